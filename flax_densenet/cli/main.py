"""`main`: runs one command; its exit status and its error messages."""

import os
import sys

from flax_densenet import errors
from flax_densenet.cli import command_line, commands, help_text, output_files
from flax_densenet.distributed import processes
from flax_densenet.errors import UserError
from flax_densenet.system import logs, terminal


def entry():
    """Entry point of `flax-densenet` and `launch.py`."""
    with processes.Defects():
        status = main(sys.argv)
    sys.exit(status)


def main(argv: list[str]) -> int:
    """Runs a command; returns the exit status.

    0 means success, and 1 that `predict` could not read some files. After a user's
    mistake, or if the disk or memory is full, the program prints one line to standard
    error and returns 2. As in a shell, Ctrl-C gives 130, SIGTERM 143, and a closed pipe
    (`| head`) 141. With several processes, all of them end with the message and status
    of the first that fails; if one dies, the others end with 2.

    Args:
      argv: the program's name and its arguments.
    """
    # File names need not be valid text; a message about one must not end the run.
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')
    status, line = 0, ''
    try:
        status = _run(argv) or 0
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
    except UserError as error:
        status, line = 2, f'error: {error}'
    except KeyboardInterrupt as stopped:
        status = getattr(stopped, 'exit_status', 130)
        line = str(stopped) or 'interrupted'
    except BrokenPipeError:
        # The final flush must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        processes.end(141, 'the reader of standard output closed it')
        return 141
    except (MemoryError, OSError, RuntimeError) as error:
        if (message := errors.explain_system_error(error)) is None:
            raise
        status, line = 2, f'error: {message}'
    if line and (processes.is_first() or line.startswith('error: ')):
        terminal.say(line, sys.stderr)
    processes.end(status, line)
    return status


def _run(argv):
    text = help_text.find(argv, commands.COMMANDS)
    if text is not None:
        print(text)
        return 0
    logs.show_messages()
    invocation = command_line.parse(argv, commands.COMMANDS)
    invocation.check_paths()
    output_files.check(invocation)
    if invocation.command.name == 'predict':  # its rows go to standard output
        logs.show_messages(to_errors=True)
    if invocation.command.fields:
        join_processes(invocation.flags)
        set_up(invocation)
    return invocation.command.run(invocation)


def join_processes(flags):
    """With --distributed, joins the other processes."""
    if 'distributed' not in flags:
        return
    if flags.distributed:
        processes.start(
            coordinator_address=flags.coordinator_address,
            num_processes=flags.num_processes,
            process_id=flags.process_id,
            initialization_timeout=flags.initialization_timeout,
            heartbeat_timeout_seconds=flags.heartbeat_timeout_seconds,
        )
        return
    for name in ('coordinator_address', 'num_processes', 'process_id'):
        if flags[name].value is not None:
            raise UserError(f'--{name} needs --distributed')


def set_up(invocation):
    """Prepares the process, before JAX starts."""
    from flax_densenet.kernels import cpu as cpu_kernels
    from flax_densenet.system import platforms, process

    name = invocation.command.name
    trains = name in ('train', 'sweep')
    process.set_up(
        cache=cpu_kernels.cache_folder() / 'xla',
        deterministic=trains and invocation.config.train.deterministic,
    )
    if name == 'pack':
        return
    if platforms.is_chosen():  # set before anything is read
        platforms.check_devices()
    if name not in ('summary', 'export', 'push'):
        model = invocation.config.model if trains else {}
        is_rdnet = str(model.get('variant')).startswith('rdnet')
        cpu_kernels.load_ahead(
            model.get('dtype') or 'float32', 'rdnet' if is_rdnet else 'densenet'
        )

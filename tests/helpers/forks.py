"""Python programs that start quickly, for tests that need a separate process.

`run(code)` works like `subprocess.run([sys.executable, '-c', code])`, but forks the
process from one that has already imported the libraries (JAX, Flax, Orbax), which takes
most of the time of a short program. That process has not started any device and has not
imported this package. Programs that test imports need a fresh process instead.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import traceback

_LIBRARIES = ('jax.export', 'jax.numpy', 'flax.linen', 'optax', 'orbax.checkpoint')
_TESTS = pathlib.Path(__file__).parents[1]
_server = None


@dataclasses.dataclass(frozen=True)
class Done:
    """The result of a program, like `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


def run(code, *arguments, cwd=None, environment=None):
    """Runs `code`; its `sys.argv` is `['-c', *arguments]`.

    Args:
      code: the source of the program; it can import the package and `tests/`.
      *arguments: strings or paths.
      cwd: its working directory; None for that of this process.
      environment: changes to the variables of this process. `JAX_PLATFORMS` and
        `JAX_ENABLE_X64` work although JAX is already imported.

    Returns:
      `Done`: exit status, standard output and standard error.
    """
    global _server
    if _server is None or _server.poll() is not None:
        _server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {'PYTHONPATH': f'{_TESTS.parent}{os.pathsep}{_TESTS}'},
        )
    with tempfile.TemporaryDirectory() as folder:
        ask = {
            'code': code,
            'argv': ['-c', *map(str, arguments)],
            'cwd': os.fspath(cwd or os.getcwd()),
            'environment': dict(os.environ) | (environment or {}),
            'folder': folder,
        }
        _server.stdin.write(json.dumps(ask) + '\n')
        _server.stdin.flush()
        status = int(_server.stdout.readline())
        said = (pathlib.Path(folder, name).read_text() for name in ('out', 'err'))
        return Done(status, *said)


def stop():
    """Ends the process that forks, at the end of all tests."""
    if _server is not None:
        _server.stdin.close()
        _server.stdout.close()
        _server.wait()


def _become(ask):
    """In the new process: sets up the environment, then runs the program."""
    for handle, name in ((1, 'out'), (2, 'err')):
        place = os.path.join(ask['folder'], name)
        os.dup2(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), handle)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(ask['cwd'])
    os.environ.clear()
    os.environ.update(ask['environment'])
    import jax

    jax.config.update('jax_platforms', os.environ.get('JAX_PLATFORMS') or None)
    x64 = os.environ.get('JAX_ENABLE_X64', '0').lower() in ('1', 'true')
    jax.config.update('jax_enable_x64', x64)
    sys.argv = ask['argv']
    exec(compile(ask['code'], '<string>', 'exec'), {'__name__': '__main__'})


def _main():
    for name in _LIBRARIES:
        importlib.import_module(name)
    for line in sys.stdin:
        number = os.fork()
        if number:
            _, status = os.waitpid(number, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        status = 1
        try:
            _become(json.loads(line))
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(bool(end.code))
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)


if __name__ == '__main__':
    _main()

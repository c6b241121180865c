"""Turns C++ errors about a lost cluster into one line, and exits with status 2.

JAX's runtime aborts the program if the first process is gone, if processes are missing,
and so on, with a page of stack trace and exit status 134, which no handler can catch.
So the C++ output (file descriptors 1 and 2) goes through a small process, this file run
as a program. It passes everything on except meaningless lines (gloo's greeting). For a
message that ends the cluster it prints one line instead, and a thread of the program
exits with status 2. The pipe holds one message at a time, so that the library, which
has more to print, blocks and does not abort first.

Python's `sys.stdout` and `sys.stderr` are not redirected.
"""

import os
import re
import select
import signal
import sys

GO_ON = (
    'run the same command, with any number of processes, to resume from the last '
    'checkpoint'
)
_FATAL = b'JAX distributed service detected fatal errors'
_PORT = b'Failed to add port to server'
# Greetings, and lines that repeat the message that ends the process.
_IDLE = re.compile(rb'^\[Gloo\] Rank|coordination_service\w*\.cc')
_PATIENCE_SECONDS = 10
_QUIET = b'\0quiet\n'

_redirected = False


def explain(text: str) -> str:
    """One line for a message of JAX's runtime that ends the process.

    >>> explain('UNAVAILABLE: The following tasks are unhealthy:\\n1\\nThe tasks')
    ... # doctest: +ELLIPSIS
    'process 1 stopped responding; start all processes again: run the same command...'
    """
    if 'Failed to add port' in text:
        return (
            "the coordinator's port is in use; choose another one (--coordinator or "
            'JAX_COORDINATOR_PORT)'
        )
    if 'Unexpected task' in text:
        return (
            'process 0 does not expect this --process_id; give all processes the same '
            '--num_processes, and each one its own --process_id'
        )
    if 'RegisterTask' in text:
        return (
            'not all processes joined within --initialization_timeout, or process 0 '
            'cannot be reached; start all of --num_processes, each with its own '
            '--process_id, and check --coordinator and firewalls'
        )
    numbers = re.search(r'unhealthy[^\n]*\n((?:\s*[\w/:]*\d+\n)+)', text)
    who = 'process 0 has ended, or the network to it is down'
    if numbers:
        found = re.findall(r'(\d+)\n', numbers[1])
        who = f'process {", ".join(found)} stopped responding'
    return f'{who}; start all processes again: {GO_ON}'


def silence():
    """Drops all C++ output from now on, as the process is about to end."""
    if _redirected:
        os.write(2, _QUIET)


def redirect():
    """Sends C++ output through the filter, for the rest of the process.

    Must be called before JAX starts anything.
    """
    import subprocess
    import threading

    global _redirected
    _redirected = True
    _flush()
    if sys.stdout is not None:
        sys.stdout = _reopen(sys.stdout)
    error = os.dup(2)
    if sys.stderr is not None:
        sys.stderr = _reopen(sys.stderr)
    reader, writer = _make_pipe()
    told, tell = os.pipe()
    with open(__file__, 'rb') as program:
        subprocess.Popen(
            [sys.executable, '-I', '-S', program.name],
            stdin=reader,
            stdout=tell,
            stderr=error,
        )
    for place in (1, 2):
        os.dup2(writer, place)
    for handle in (reader, writer, tell, error):
        os.close(handle)

    def leave():
        if os.read(told, 1):
            _flush()
            os._exit(2)

    threading.Thread(target=leave, daemon=True).start()


def _flush():
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _reopen(stream):
    """The stream on a separate file descriptor from that of C++."""
    return open(
        os.dup(stream.fileno()),
        'w',
        buffering=1 if stream.isatty() or stream is sys.stderr else -1,
        encoding=stream.encoding,
        errors=stream.errors,
    )


def _make_pipe():
    if not hasattr(os, 'O_DIRECT') or not hasattr(os, 'pipe2'):
        return os.pipe()
    import fcntl

    reader, writer = os.pipe2(os.O_DIRECT)  # separates a message from the next one
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)  # and is the only one there
    os.set_inheritable(writer, False)
    return reader, writer


def _pass_on():
    """The filter program: reads messages until their writer has ended."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # those are for the other process
        signal.signal(signum, signal.SIG_IGN)
    poll, part = select.poll(), b''
    poll.register(0, select.POLLIN)
    while (message := os.read(0, 1 << 16)) or part:
        message, part = part + message, b''
        if not message.endswith(b'\n') and poll.poll(200):
            part = message  # the rest of the line has arrived already
            continue
        if _QUIET in message:
            _drop(0)
            return
        if _FATAL in message or _PORT in message:
            line = explain(message.decode(errors='replace'))
            os.write(2, f'error: {line}\n'.encode())
            os.write(1, b'x')
            _drop(_PATIENCE_SECONDS)
            return
        if not _IDLE.search(message):
            os.write(2, message)


def _drop(seconds):
    """Lets the writer wait until it has ended, then reads the rest."""
    poll = select.poll()
    poll.register(0, select.POLLHUP)
    poll.poll(1000 * seconds)
    while os.read(0, 1 << 16):
        pass


if __name__ == '__main__':
    _pass_on()

"""Processes of one run: how they find each other, agree, and end together.

All of it is JAX's distributed runtime: its detection of the cluster, its key-value
store and its barriers. Without `start` there is one process, and nothing here does
anything.

A process that ends before the others tells them why. One that is killed or hangs does
not: each process has a thread that meets those of all others every few seconds, and
where one is missing for `heartbeat_timeout_seconds` the others end, whatever their
devices wait for.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from flax_densenet.distributed import native_errors
from flax_densenet.errors import UserError

# What `jax.distributed.initialize` knows, in the order in which it looks.
LAUNCHERS = 'Cloud TPU, Open MPI, Slurm, Kubernetes (Indexed Job or JobSet)'
_EVER = 2**31 - 1  # milliseconds, some 24 days
_PULSE_SECONDS = 2.0
_GRACE_SECONDS = 5.0  # to end in one's own way, for what all processes meet
_PREFIX = 'flax_densenet'

_LOGGER = logging.getLogger(__name__)

_member = None


class Terminated(KeyboardInterrupt):
    """SIGTERM, where training does not see to it; exit status 143."""

    exit_status = 128 + signal.SIGTERM


def check(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
) -> str | None:
    """The coordinator's address, where it is given; None for the cluster to tell.

    Raises:
      UserError: a part of the three is given, or they cannot be.
    """
    address = coordinator_address or os.environ.get('JAX_COORDINATOR_ADDRESS')
    given = coordinator_address, num_processes, process_id
    if all(value is None for value in given):
        return address
    if address is None or num_processes is None or process_id is None:
        raise UserError(
            '--coordinator (or JAX_COORDINATOR_ADDRESS), --num_processes and '
            '--process_id go together; give all three, or none for the cluster to tell '
            f'({LAUNCHERS})'
        )
    host, _, port = address.rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f'--coordinator={address} must be HOST:PORT')
    if num_processes < 1:
        raise UserError(f'--num_processes={num_processes} must be at least 1')
    if not 0 <= process_id < num_processes:
        raise UserError(
            f'--process_id={process_id} must be from 0 to {num_processes - 1}, as '
            f'--num_processes={num_processes}'
        )
    if process_id == 0:
        _check_port(address)
    return address


def _check_port(address):
    """JAX would end by a segmentation fault where the port is taken."""
    port = int(address.rpartition(':')[2])
    with socket.socket(socket.AF_INET) as probe:
        # As the coordinator does it: a port whose last owner just left is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('', port))
        except OSError as error:
            raise UserError(
                f'--coordinator={address}: the port cannot be used ({error.strerror}); '
                'choose another one'
            ) from error


def start(
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    initialization_timeout: int = 300,
    heartbeat_timeout_seconds: int = 30,
):
    """Becomes one process of several; to be called once, before JAX has a backend.

    Args:
      coordinator_address: `HOST:PORT` of process 0, `num_processes` and `process_id`:
        all three, or none for the cluster to tell.
      initialization_timeout: seconds to wait for all processes.
      heartbeat_timeout_seconds: a process that does not answer for so long has died.

    Raises:
      UserError: the values are wrong or no cluster is found. Where the others do not
        come, the process ends with a line and status 2.
    """
    global _member
    address = check(coordinator_address, num_processes, process_id)
    if initialization_timeout < 1 or heartbeat_timeout_seconds < 5:
        raise UserError(
            f'--initialization_timeout={initialization_timeout} must be at least 1, '
            f'--heartbeat_timeout_seconds={heartbeat_timeout_seconds} at least 5'
        )
    native_errors.redirect()
    import jax

    # Its handler of SIGTERM would take the place of ours, and end nothing.
    jax.config.update('jax_enable_preemption_service', False)
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            cluster_detection_method=None if process_id is None else 'deactivate',
            initialization_timeout=initialization_timeout,
            # Ours comes first; it can say more.
            heartbeat_timeout_seconds=3 * heartbeat_timeout_seconds,
        )
    except ValueError as error:
        raise UserError(
            f'--distributed: no cluster was found ({LAUNCHERS}); start this under one, '
            'or give --coordinator=HOST:PORT, --num_processes and --process_id'
        ) from error
    except (RuntimeError, OSError, KeyError) as error:
        text = ' '.join(str(error).split())
        raise UserError(f'--distributed: the cluster cannot be joined: {text}') from (
            error
        )
    signal.signal(signal.SIGTERM, _terminate)
    _member = _Member(heartbeat_timeout_seconds)
    if not is_first():
        # One process speaks; what ends another goes to standard error.
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115


def _terminate(signum, frame):
    raise Terminated('stopped by SIGTERM')


def is_first() -> bool:
    """True on the one process that writes and speaks."""
    return _member is None or _member.index == 0


def count() -> int:
    """How many processes there are."""
    return 1 if _member is None else _member.count


def index() -> int:
    """Which of them this one is, from 0."""
    return 0 if _member is None else _member.index


def barrier(name: str):
    """Waits until all processes are here."""
    if _member is not None:
        _member.meet(name)


def broadcast(name: str, make: Callable[[], Any]) -> Any:
    """What `make` returns on the first process, on all; JSON can hold it.

    An error of `make` is raised there, and ends the others with it.
    """
    if _member is None:
        return make()
    key = _member.new_key(name)
    if is_first():
        value = make()
        kv_set(key, json.dumps(value).encode())
        return value
    return json.loads(kv_get(key, delete=False))


def gather(name: str, value: Any) -> list[Any]:
    """The values of all processes, on all, in their order; JSON can hold them."""
    if _member is None:
        return [value]
    key = _member.new_key(name)
    kv_set(f'{key}/{_member.index}', json.dumps(value).encode())
    return [
        json.loads(kv_get(f'{key}/{number}', delete=False))
        for number in range(_member.count)
    ]


def check_same(name: str, values: dict[str, Any]):
    """Raises where a process has another value than the first one.

    Args:
      values: what is the same everywhere if all is right, by what it is.

    Raises:
      UserError: names the first one that differs.
    """
    values = json.loads(json.dumps(values))  # in which tuples are lists
    found = broadcast(name, lambda: values)
    for key, value in values.items():
        if value != found[key]:
            raise UserError(
                f'{key} is {value} on process {index()} ({socket.gethostname()}) and '
                f'{found[key]} on process 0; give all processes the same settings, '
                'data and --workdir, as on a disk that all of them see'
            )


def kv_set(key: str, value: bytes):
    """Into the store that all processes see."""
    assert _member is not None
    _member.put(key, value)


def kv_get(key: str, *, delete: bool = True) -> bytes:
    """What another process put there; waits for it."""
    assert _member is not None
    return _member.take(key, delete=delete)


def end(status: int, line: str):
    """Ends this process of several, with the others; does nothing where it is alone.

    Args:
      status: of the program.
      line: why it ended too early; empty where it did all it had to do.
    """
    if _member is None:
        return
    if not line:
        _member.finish(status)
    _member.leave(status, line)


class Defects:
    """A context in which an exception that nobody expected ends the others too.

    Devices give errors of all kinds where another process has died; then this process
    ends with the line about that, else with its traceback.
    """

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if _member is None or error is None:
            return
        _member.wait_for_cause()
        traceback.print_exception(error)
        text = ' '.join(str(error).split())[:200]
        _member.leave(1, f'error: {kind.__name__}: {text}')


class _Member:
    """This process among the others, and the thread that watches over them."""

    def __init__(self, timeout_seconds):
        from jax._src import distributed

        # Public is only what starts devices, and hangs where a process has died.
        state = distributed.global_state
        self.client, self.index = state.client, state.process_id
        self.count = state.num_processes
        self._timeout = timeout_seconds
        self._numbers = itertools.count()
        self._over = threading.Event()
        self._last = threading.Lock()  # of the one that ends the process
        self._pulses, self._late, self._told = 0, 0.0, False
        if self.count > 1:
            self.put(f'host/{self.index}', socket.gethostname().encode())
            for target in (self._pulse, self._listen, self._count_time):
                threading.Thread(target=target, daemon=True).start()

    def new_key(self, name):
        """The same on all processes, which call it in the same order."""
        return f'{name}/{next(self._numbers)}'

    def put(self, key, value):
        self.client.key_value_set_bytes(f'{_PREFIX}/{key}', value)

    def take(self, key, *, delete):
        found = self.client.blocking_key_value_get_bytes(f'{_PREFIX}/{key}', _EVER)
        if delete:
            self.client.key_value_delete(f'{_PREFIX}/{key}')
        return found

    def meet(self, name):
        self._wait(self.new_key(name), _EVER)

    def _wait(self, name, milliseconds):
        self.client.wait_at_barrier(f'{_PREFIX}/{name}', int(milliseconds))

    def finish(self, status):
        """Ends the process where all has been done, by all."""
        import jax

        self.meet('end')
        self._over.set()
        jax.distributed.shutdown()
        self._exit(status)  # Python would break off threads that are in C++

    def _pulse(self):
        """Meets the others again and again."""
        for number in itertools.count():
            try:
                self._wait(f'pulse/{number}', 1000 * self._timeout)
            except RuntimeError as error:
                text = str(error)
                if 'timed out' in text and not self._told:
                    self._end(self._who(text))
                # The first process is gone; C++ has to say something of it first.
                elif not self._told and not self._over.wait(_GRACE_SECONDS):
                    self._end('process 0 has ended, or the network to it is down')
                return
            self._pulses, self._late = number + 1, 0.0
            if self._over.wait(_PULSE_SECONDS):
                return

    def _count_time(self):
        """Ends the process where the first one, which keeps the barriers, hangs."""
        # Counted in steps: a program that is stopped and goes on finds its clock
        # ahead.
        while not self._over.wait(1.0):
            self._late += 1.0
            if self._late > self._timeout + 2 * _GRACE_SECONDS + _PULSE_SECONDS:
                self._end('process 0 stopped responding, or the network to it is down')

    def _listen(self):
        """Waits for the reason of a process that ended too early."""
        try:
            found = json.loads(self.take('ended', delete=False))
        except RuntimeError:  # the first process is gone, and with it the store
            if not self._over.wait(_GRACE_SECONDS):
                self._end('process 0 has ended, or the network to it is down')
            return
        self._told = True
        # A signal that all have agreed on ends this one too, once its own turn comes.
        grace = _GRACE_SECONDS * (4 if found['status'] > 128 else 1)
        if found['process'] == self.index or self._over.wait(grace):
            return
        line = found['line'].removeprefix('error: ')
        who = f'process {found["process"]} ({found["host"]})'
        self._leave(found['status'], f'error: ended with {who}: {line}')

    def _who(self, text):
        """Which processes did not come to a barrier, of its error."""
        found = re.search(r'timed out task names:\s*((?:\S*\d+\s+)+)', text)
        if not found:
            return 'a process has ended, or the network to it is down'
        names = []
        for number in re.findall(r'(\d+)\s', found[1])[:8]:
            key = f'{_PREFIX}/host/{number}'
            host = self.client.blocking_key_value_get_bytes(key, 1000).decode()
            names.append(f'{number} ({host})')
        return f'process {", ".join(names)} stopped responding for {self._timeout} s'

    def _end(self, what):
        line = f'error: {what}; start all processes again: {native_errors.GO_ON}'
        self._leave(2, line, meeting=False)

    def _leave(self, status, line, *, meeting=True):
        if not self._last.acquire(blocking=False):
            return
        _LOGGER.error('%s', line)
        self._part(status, meeting=meeting)

    def leave(self, status, line):
        """Tells the others why, and ends the process; the line has been printed."""
        if not self._last.acquire(blocking=False):
            time.sleep(4 * _GRACE_SECONDS)  # another thread does it
        if self.count > 1:
            reason = {
                'process': self.index,
                'host': socket.gethostname(),
                'status': status,
                'line': line,
            }
            self._try(lambda: self.put('ended', json.dumps(reason).encode()))
        self._part(status)

    def _part(self, status, *, meeting=True):
        """Ends the process, the first one as the last, as it keeps the store."""
        self._over.set()
        native_errors.silence()  # all that is to be said has been said
        if self.count > 1:
            if meeting:
                wait = 1000 * 2 * _GRACE_SECONDS
                self._try(lambda: self._wait('parting', wait))
            if self.index == 0:
                time.sleep(1.0 if meeting else 3.0)
        self._exit(status)

    def _exit(self, status):
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(status)

    def _try(self, call):
        """Calls what may fail or hang by now."""

        def attempt():
            with contextlib.suppress(RuntimeError):  # too late, or told by another one
                call()

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(3 * _GRACE_SECONDS)

    def wait_for_cause(self):
        pulses = self._pulses
        end = time.monotonic() + self._timeout + 6 * _GRACE_SECONDS
        while self._pulses < pulses + 3 and time.monotonic() < end:
            time.sleep(0.1)

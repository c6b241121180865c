"""Processes of one run: how they find each other, agree, and end together.

All of it uses JAX's distributed runtime: its detection of the cluster, its key-value
store and its barriers. Without `start` there is one process, and nothing here has any
effect.

A process that ends before the others tells them why. For processes that are killed or
hang, each process has a thread that meets those of all others every few seconds. If one
is missing for `heartbeat_timeout_seconds`, the others end, whatever their devices are
waiting for.
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

# Launchers that `jax.distributed.initialize` detects, in its order.
LAUNCHERS = 'Cloud TPU, Open MPI, Slurm, Kubernetes (Indexed Job or JobSet)'
_EVER = 2**31 - 1  # milliseconds, about 24 days
_PULSE_SECONDS = 2.0
_GRACE_SECONDS = 5.0  # to end regularly after a common event
_PREFIX = 'flax_densenet'

_LOGGER = logging.getLogger(__name__)

_member = None


class Terminated(KeyboardInterrupt):
    """SIGTERM, if training does not handle it; exit status 143."""

    exit_status = 128 + signal.SIGTERM


def check(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
) -> str | None:
    """The coordinator's address if it is given; None to detect the cluster.

    Raises:
      UserError: only some of the three are given, or they are invalid.
    """
    address = coordinator_address or os.environ.get('JAX_COORDINATOR_ADDRESS')
    given = coordinator_address, num_processes, process_id
    if all(value is None for value in given):
        return address
    if address is None or num_processes is None or process_id is None:
        raise UserError(
            '--coordinator (or JAX_COORDINATOR_ADDRESS), --num_processes and '
            '--process_id go together; give all three, or none to detect the cluster '
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
    """Checks the port, since JAX would crash with a segmentation fault."""
    port = int(address.rpartition(':')[2])
    with socket.socket(socket.AF_INET) as probe:
        # As the coordinator does it: a port that was closed a moment ago is free.
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
    """Joins several processes; to be called once, before JAX has a backend.

    Args:
      coordinator_address: `HOST:PORT` of process 0, `num_processes` and `process_id`:
        give all three, or none to detect the cluster.
      initialization_timeout: seconds to wait for all processes.
      heartbeat_timeout_seconds: a process that does not respond for this long counts as
        dead.

    Raises:
      UserError: the values are wrong or no cluster is found. If other processes do not
        join, the process ends with a line and status 2.
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

    # Its SIGTERM handler would replace ours and not end the process.
    jax.config.update('jax_enable_preemption_service', False)
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            cluster_detection_method=None if process_id is None else 'deactivate',
            initialization_timeout=initialization_timeout,
            # Our check comes first, with a better message.
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
        # Only one process prints; errors of the others go to standard error.
        sys.stdout = open(os.devnull, 'w')  # noqa: SIM115


def _terminate(signum, frame):
    raise Terminated('stopped by SIGTERM')


def is_first() -> bool:
    """True on the one process that writes files and prints."""
    return _member is None or _member.index == 0


def count() -> int:
    """The number of processes."""
    return 1 if _member is None else _member.count


def index() -> int:
    """The index of this process, from 0."""
    return 0 if _member is None else _member.index


def barrier(name: str):
    """Waits until all processes are here."""
    if _member is not None:
        _member.meet(name)


def broadcast(name: str, make: Callable[[], Any]) -> Any:
    """Calls `make` on the first process and returns its JSON result on all.

    An error of `make` is raised there, and ends the other processes too.
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
    """The JSON values of all processes, in order, on every process."""
    if _member is None:
        return [value]
    key = _member.new_key(name)
    kv_set(f'{key}/{_member.index}', json.dumps(value).encode())
    return [
        json.loads(kv_get(f'{key}/{number}', delete=False))
        for number in range(_member.count)
    ]


def check_same(name: str, values: dict[str, Any]):
    """Raises if a process has another value than the first one.

    Args:
      values: values that must be equal everywhere, by description.

    Raises:
      UserError: names the first value that differs.
    """
    values = json.loads(json.dumps(values))  # in which tuples become lists
    found = broadcast(name, lambda: values)
    for key, value in values.items():
        if value != found[key]:
            raise UserError(
                f'{key} is {value} on process {index()} ({socket.gethostname()}) and '
                f'{found[key]} on process 0; give all processes the same settings, '
                'data and --workdir, such as on a shared disk'
            )


def kv_set(key: str, value: bytes):
    """Puts a value into the store that all processes share."""
    assert _member is not None
    _member.put(key, value)


def kv_get(key: str, *, delete: bool = True) -> bytes:
    """Waits for a value that another process puts there."""
    assert _member is not None
    return _member.take(key, delete=delete)


def end(status: int, line: str):
    """Ends this process together with the others; does nothing for a single process.

    Args:
      status: exit status of the program.
      line: why it ended too early; empty if it finished normally.
    """
    if _member is None:
        return
    if not line:
        _member.finish(status)
    _member.leave(status, line)


class Defects:
    """A context in which an unexpected exception ends the other processes too.

    Devices raise all kinds of errors if another process has died; then this process
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
    """This process among the others, and the thread that monitors them."""

    def __init__(self, timeout_seconds):
        from jax._src import distributed

        # The public API would start devices, and would hang if a process has died.
        state = distributed.global_state
        self.client, self.index = state.client, state.process_id
        self.count = state.num_processes
        self._timeout = timeout_seconds
        self._numbers = itertools.count()
        self._over = threading.Event()
        self._last = threading.Lock()  # belongs to the thread that ends the process
        self._pulses, self._late, self._told = 0, 0.0, False
        if self.count > 1:
            self.put(f'host/{self.index}', socket.gethostname().encode())
            for target in (self._pulse, self._listen, self._count_time):
                threading.Thread(target=target, daemon=True).start()

    def new_key(self, name):
        """Must be called by all processes in the same order."""
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
        """Ends the process after all processes have finished."""
        import jax

        self.meet('end')
        self._over.set()
        jax.distributed.shutdown()
        self._exit(status)  # Python would interrupt threads that are in C++

    def _pulse(self):
        """Meets the other processes periodically."""
        for number in itertools.count():
            try:
                self._wait(f'pulse/{number}', 1000 * self._timeout)
            except RuntimeError as error:
                text = str(error)
                if 'timed out' in text and not self._told:
                    self._end(self._who(text))
                # The first process is gone; C++ reports that first.
                elif not self._told and not self._over.wait(_GRACE_SECONDS):
                    self._end('process 0 has ended, or the network to it is down')
                return
            self._pulses, self._late = number + 1, 0.0
            if self._over.wait(_PULSE_SECONDS):
                return

    def _count_time(self):
        """Ends the process if the first one, which keeps the barriers, hangs."""
        # Counted in steps: after a suspended program continues, its clock has jumped.
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
        # A signal that all have agreed on ends this process too, in the regular way.
        grace = _GRACE_SECONDS * (4 if found['status'] > 128 else 1)
        if found['process'] == self.index or self._over.wait(grace):
            return
        line = found['line'].removeprefix('error: ')
        who = f'process {found["process"]} ({found["host"]})'
        self._leave(found['status'], f'error: ended with {who}: {line}')

    def _who(self, text):
        """The processes that did not reach a barrier, from its error."""
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
            time.sleep(4 * _GRACE_SECONDS)  # another thread is doing it
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
        """Ends the process; the first process ends last, as it keeps the store."""
        self._over.set()
        native_errors.silence()  # everything has been printed
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
        """Calls a function that may fail or hang by now."""

        def attempt():
            with contextlib.suppress(RuntimeError):  # too late, or already reported
                call()

        thread = threading.Thread(target=attempt, daemon=True)
        thread.start()
        thread.join(3 * _GRACE_SECONDS)

    def wait_for_cause(self):
        pulses = self._pulses
        end = time.monotonic() + self._timeout + 6 * _GRACE_SECONDS
        while self._pulses < pulses + 3 and time.monotonic() < end:
            time.sleep(0.1)

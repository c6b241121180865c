"""Several processes of one command."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time

from helpers.paths import ROOT


def free_port():
    """A free port outside the range that the system assigns to connections."""
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(10000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(('127.0.0.1', port))
            return port


class Processes:
    """A context with several processes of one command; kills them at the end."""

    def __init__(self, folder, count, *flags, of_process=None, program=None, **fields):
        port, self.flags = free_port(), list(flags)
        self.flags += [f'--config.{name}={value}' for name, value in fields.items()]
        self.logs, self.processes = [], []
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            logs = [folder / f'{name}{number}.log' for name in ('out', 'err')]
            self.logs.append(logs)
            with contextlib.ExitStack() as stack:
                out, err = (stack.enter_context(log.open('w')) for log in logs)
                self.processes.append(
                    subprocess.Popen(
                        [
                            *(sys.executable, program or ROOT / 'launch.py'),
                            '--distributed',
                            f'--coordinator=127.0.0.1:{port}',
                            f'--num_processes={count}',
                            f'--process_id={number}',
                            *self.flags,
                            *(of_process or {}).get(number, []),
                        ],
                        stdout=out,
                        stderr=err,
                        cwd=ROOT,
                        env=self.environment(),
                    )
                )

    def environment(self):
        flags = os.environ['XLA_FLAGS'].replace('count=4', 'count=1')
        return os.environ | {'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def wait(self, seconds=600):
        """Waits for all processes; returns their exit statuses."""
        end = time.monotonic() + seconds
        return [
            process.wait(max(0.1, end - time.monotonic())) for process in self.processes
        ]

    def out(self, number):
        return self.logs[number][0].read_text()

    def error(self, number):
        return self.logs[number][1].read_text()

    def wait_for(self, condition, seconds=600):
        end = time.monotonic() + seconds
        while not condition():
            texts = [self.out(0), *map(self.error, range(len(self.logs)))]
            assert time.monotonic() < end, texts
            assert any(process.poll() is None for process in self.processes), texts
            time.sleep(0.01)

    def kill(self, number, signum=signal.SIGKILL):
        self.processes[number].send_signal(signum)

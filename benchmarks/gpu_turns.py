"""Runs groups of contenders of `benchmarks.gpu`, and records those that fail.

Unlike `sidebyside.alternate`, it continues with the others if a contender ends or takes
too long, and records the reason.
"""

import dataclasses
import json
import os
import pathlib
import re
import sys
import threading

from benchmarks import sidebyside

OUT_OF_MEMORY = re.compile('RESOURCE_EXHAUSTED|out of memory|OutOfMemory', re.I)
# The time limit for a contender to prepare; about 100 s are usual.
START_SECONDS = 300


class Group:
    """Contenders that are alive, and the reasons why others ended."""

    def __init__(self, run):
        self.run, self.alive, self.failed = run, {}, {}

    def start(self, specs, flags=None):
        """Starts `{name: Spec}`; all prepare at the same time."""
        for name, spec in specs.items():
            if self.run.left() < 60:
                self.failed[name] = 'not run: the time was up'
                continue
            torch = spec.kind.startswith('torch')
            extra = '' if torch else (flags or {}).get(name, '')
            text = json.dumps(dataclasses.asdict(spec))
            with open(self._log(name), 'w') as log:
                self.alive[name] = sidebyside.Contender(
                    [
                        self.run.peers if torch else self.run.ours,
                        *('-m', 'benchmarks.gpu_contender', text),
                    ],
                    stderr=log,
                    wait=False,
                    # Otherwise each would allocate three quarters of the memory.
                    XLA_PYTHON_CLIENT_PREALLOCATE='false',
                    XLA_PYTHON_CLIENT_MEM_FRACTION='0.95',
                    XLA_FLAGS=f'{os.environ.get("XLA_FLAGS", "")} {extra}'.strip(),
                )
        for name in specs:
            if name in self.alive:
                self._guard(name, sidebyside.Contender.ready, START_SECONDS)

    def _log(self, name):
        return pathlib.Path(self.run.logs) / f'{name.replace(" ", "_")}.log'

    def _guard(self, name, action, seconds=120):
        """The result of the action; None if the contender ended or took too long."""
        contender = self.alive[name]
        seconds = max(1, min(seconds, self.run.left()))
        timer = threading.Timer(seconds, contender.kill)
        timer.start()
        try:
            return action(contender)
        except (RuntimeError, BrokenPipeError):
            contender.kill()
            contender.close()
            del self.alive[name]
            self.failed[name] = _reason(self._log(name).read_text())
            if timer.finished.is_set():
                self.failed[name] = f'stopped: not done in {seconds:.0f} s'
            print(f'{name}: {self.failed[name]}', file=sys.stderr, flush=True)
            return None
        finally:
            timer.cancel()

    def measure(self, rounds):
        """`{name: {metric: [rounds]}}` of those that succeed, in changing order."""
        found = {name: {} for name in self.alive}
        for number in range(rounds):
            names = list(self.alive)
            for name in names if number % 2 == 0 else reversed(names):
                figures = self._guard(name, sidebyside.Contender.measure)
                for figure, value in (figures or {}).items():
                    found[name].setdefault(figure, []).append(value)
        return {name: found[name] for name in self.alive}

    def close(self, *names):
        for name in names or list(self.alive):
            if name in self.alive:
                self.alive.pop(name).close()


def _reason(log):
    """The line of a log that says why the process ended."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    pattern = re.compile('Unknown flag|Error|RESOURCE_EXHAUSTED|out of memory')
    said = [line for line in lines if pattern.search(line)]
    return (said or lines or ['ended without a word'])[-1][:300]

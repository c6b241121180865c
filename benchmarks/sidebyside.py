"""Runs contenders in separate processes that take turns.

A contender is a program that calls `serve(measure)`: it prepares, reports that it is
ready, and then runs `measure()` on each request. This keeps imports, compilation and
the work of other contenders out of the results, and slow minutes of the machine affect
all.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any


def serve(measure: Callable[[], dict[str, Any]]):
    """Runs `measure` once per line of standard input and prints its results."""
    # Output of libraries must not appear between the results.
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps({'ready': True}), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure()), file=answers, flush=True)


class Contender:
    """A program under `serve`.

    Args:
      stderr: file for its standard error; None for that of this process.
      wait: whether to wait until it is ready. Otherwise call `ready`, so that several
        contenders can prepare at the same time.
    """

    def __init__(
        self, command: list[str], *, stderr=None, wait: bool = True, **environment: str
    ):
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | environment,
        )
        if wait:
            self.ready()

    def ready(self):
        """Waits until it is ready for its first turn."""
        self._read(self._process.args)

    def _read(self, what):
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f'ended early: {what}')
        return json.loads(line)

    def measure(self) -> dict[str, Any]:
        self._process.stdin.write('go\n')
        self._process.stdin.flush()
        return self._read(self._process.args)

    def close(self):
        """Waits until it has ended."""
        with contextlib.suppress(BrokenPipeError):  # it has ended by itself
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def kill(self):
        """Kills the process at once; `close` must still be called."""
        self._process.kill()


def alternate(contenders: dict[str, Contender], rounds: int):
    """`{name: {metric: [rounds]}}`: one turn each per round, in changing order."""
    found = {name: {} for name in contenders}
    names = list(contenders)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            for figure, value in contenders[name].measure().items():
                found[name].setdefault(figure, []).append(value)
    return found


def summarize(values) -> dict[str, float]:
    """Median and the range from the lowest to the highest."""
    return {
        'median': statistics.median(values),
        'lowest': min(values),
        'highest': max(values),
        'rounds': len(values),
    }


def ratio(ours, theirs) -> dict[str, float]:
    """Summary of the ratio `ours / theirs`, taken round by round."""
    return summarize([a / b for a, b in zip(ours, theirs, strict=True)])

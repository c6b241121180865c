"""Runs damaged inputs in a child process, and tells of each what came of it.

    python tests/faults/fuzz_engine.py images --first=0 --count=1000 --folder=/tmp/x

runs a range of inputs; with `--count=1` it makes one again, with its traceback. An
input is a function of its kind and its number alone. The process has a bound on its
memory, and each input one on its processor time. What the child dies of is seen by its
parent (`fuzz`), which keeps the input and goes on behind it.
"""

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback

HERE = pathlib.Path(__file__).resolve().parent
SECONDS = 5  # of processor time for one input
_STUCK = 120  # seconds that a child may take for one input, on a busy machine
MEMORY = 2**30  # above what the process takes before the first input
_LONGEST = 2500  # characters of an error's line
_MOST_DEATHS = 20


class Hang(BaseException):
    """An input took too long; no `except` of the program's may end it."""


@dataclasses.dataclass
class Outcome:
    """What came of the inputs of one kind.

    Attributes:
      failures: one dict each: `index`, `error`, `where`, `traceback`, `file`.
    """

    kind: str
    results: int = 0
    refused: int = 0
    seconds: float = 0.0
    failures: list = dataclasses.field(default_factory=list)

    def __str__(self):
        places = collections.Counter((f['error'], f['where']) for f in self.failures)
        lines = [
            f'{self.kind}: {self.results} results, {self.refused} refused, '
            f'{len(self.failures)} failed, {self.seconds:.0f} s'
        ]
        for (error, where), count in places.most_common(30):
            first = next(f for f in self.failures if f['where'] == where)
            lines.append(f'  {count} x {error} at {where}: {first["file"]}')
        return '\n'.join(lines)


def fuzz(kind: str, *, first: int, count: int, folder) -> Outcome:
    """Runs `count` inputs of a kind, in one child process or, where one dies, more.

    Args:
      folder: empty or absent; gets `failures/KIND-NUMBER` and what the child writes.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    outcome, start, place = Outcome(kind), time.monotonic(), first
    while place < first + count and len(outcome.failures) < _MOST_DEATHS:
        left = first + count - place
        status, error = _run_child(kind, place, left, folder)
        done = json.loads((folder / 'done.json').read_text() or '{}')
        outcome.results += done.get('results', 0)
        outcome.refused += done.get('refused', 0)
        if status == 0:
            break
        index = done.get('index', place)
        kept = _keep(folder, kind, index)
        lines = error.strip().splitlines() or ['']
        where = next((x.strip() for x in lines if x.startswith('  File')), lines[-1])
        outcome.failures.append(
            dict(index=index, error=f'died ({status})', where=where, file=kept)
            | dict(traceback=error[-4000:])
        )
        place = index + 1
    failures = folder / 'failures.jsonl'
    if failures.exists():
        outcome.failures += map(json.loads, failures.read_text().splitlines())
    outcome.seconds = time.monotonic() - start
    return outcome


def _run_child(kind, first, count, folder):
    """(exit status, what it wrote to stderr); killed where it makes no progress."""
    command = [sys.executable, str(HERE / 'fuzz_engine.py'), kind]
    command += [f'--first={first}', f'--count={count}', f'--folder={folder}']
    done = folder / 'done.json'
    done.write_text('{}')
    with open(folder / 'stderr', 'w+') as said:
        child = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=said, cwd=folder
        )
        try:
            while child.poll() is None:
                time.sleep(0.2)
                if time.time() - done.stat().st_mtime > _STUCK:
                    child.kill()
                    child.wait()
                    return 'no progress', ''
        finally:
            child.kill()
        said.seek(0)
        return child.returncode, said.read()


def _keep(folder, kind, index):
    kept = folder / 'failures' / f'{kind}-{index}'
    kept.parent.mkdir(exist_ok=True)
    if (folder / 'input').exists():
        shutil.copy(folder / 'input', kept)
    return str(kept)


def _on_alarm(*_):
    raise Hang(f'more than {SECONDS} s of processor time')


@contextlib.contextmanager
def interruptible():
    """Inside, an input that takes too long is one that failed."""
    before = signal.signal(signal.SIGPROF, _on_alarm)
    try:
        yield
    finally:
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _limited():
    """Bounds the processor time of what is inside."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _bound_memory():
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def try_input(kind, raw: bytes, path: str) -> tuple[str, BaseException | None]:
    """('result' or 'refused', None), or ('failed', what was raised)."""
    from flax_densenet import UserError

    try:
        with _limited():
            kind.run(raw, path)
    except UserError as error:
        said = str(error)
        if said != ' '.join(said.splitlines()) or not 3 < len(said) < _LONGEST:
            return 'failed', error
        if not said.isprintable():
            return 'failed', error
        return 'refused', None
    # Whatever it is, it is what is looked for.
    except BaseException as error:  # noqa: BLE001
        return 'failed', error
    return 'result', None


def _describe(error):
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if '/tests/' not in f.filename] or frames
    ours = [f for f in ours if 'flax_densenet/' in f.filename] or ours
    where = f'{os.path.basename(ours[-1].filename)}:{ours[-1].lineno}'
    where += f' ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})'
    return dict(
        error=type(error).__name__,
        where=where,
        traceback=''.join(traceback.format_exception(error))[-4000:],
    )


def _work(name, first, count, folder):
    """Runs a range of inputs; writes how far it came and what failed."""
    from faults.fuzz_kinds import KINDS

    kind = KINDS[name]()
    path = str(folder / 'input')
    for seed in kind.seeds:  # what is imported and compiled at first is not counted
        kind.run(seed, path)
    _bound_memory()
    counts = {'result': 0, 'refused': 0, 'failed': 0}
    with open(folder / 'done.json', 'r+') as done:
        for index in range(first, first + count):
            raw = kind.make(random.Random(f'{name} {index}'))
            pathlib.Path(path).write_bytes(raw)
            state = dict(
                index=index, results=counts['result'], refused=counts['refused']
            )
            _write(done, state)
            outcome, error = try_input(kind, raw, path)
            counts[outcome] += 1
            if outcome == 'failed':
                pathlib.Path(path).write_bytes(raw)
                found = _describe(error) | dict(index=index)
                found['file'] = _keep(folder, name, index)
                with open(folder / 'failures.jsonl', 'a') as failures:
                    failures.write(json.dumps(found) + '\n')
                if count == 1:
                    print(found['traceback'], file=sys.stderr)
        _write(done, dict(results=counts['result'], refused=counts['refused']))


def _write(file, state):
    file.seek(0)
    file.write(json.dumps(state).ljust(80))
    file.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('kind')
    parser.add_argument('--first', type=int, default=0)
    parser.add_argument('--count', type=int, default=1000)
    parser.add_argument('--folder', type=pathlib.Path, required=True)
    found = parser.parse_args()
    faulthandler.enable()
    os.environ['JAX_PLATFORMS'] = 'cpu'
    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
    found.folder.mkdir(parents=True, exist_ok=True)
    (found.folder / 'done.json').touch()
    # What the readers say of files is not what is tested.
    with (
        open(os.devnull, 'w') as nowhere,
        contextlib.redirect_stdout(nowhere),
        interruptible(),
    ):
        _work(found.kind, found.first, found.count, found.folder)


if __name__ == '__main__':
    main()

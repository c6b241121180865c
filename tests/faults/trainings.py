"""Trainings in processes of their own, to be killed, stopped and damaged."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FULL = os.environ.get('FAULTS') == 'full'
# In full as users have it; else compiled in less time, for one device all the same.
XLA_FLAGS = '' if FULL else os.environ['XLA_FLAGS'].replace('count=4', 'count=1')
EPOCHS = 5 if FULL else 3
STEPS = 27 if FULL else 17  # of 539 images, in all epochs
# Whatever could depend on where a run was stopped is switched on; epochs end inside of
# batches.
TINY = {
    'model.variant': 'BC-L10k4',
    'model.block_sizes': (1,),
    'model.dropout_rate': 0.1,
    'data.image_size': 8,
    'data.augment': 'shift_flip',
    'data.batch_size': 100,
    'data.test_fraction': 0.7,
    'optimizer.schedule': 'cosine',
    'optimizer.learning_rate': 3e-3,
    'train.epochs': EPOCHS,
    'train.checkpoint_every': '2 steps',
    'train.tensorboard': False,
    'train.report': False,
}


class Forks:
    """Starts trainings; see `forks.py`."""

    def __init__(self, folder):
        self._folder, self._count = folder, 0
        self._server = subprocess.Popen(
            [sys.executable, pathlib.Path(__file__).parent / 'forks.py'],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ
            | {
                'PYTHONPATH': str(ROOT),
                'XLA_FLAGS': XLA_FLAGS,
                'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
                'PYTHONWARNINGS': 'ignore',
            },
        )

    def _ask(self, **what):
        self._server.stdin.write(json.dumps(what) + '\n')
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def start(self, workdir, *flags, tiny=TINY, **fields):
        self._count += 1
        log = self._folder / f'{self._count}.log'
        args = [f'--config.{n}={v}' for n, v in (tiny | fields).items()]
        args += [f'--workdir={workdir}', *flags]
        return Training(self, self._ask(args=args, log=str(log)), log)

    def run(self, workdir, *flags, tiny=TINY, **fields):
        training = self.start(workdir, *flags, tiny=tiny, **fields)
        return training.wait(), training.text

    def close(self):
        with self._server:  # which closes its pipes and waits
            pass


class Training:
    def __init__(self, forks, number, log):
        self._forks, self.number, self._log = forks, number, log

    @property
    def text(self):
        return self._log.read_text() if self._log.exists() else ''

    def wait(self):
        return self._forks._ask(wait=self.number)

    def wait_for(self, condition, seconds=600):
        """Until the log has a text, or a function is true."""
        end = time.monotonic() + seconds
        while not (condition() if callable(condition) else condition in self.text):
            assert time.monotonic() < end, self.text
            assert self.is_alive(), self.text
            time.sleep(0.02)

    def has_begun(self):
        """Waits for its first step; False where it ended without one."""
        while self.is_alive():
            if 'compiled in' in self.text:
                return True
            time.sleep(0.02)
        return False

    def is_alive(self):
        state = pathlib.Path(f'/proc/{self.number}/stat').read_text()
        return state.rpartition(')')[2].split()[0] != 'Z'

    def children(self):
        """Decoding processes; not the one that watches over them."""
        pids = []
        for task in pathlib.Path(f'/proc/{self.number}/task').iterdir():
            with contextlib.suppress(FileNotFoundError):  # a thread that has ended
                pids += (task / 'children').read_text().split()
        return [int(pid) for pid in pids]

    def kill(self, signum):
        os.kill(self.number, signum)


@pytest.fixture(scope='session')
def forks(tmp_path_factory):
    forks = Forks(tmp_path_factory.mktemp('logs'))
    yield forks
    forks.close()


@pytest.fixture(scope='session')
def whole(forks, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    status, text = forks.run(workdir)
    assert status == 0, text
    return workdir

"""Results that are created once for all tests, by the first process that needs them.

Session fixtures are created in each process of pytest-xdist. A folder from `once` is
created by one process, and the others wait for it.
"""

import dataclasses
import fcntl
import os
import pickle
import shutil

import flax_densenet

# A run of seconds on the digits, with its pictures and its report.
DIGITS = {
    'model': {'variant': 'BC-L10k4', 'block_sizes': (1, 1)},
    'data': {'image_size': 8, 'batch_size': 128},
    'optimizer': {'learning_rate': 1e-2},
    'train': {'epochs': 4, 'tensorboard': False},
}


def once(tmp_path_factory, name, make):
    """The folder `name`, filled by `make(folder)` in one of the test processes.

    It must not change afterwards, since other processes read it at the same time.
    """
    base = tmp_path_factory.getbasetemp()
    if os.environ.get('PYTEST_XDIST_WORKER'):
        base = base.parent
    folder = base / name
    with open(base / f'{name}.lock', 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not folder.exists():
            part = base / f'{name}.part'
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            make(part)
            part.rename(folder)
    return folder


def digits_run(tmp_path_factory):
    """A run of `DIGITS` in a folder of this process, from `flax_densenet.train`."""

    def make(folder):
        result = flax_densenet.train(DIGITS, folder / 'run')
        (folder / 'result').write_bytes(pickle.dumps(result))

    folder = once(tmp_path_factory, 'digits', make)
    own = tmp_path_factory.mktemp('digits') / 'run'
    shutil.copytree(folder / 'run', own)
    result = pickle.loads((folder / 'result').read_bytes())
    return dataclasses.replace(result, workdir=str(own))

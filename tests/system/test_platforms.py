"""Devices that are not there are one line; nothing here needs a POSIX system."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from flax_densenet.errors import UserError
from flax_densenet.system import lock, platforms
from helpers import forks
from helpers.paths import ROOT
from helpers.runs import make_weights

CHECK = """
from flax_densenet.errors import UserError
from flax_densenet.system import platforms
try:
    platforms.check_devices()
except UserError as error:
    print(error)
else:
    print('fine')
"""


def check(**environment):
    done = forks.run(CHECK, cwd=ROOT, environment=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        ('JAX_PLATFORMS', 'cud', 'did you mean cuda?'),
        ('JAX_PLATFORMS', 'nothing-like-it', 'or unset it'),
        ('JAX_PLATFORMS', 'tpu', 'JAX finds'),
        *(
            pytest.param('JAX_PLATFORMS', value, message, marks=pytest.mark.slow)
            for value, message in (
                ('CPU', 'did you mean JAX_PLATFORMS=cpu?'),
                (' cpu', 'did you mean JAX_PLATFORMS=cpu?'),
                ('rocm', 'JAX finds'),
            )
        ),
    ],
)
def test_devices_that_are_not_there(name, value, message):
    told = check(**{name: value})
    assert told.startswith(f'{name}={value}: not available')
    assert message in told and 'cpu' in told
    assert told.count('\n') == 1


@pytest.mark.parametrize('value', ['cuda', pytest.param('gpu', marks=pytest.mark.slow)])
def test_no_gpu(value):
    told = check(JAX_PLATFORMS=value)
    if told == 'fine\n':
        pytest.skip('there is one')
    assert told.startswith(f'JAX_PLATFORMS={value}: not available')
    assert "pip install 'flax_densenet[cuda]'" in told
    assert told.count('\n') == 1


@pytest.mark.parametrize(
    'value',
    [*(pytest.param(v, marks=pytest.mark.slow) for v in ('cpu', '')), 'cuda,cpu'],
)
def test_devices_that_are_there(value):
    assert check(JAX_PLATFORMS=value) == 'fine\n'


LOAD = """
import flax_densenet
try:
    flax_densenet.load('tests/data/v0/run')
except flax_densenet.UserError as error:
    print(error)
"""


def test_the_library_tells_it_too():
    done = forks.run(LOAD, cwd=ROOT, environment={'JAX_PLATFORMS': 'nothing-like-it'})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('JAX_PLATFORMS=nothing-like-it: not available')


WINDOWS = """
import os, select, signal, socket, sys
for name in 'fcntl resource pwd grp termios tty pty syslog posix_ipc'.split():
    sys.modules[name] = None
POSIX = {
    os: 'fork pread pwrite posix_fadvise sched_getaffinity getuid geteuid killpg '
    'setsid statvfs sysconf pipe2 fchmod chown mkfifo O_DIRECT O_DIRECTORY',
    signal: 'pthread_sigmask SIGHUP SIGUSR1 SIGALRM SIG_BLOCK SIGPIPE',
    select: 'poll epoll POLLIN POLLHUP',
    socket: 'AF_UNIX TCP_USER_TIMEOUT SO_REUSEPORT',
}
"""
# After the libraries are imported, which know Windows.
HIDE = """
for module, names in POSIX.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)
"""


@pytest.mark.slow
def test_without_posix(tmp_path):
    """As on Windows: every module is imported; weights and images are read."""
    make_weights(tmp_path / 'w.safetensors')
    for i in range(3):
        pixels = np.full((20, 20, 3), 40 * i, np.uint8)
        Image.fromarray(pixels).save(tmp_path / f'{i}.png')
    code = WINDOWS + (
        'import pathlib, importlib\n'
        'for path in sorted(pathlib.Path("flax_densenet").rglob("*.py")):\n'
        '    parts = path.with_suffix("").parts\n'
        '    if parts[-1] != "__main__" and "configs" not in parts:\n'
        '        importlib.import_module(".".join(parts).removesuffix(".__init__"))\n'
        'print("imported")\n'
        'import jax, numpy, PIL.Image, orbax.checkpoint, grain, flax\n'
        'import flax_densenet.inference.predictor as lib\n'
        + HIDE
        + f'import glob\npath = {str(tmp_path / "w.safetensors")!r}\n'
        'model = lib.load_trained(path)\n'
        f'rows = model.predict(sorted(glob.glob({str(tmp_path / "*.png")!r})))\n'
        'print(len(rows))\n'
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert (first, last) == ('imported', '3')


def test_files_without_pread(tmp_path, monkeypatch):
    path = tmp_path / 'a'
    path.write_bytes(b'0123456789')
    with open(path, 'rb') as file:
        assert platforms.read_at(file, 3, 4) == b'456'
        monkeypatch.delattr(os, 'pread')
        assert platforms.read_at(file, 3, 4) == b'456'


def test_figures_without_resource(monkeypatch):
    assert platforms.peak_memory_bytes() > 2**20
    assert platforms.memory_bytes() > 2**20
    monkeypatch.setitem(sys.modules, 'resource', None)
    assert platforms.peak_memory_bytes() == 0
    assert platforms.max_open_files() == 512


def test_lock_of_windows(tmp_path, monkeypatch):
    """Its module stands in for the one of POSIX systems."""

    class Msvcrt:
        LK_NBLCK = 2
        held = set()

        @classmethod
        def locking(cls, handle, mode, count):
            found = os.fstat(handle).st_ino
            if found in cls.held:
                raise PermissionError(13, 'Permission denied')
            cls.held.add(found)

    monkeypatch.setitem(sys.modules, 'fcntl', None)
    monkeypatch.setitem(sys.modules, 'msvcrt', Msvcrt)
    with lock.hold(str(tmp_path)), pytest.raises(UserError, match='is in use'):
        lock.check(str(tmp_path))

"""Settings of the whole process."""

import ctypes
import sys

import pytest

from flax_densenet.system import process


def test_memory_settings_leave_a_users_own_alone(monkeypatch):
    for name, value in {
        'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',
        'MALLOC_ARENA_MAX': '2',
        'FLAX_DENSENET_KEEP_MEMORY': '0',
    }.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert process.keep_memory() is False


def _resident_mib():
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * 4096 / 2**20


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='glibc alone keeps')
def test_memory_is_released(monkeypatch):
    """Below a block that is in use, where glibc by itself keeps it."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, 'malloc_trim'):
        pytest.skip('this is not glibc')
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(100_000) for _ in range(500)]
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    for block in blocks[:-1]:
        libc.free(block)
    before = _resident_mib()
    monkeypatch.setattr(process, '_kept', False)
    process.release_memory()
    assert before - _resident_mib() < 5  # the settings are not ours
    monkeypatch.setattr(process, '_kept', True)
    process.release_memory()
    assert before - _resident_mib() > 30
    libc.free(blocks[-1])

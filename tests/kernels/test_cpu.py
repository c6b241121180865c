"""How compiled kernels are kept."""

import concurrent.futures
import pathlib
import time

import filelock
import pytest

from flax_densenet.kernels import compiling
from flax_densenet.kernels import cpu as cpu_kernels

SOURCE = 'cpu_float32_stem.cc'


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The list of what a slow compiler compiled, for an empty cache."""
    sources = []

    def compile(source, output, **_):
        sources.append(source.name)
        time.sleep(0.2)
        pathlib.Path(output).write_bytes(b'library')

    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(compiling, 'find_compiler', lambda: 'c++')
    monkeypatch.setattr(compiling, 'run', compile)
    return sources


def build_twice():
    with concurrent.futures.ThreadPoolExecutor() as pool:
        both = [pool.submit(cpu_kernels._build, SOURCE, level=None) for _ in range(2)]
    files = {one.result() for one in both}
    assert len(files) == 1
    assert [file.read_bytes() for file in files] == [b'library']


def test_processes_that_start_together_compile_once(compiled):
    build_twice()
    assert compiled == [SOURCE]


@pytest.mark.parametrize('error', [OSError('no locks'), NotImplementedError()])
def test_a_file_system_without_locks(compiled, monkeypatch, error):
    def acquire(*_, **__):
        raise error

    monkeypatch.setattr(filelock.FileLock, 'acquire', acquire)
    build_twice()
    assert compiled == [SOURCE] * 2

"""Four fake CPU devices, strict JAX, and runs without pictures."""

import contextlib
import gc
import importlib
import os
import signal
import sys
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
    '--xla_force_host_platform_device_count=4'
    # The tests spend most of their time compiling; their arrays are small.
    ' --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
    ' --xla_cpu_parallel_codegen_split_count=1'
)

# Many tests compile the same small programs. The workers share the compiled programs,
# and so do all runs if the variable names a folder, as in the Makefile.
if 'FLAX_DENSENET_TEST_CACHE' not in os.environ:
    _cache = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    os.environ['FLAX_DENSENET_TEST_CACHE'] = _cache.name
os.environ['JAX_COMPILATION_CACHE_DIR'] = os.environ['FLAX_DENSENET_TEST_CACHE']
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
# The same holds for bytecode, if Python is told not to write it next to the sources.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = os.path.join(
        os.environ['FLAX_DENSENET_TEST_CACHE'], 'bytecode'
    )
    os.environ['PYTHONPYCACHEPREFIX'] = sys.pycache_prefix
    os.environ.pop('PYTHONDONTWRITEBYTECODE', None)

# A process that a shell starts in the background ignores Ctrl-C. So would the programs
# that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
from _pytest import doctest

from flax_densenet.system import logs

# Tracing and collecting tests create many objects that stay. Searching them for cycles
# after every 700 new ones would take a seventh of the time.
gc.set_threshold(100_000, 20, 100)

pytest.register_assert_rewrite('helpers', 'faults')
logs.show_messages()  # as the commands do; tests read what is printed


def pytest_collection(session):
    """Makes JAX strict; not imported where workers run the tests (pytest-xdist)."""
    if os.environ.get('PYTEST_XDIST_WORKER') or not session.config.option.numprocesses:
        import jax

        jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_collectstart(collector):
    """Each worker first imports its own part of the test files.

    Pytest rewrites the assertions of a file when it is imported for the first time,
    which takes seconds for all files. A worker reads what another one has rewritten.
    """
    worker = os.environ.get('PYTEST_XDIST_WORKER', '')[2:]
    everything = not collector.config.option.file_or_dir
    if not (isinstance(collector, pytest.Session) and worker and everything):
        return
    root = collector.config.rootpath
    files = sorted(root.glob('tests/**/test_*.py'))
    count = int(os.environ['PYTEST_XDIST_WORKER_COUNT'])
    first, end = (len(files) * (int(worker) + more) // count for more in (0, 1))
    for file in files[first:end]:
        # An error is reported when the file is collected.
        with contextlib.suppress(Exception, pytest.skip.Exception):
            importlib.import_module(
                '.'.join(file.relative_to(root).with_suffix('').parts)
            )


# Files with tests that take many seconds.
_LONG = {
    *(
        'test_launch',
        'test_fit',
        'test_devices',
        'test_runner',
        'test_whole_sweeps',
        'test_extras',
    ),
    *('test_kills', 'test_disks', 'test_processes', 'test_serve_process'),
    *('test_notebooks', 'test_reference', 'test_recipes', 'test_web', 'test_api'),
}


def pytest_collection_modifyitems(items):
    """Runs them first; otherwise one might still run when the workers are done."""
    items.sort(key=lambda item: item.path.stem not in _LONG)


def pytest_collection_finish():
    """Excludes imported objects, which stay, from garbage collection."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    forks = sys.modules.get('helpers.forks')
    if forks:
        forks.stop()


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path):
    """Skips doctests in test files, which have none; searching takes a while."""
    found = yield
    if file_path.is_relative_to(os.path.dirname(__file__)):
        found = [one for one in found if not isinstance(one, doctest.DoctestModule)]
    return found


@pytest.fixture(scope='session')
def digits_run(tmp_path_factory):
    """The result of `train` for a run of four epochs on digits (`helpers.shared`).

    The folder belongs to this process; a test that changes it must copy it first.
    """
    from helpers import shared

    return shared.digits_run(tmp_path_factory)


@pytest.fixture(autouse=True)
def _messages_on_standard_output():
    """Undoes `predict` in earlier tests, which sends messages to standard error."""
    logs.show_messages()


@pytest.fixture(autouse=True)
def _without_pictures(request, monkeypatch):
    """Skips pictures, a third of a small run, except in tests marked `drawn`."""
    if request.node.get_closest_marker('drawn'):
        return
    from PIL import Image

    from flax_densenet.report import plots

    def save_samples(workdir, *_, **__):
        Image.new('RGB', (1, 1)).save(os.path.join(workdir, 'samples.png'))

    monkeypatch.setattr(plots, 'save_samples', save_samples)
    monkeypatch.setattr(plots, 'save_curves', lambda workdir, records: None)


@pytest.fixture(scope='session')
def _file_host():
    from helpers import file_hosts

    host = file_hosts.Host()
    yield host
    host.close()


@pytest.fixture
def host(_file_host, tmp_path, monkeypatch):
    """A local server for files and the Hub; caches are in the folder of the test."""
    from helpers import file_hosts

    _file_host.clear()
    return file_hosts.use(_file_host, tmp_path, monkeypatch)

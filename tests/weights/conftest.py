"""Keras, where it is installed."""

import os

import jax
import pytest

from helpers import file_hosts

# Read by Keras when it is imported, in the tests that need it.
os.environ.setdefault('KERAS_BACKEND', 'jax')


@pytest.fixture
def keras_promotes_ranks():
    """../conftest.py forbids it to us; Keras adds biases that way."""
    with jax.numpy_rank_promotion('allow'):
        yield


@pytest.fixture
def h5py():
    return pytest.importorskip('h5py')


@pytest.fixture
def keras(h5py):
    return pytest.importorskip('keras')


@pytest.fixture(scope='session')
def _file_host():
    host = file_hosts.Host()
    yield host
    host.close()


@pytest.fixture
def host(_file_host, tmp_path, monkeypatch):
    """Hosts of files and the Hub, on this machine; caches in the test's folder."""
    _file_host.clear()
    return file_hosts.use(_file_host, tmp_path, monkeypatch)

"""Keras, where it is installed."""

import os

import jax
import pytest

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

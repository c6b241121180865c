"""Folded networks in bfloat16: every way to multiply is as close to float32 as XLA."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_densenet.kernels import cpu as cpu_kernels
from flax_densenet.models import folded
from helpers.blocks import BLOCKS, error, inputs, make, require_native


@pytest.fixture
def paths():
    """The paths that this processor has; the first one is used again at the end."""
    require_native('bfloat16')
    usual, found = cpu_kernels.bfloat16_path(), []
    for path in cpu_kernels.BFLOAT16_PATHS:
        try:
            found.append(cpu_kernels.bfloat16_path(path))
        except ValueError:
            assert path in ('amx', 'avx512')
    yield found
    cpu_kernels.bfloat16_path(usual)


def program(block, size, count, **fields):
    """A function that computes the folded features of some images, and its text."""
    variables, images = inputs(block, size, count)
    module = make(block, **fields)
    arrays = folded.fold(module, variables)
    lowered = jax.jit(functools.partial(folded.features, module)).lower(arrays, images)
    compiled = lowered.compile()
    return lambda: np.asarray(compiled(arrays, images)), lowered.as_text()


# Fewer images than threads, and more; whole images and bands; widths that fill no tile.
CASES = [
    ('BC', (70, 34), 1),
    ('imagenet', (61, 45), 5),
    *(
        pytest.param(
            *(block, size, count),
            marks=pytest.mark.slow if quick else pytest.mark.exhaustive,
        )
        for block in BLOCKS
        if block not in ('plain', 'C')
        for size, count, quick in (
            ((13, 22), 1, block == 'wide'),
            ((9, 31), 7, block == 'BC'),
            ((230, 190), 1, block == 'imagenet'),
        )
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(('block', 'size', 'count'), CASES)
def test_each_path_is_as_good_as_xla(paths, block, size, count):
    native, text = program(block, size, count, kernel='native', dtype='bfloat16')
    assert text.count('flax_densenet_DenseBlockForwardPackedBfloat16') == 2
    by_xla, text = program(block, size, count, kernel='xla', dtype='bfloat16')
    assert 'flax_densenet' not in text
    exact = program(block, size, count, kernel='xla')[0]()
    theirs, found = error(by_xla(), exact), {}
    assert 1e-3 < theirs < 2e-2
    for path in paths:
        if path == 'emulated' and size[0] > 100:
            continue  # slow, and the same code
        cpu_kernels.bfloat16_path(path)
        found[path] = native()
        assert found[path].dtype == jnp.bfloat16
        np.testing.assert_array_equal(found[path], native())
        assert error(found[path], exact) < 1.2 * theirs
    for one in found.values():  # they differ in the order of their sums
        assert error(one, found['portable']) < 0.5 * theirs


@pytest.mark.slow
def test_images_are_computed_apart(paths):
    """Values that are too large for bfloat16 do not reach the other images."""
    variables, images = inputs('BC', (13, 22), 5)
    module = make('BC', kernel='native', dtype='bfloat16')
    arrays = folded.fold(module, variables)
    function = jax.jit(functools.partial(folded.features, module))
    alone = np.asarray(function(arrays, images))
    images = images.copy()
    images[2] = 1e38 * np.sign(images[2])
    beside = np.asarray(function(arrays, images))
    assert not np.isfinite(beside[2].astype(np.float32)).all()
    for n in (0, 1, 3, 4):
        np.testing.assert_array_equal(beside[n], alone[n])
    # Nothing of it stays in the memory that the next call uses.
    images[2] = 0
    np.testing.assert_array_equal(np.asarray(function(arrays, images))[0], alone[0])


@pytest.mark.slow
def test_a_path_that_is_asked_for(paths):
    with pytest.raises(ValueError, match='sse9'):
        cpu_kernels.bfloat16_path('sse9')
    script = (
        'from flax_densenet.kernels import cpu; assert cpu.load("bfloat16") is None; '
        'print(cpu.bfloat16_path())'
    )
    environment = os.environ | {'FLAX_DENSENET_BFLOAT16': 'portable'}
    done = subprocess.run(
        [sys.executable, '-c', script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == 'portable\n'

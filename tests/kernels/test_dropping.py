"""Dropout and stochastic depth drop the same by all implementations of a block."""

import functools

import jax
import numpy as np
import pytest

from flax_densenet import create_model, init_variables
from flax_densenet.kernels import native_block, xla_block
from helpers.blocks import error, inputs, make, require_native, run, run_plain

DROPS = dict(drop_path_rate=0.5, dropout_rate=0.2)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_stochastic_depth():
    """An image keeps a layer's new maps, scaled, or has zeros; plain and fast alike."""
    images = np.random.default_rng(0).standard_normal((64, 4, 4, 3), np.float32)
    fields = dict(num_classes=0, block_sizes=(2, 1), stem_features=4)
    module = create_model('BC-L10k4', **fields, fast=False)
    variables = init_variables(module, 0)

    @functools.partial(jax.jit, static_argnames=('module', 'frozen'))
    def blocks(key, module, frozen=0):
        return module.apply(
            variables,
            images,
            True,
            frozen,
            method='pyramid',
            mutable=['batch_stats'],
            rngs={'dropout': jax.random.key(key)},
        )[0]

    whole = np.asarray(blocks(0, module)[0])
    dropping = module.clone(drop_path_rate=0.8)  # of the three layers 0, 0.4, 0.8
    found = np.asarray(blocks(0, dropping)[0])
    np.testing.assert_array_equal(found[..., :8], whole[..., :8])
    kept = found[..., 8:].any((1, 2, 3))
    assert 0.4 < kept.mean() < 0.8
    expected = np.where(kept[:, None, None, None], whole[..., 8:] / 0.6, 0)
    np.testing.assert_allclose(found[..., 8:], expected, rtol=1e-5, atol=1e-6)
    assert not np.array_equal(found, blocks(1, dropping)[0])
    require_native()
    for kernel in ('xla', 'native'):
        fast = dropping.clone(fast=True, kernel=kernel)
        for ours, theirs in zip(blocks(0, fast), blocks(0, dropping), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    one, other = (blocks(key, dropping, frozen=2)[0] for key in (0, 1))
    np.testing.assert_array_equal(one, other)  # what is frozen drops nothing


@pytest.mark.slow
@pytest.mark.parametrize(
    ('block', 'kernel', 'remat'),
    [
        ('BC', 'native', 'block'),
        pytest.param('plain', 'native', 'block', marks=pytest.mark.exhaustive),
        pytest.param('BC', 'xla', 'block', marks=pytest.mark.exhaustive),
        pytest.param('BC', 'xla', 'none', marks=pytest.mark.exhaustive),
    ],
)
def test_what_is_dropped_has_the_same_gradients(block, kernel, remat):
    """Values and layers, in blocks whose first layer drops too."""
    if kernel == 'native':
        require_native()
    variables, images = inputs(block, count=8)
    plain = run(make(block, fast=False, **DROPS), variables, images)
    fast = run(make(block, kernel=kernel, remat=remat, **DROPS), variables, images)
    for name in plain:
        assert error(fast[name], plain[name]) < 2e-5
    values = run_plain(block, count=8)
    assert error(values['features'], plain['features']) > 0.1


@pytest.mark.slow
def test_random_bits_of_dropout(monkeypatch):
    """The kernel's own are JAX's; with other kinds of keys they come from JAX."""
    require_native()
    shape = (3, 5, 7, 11)  # not whole vector registers

    def masks(keys):
        ours = jax.jit(lambda: native_block.keep_mask(keys, shape, 0.3))
        theirs = [xla_block.kept(key, shape, 0.3) for key in keys]
        assert 0.6 < np.mean(theirs) < 0.8
        np.testing.assert_array_equal(ours(), np.asarray(theirs).astype(np.uint8))
        return 'flax_densenet_DropoutKeep' in ours.lower().as_text()

    assert masks([jax.random.key(1), jax.random.key(-2)])
    assert masks([jax.random.PRNGKey(7)])
    assert not masks([jax.random.key(1, impl='rbg')])
    with jax.threefry_partitionable(False):
        assert not masks([jax.random.key(1)])

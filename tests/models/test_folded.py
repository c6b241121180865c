"""Folding keeps what the module computes: all stems, blocks, paddings; both kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_densenet import create_model, init_variables
from flax_densenet.models import folded
from helpers.blocks import BLOCKS, error, inputs, make, require_native
from helpers.marks import exhaustive_after, slow_after
from helpers.networks import compiled

OTHERS = {
    'deep': ('densenet264d', dict(growth_rate=8, block_sizes=(2, 1))),
    'blur': ('densenetblur121d', dict(growth_rate=8, block_sizes=(2, 1))),
}
QUICK = ('plain', 'imagenet')
ALL = [
    *slow_after(1, QUICK),
    *exhaustive_after(0, [b for b in BLOCKS if b not in QUICK]),
]


def maps(module, variables, images):
    """The folded features."""
    arrays = folded.fold(module, variables)
    return jax.jit(functools.partial(folded.features, module))(arrays, images)


def in_double(module, variables, images):
    """The module's own features, in float64."""
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), variables)
        plain = compiled(module.clone(fast=False, dtype='float64'), method='features')
        return np.asarray(plain(double, jnp.asarray(images, jnp.float64)))


def five(block):
    return inputs(block, (13, 22), 5)


@functools.cache
def exact(block):
    """Of five images; what an image gives does not depend on the others."""
    return in_double(make(block), *five(block))


@pytest.mark.parametrize('block', ALL)
def test_by_xla(block):
    module = make(block, kernel='xla')
    variables, images = five(block)
    assert error(maps(module, variables, images[:2]), exact(block)[:2]) < 2e-6
    arrays = folded.fold(module, variables)
    assert not any('packed' in one for one in (*arrays['blocks'], arrays['stem']))


@pytest.mark.parametrize('count', [1, 5])
@pytest.mark.parametrize(
    'block',
    slow_after(
        1, ['BC', 'imagenet', *sorted({*BLOCKS} - {'plain', 'C', 'BC', 'imagenet'})]
    ),
)
def test_by_the_native_kernel(block, count):
    """Fewer images than threads, and more; widths that fill no register."""
    require_native()
    module = make(block, kernel='native')
    variables, images = five(block)
    images = images[:count]
    arrays = folded.fold(module, variables)
    assert all('packed' in one for one in arrays['blocks'])
    text = jax.jit(functools.partial(folded.features, module)).lower(arrays, images)
    assert text.as_text().count('flax_densenet_DenseBlockForwardPacked') == 2
    stems = text.as_text().count('flax_densenet_StemForwardPacked')
    assert stems == (module.stem == 'imagenet')
    found = maps(module, variables, images)
    assert error(found, exact(block)[:count]) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize('name', exhaustive_after(1, OTHERS))
def test_stems(name):
    variant, fields = OTHERS[name]
    module = create_model(variant, num_classes=3, kernel='xla', **fields)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: x + 0.1 * rng.uniform(size=x.shape).astype(np.float32),
        init_variables(module, 0),
    )
    images = rng.standard_normal((2, 21, 30, 3)).astype(np.float32)
    found = maps(module, variables, images)
    assert error(found, in_double(module, variables, images)) < 2e-6


@pytest.mark.exhaustive
@pytest.mark.slow
def test_logits_and_half_precision():
    variables, images = inputs('BC')
    module = make('BC', kernel='xla')
    arrays = folded.fold(module, variables)
    found = folded.logits(module, arrays, images)
    expected = compiled(module)(variables, images)
    assert found.dtype == expected.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    half = make('BC', kernel='xla', dtype='bfloat16')
    rough = folded.logits(half, folded.fold(half, variables), images)
    theirs = compiled(half)(variables, images)
    assert 1e-4 < error(rough, expected) < 2 * error(theirs, expected) + 1e-3


@pytest.mark.exhaustive
@pytest.mark.slow
def test_networks_without_batch_norm():
    module = create_model(
        'rdnet_tiny',
        num_classes=3,
        stem_features=8,
        growth_rates=(8, 8),
        block_sizes=(1, 1),
        halvings=(1,),
        squeeze_blocks=(2,),
    )
    variables = init_variables(module, 0)
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3), np.float32)
    found = folded.logits(module, folded.fold(module, variables), images)
    np.testing.assert_allclose(found, compiled(module)(variables, images), atol=1e-6)

"""Small networks with all kinds of dense blocks, and inputs for them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_densenet import create_model, init_variables
from flax_densenet.kernels import cpu as cpu_kernels

# Plain, bottleneck, compression, both; growth rates and widths that do not fill a
# vector register; the ImageNet stem and its pooling; the widths of densenet161.
BLOCKS = {
    'plain': ('L10k5', dict(block_sizes=(3, 1))),
    'B': ('B-L16k6', dict(block_sizes=(3, 1))),
    'C': ('C-L10k4', dict(block_sizes=(2, 1))),
    'BC': ('BC-L16k12', dict(block_sizes=(3, 1))),
    'imagenet': (
        'densenet121',
        dict(growth_rate=32, block_sizes=(2, 1), stem_features=16),
    ),
    'same padding': (
        'densenet121',
        dict(growth_rate=8, block_sizes=(2, 2), stem_features=20, padding='same'),
    ),
    'wide': (
        'densenet161',
        dict(block_sizes=(2, 2), stem_features=300, bottleneck=4),
    ),
}


def require_native(dtype='float32'):
    reason = cpu_kernels.load(dtype)
    if reason:
        pytest.skip(f'the CPU kernel cannot be built here: {reason}')


def make(block, **fields):
    name, own = BLOCKS[block]
    return create_model(name, num_classes=3, **own | fields)


@functools.cache
def inputs(block, size=(13, 22), count=2):
    """Variables that differ from their initial values, and images."""
    variables = init_variables(make(block), 0)
    rng = np.random.default_rng(0)

    def shake(path, leaf):
        name = path[-1].key
        if name == 'kernel':
            return leaf
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        return leaf + 0.2 * (np.abs(noise) if name == 'var' else noise)

    variables = jax.tree_util.tree_map_with_path(shake, variables)
    images = rng.standard_normal((count, *size, 3)).astype(np.float32)
    return variables, images


def layers_of(channels, bottleneck, growth, count):
    """Random parameters of a block, as `native_block.parameters` of each layer."""
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0, shift=0.0):
        return (shift + scale * rng.standard_normal(shape)).astype(np.float32)

    layers = []
    for wide in range(channels, channels + count * growth, growth):
        one = (normal(wide, scale=0.3, shift=1), normal(wide, scale=0.3))
        if not bottleneck:
            kernel = normal(3, 3, wide, growth, scale=(2 / wide) ** 0.5 / 3)
            layers.append((*one, kernel))
            continue
        two = (normal(bottleneck, scale=0.3, shift=1), normal(bottleneck, scale=0.3))
        kernel1 = normal(1, 1, wide, bottleneck, scale=(2 / wide) ** 0.5)
        kernel2 = normal(3, 3, bottleneck, growth, scale=(2 / bottleneck) ** 0.5 / 3)
        layers.append((*one, kernel1, *two, kernel2))
    return layers


def run(module, variables, images):
    """Training outputs, updated statistics, gradients; evaluation outputs."""

    def loss_of(params, images):
        features, updated = module.apply(
            {**variables, 'params': params},
            images,
            train=True,
            mutable=['batch_stats'],
            method='features',
            rngs={'dropout': jax.random.key(3)},
        )
        # Any function of all outputs works; this one has no flat directions.
        weights = np.sin(np.arange(features.size)).reshape(features.shape)
        wide = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        return (wide * weights).sum(), (features, updated['batch_stats'])

    (_, (features, stats)), gradients = jax.jit(
        jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
    )(variables['params'], images)
    evaluated = jax.jit(functools.partial(module.apply, method='features'))(
        variables, images
    )
    return {
        'features': features,
        'batch_stats': stats,
        'param_gradients': gradients[0],
        'image_gradient': gradients[1],
        'evaluated': evaluated,
    }


@functools.cache
def run_plain(block, size=(13, 22), count=2):
    """Reference results for several tests."""
    return run(make(block, fast=False), *inputs(block, size, count))


def error(found, exact):
    """Relative error of a tree of arrays: norm of the difference / norm."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    difference = sum(((a - b) ** 2).sum() for a, b in pairs)
    return np.sqrt(difference / sum((b**2).sum() for _, b in pairs))

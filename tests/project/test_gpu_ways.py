"""Every way to build the dense block for a GPU keeps the plain layers' results."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu_ways
from flax_densenet.kernels import dense_block, xla_block
from helpers.marks import exhaustive_after

pytestmark = pytest.mark.slow

# Growth 32 and 48 as in the 121 and the 161; pixel counts that no tile divides.
SHAPES = {'121': (2, 7, 9, 64, 32, 2), '161': (1, 13, 11, 96, 48, 2)}


@functools.cache
def inputs(shape):
    count, height, width, channels, growth, depth = SHAPES[shape]
    rng = np.random.default_rng(0)

    def normal(*size, scale=1.0):
        return (scale * rng.standard_normal(size)).astype(np.float32)

    layers = []
    for index in range(depth):
        wide = channels + index * growth
        layers.append(
            xla_block.Layer(
                scale1=1 + normal(wide, scale=0.2),
                bias1=normal(wide, scale=0.2),
                kernel1=normal(1, 1, wide, 4 * growth, scale=wide**-0.5),
                mean1=normal(wide, scale=0.2),
                var1=1 + np.abs(normal(wide)),
                scale2=1 + normal(4 * growth, scale=0.2),
                bias2=normal(4 * growth, scale=0.2),
                kernel2=normal(3, 3, 4 * growth, growth, scale=(36 * growth) ** -0.5),
                mean2=normal(4 * growth, scale=0.2),
                var2=1 + np.abs(normal(4 * growth)),
            )
        )
    return 0.5 + normal(count, height, width, channels), layers


def results(functions, shape, dtype):
    """Outputs of training and evaluation, and gradients of all of training's."""
    x, layers = inputs(shape)
    train, evaluate = functions
    options = dict(epsilon=1e-5, dtype=jnp.dtype(dtype))

    def loss_of(x, layers):
        found = train(x.astype(dtype), layers, **options)
        total = 0
        for place, leaf in enumerate(jax.tree.leaves(found)):
            weights = np.sin(place + np.arange(leaf.size)).reshape(leaf.shape)
            total += (leaf * weights.astype(np.float32)).sum()
        return total, found

    gradient = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
    (_, found), gradients = jax.jit(gradient)(x, layers)
    evaluated = jax.jit(functools.partial(evaluate, **options))(x.astype(dtype), layers)
    return {'train': found, 'gradients': gradients, 'eval': evaluated}


@functools.cache
def plain(shape, dtype):
    functions = (
        functools.partial(dense_block.block_train, kernel='xla', remat=False),
        functools.partial(dense_block.block_eval, kernel='xla'),
    )
    return results(functions, shape, dtype)


def error(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    wrong = sum(((a - b) ** 2).sum() for a, b in pairs)
    return np.sqrt(wrong / sum((b**2).sum() for _, b in pairs))


# The parts of the others are among those in bfloat16.
QUICK = ('fused',)
CASES = [
    *exhaustive_after(0, [(way, '161', 'float32') for way in QUICK]),
    *exhaustive_after(
        1, [(way, '121', 'bfloat16') for way in ('pallas', 'pieces', 'buffer', 'fused')]
    ),
    *exhaustive_after(
        0, [(way, '161', 'float32') for way in gpu_ways.WAYS if way not in QUICK]
    ),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(('way', 'shape', 'dtype'), CASES)
def test_contract(way, shape, dtype):
    expected = plain(shape, 'float32')
    found = results(gpu_ways.WAYS[way], shape, dtype)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, expected)
    assert found['train'][0].dtype == found['eval'].dtype == dtype
    for name in expected:
        allowed = 2e-5
        if dtype == 'bfloat16':
            # Rounding alone: not much further from float32 than today's block.
            allowed = 1.5 * error(plain(shape, dtype)[name], expected[name])
            assert 1e-4 < allowed < 0.1
        assert error(found[name], expected[name]) < allowed, name


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ('size', 'padding'),
    exhaustive_after(1, [((8, 11), ((0, 1), (1, 1))), ((9, 14), ((1, 1), (1, 1)))]),
)
def test_pooling_without_scatter(size, padding):
    """Equal values too: the first of a window takes the gradient, as by XLA."""
    x = np.random.default_rng(0).integers(-2, 3, (2, *size, 5)).astype(np.float32)
    row = np.ones(5, np.float32)

    def run(pool):
        def total(x):
            y = gpu_ways.POOLS[pool](x, 0 * row, row, row, row, 0, padding, x.dtype)
            return (y * np.sin(np.arange(y.size)).reshape(y.shape)).sum(), y

        return jax.grad(total, has_aux=True)(x)

    for found, expected in zip(run('gather'), run('scatter'), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_ways_differ():
    """Else the comparisons would compare a thing with itself."""
    x, layers = inputs('121')

    def text(way):
        train = functools.partial(gpu_ways.WAYS[way][0], epsilon=0, dtype=x.dtype)
        return jax.jit(train).lower(x, layers).as_text()

    names = ('convolution', 'dot_general', 'concatenate', 'dynamic_update_slice')
    counts = {
        way: [text(way).count(f'stablehlo.{name}') for name in names]
        for way in ('concat', 'conv1x1', 'buffer')
    }
    # Two layers; the statistics, mean and var, are concatenated in each.
    assert counts == {
        'concat': [2, 2, 6, 0],
        'conv1x1': [4, 0, 6, 0],
        'buffer': [2, 2, 4, 2],
    }
    assert 'while' in text('pallas')  # interpreted, over the tiles
    assert text('pieces') != text('concat') != text('nchw')


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    'way', exhaustive_after(1, ['fused', 'nchw', 'pieces', 'buffer', 'pallas'])
)
def test_mapped_over_groups(way):
    """As `groups` maps a model over them: each has its own statistics."""
    x, layers = inputs('121')
    groups = np.stack([x, 1.1 * x[::-1] + 0.1])

    def gradients(train):
        def total(x, layers):
            options = dict(epsilon=1e-5, dtype=jnp.dtype('float32'))
            found = jax.vmap(lambda rows: train(rows, layers, **options))(x)
            return sum(
                (leaf * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape)).sum()
                for leaf in jax.tree.leaves(found)
            )

        return jax.jit(jax.grad(total, argnums=(0, 1)))(groups, layers)

    expected = functools.partial(dense_block.block_train, kernel='xla', remat=False)
    assert error(gradients(gpu_ways.WAYS[way][0]), gradients(expected)) < 2e-5

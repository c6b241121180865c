"""A dense block in training in bfloat16: as close to float64 as XLA's, in all ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_densenet.kernels import cpu as cpu_kernels
from flax_densenet.kernels import dense_block, native_block, xla_block
from helpers.blocks import error, inputs, layers_of, make, require_native
from helpers.marks import exhaustive_after

KEYS = list(jax.random.split(jax.random.key(2), 4))


def by_xla(x, layers, dropout, epsilon, dtype):
    fields = ('scale1', 'bias1', 'kernel1', 'scale2', 'bias2', 'kernel2')
    features, (mean, var), inner = xla_block.train(
        x,
        [
            xla_block.Layer(
                mean1=None, var1=None, **dict(zip(fields, one, strict=False))
            )
            for one in layers
        ],
        epsilon=epsilon,
        dtype=dtype,
        remat=False,
        dropout_rate=dropout,
        keys=KEYS,
        path_rates=(0.0,) * len(layers),
        path_keys=None,
    )
    mean2 = var2 = jnp.zeros((len(layers), 0))
    if inner[0] is not None:
        mean2, var2 = (jnp.stack(parts) for parts in zip(*inner, strict=True))
    return features, mean, var, mean2, var2


def natively(x, layers, dropout):
    mask = jnp.zeros((0,), jnp.uint8)
    if dropout:
        shape = (*x.shape[:3], layers[0][-1].shape[3])
        mask = native_block.keep_mask(KEYS[: len(layers)], shape, dropout)
    drop = mask, jnp.zeros((0,), jnp.float32)
    return native_block.train(x, layers, drop, 1e-5, dropout)


def with_gradients(train):
    """A function of x and layers: outputs and gradients, statistics' share included."""

    def loss(x, layers):
        found = train(x, layers)
        features, mean, var, *_ = found
        wide = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        weights = np.sin(np.arange(features.size)).reshape(features.shape)
        more = (mean * np.arange(mean.size) + var * 3).sum() * 0.1
        return (wide * weights).sum() + more, found

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def named(found):
    (_, (features, mean, var, mean2, var2)), (of_x, of_layers) = found
    names = ('scale1', 'bias1', 'kernel1', 'scale2', 'bias2', 'kernel2')
    gradients = dict(zip(names, zip(*of_layers, strict=True), strict=False))
    statistics = {'mean': (mean, mean2), 'var': (var, var2)}
    return {'features': features, 'x': of_x} | statistics | gradients


@pytest.mark.slow
@pytest.mark.parametrize(
    ('shape', 'bottleneck', 'growth', 'count', 'dropout'),
    [
        ((3, 7, 9, 24), 48, 12, 2, 0.0),  # groups of images, chunks that are not full
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ((3, 7, 9, 40), 0, 12, 2, 0.3),  # without bottleneck
            )
        ),
        *exhaustive_after(
            0,
            [
                ((2, 40, 58, 64), 128, 32, 2, 0.2),  # bands
                ((5, 14, 14, 96), 192, 48, 2, 0.0),
                ((1, 5, 3, 16), 16, 8, 3, 0.0),
                ((1, 70, 29, 16), 0, 24, 2, 0.0),  # bands
                ((2, 6, 5, 16), 0, 5, 3, 0.3),
            ],
        ),
    ],
)
def test_each_path_is_as_good_as_xla(shape, bottleneck, growth, count, dropout):
    require_native('bfloat16')
    require_native()  # which has dropout's random bits
    layers = layers_of(shape[3], bottleneck, growth, count)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal(shape) + 3, jnp.bfloat16)
    with jax.enable_x64(True):
        train = functools.partial(
            by_xla, dropout=dropout, epsilon=1e-5, dtype=jnp.float64
        )
        double = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), layers)
        exact = with_gradients(train)(jnp.asarray(x, jnp.float64), double)
        exact = jax.tree.map(np.asarray, named(exact))
    train = functools.partial(by_xla, dropout=dropout, epsilon=1e-5, dtype=jnp.bfloat16)
    theirs = named(with_gradients(train)(x, layers))
    ours = with_gradients(functools.partial(natively, dropout=dropout))
    usual, found = cpu_kernels.bfloat16_path(), {}
    try:
        for path in cpu_kernels.BFLOAT16_PATHS:
            if path == 'emulated' and shape[1] > 30:
                continue
            try:
                cpu_kernels.bfloat16_path(path)
            except ValueError:
                continue
            found[path] = named(ours(x, layers))
            again = named(ours(x, layers))
            jax.tree.map(np.testing.assert_array_equal, found[path], again)
    finally:
        cpu_kernels.bfloat16_path(usual)
    assert {'portable'} <= found.keys()
    for name, expected in exact.items():
        limit = 1.5 * error(theirs[name], expected)
        assert limit < 0.3, name
        for path, one in found.items():
            assert error(one[name], expected) <= max(limit, 2e-6), (path, name)
            assert error(one[name], found['portable'][name]) <= limit, (path, name)


def lowered(kernel):
    variables, images = inputs('BC')
    module = make('BC', kernel=kernel, dtype='bfloat16')

    def loss(params):
        features, _ = module.apply(
            {**variables, 'params': params},
            images,
            train=True,
            mutable=['batch_stats'],
            method='features',
        )
        return features.astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss)).lower(variables['params']).as_text()


def test_float32_where_the_processor_has_no_instructions(monkeypatch, capsys):
    """The blocks are never slower than in float32, and a line tells."""
    monkeypatch.setattr(cpu_kernels, 'load', lambda *_: None)  # nothing runs
    monkeypatch.setattr(cpu_kernels, 'why_bfloat16_is_slow', lambda: None)
    text = lowered('native')
    for name in ('DenseBlockForwardTrainBfloat16', 'DenseBlockBackwardBfloat16'):
        assert text.count(name) >= 2
    assert capsys.readouterr().out == ''
    monkeypatch.setattr(cpu_kernels, 'why_bfloat16_is_slow', lambda: 'it is old')
    dense_block._log_once.cache_clear()
    text = lowered('native')
    assert 'TrainBfloat16' not in text and 'DenseBlockForwardTrain' in text
    assert capsys.readouterr().out == (
        'model.dtype=bfloat16: it is old, so the dense blocks compute in float32\n'
    )

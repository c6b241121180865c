"""Stem and transitions in bfloat16 training: as close to float64 as those of XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.kernels import cpu as cpu_kernels
from flax_densenet.kernels import dense_block, native_stem, native_transition, xla_block
from helpers.blocks import error, inputs, make, require_native


def normal(*shape, scale=1.0, shift=0.0):
    rng = np.random.default_rng(sum(shape))
    return (shift + scale * rng.standard_normal(shape)).astype(np.float32)


def norm_of(channels):
    """mean, var, scale, bias; some scales are negative."""
    var = np.abs(normal(channels)) + 0.5
    scale = normal(channels, scale=0.6, shift=0.5)
    return normal(channels, scale=0.3), var, scale, normal(channels, scale=0.3)


def with_gradients(function, count):
    """A function to the outputs and the gradients of all arguments."""

    def loss(*arguments):
        outputs = function(*arguments)
        y, *more = jax.tree.leaves(outputs)
        wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        weights = np.sin(np.arange(y.size)).reshape(y.shape)
        return (wide * weights).sum() + sum(one.sum() for one in more), outputs

    both = jax.value_and_grad(loss, argnums=tuple(range(count)), has_aux=True)

    def run(*arguments):
        (_, outputs), gradients = both(*arguments)
        return jax.tree.leaves((outputs, gradients))

    return jax.jit(run)


def on_each_path(function, arguments):
    """Path to results, each computed twice; `emulated` only for small arrays."""
    usual, found = cpu_kernels.bfloat16_path(), {}
    try:
        for path in cpu_kernels.BFLOAT16_PATHS:
            if path == 'emulated' and arguments[0].size > 100_000:
                continue
            try:
                cpu_kernels.bfloat16_path(path)
            except ValueError:
                continue
            found[path] = function(*arguments)
            again = function(*arguments)
            jax.tree.map(np.testing.assert_array_equal, found[path], again)
    finally:
        cpu_kernels.bfloat16_path(usual)
    assert {'portable'} <= found.keys()
    return found


def compare(found, theirs, exact, names):
    """Each path is as close to float64 as XLA, and to the portable path."""
    for place, (name, expected) in enumerate(zip(names, exact, strict=True)):
        limit = 1.5 * error(theirs[place], expected)
        assert limit < 0.1, name
        for path, one in found.items():
            assert error(one[place], expected) <= max(limit, 2e-6), (path, name)
            assert error(one[place], found['portable'][place]) <= limit, (path, name)


def in_float64(function, arguments):
    with jax.enable_x64(True):
        double = [jnp.asarray(np.asarray(a), jnp.float64) for a in arguments]
        return jax.tree.map(np.asarray, function(*double))


def transition_by_xla(x, *rest, dtype):
    *norm, weights = rest
    weights = weights[None, None]
    options = dict(epsilon=1e-5, dtype=dtype, kernel='xla')
    return dense_block.transition(x, norm, weights, **options)


def transition_arguments(shape, features):
    channels = shape[3]
    x = jnp.asarray(normal(*shape, shift=1), jnp.bfloat16)
    weights = normal(channels, features, scale=channels**-0.5)
    return (x, *norm_of(channels), weights)


natively = functools.partial(native_transition.transition, epsilon=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('shape', 'features'),
    [
        ((3, 7, 9, 24), 20),  # odd sizes, chunks that are not full
        ((1, 2, 3, 40), 72),  # one pixel
        pytest.param((2, 56, 56, 256), 128, marks=pytest.mark.slow),
        pytest.param((5, 14, 14, 640), 320, marks=pytest.mark.slow),
        pytest.param((40, 4, 6, 33), 31, marks=pytest.mark.slow),
    ],
)
def test_a_transition_on_each_path(shape, features):
    require_native('bfloat16')
    arguments = transition_arguments(shape, features)
    count = len(arguments)

    def by_xla(dtype):
        return with_gradients(functools.partial(transition_by_xla, dtype=dtype), count)

    exact = in_float64(by_xla(jnp.float64), arguments)
    theirs = by_xla(jnp.bfloat16)(*arguments)
    found = on_each_path(with_gradients(natively, count), arguments)
    names = ('y', 'x', 'mean', 'var', 'scale', 'bias', 'weights')
    compare(found, theirs, exact, names)


def rounded(y):
    """y rounded to bfloat16, with the gradient of y."""
    return y + lax.stop_gradient(y.astype(jnp.bfloat16).astype(y.dtype) - y)


def stem_by_xla(x, kernel, scale, bias, padding, dtype, rounding=True):
    """With the convolution's output rounded, so that the same pixels are largest."""
    y = lax.conv_general_dilated(
        *(x.astype(dtype), kernel.astype(dtype), (2, 2)),
        native_stem._pads(x.shape[1:3], 7, padding),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    y = rounded(y) if rounding else y
    mean, var = xla_block.statistics(y)
    pads = native_stem._pads(y.shape[1:3], 3, padding)
    return xla_block.stem(y, mean, var, scale, bias, 1e-5, pads, dtype), mean, var


def stem_arguments(shape, features):
    _, _, scale, bias = norm_of(features)
    kernel = normal(7, 7, shape[3], features, scale=0.1)
    # Without rounding there are the same products in float64.
    kernel = np.asarray(jnp.asarray(kernel, jnp.bfloat16), np.float32)
    return jnp.asarray(normal(*shape, shift=0.5), jnp.bfloat16), kernel, scale, bias


@pytest.mark.slow
@pytest.mark.parametrize(
    ('shape', 'features', 'padding'),
    [
        ((3, 23, 37, 3), 20, 'torch'),
        ((1, 10, 24, 1), 40, 'same'),
        pytest.param((1, 1, 5, 3), 64, 'torch', marks=pytest.mark.slow),
        pytest.param((2, 112, 90, 3), 64, 'same', marks=pytest.mark.exhaustive),
        pytest.param((5, 64, 70, 4), 96, 'torch', marks=pytest.mark.exhaustive),
    ],
)
def test_the_stem_on_each_path(shape, features, padding):
    """XLA computes the gradient of the images, in float32 and without rounding."""
    require_native('bfloat16')
    arguments, count = stem_arguments(shape, features), 4

    def natively(*arguments):
        return native_stem.train(*arguments, 1e-5, padding)

    def by_xla(*arguments, rounding):
        y, *statistics = stem_by_xla(*arguments, padding, jnp.float64, rounding)
        return y, *lax.stop_gradient(statistics)  # which only update averages

    exact, without_rounding = (
        in_float64(
            with_gradients(functools.partial(by_xla, rounding=rounding), count),
            arguments,
        )
        for rounding in (True, False)
    )
    exact[3] = without_rounding[3]  # of x
    found = on_each_path(with_gradients(natively, count), arguments)
    names = ('y', 'mean', 'var', 'x', 'kernel', 'scale', 'bias')
    limits = (0.004, 1e-4, 1e-4, 0.01, 0.015, 0.01, 0.01)
    for path, results in found.items():
        for name, limit, one, expected in zip(
            names, limits, results, exact, strict=True
        ):
            assert error(one, expected) < limit, (path, name)
    # With given statistics.
    y, mean, var, *_ = found[cpu_kernels.bfloat16_path()]
    images, kernel, scale, bias = arguments
    again = (images, kernel, scale, bias, mean, var, 1e-5, padding)
    np.testing.assert_array_equal(
        jax.jit(native_stem.evaluate, static_argnums=(6, 7))(*again), y
    )


@pytest.mark.slow
def test_the_stem_where_a_value_is_not_the_largest():
    """A ReLU without gradient, equal values (the first counts) and a zero image."""
    require_native('bfloat16')
    x = (
        jnp.zeros((2, 8, 9, 3), jnp.bfloat16)
        .at[1]
        .set(jnp.asarray(normal(8, 9, 3), jnp.bfloat16))
    )
    _, kernel, scale, _ = stem_arguments((1, 8, 9, 3), 20)
    bias = np.full(20, -0.5, np.float32)
    arguments = (x, kernel, scale, bias)
    run = with_gradients(lambda *a: native_stem.train(*a, 1e-5, 'torch')[0], 4)
    found = run(*arguments)
    assert 0.1 < (np.asarray(found[0], np.float32) == 0).mean() < 0.9
    by_xla = functools.partial(stem_by_xla, padding='torch', dtype=jnp.float64)
    exact = in_float64(with_gradients(lambda *a: by_xla(*a)[0], 4), arguments)
    for place in (0, 2, 3, 4):  # y, kernel, scale, bias
        assert error(found[place], exact[place]) < 0.015, place


def on_four(function, arguments, split):
    """The results on one device and on four that share the rows of `split`."""
    results = []
    for count in (1, 4):
        mesh = mesh_lib.make_mesh(jax.devices()[:count])
        given = [
            mesh_lib.to_global(np.asarray(one), mesh)
            if rows
            else mesh_lib.replicate(one, mesh)
            for one, rows in zip(arguments, split, strict=True)
        ]
        with mesh_lib.computing(mesh):
            text = jax.jit(function).lower(*given).as_text()
            results.append(jax.jit(function)(*given))
    assert 'Together' in text
    return results


@pytest.mark.slow
def test_a_transition_on_four_devices():
    require_native()  # which has the number of a call
    require_native('bfloat16')
    arguments = transition_arguments((8, 5, 7, 24), 20)
    function = with_gradients(natively, len(arguments))
    one, four = on_four(function, arguments, [True, *[False] * 5])
    jax.tree.map(np.testing.assert_array_equal, one, four)
    assert len(four[0].sharding.device_set) == 4


@pytest.mark.slow
def test_the_stem_on_four_devices():
    require_native()
    require_native('bfloat16')
    arguments = stem_arguments((8, 13, 9, 3), 20)
    function = with_gradients(lambda *a: native_stem.train(*a, 1e-5, 'same'), 4)
    one, four = on_four(function, arguments, [True, False, False, False])
    for place in (0, 1, 2, 4, 5, 6):  # all but the images' gradient, by XLA
        np.testing.assert_array_equal(one[place], four[place])
    assert error(one[3], four[3]) < 0.01


def program(monkeypatch, reason, **fields):
    """The text of the gradient of a training step."""
    monkeypatch.setattr(cpu_kernels, 'why_bfloat16_is_slow', lambda: reason)
    variables, images = inputs('imagenet', (37, 45))
    module = make('imagenet', dtype='bfloat16', **fields)

    def loss(params):
        given = {**variables, 'params': params}
        options = dict(train=True, mutable=['batch_stats'], method='features')
        features, _ = module.apply(given, images, **options)
        return features.astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss)).lower(variables['params']).as_text()


HANDLERS = (
    *('TransitionForwardBfloat16', 'TransitionBackwardBfloat16'),
    *('StemForwardTrainBfloat16', 'StemBackwardBfloat16'),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('reason', 'fields', 'native'),
    [
        (None, {'kernel': 'native'}, True),
        (None, {'kernel': 'xla'}, False),
        ('it is old', {'kernel': 'native'}, False),
    ],
)
def test_which_kernels_a_network_uses(monkeypatch, reason, fields, native):
    require_native()
    require_native('bfloat16')
    text = program(monkeypatch, reason, **fields)
    for name in HANDLERS:
        assert (name in text) == native, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ('block', 'group'),
    [
        ('imagenet', 0),
        pytest.param('same padding', 0, marks=pytest.mark.exhaustive),
        pytest.param('imagenet', 2, marks=pytest.mark.exhaustive),
    ],
)
def test_a_network_beside_its_plain_layers(monkeypatch, block, group):
    """Outputs and updated statistics, in training, frozen, in groups and evaluation."""
    require_native()
    require_native('bfloat16')
    monkeypatch.setattr(cpu_kernels, 'why_bfloat16_is_slow', lambda: None)
    variables, images = inputs(block, (37, 45), count=4)

    def results(**fields):
        module = make(block, dtype='bfloat16', **fields)
        options = dict(mutable=['batch_stats'], method='features')

        def run(variables, images):
            apply = functools.partial(module.apply, variables, images, **options)
            return apply(train=True), apply(train=True, frozen=1), apply(train=False)

        compiled = jax.jit(run).lower(variables, images)
        native = fields.get('kernel') == 'native'
        for name in ('StemForwardTrainB', 'StemForwardEvalB', 'TransitionForwardB'):
            assert (name in compiled.as_text()) == native
        return compiled.compile()(variables, images)

    plain = results(fast=False, batch_norm_group=group)
    found = results(kernel='native', batch_norm_group=group)
    for ours, theirs in zip(found, plain, strict=True):
        assert error(ours[0], theirs[0]) < 0.03
        stats, expected = (one[1]['batch_stats'] for one in (ours, theirs))
        for name in expected['norm0']:
            assert error(stats['norm0'][name], expected['norm0'][name]) < 1e-3
        assert error(stats, expected) < 0.01

"""Stem and transitions in bfloat16 training: as close to float64 as those of XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.kernels import cpu as cpu_kernels
from flax_densenet.kernels import dense_block, native_transition
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


def test_a_transition_on_four_devices():
    require_native()  # which has the number of a call
    require_native('bfloat16')
    arguments = transition_arguments((8, 5, 7, 24), 20)
    function = with_gradients(natively, len(arguments))
    one, four = on_four(function, arguments, [True, *[False] * 5])
    jax.tree.map(np.testing.assert_array_equal, one, four)
    assert len(four[0].sharding.device_set) == 4


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


TRANSITION = ('TransitionForwardBfloat16', 'TransitionBackwardBfloat16')


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
    for name in TRANSITION:
        assert (name in text) == native, name

"""The C++ kernels on four devices that share the rows: what one device computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.kernels import cpu as cpu_kernels
from flax_densenet.kernels import dense_block, native_block, xla_block
from flax_densenet.models import folded
from flax_densenet.train import step
from helpers.blocks import error, inputs, layers_of, make, require_native
from helpers.marks import exhaustive_after

KEYS = tuple(jax.random.split(jax.random.key(2), 2))


def block(shape, bottleneck, growth, dtype):
    """A function to outputs and gradients of a block, with its arguments."""
    layers = layers_of(shape[3], bottleneck, growth, 2)
    x = np.random.default_rng(1).standard_normal(shape) + 3

    def loss(x, layers, weights):
        drawn = [xla_block.Layer(*one[:3], None, None, *one[3:]) for one in layers]
        drop = native_block.drops(x, drawn, 0.2, KEYS, (0.0, 0.5), KEYS)
        found = native_block.train(x, layers, drop, 1e-5, 0.2)
        features, mean, var, *_ = found
        more = (mean * np.arange(mean.size) + var * 3).sum() * 0.1
        return (features.astype(jnp.float32) * weights).sum() + more, found

    width = shape[3] + 2 * growth
    weights = np.sin(np.arange(np.prod(shape[:3]) * width)).reshape(*shape[:3], width)
    train = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    return train, (jnp.asarray(x, dtype), layers, weights.astype(np.float32))


def on_four(function, arguments, split):
    """Its results, and how often its program names the calls of several devices."""
    mesh = mesh_lib.make_mesh()
    assert mesh.size == 4
    given = [
        mesh_lib.to_global(one, mesh) if rows else mesh_lib.replicate(one, mesh)
        for one, rows in zip(arguments, split, strict=True)
    ]
    with mesh_lib.computing(mesh):
        compiled = jax.jit(function)
        text = compiled.lower(*given).as_text()
        return compiled(*given), text


@pytest.mark.slow
@pytest.mark.parametrize(
    ('bottleneck', 'growth', 'dtype'),
    exhaustive_after(
        2,
        [
            *((16, 8, 'float32'), (48, 12, 'bfloat16')),
            *((0, 8, 'float32'), (0, 8, 'bfloat16')),
        ],
    ),
)
def test_a_block_in_training_bit_for_bit(bottleneck, growth, dtype):
    """With dropout and stochastic depth, of which each device has its own rows."""
    require_native()
    require_native(dtype)
    function, arguments = block((8, 5, 7, 24), bottleneck, growth, dtype)
    arguments = jax.tree.map(np.asarray, arguments)
    first = jax.devices()[:1]
    with mesh_lib.computing(mesh_lib.make_mesh(first)):
        one = jax.jit(function)(*arguments)
    four, text = on_four(function, arguments, (True, False, True))
    assert text.count('ForwardTrain' + dtype.title().replace('Float32', '')) >= 1
    assert 'Together' in text and 'DropoutKeep' in text
    (_, outputs), gradients = one
    (_, outputs_of_four), gradients_of_four = four
    pairs = (outputs, gradients), (outputs_of_four, gradients_of_four)
    jax.tree.map(np.testing.assert_array_equal, *pairs)
    assert len(outputs_of_four[0].sharding.device_set) == 4


@pytest.mark.slow
def test_two_networks_in_one_program():
    """Their calls are alike and may come in any order on each device."""
    require_native()
    variables, images = inputs('BC', count=8)

    def features(kernel, variables, images):
        apply = functools.partial(
            make('BC', kernel=kernel).apply,
            variables,
            train=True,
            mutable=['batch_stats'],
            method='features',
        )
        return [apply(given)[0] for given in (images, images[:, ::-1], -images)]

    given, split = (variables, images), (False, True)
    four, text = on_four(functools.partial(features, 'auto'), given, split)
    assert text.count('Together') >= 6
    expected = jax.jit(functools.partial(features, 'xla'))(*given)
    for found, one in zip(four, expected, strict=True):
        assert error(found, one) < 1e-5
    assert error(four[0], expected[1]) > 0.1


def training_step(devices, **fields):
    """The program of a step over so many devices, its loss and parameters after it."""
    variables, images = inputs('BC', count=8)
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    module, optimizer = make('BC', **fields), optax.sgd(0.1)
    options = step.StepOptions(mean=(0.5,) * 3, std=(0.2,) * 3, seed=0)
    train_step = step.make_train_step(module, optimizer, options)
    state = mesh_lib.replicate(step.new_state(variables, optimizer), mesh)
    batch = {
        'image': np.uint8(30 * np.abs(images)),
        'label': np.arange(8, dtype=np.int32) % 3,
        'epoch': np.zeros(8, np.int32),
    }
    batch = mesh_lib.to_global(batch, mesh)
    with mesh_lib.computing(mesh):
        text = jax.jit(train_step).lower(state, batch).as_text()
    compiled = step.compile_train_step(train_step, state, batch, mesh)
    state, loss = compiled(state, batch)
    return text, float(loss), jax.device_get(state.params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('group', 'together'),
    [
        (0, True),
        # Rows of one device: nothing to compute together.
        pytest.param(2, False, marks=pytest.mark.exhaustive),
        pytest.param(4, True, marks=pytest.mark.exhaustive),
    ],
)
def test_a_training_step(group, together):
    require_native()
    text, loss, params = training_step(4, batch_norm_group=group)
    assert ('Together' in text) == together
    assert 'DenseBlockForwardTrain' in text
    _, expected, exact = training_step(1, batch_norm_group=group, kernel='native')
    assert loss == pytest.approx(expected, rel=1e-6)
    assert error(params, exact) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('count', exhaustive_after(1, [8, 6]))
def test_inference(dtype, count):
    """Each device computes its own rows; all of them if they cannot be divided."""
    require_native()
    require_native(dtype)
    variables, images = inputs('imagenet', size=(37, 45), count=count)
    module = make('imagenet', dtype=dtype)
    mesh = mesh_lib.make_mesh()
    with mesh_lib.computing(mesh):
        arrays = folded.fold(module, variables)
    assert 'packed' in arrays['stem'] and 'packed' in arrays['blocks'][0]
    logits = functools.partial(folded.logits, module)
    divided = count % 4 == 0
    found, text = on_four(logits, (arrays, images), (False, divided))
    assert ('SPMDFullToShard' in text or 'manual_computation' in text) == divided
    one = jax.jit(logits)(arrays, images)
    assert error(found, one) < (1e-6 if dtype == 'float32' else 1e-2)


@pytest.mark.slow
def test_several_processes(monkeypatch, capsys):
    """Batch statistics of several processes are XLA's part, and a line tells."""
    require_native()
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    dense_block._log_once.cache_clear()
    variables, images = inputs('BC', count=8)

    def program(**fields):
        module = make('BC', **fields)
        apply = functools.partial(module.apply, train=True, mutable=['batch_stats'])
        with mesh_lib.computing(mesh_lib.make_mesh()):
            return jax.jit(apply).lower(variables, images).as_text()

    assert 'DenseBlock' in program(batch_norm_group=2)
    assert capsys.readouterr().out == ''
    assert 'DenseBlock' not in program()
    assert capsys.readouterr().out == (
        'the dense block runs without its CPU kernel: the batch statistics cover '
        'several processes; training is about three times slower; '
        "model.batch_norm_group=-1 (statistics of each device's own rows) changes "
        'that\n'
    )


def test_where_it_is_not_known_who_has_the_rows():
    """A kernel's call is not divided by JAX, so `auto` leaves it to XLA."""
    require_native()
    variables, images = inputs('BC', count=8)
    apply = jax.jit(make('BC').apply)
    assert 'DenseBlock' not in apply.lower(variables, images).as_text()
    with mesh_lib.computing(mesh_lib.make_mesh()):
        assert 'DenseBlock' in apply.lower(variables, images).as_text()


def test_a_call_that_names_no_devices():
    require_native()
    x = jnp.zeros((2, 3, 3, 4))
    with pytest.raises(jax.errors.JaxRuntimeError, match='not a call of several'):
        cpu_kernels.call(
            'StemForwardTrainTogether',
            [jax.ShapeDtypeStruct((2, 2, 2, 4), jnp.float32)],
            *(x, x, jnp.zeros(2, jnp.uint32)),
            axes=np.array([0], np.int64),
            devices=2,
        )

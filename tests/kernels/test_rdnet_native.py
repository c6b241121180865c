"""RDNet's C++ kernels: as close to float64 as the plain layers, in all ways."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_densenet import UserError
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.kernels import cpu as cpu_kernels
from flax_densenet.kernels import native_rdnet
from flax_densenet.models import folded, rdnet_layers
from helpers.blocks import error
from helpers.rdnets import make_images, shaken, tiny


def require(dtype):
    reason = cpu_kernels.load(dtype, 'rdnet')
    if reason:
        pytest.skip(f'the CPU kernels cannot be built here: {reason}')


def make_module(shape, features, size=None, *, dtype='float32', fast=None):
    """A layer or, with `size`, a transition; each is as in an RDNet."""
    wide = jnp.float64 if dtype == 'float64' else jnp.float32
    dtypes = dict(dtype=jnp.dtype(dtype), param_dtype=wide)
    options = dict(kernel_init=nn.initializers.he_normal(), **dtypes)
    conv = functools.partial(rdnet_layers.Conv, **options)
    norm = functools.partial(
        nn.LayerNorm, epsilon=1e-6, use_fast_variance=False, **dtypes
    )
    if size:
        return rdnet_layers.Transition(features, size, conv, norm, fast)
    return rdnet_layers.DenseLayer(
        growth_rate=features,
        bottleneck=4,
        squeeze=False,
        layer_scale=0,
        dropout_rate=0.0,
        conv=conv,
        depthwise=functools.partial(rdnet_layers.DepthwiseConv, **options),
        norm=norm,
        param_dtype=wide,
        fast=fast,
    )


# Shape, new features and size of a transition. Widths that do not fill a chunk, odd
# sizes, patches that leave a row and a column, many rows for each thread, few rows.
CASES = [
    ((3, 5, 17, 40), 24, None),
    ((2, 7, 9, 24), 40, 2),
    pytest.param(((9, 14, 14, 72), 64, None), marks=pytest.mark.exhaustive),
    pytest.param(((5, 28, 28, 40), 72, 2), marks=pytest.mark.slow),
    pytest.param(((1, 33, 29, 8), 8, None), marks=pytest.mark.exhaustive),
    pytest.param(((1, 1, 3, 256), 128, None), marks=pytest.mark.exhaustive),
    pytest.param(((1, 21, 16, 64), 8, 1), marks=pytest.mark.exhaustive),
]
FAST = dict(kernel='native', epsilon=1e-6)


def with_gradients(module):
    """A function of variables and input: result, and both gradients."""

    def loss(variables, x):
        y = module.apply(variables, x, train=True)
        wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        # Positive on average: sums in which all cancels have no digits in common.
        weights = 1 + np.sin(np.arange(y.size)).reshape(y.shape)
        return (wide * weights).sum(), y

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


def named(found):
    (_, y), (variables, x) = found
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    gradients = {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    return jax.tree.map(np.asarray, {'y': y, 'x': x} | gradients)


def run(case, arguments, **options):
    return named(jax.jit(with_gradients(make_module(*case, **options)))(*arguments))


@functools.cache
def prepared(*case):
    """Variables and input that bfloat16 represents, and the results in float64."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(case[0]) + 0.5, jnp.bfloat16)
    module = make_module(*case)
    variables = jax.jit(functools.partial(module.init, train=False))(
        jax.random.key(0), x.astype(jnp.float32)
    )
    variables = jax.tree.map(
        lambda leaf: leaf + rng.uniform(0.1, 0.3, leaf.shape).astype('f4'), variables
    )
    with jax.enable_x64(True):
        double = jax.tree.map(np.float64, (variables, x))
        return variables, x, run(case, double, dtype='float64')


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_training_in_float32(case):
    require('float32')
    variables, x, exact = prepared(*case)
    arguments = variables, x.astype(jnp.float32)
    found = run(case, arguments, fast=FAST)
    jax.tree.map(np.testing.assert_array_equal, found, run(case, arguments, fast=FAST))
    plain = run(case, arguments)
    for name, expected in exact.items():
        limit = max(3 * error(plain[name], expected), 1e-6)
        assert error(found[name], expected) < limit < 1e-4, name
    assert any(np.any(found[name] != plain[name]) for name in exact)


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_training_in_bfloat16(case, monkeypatch):
    """Each way to multiply."""
    require('bfloat16')
    monkeypatch.setattr(cpu_kernels, 'why_bfloat16_is_slow', lambda family: None)
    variables, x, exact = prepared(*case)
    theirs = run(case, (variables, x), dtype='bfloat16')
    ours = jax.jit(with_gradients(make_module(*case, dtype='bfloat16', fast=FAST)))
    usual, found = cpu_kernels.bfloat16_path(), {}
    try:
        for path in cpu_kernels.BFLOAT16_PATHS:
            try:
                cpu_kernels.bfloat16_path(path)
            except ValueError:
                continue
            found[path] = named(ours(variables, x))
    finally:
        cpu_kernels.bfloat16_path(usual)
    assert {'portable', 'emulated'} <= found.keys()
    assert found['portable']['y'].dtype == jnp.bfloat16
    for name, expected in exact.items():
        # XLA sums the gradients of biases in bfloat16.
        limit = min(1.5 * error(theirs[name], expected), 0.05)
        for path, one in found.items():
            assert error(one[name], expected) <= limit, (path, name)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_inference_with_packed_kernels(dtype, monkeypatch):
    """Packed once, as the program would pack them."""
    require(dtype)
    monkeypatch.setattr(cpu_kernels, 'why_bfloat16_is_slow', lambda family: None)
    module = tiny(kernel='native', dtype=dtype, stem_features=40)
    variables, images = shaken(module), make_images()
    arrays = folded.fold(module, variables)
    function = jax.jit(functools.partial(folded.features, module))
    text = function.lower(arrays, images).as_text()
    assert 'RDNetLayerForward' in text and 'RDNetTransitionForward' in text
    assert 'RDNetPack' not in text
    expected = jax.jit(functools.partial(module.apply, method='features'))
    assert 'RDNetPack' in expected.lower(variables, images).as_text()
    np.testing.assert_array_equal(
        np.float32(function(arrays, images)), np.float32(expected(variables, images))
    )
    assert (
        'packed'
        not in folded.fold(folded.differentiable(module), variables)['variables']
    )


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gelu(dtype):
    """Of all sizes, through a layer whose 1x1s select the GELU of each bias."""
    require(dtype)
    x = np.float32([0, 0.3, -1, 2.5, -5, 9, -1e4, 1e4])
    ones, eye = np.ones(8, 'f4'), np.eye(8, dtype='f4')
    image = jnp.arange(72.0).reshape(1, 3, 3, 8).astype(dtype)

    def gelu(x):
        first = np.ones((7, 7, 1, 8), 'f4'), ones, ones, ones
        arrays = (*first, np.zeros((1, 8, 8), 'f4'), x, eye[None], 0 * ones)
        return native_rdnet._layer(image, arrays, 1e-6)[0, 0, 0].astype(jnp.float32)

    expected, pull = jax.vjp(lambda x: jax.nn.gelu(x, approximate=False), x)
    found, own_pull = jax.vjp(gelu, x)
    tolerance = 1e-6 if dtype == 'float32' else 1e-2
    np.testing.assert_allclose(found, expected, tolerance, 100 * tolerance * 1e-3)
    np.testing.assert_allclose(
        own_pull(ones)[0], pull(ones)[0], tolerance, tolerance / 3
    )


def test_float32_where_bfloat16_is_slower(monkeypatch, capsys):
    monkeypatch.setattr(cpu_kernels, 'load', lambda *_: None)  # nothing runs
    monkeypatch.setattr(cpu_kernels, 'why_bfloat16_is_slow', lambda family: 'it is old')
    native_rdnet._log_once.cache_clear()
    module = tiny(dtype='bfloat16', kernel='native')
    variables, images = shaken(module), make_images()
    text = jax.jit(module.apply).lower(variables, images).as_text()
    assert 'RDNetLayerForward' in text and 'RDNetLayerForwardBfloat16' not in text
    assert capsys.readouterr().out == (
        'model.dtype=bfloat16: it is old, so RDNet computes in float32\n'
    )


def test_where_the_kernels_cannot_be_used(monkeypatch, capsys):
    with jax.enable_x64(True), pytest.raises(UserError, match='not float64; use auto'):
        native_rdnet.use_native('native', 'float64', gradients=True)
    assert not native_rdnet.use_native('auto', 'float16', gradients=True)
    monkeypatch.setattr(cpu_kernels, 'load', lambda *_: 'no C++ compiler is installed')
    native_rdnet._log_once.cache_clear()
    with mesh_lib.computing(mesh_lib.make_mesh()):
        assert not native_rdnet.use_native('auto', 'float32', gradients=True)
    assert capsys.readouterr().out == (
        'RDNet runs without its CPU kernels: no C++ compiler is installed; training '
        'and prediction are slower; install g++ or set CXX\n'
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    'dtype', ['bfloat16', pytest.param('float32', marks=pytest.mark.slow)]
)
def test_four_devices(dtype, monkeypatch):
    """Gradients of parameters cover the rows of all devices."""
    require(dtype)
    monkeypatch.setattr(cpu_kernels, 'why_bfloat16_is_slow', lambda family: None)
    module = tiny(dtype=dtype)
    variables, images = shaken(module), make_images(count=8)

    def loss(variables, images):
        y = module.apply(variables, images, train=True, method='features')
        return (y.astype(jnp.float32) ** 2).sum((1, 2, 3)), y

    function = jax.grad(lambda *args: loss(*args)[0].sum())
    results, devices = [], jax.devices()
    for mesh in (mesh_lib.make_mesh(devices[:1]), mesh_lib.make_mesh(devices[:4])):
        given = mesh_lib.replicate(variables, mesh), mesh_lib.to_global(images, mesh)
        with mesh_lib.computing(mesh):
            text = jax.jit(function).lower(*given).as_text()
            assert ('Together' in text) == (mesh.size == 4)
            assert 'RDNetLayerBackward' in text
            results.append(jax.device_get(jax.jit(function)(*given)))
    own = {'denseblock1', 'denseblock2', 'transition1'}
    one, four = ({k: found['params'][k] for k in own} for found in results)
    for found, expected in zip(*map(jax.tree.leaves, (four, one)), strict=True):
        assert error(found, expected) < (1e-6 if dtype == 'float32' else 2e-2)


@pytest.mark.parametrize(
    ('arguments', 'loaded'),
    [
        ((), [('float32', 'densenet')]),
        (('bfloat16', 'rdnet'), [('float32', 'rdnet'), ('bfloat16', 'rdnet')]),
    ],
)
def test_what_is_loaded_ahead(monkeypatch, arguments, loaded):
    found = []
    monkeypatch.setattr(cpu_kernels, 'load', lambda *given: found.append(given))
    cpu_kernels.load_ahead(*arguments).join()
    assert found == loaded

"""The fast block keeps the plain layers' contract: variables, outputs, gradients,
running statistics. Errors are measured against the plain block in float64."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_densenet import UserError
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.kernels import cpu as cpu_kernels
from flax_densenet.kernels import dense_block, xla_block
from flax_densenet.train import fit
from helpers.blocks import error, inputs, make, require_native, run, run_plain
from helpers.marks import exhaustive_after
from helpers.networks import compiled
from helpers.runs import tiny_config

# `make test-slow` and `make test-exhaustive` run the others; the latter also runs those
# with dropout, bfloat16 and four devices.
CONTRACTS = [
    ('native', 'BC'),
    pytest.param('xla', 'BC', marks=pytest.mark.slow),
    *(
        pytest.param(kernel, block, marks=pytest.mark.exhaustive)
        for kernel, block in (
            *(('xla', 'plain'), ('xla', 'imagenet')),
            *(('native', 'plain'), ('native', 'imagenet')),
            *(('native', 'same padding'), ('native', 'wide')),
        )
    ),
]


@functools.cache
def exact(block, size=(13, 22), dropout=0.0, count=2):
    """The plain layers in float64."""
    variables, images = inputs(block, size, count)
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), variables)
        module = make(block, fast=False, dtype='float64', dropout_rate=dropout)
        found = run(module, double, jnp.asarray(images, jnp.float64))
        return jax.tree.map(np.asarray, found)


def assert_as_good(fast, plain, exact, factor=2.0, floor=2e-6):
    """No further from float64 than `factor` times what the plain layers are.

    `floor`: where the plain layers happen to be closer than a few roundings.
    """
    for name in exact:
        ours, theirs = (error(found[name], exact[name]) for found in (fast, plain))
        assert ours <= max(factor * theirs, floor), (name, ours, theirs)
        assert theirs < 2e-4, (name, theirs)  # the comparison itself is sound


def compiled_text(module, block):
    variables, images = inputs(block)
    lowered = jax.jit(
        lambda v, x: module.apply(v, x, train=True, mutable=['batch_stats'])
    ).lower(variables, images)
    return lowered.as_text()


@pytest.mark.slow
def test_the_paths_differ():
    """Else every comparison below would compare a thing with itself."""
    require_native()
    texts = {
        name: compiled_text(make('imagenet', **fields), 'imagenet')
        for name, fields in {
            'plain': dict(fast=False),
            'xla': dict(kernel='xla'),
            'native': dict(kernel='native'),
        }.items()
    }
    calls = {
        name: len(re.findall('flax_densenet_', text)) for name, text in texts.items()
    }
    assert calls == {'plain': 0, 'xla': 0, 'native': 3}  # stem and two blocks
    convolutions = {name: text.count('convolution(') for name, text in texts.items()}
    # Stem, three layers of two and the transition; the 1x1 are products; the stem.
    assert convolutions == {'plain': 8, 'xla': 4, 'native': 1}


@pytest.mark.parametrize(('kernel', 'block'), CONTRACTS)
def test_contract(kernel, block):
    if kernel == 'native':
        require_native()
    variables, images = inputs(block)
    plain = run_plain(block)
    fast = run(make(block, kernel=kernel), variables, images)
    assert jax.tree.structure(plain) == jax.tree.structure(fast)
    assert jax.tree.map(np.shape, plain) == jax.tree.map(np.shape, fast)
    assert_as_good(fast, plain, exact(block))


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(
    'size',
    [
        (9, 31),
        *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ((5, 4), (70, 34))),
    ],
)
@pytest.mark.parametrize(
    'block', ['BC', pytest.param('C', marks=pytest.mark.exhaustive)]
)
def test_sizes(size, block):
    """The native kernel's bands and register tiles end inside of any image."""
    require_native()
    variables, images = inputs(block, size)
    plain = run_plain(block, size)
    fast = run(make(block, kernel='native'), variables, images)
    assert_as_good(fast, plain, exact(block, size))


@pytest.mark.slow
@pytest.mark.parametrize('kernel', exhaustive_after(1, ['native', 'xla']))
def test_variance_with_a_large_mean(kernel):
    """Mean 1000, spread 1: a one-pass variance in float32 would lose it."""
    if kernel == 'native':
        require_native()
    rng = np.random.default_rng(0)
    x = (1000 + rng.standard_normal((4, 16, 16, 24))).astype(np.float32)
    variables, _ = inputs('BC')
    block = variables['params']['denseblock1']
    layers = [
        xla_block.Layer(
            scale1=layer['norm1']['scale'],
            bias1=layer['norm1']['bias'],
            kernel1=layer['conv1']['kernel'],
            scale2=layer['norm2']['scale'],
            bias2=layer['norm2']['bias'],
            kernel2=layer['conv2']['kernel'],
            mean1=None,
            var1=None,
        )
        for layer in block.values()
    ]
    _, (mean, var), _ = dense_block.block_train(
        x, layers, epsilon=1e-5, dtype=jnp.float32, kernel=kernel
    )
    double = x.astype(np.float64)
    np.testing.assert_allclose(mean[:24], double.mean((0, 1, 2)), rtol=2e-7)
    np.testing.assert_allclose(var[:24], double.var((0, 1, 2)), rtol=1e-5)
    one_pass = (x**2).mean((0, 1, 2)) - x.mean((0, 1, 2)) ** 2
    assert np.abs(one_pass - var[:24]).max() > 1e-2


@pytest.mark.exhaustive
@pytest.mark.slow
def test_without_remat():
    variables, images = inputs('BC')
    found = run(make('BC', kernel='xla', remat='none'), variables, images)
    assert_as_good(found, run_plain('BC'), exact('BC'))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_four_devices():
    """Statistics of the whole batch, though it is spread over devices."""
    variables, images = inputs('BC', count=8)
    mesh = mesh_lib.make_mesh()
    assert mesh.size == 4
    one = run(make('BC', kernel='xla'), variables, images)
    four = run(
        make('BC'),
        mesh_lib.replicate(variables, mesh),
        mesh_lib.to_global(images, mesh),
    )
    assert len(four['features'].sharding.device_set) == 4
    for name in one:
        assert error(four[name], one[name]) < 2e-5


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ('block', 'dropout', 'dtype'),
    [
        ('plain', 0.3, 'float32'),
        ('plain', 0.0, 'bfloat16'),
        ('B', 0.0, 'float32'),
        ('B', 0.3, 'bfloat16'),
        ('C', 0.0, 'float32'),
        ('C', 0.3, 'bfloat16'),
        ('BC', 0.0, 'float32'),
        ('BC', 0.3, 'float32'),
        ('BC', 0.0, 'bfloat16'),
    ],
)
def test_every_pair_of_choices(block, dropout, dtype):
    """On one device and on four, of an odd image size, by XLA; natively.

    In float32: no further from float64 than twice what the plain layers are; in
    bfloat16 too, where both are a few percent away.
    """
    size = (13, 22)
    variables, images = inputs(block, size, count=4)
    fields = dict(dropout_rate=dropout, dtype=dtype)
    reference = exact(block, size, dropout=dropout, count=4)
    if dropout or dtype != 'float32':
        plain = run(make(block, fast=False, **fields), variables, images)
    else:
        plain = run_plain(block, size, count=4)
    mesh = mesh_lib.make_mesh()
    spread = (
        mesh_lib.replicate(variables, mesh),
        mesh_lib.to_global(images, mesh),
    )
    if dropout and dtype == 'float32':
        without = run_plain(block, size, count=4)
        assert error(without['features'], plain['features']) > 0.1
    found = {
        'one': run(make(block, kernel='xla', **fields), variables, images),
        'four': run(make(block, **fields), *spread),
    }
    require_native()
    if dtype == 'float32':
        module = make(block, kernel='native', **fields)
        found['native'] = run(module, variables, images)
    with mesh_lib.computing(mesh):
        found['four natively'] = run(make(block, kernel='native', **fields), *spread)
    for fast in found.values():
        assert jax.tree.structure(plain) == jax.tree.structure(fast)
        if dtype == 'float32':
            assert_as_good(fast, plain, reference)
            continue
        for name in reference:
            ours, theirs = (error(r[name], reference[name]) for r in (fast, plain))
            bound = 0.2 if block == 'BC' and not dropout else 0.25
            assert ours <= 2 * theirs and 1e-4 < theirs < bound, (name, ours, theirs)


@pytest.mark.slow
def test_native_is_deterministic():
    require_native()
    variables, images = inputs('imagenet', size=(61, 45))
    runs = [run(make('imagenet', kernel='native'), variables, images) for _ in range(3)]
    for other in runs[1:]:
        jax.tree.map(np.testing.assert_array_equal, runs[0], other)


@pytest.mark.slow
@pytest.mark.parametrize(
    'kernel', [pytest.param('xla', marks=pytest.mark.exhaustive), 'native']
)
def test_gradient_in_evaluation(kernel):
    """As explanations of a prediction need it."""
    if kernel == 'native':
        require_native()
    variables, images = inputs('imagenet', size=(61, 45))

    def gradient(**fields):
        module = make('imagenet', **fields)
        logits = compiled(module)
        return jax.grad(lambda x: logits(variables, x)[:, 1].sum())(images)

    expected = gradient(fast=False)
    assert error(gradient(kernel=kernel), expected) < 1e-5


@pytest.mark.slow
def test_ties_in_the_pooling_go_to_one_place():
    """Equal values in a window: the gradient is given once, as by the plain layers."""
    require_native()
    x = np.ones((1, 8, 8, 16), np.float32) * np.arange(1, 17, dtype=np.float32)
    one = np.ones(16, np.float32)
    pad = ((1, 1), (1, 1))

    def pooled(kernel):
        def total(x):
            return dense_block.stem(
                x,
                (0 * one, one, one, one),
                epsilon=1e-5,
                dtype=jnp.float32,
                padding=pad,
                kernel=kernel,
            )[0].sum()

        return jax.grad(total)(x)

    np.testing.assert_allclose(pooled('native'), pooled('xla'), rtol=1e-5)


@pytest.mark.parametrize(
    ('block', 'fields', 'message'),
    [
        ('plain', {'growth_rate': 29}, 'a growth rate of at most 28'),
        ('BC', {'growth_rate': 65}, 'layers of at most 256'),
    ],
)
def test_native_where_it_cannot_be(block, fields, message):
    module = make(block, kernel='native', **fields)
    _, images = inputs(block)
    with pytest.raises(UserError, match=f'model.kernel=native.*{message}.*use auto'):
        jax.eval_shape(module.init, jax.random.key(0), images)


def test_without_a_compiler(monkeypatch, capsys):
    """`auto` goes on with XLA and says so once; `native` names the reason."""
    monkeypatch.setenv('PATH', '')
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setattr(cpu_kernels, '_load', cpu_kernels._load.__wrapped__)
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    dense_block._log_once.cache_clear()
    variables, images = inputs('BC')
    for _ in range(2):
        jax.eval_shape(make('BC').apply, variables, images)
    assert capsys.readouterr().out == (
        'the dense block runs without its CPU kernel: no C++ compiler (c++, g++ or '
        '$CXX) is installed; training and prediction are about three times slower; '
        'install g++ or set CXX\n'
    )
    with pytest.raises(UserError, match=r'no C\+\+ compiler'):
        jax.eval_shape(make('BC', kernel='native').apply, variables, images)


def test_a_broken_compiler(monkeypatch, tmp_path):
    broken = tmp_path / 'broken-c++'
    broken.write_text('#!/bin/sh\necho "x.cc:1: error: no such thing" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv('CXX', str(broken))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert 'failed: x.cc:1: error: no such thing' in cpu_kernels._load.__wrapped__()
    left = (tmp_path / 'flax_densenet' / 'kernels').iterdir()
    assert {path.suffix for path in left} == {'.lock'}


@pytest.mark.exhaustive
@pytest.mark.slow
def test_training_with_the_native_kernel(tmp_path, monkeypatch):
    """One device: `auto` takes it; the run is the XLA one's within rounding."""
    require_native()
    devices = jax.devices()[:1]
    monkeypatch.setattr(mesh_lib.jax, 'devices', lambda: devices)
    records = {}
    for kernel in ('native', 'xla'):
        config = tiny_config(**{'model.kernel': kernel, 'train.epochs': 1})
        records[kernel] = fit.fit(config, str(tmp_path / kernel)).best
    for name in ('train_loss', 'test_loss'):
        assert records['native'][name] == pytest.approx(records['xla'][name], rel=1e-3)

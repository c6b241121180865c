"""RDNet: its parts by hand, its fields, and all that uses models with it."""

import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from flax_densenet import UserError, create_model, init_variables
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.evaluation import evaluate
from flax_densenet.export import formats
from flax_densenet.inference import predictor as predictor_lib
from flax_densenet.kernels import depthwise
from flax_densenet.models import factory, layers, rdnet_layers, summary
from flax_densenet.settings import ModelSettings
from flax_densenet.train import announce, finetune, fit, prepare
from flax_densenet.weights import trained as trained_lib
from flax_densenet.weights import transfer, weight_file
from helpers.marks import exhaustive_after
from helpers.rdnets import TINY, make_images, shaken, tiny
from helpers.runs import tiny_config, write_images


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_gelu(dtype):
    """As Flax's, which computes the same by another function."""
    x = jnp.linspace(-9, 9, 1001).astype(dtype)
    found, pull = jax.vjp(rdnet_layers._gelu, x)
    expected, expected_pull = jax.vjp(lambda x: nn.gelu(x, approximate=False), x)
    assert found.dtype == x.dtype
    tolerance = {'float32': 1e-6, 'bfloat16': 1e-2}[dtype]
    for ours, theirs in ((found, expected), (*pull(x), *expected_pull(x))):
        np.testing.assert_allclose(
            np.float32(ours), np.float32(theirs), rtol=tolerance, atol=tolerance
        )


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_depthwise(dtype):
    """The CPU's way and its gradients are those of XLA's convolution."""
    rng = np.random.default_rng(0)
    x, kernel, gradient = (
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape in ((2, 5, 9, 4), (7, 7, 1, 4), (2, 5, 9, 4))
    )
    found = []
    for function in (depthwise._by_rows, depthwise._convolution):
        y, pull = jax.vjp(function, x, kernel)
        found.append((y, *pull(gradient)))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        scale = float(jnp.abs(theirs).max())
        error = np.abs(np.float32(ours) - np.float32(theirs)).max()
        assert error < scale * (1e-6 if dtype == 'float32' else 2e-2)


@pytest.mark.slow
def test_by_hand():
    """A block of two layers with squeeze-excitation, in numpy."""
    module = tiny(block_sizes=(2,), growth_rates=(8,), halvings=(), squeeze_blocks=(1,))
    variables, images = shaken(module), make_images((2, 6), count=2)
    params = variables['params']

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * p['scale'] + p['bias']

    def product(x, p):
        return x @ p['kernel'][0, 0] + p['bias']

    patches = images.reshape(2, 1, 2, 3, 2, 3).transpose(0, 1, 3, 2, 4, 5)
    stem = params['conv0']
    x = np.einsum('nhwijc,ijcf->nhwf', patches, stem['kernel']) + stem['bias']
    x = norm(x, params['norm0'])
    erf = np.vectorize(math.erf)
    for name in ('denselayer1', 'denselayer2'):
        p = params['denseblock1'][name]
        padded = np.pad(x, ((0, 0), (3, 3), (3, 3), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (7, 7), (1, 2))
        y = np.einsum('nhwcij,ijc->nhwc', windows, p['conv1']['kernel'][:, :, 0])
        y = norm(y + p['conv1']['bias'], p['norm1'])
        y = product(y, p['conv2'])
        y = product(y * (1 + erf(y / np.sqrt(2))) / 2, p['conv3'])
        gate = product(y.mean((1, 2), keepdims=True), p['gate'])
        y = y * np.clip(gate + 3, 0, 6) / 6 * p['gamma']
        x = np.concatenate([x, y], -1)

    @jax.jit
    def run(images):
        features = module.apply(variables, images, method='features')
        pooled = module.apply(variables, features, method='pool')
        return features, pooled, module.apply(variables, images)

    features, pooled, logits = run(images)
    np.testing.assert_allclose(features, x, rtol=1e-4, atol=1e-5)
    x = norm(x.mean((1, 2)), params['norm'])
    np.testing.assert_allclose(pooled, x, rtol=1e-3, atol=1e-4)
    head = params['classifier']
    x = x @ head['kernel'] + head['bias']
    np.testing.assert_allclose(logits, x, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_parts_and_first_variables():
    module = tiny(layer_scale=0.25, drop_path_rate=0.5, block_sizes=(1, 2))
    variables = init_variables(module, 0)
    assert variables['batch_stats'] == {}
    params = variables['params']
    assert set(params) == set().union(*module.stages())
    np.testing.assert_array_equal(params['denseblock2']['denselayer2']['gamma'], 0.25)
    kernel = params['denseblock2']['denselayer2']['conv1']['kernel']
    assert kernel.std() == pytest.approx(np.sqrt(2 / 49), rel=0.1)
    theirs = jax.eval_shape(module.init, jax.random.key(0), make_images())
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, theirs['params'])
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    assert sum(sizes) == module.count_parameters()
    apply = functools.partial(module.apply, method='pyramid')
    levels = jax.eval_shape(apply, variables, make_images((12, 8)))
    assert [level.shape for level in levels] == [(3, 6, 4, 16), (3, 3, 2, 24)]
    assert module.smallest_image_size() == 4
    assert module.last_map_side(15) == 3
    with pytest.raises(UserError, match='3x8 are too small .* use at least 4x4'):
        module.apply(variables, make_images((3, 8)))


@pytest.mark.slow
def test_stochastic_depth():
    """Images lose a layer's maps whole, and those that keep them have them scaled."""
    images = make_images(count=64, size=(4, 4))
    module = tiny(block_sizes=(2,), growth_rates=(8,), halvings=(), squeeze_blocks=(),
                  drop_path_rate=0.4)  # fmt: skip
    variables = shaken(module)
    features = jax.jit(functools.partial(module.apply, method='features'))
    whole = features(variables, images)

    @functools.partial(jax.jit, static_argnames=('module', 'frozen'))
    def run(key, module=module, frozen=0):
        rngs = {'dropout': jax.random.key(key)}
        return module.apply(
            variables, images, True, frozen, rngs=rngs, method='features'
        )

    found = np.array(run(0))
    np.testing.assert_allclose(found[..., :16], whole[..., :16], rtol=1e-5, atol=1e-6)
    kept = np.array([bool(image.any()) for image in found[..., 16:]])
    assert 0.4 < kept.mean() < 0.8
    expected = np.where(kept[:, None, None, None], whole[..., 16:] / 0.6, 0)
    np.testing.assert_allclose(found[..., 16:], expected, rtol=1e-4, atol=1e-5)
    assert not np.array_equal(found, run(1))
    np.testing.assert_allclose(run(0, frozen=2), whole, rtol=1e-5, atol=1e-6)
    dropped = run(0, module=module.clone(drop_path_rate=0.0, dropout_rate=0.3))
    assert 0.25 < (np.array(dropped)[..., 8:] == 0).mean() < 0.35


@pytest.mark.exhaustive
@pytest.mark.slow
def test_remat_changes_no_gradient():
    images = make_images()

    def gradients(module):
        def loss(params):
            rngs = {'dropout': jax.random.key(0)}
            return module.apply({'params': params}, images, True, rngs=rngs).sum()

        return jax.jit(jax.grad(loss))(shaken(module)['params'])

    plain, again = (tiny(drop_path_rate=0.5, remat=r) for r in ('none', 'block'))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        gradients(plain),
        gradients(again),
    )
    text = jax.make_jaxpr(functools.partial(again.apply, train=False))
    assert 'remat' in str(text(shaken(again), images))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Two epochs of digits; (workdir, config)."""
    workdir = tmp_path_factory.mktemp('rdnet')
    config = tiny_config(
        **{f'model.{name}': value for name, value in TINY.items()},
        **{'model.variant': 'rdnet_tiny', 'model.layer_scale': 0.5},
        **{'model.drop_path_rate': 0.2, 'data.batch_size': 100},
    )
    fit.fit(config, str(workdir))
    return str(workdir), config


def read_records(workdir):
    text = (pathlib.Path(workdir) / 'metrics.jsonl').read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.slow
def test_training_and_all_after_it(trained, tmp_path, capsys):
    """Learns; predicts, explains; exported and read it is the same."""
    workdir, config = trained
    records = read_records(workdir)
    assert records[-1]['test_accuracy'] > 0.6
    loaded = trained_lib.load_trained(workdir)
    assert loaded.variables['batch_stats'] == {}
    predictor = predictor_lib.load_trained(workdir, batch_size=4)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    _, features = predictor.compute(pixels)
    assert features.shape == (3, predictor.feature_size) == (3, 16)
    assert predictor.cams(pixels).shape == (3, 2, 2)
    assert (predictor.cams(pixels, [1, 1, 1]) > 0).any()
    formats.save(str(tmp_path / 'x.safetensors'), loaded, 'safetensors')
    other = predictor_lib.load_trained(tmp_path / 'x.safetensors', batch_size=4)
    assert other.trained.module == loaded.module
    jax.tree.map(
        np.testing.assert_array_equal,
        other.trained.variables,
        jax.device_get(loaded.variables),
    )
    with pytest.raises(UserError, match=r'keras.applications has no rdnet_tiny; use'):
        formats.save(str(tmp_path / 'x.keras'), loaded, 'keras')


@pytest.mark.slow
def test_a_run_goes_on(trained, tmp_path, capsys):
    workdir, config = trained
    more = config | {'train': config['train'] | {'epochs': 3}}
    fit.fit(more, workdir)
    assert 'resuming after epoch 2' in capsys.readouterr().out
    assert checkpoint_reader.find_latest(workdir).step == 44
    other = config | {'model': config['model'] | {'layer_scale': 0.1}}
    with pytest.raises(UserError, match='holds a run with model.layer_scale=0.5'):
        fit.fit(other, workdir)


def test_one_image_a_batch(tmp_path, monkeypatch, capsys):
    """What batch norm cannot do with it is no matter here."""
    mesh = mesh_lib.make_mesh(jax.devices()[:1])
    monkeypatch.setattr(mesh_lib, 'make_mesh', lambda: mesh)
    fields = {f'model.{name}': value for name, value in TINY.items()}
    for overrides, warns in (
        ({'model.variant': 'BC-L10k4'}, True),
        ({'model.variant': 'rdnet_tiny'} | fields, False),
    ):
        config = tiny_config(**{'data.batch_size': 1}, **overrides)
        announce.announce(prepare.prepare(config, str(tmp_path)))
        assert ('warning: data.batch_size=1' in capsys.readouterr().out) == warns


@pytest.mark.exhaustive
@pytest.mark.slow
def test_fine_tuning(trained, tmp_path, capsys):
    """New classes, a frozen backbone and its cached features: the head alone learns."""
    workdir, config = trained
    photos = write_images(tmp_path / 'photos', {'a': 12, 'b': 12}, size=(10, 10))
    config = tiny_config(
        **{'data.source': f'folder:{photos}', 'data.batch_size': 4},
        **{'model.variant': None, 'train.freeze': 'backbone', 'train.epochs': 3},
        **{'optimizer.learning_rate': 0.1},
    ) | {'init_from': workdir}
    config['model']['drop_path_rate'] = 0.1
    fit.fit(config, str(tmp_path / 'run'))
    out = capsys.readouterr().out
    assert 'frozen: conv0 to norm' in out and 'features of 24 images, 16 each' in out
    assert 'the classifier starts new' in out
    records = read_records(tmp_path / 'run')
    ours = trained_lib.load_trained(str(tmp_path / 'run'))
    theirs = trained_lib.load_trained(workdir)
    assert ours.module.drop_path_rate == 0.1
    for name, part in theirs.variables['params'].items():
        same = jax.tree.map(np.array_equal, part, ours.variables['params'][name])
        assert jax.tree.all(same) == (name != 'classifier')
    # Test figures come from cached features in the run, and from images here.
    run = prepare.prepare(config, str(tmp_path / 'again'))
    best = max(records, key=checkpoint_reader.rank)
    found = evaluate.evaluate(
        ours.module, ours.variables, run.source.test, batch_size=4, mesh=run.mesh,
        **run.preprocessing,
    )  # fmt: skip
    assert found['loss'] == pytest.approx(best['test_loss'], rel=1e-4)
    assert finetune.count_frozen(ours.module, 'denseblock2') == 3


def test_summary():
    module = tiny()
    lines = summary.format_summary(module, (8, 12, 3)).splitlines()
    table = {line.split()[0]: line.split()[1:] for line in lines}
    assert table['total'][0] == f'{module.count_parameters():,}'
    assert table['transition1'][0] == '2x3x8'
    inner, positions = 49 * 8 + 8 * 32 + 32 * 8, 4 * 6
    (row,) = [r for r in summary.count_model(module, (8, 12, 3)) if 'block1' in r[0]]
    assert row[3] == inner * positions


@pytest.fixture
def weights(tmp_path):
    """A file, in less time than a run."""
    path, module = str(tmp_path / 'x.safetensors'), tiny(num_classes=10)
    metadata = {'model': {'variant': 'rdnet_tiny'} | TINY | {'layer_scale': 0.5}}
    metadata |= {'class_names': [f'class {n}' for n in range(10)], 'image_size': 8}
    metadata |= {'mean': [0.5] * 3, 'std': [0.25] * 3, 'data': {}}
    model = trained_lib.Trained(module, shaken(module), metadata, {}, 1, None)
    formats.save(path, model, 'safetensors')
    return path


@pytest.mark.parametrize(
    'kind', ['weights', pytest.param('trained', marks=pytest.mark.slow)]
)
def test_weights_and_config_that_differ(kind, request):
    path = request.getfixturevalue(kind)
    found = weight_file.load(path if kind == 'weights' else path[0])
    settled = transfer.resolve_model(ModelSettings(), found)
    assert factory.from_settings(settled, num_classes=10) == found.module
    for fields, message in (
        (
            {'variant': 'densenet121'},
            'holds a rdnet_tiny; the config says model.variant=',
        ),
        (
            {'growth_rate': 12},
            'config says model.growth_rate=12: leave',
        ),
        ({'stem_features': 12}, 'with stem_features=8; the config'),
    ):
        with pytest.raises(UserError, match=message):
            transfer.resolve_model(ModelSettings(**fields), found)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'growth_rate': 12}, 'model.growth_rate=12: rdnet_tiny has no such field'),
        ({'kernel': 'cuda'}, 'model.kernel=cuda is not known; use auto, native, xla'),
        ({'blur_pool': True}, 'model.blur_pool=True: rdnet_tiny has no such field'),
        (
            {'depth': 3},
            'model.depth is not a field of the model; it has block_sizes, bottleneck',
        ),
        ({'growth_rates': (8,)}, r'growth_rates=\(8,\) must be 2 whole numbers'),
        ({'growth_rates': (8, 0)}, r'growth_rates=\(8, 0\) must be 2 whole numbers'),
        ({'growth_rates': '88'}, "growth_rates='88' must be whole numbers in brackets"),
        ({'halvings': (2,)}, 'must be different numbers from 1 to 1, or none'),
        ({'squeeze_blocks': (1, 1)}, 'must be different numbers from 1 to 2, or none'),
        ({'drop_path_rate': 1.0}, 'drop_path_rate=1.0 must be at least 0, and below 1'),
        ({'layer_scale': -0.1}, 'layer_scale=-0.1 must be from 0 to 1'),
        ({'bottleneck': 0}, 'bottleneck=0 must be at least 1'),
        ({'patch_size': 0}, 'patch_size=0 must be from 1 to 64'),
        ({'epsilon': 0.0}, 'epsilon=0.0 must be above 0, and at most 1'),
        ({'remat': 'all'}, 'model.remat=all is not known; use none, block'),
        ({'compression': 0.1}, 'leave a part of the network without features'),
        ({'stem_features': 10**7}, 'lower model.growth_rates='),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        tiny(**fields)


def test_fields_of_the_other_network():
    """Of a config left as it was they say nothing."""
    assert tiny(fast=True, kernel='auto', growth_rate=None) == tiny()
    with pytest.raises(UserError, match='layer_scale=0.1: densenet121 has no such'):
        create_model('densenet121', num_classes=2, layer_scale=0.1)


@pytest.mark.slow
def test_blur():
    x = np.random.default_rng(0).standard_normal((1, 5, 6, 1)).astype('f4')
    padded = np.pad(x[0, ..., 0], 1, mode='reflect')
    weight = np.outer([1, 2, 1], [1, 2, 1]) / 16
    expected = [
        [(padded[i : i + 3, j : j + 3] * weight).sum() for j in range(0, 6, 2)]
        for i in range(0, 5, 2)
    ]
    np.testing.assert_allclose(layers.blur_pool(x)[0, ..., 0], expected, atol=1e-6)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize('fast', exhaustive_after(1, [True, False]))
def test_deep_stem_and_blur(fast):
    fields = dict(num_classes=2, growth_rate=4, block_sizes=(1, 2), stem_features=8)
    module = create_model('densenetblur121d', **fields, fast=fast)
    assert (module.stem, module.blur_pool) == ('deep', True)
    assert module.stages()[0][-1] == 'norm2'
    variables = init_variables(module, 0)
    assert set(variables['params']) == set().union(*module.stages())
    leaves = jax.tree.leaves(variables['params'])
    assert sum(leaf.size for leaf in leaves) == module.count_parameters()
    sharp = create_model('densenetblur121d', **fields, fast=fast, blur_pool=False)

    @jax.jit
    def run(variables, images):
        blurred, other = (
            m.apply(variables, images, method='pyramid') for m in (module, sharp)
        )
        _, updated = module.apply(
            variables, images, train=True, mutable=['batch_stats']
        )
        return blurred, other, updated['batch_stats']

    blurred, other, updated = run(variables, make_images((13, 18)))
    assert blurred[0].shape == (3, 4, 5, 12) and blurred[1].shape == (3, 2, 2, 14)
    assert [x.shape for x in blurred] == [x.shape for x in other]
    assert not np.allclose(blurred[0], other[0])
    for name in ('norm0', 'norm1', 'norm2'):
        assert np.abs(updated[name]['mean']).max() > 0
    with pytest.raises(UserError, match='blur_pool=True: the cifar stem'):
        create_model('BC-L10k4', num_classes=2, blur_pool=True)

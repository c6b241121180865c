"""Weights from files: what is read, how it is checked, and what comes out again."""

import json
import pickle
import shutil
import struct
import zipfile

import numpy as np
import pytest
from flax import traverse_util

from flax_densenet import UserError, settings
from flax_densenet.export import formats
from flax_densenet.models import factory
from flax_densenet.train import fit
from flax_densenet.weights import channels as channels_lib
from flax_densenet.weights import torch_names, torch_pickle, transfer, weight_file
from flax_densenet.weights import trained as trained_lib
from helpers.networks import compiled
from helpers.paths import shared
from helpers.runs import tiny_config
from helpers.weight_files import (
    assert_same,
    flat,
    state_dict,
    tiny,
    trained_of,
    write_safetensors,
)


@pytest.mark.parametrize(
    'name',
    [
        'tiny_torchvision.pth',
        'tiny_torchvision.safetensors',
        'tiny_chexnet_style.pth.tar',
    ],
)
def test_reference_files(name, tmp_path):
    """Logits of torchvision; whatever the file is called."""
    path = tmp_path / 'anything.bin'
    shutil.copy(shared(f'reference/{name}'), path)
    found = weight_file.load(str(path))
    assert (found.family, found.num_classes) == ('torchvision', 5)
    assert found.fields == {
        'variant': 'densenet121', 'growth_rate': 4, 'block_sizes': (2, 3),
        'bottleneck': 2, 'compression': 0.5, 'stem': 'imagenet', 'stem_features': 8,
    }  # fmt: skip
    assert found.preprocessing['crop_fraction'] == 0.875
    reference = np.load(shared('reference/tiny_torchvision_logits.npz'))
    images = np.random.default_rng(2026).standard_normal((2, 64, 64, 3))
    logits = compiled(found.module)(found.variables, images.astype(np.float32))
    expected = reference['logits']
    assert np.abs(logits - expected).max() < 1e-5 * expected.std()


def test_safetensors_there_and_back(tmp_path):
    module, variables = tiny()
    path = str(tmp_path / 'x.safetensors')
    formats.save(path, trained_of(module, variables), 'safetensors')
    found = weight_file.load(path)
    assert_same(found.variables, variables)
    assert found.family == 'flax_densenet'
    assert found.class_names == tuple(f'class {n}' for n in range(5))
    assert found.preprocessing['image_size'] == 48
    assert found.preprocessing['resize'] == 'crop'
    assert found.preprocessing['mean'] == (0.5,) * 3
    loaded = trained_lib.load_trained(path)
    assert loaded.class_names == found.class_names and loaded.step is None
    assert [p.name for p in tmp_path.iterdir()] == ['x.safetensors']


@pytest.mark.slow
def test_another_epsilon_goes_into_the_variances():
    module, variables = tiny(epsilon=1e-3)
    arrays = formats.torch_arrays(module, variables)
    key = 'features.norm0.running_var'
    expected = variables['batch_stats']['norm0']['var'] + np.float32(1e-3 - 1e-5)
    np.testing.assert_array_equal(arrays[key], expected)
    images = np.random.default_rng(0).standard_normal((2, 40, 40, 3)).astype('f4')
    renamed = torch_names.rename('x', arrays).arrays
    plain = module.clone(epsilon=1e-5)
    expected = compiled(module)(variables, images)
    renamed = traverse_util.unflatten_dict(renamed, sep='/')
    found = compiled(plain)(renamed, images)
    assert np.abs(found - expected).max() < 1e-5 * expected.std()
    low = flat(variables) | {'batch_stats/norm0/var': np.zeros(8, np.float32)}
    low = traverse_util.unflatten_dict(low, sep='/')
    with pytest.raises(UserError, match=r'batch_stats/norm0/var: .* below 0'):
        formats.torch_arrays(module.clone(epsilon=1e-6), low)


@pytest.mark.parametrize('prefix', ['', 'module.', 'densenet121.', 'model.backbone.'])
@pytest.mark.parametrize('head', ['classifier', 'classifier.0', 'fc', 'head'])
def test_prefixes_and_heads(prefix, head, tmp_path):
    arrays = {
        prefix + name.replace('classifier', head): array
        for name, array in state_dict().items()
    }
    found = weight_file.load(write_safetensors(tmp_path / 'x', arrays))
    assert_same(found.variables, tiny()[1])


def test_a_head_beside_the_prefixed_backbone(tmp_path):
    arrays = {
        f'model.{name}' if name.startswith('features') else name: array
        for name, array in state_dict().items()
    }
    found = weight_file.load(write_safetensors(tmp_path / 'x', arrays))
    assert found.num_classes == 5


def test_every_key_is_accounted_for(tmp_path):
    arrays = state_dict()
    del arrays['features.norm5.bias']
    arrays['features.extra.weight'] = np.zeros((2, 2, 3, 3), np.float32)
    arrays['something'] = np.zeros(3, np.float32)
    arrays['features.denseblock1.denselayer2.norm1.weight'] = np.zeros(3, np.float32)
    with pytest.raises(UserError) as caught:
        weight_file.load(write_safetensors(tmp_path / 'x', arrays))
    message = str(caught.value)
    assert '1 missing: features.norm5.bias' in message
    assert '2 unexpected: features.extra.weight, something' in message
    key = 'features.denseblock1.denselayer2.norm1.weight'
    assert f'1 of another shape: {key} [3], not [12]' in message


@pytest.mark.parametrize(
    ('fields', 'variant'),
    [
        (dict(growth_rate=12, block_sizes=(16, 16, 16), bottleneck=4, stem='cifar',
              stem_features=24), 'BC-L100k12'),
        (dict(growth_rate=12, block_sizes=(12, 12, 12), bottleneck=0, stem='cifar',
              stem_features=16, compression=1.0), 'L40k12'),
    ],
)  # fmt: skip
def test_the_architecture_is_read_off(fields, variant, tmp_path):
    module, variables = tiny(**fields)
    path = str(tmp_path / 'x')
    arrays = formats.torch_arrays(module, variables)
    found = weight_file.load(write_safetensors(path, arrays))
    assert found.fields == {'variant': variant}
    assert_same(found.variables, variables)


def test_an_unusual_compression(tmp_path):
    module, variables = tiny(compression=0.7)
    path = write_safetensors(tmp_path / 'x', formats.torch_arrays(module, variables))
    assert weight_file.load(path).fields['compression'] == 0.7


def test_config_and_weights_disagree(tmp_path):
    path = write_safetensors(tmp_path / 'x', state_dict())
    found = weight_file.load(path)
    fields = settings.ModelSettings(variant='densenet161')
    with pytest.raises(UserError) as caught:
        transfer.resolve_model(fields, found)
    for part in (
        'growth_rate=4',
        'growth_rate=48',
        'block_sizes=(2, 3)',
        'variant out',
    ):
        assert part in str(caught.value)
    settled = transfer.resolve_model(settings.ModelSettings(), found)
    assert factory.from_settings(settled, num_classes=5) == found.module
    with pytest.raises(UserError, match='bottleneck=2; the config says bottleneck=4'):
        transfer.resolve_model(settings.ModelSettings(bottleneck=4), found)


def test_preprocessing_comes_with_the_weights(tmp_path, capsys):
    path = write_safetensors(tmp_path / 'x', state_dict())
    found = weight_file.load(path)
    settled = transfer.resolve_preparation(settings.PreparationSettings(), found)
    wanted = dict(
        image_size=224, resize='crop', crop_fraction=0.875, interpolation='bilinear',
        channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), window=None,
        bit_depth=0,
    )  # fmt: skip
    assert vars(settled) == wanted
    assert capsys.readouterr().out == ''
    given = settings.PreparationSettings(std=(1.0, 1.0, 1.0))
    transfer.resolve_preparation(given, found)
    assert (
        'made with data.std=(0.229, 0.224, 0.225); the config says (1.0, 1.0, 1.0)'
        in (capsys.readouterr().out)
    )


def test_timm_writes_beside_the_file(tmp_path):
    config = {
        'pretrained_cfg': {
            'input_size': [3, 288, 288], 'crop_pct': 0.95, 'interpolation': 'bicubic',
            'mean': [0.5, 0.5, 0.5], 'std': [0.5, 0.5, 0.5],
        }
    }  # fmt: skip
    (tmp_path / 'config.json').write_text(json.dumps(config))
    path = write_safetensors(tmp_path / 'model.safetensors', state_dict())
    found = weight_file.load(path)
    assert found.family == 'timm'
    assert found.preprocessing == dict(
        image_size=288, resize='crop', crop_fraction=0.95, interpolation='bicubic',
        mean=(0.5,) * 3, std=(0.5,) * 3, channels=3,
    )  # fmt: skip


def test_chest_x_rays(tmp_path):
    arrays = state_dict(num_classes=18, channels=1)
    arrays['op_threshs'] = np.linspace(0.1, 0.9, 18).astype(np.float32)
    found = weight_file.load(write_safetensors(tmp_path / 'x', arrays))
    assert found.family == 'torchxrayvision'
    preprocessing = found.preprocessing
    (mean,), (std,) = preprocessing['mean'], preprocessing['std']
    values = (np.array([0, 127.5, 255]) / 255 - mean) / std
    np.testing.assert_allclose(values, [-1024, 0, 1024])
    assert preprocessing['channels'] == 1
    assert len(found.metadata['operating_points']) == 18


@pytest.mark.parametrize(('old', 'new'), [(3, 1), (1, 3), (3, 4)])
def test_channels_are_converted(old, new):
    """Equal channels in, the same out, as timm does."""
    kernel = np.random.default_rng(0).standard_normal((7, 7, old, 8)).astype('f4')
    converted = channels_lib.convert_channels(kernel, new)
    assert converted.shape == (7, 7, new, 8)
    if 3 in (old, new) and 1 in (old, new):
        np.testing.assert_allclose(converted.sum(2), kernel.sum(2), atol=1e-5)


@pytest.mark.slow
def test_a_run_from_weights(tmp_path, capsys):
    """A file, to a run of gray images and other classes; then evaluation and export."""
    path = write_safetensors(tmp_path / 'x', state_dict(stem='cifar'))
    config = tiny_config(
        **{
            'model.variant': None, 'data.image_size': 16, 'data.channels': 1,
            'data.batch_size': 64, 'train.epochs': 1, 'optimizer.learning_rate': 1e-7,
        }
    )  # fmt: skip
    config['init_from'] = path
    workdir = str(tmp_path / 'run')
    fit.fit(config, workdir)
    out = capsys.readouterr().out
    assert f'{path}: it has 5 classes, not 10: the classifier starts new' in out
    assert 'made for images with 3 channels; for data.channels=1 its first ' in out
    assert 'made with data.image_size=224; the config says 16, which is used' in out
    loaded = trained_lib.load_trained(workdir)
    assert loaded.metadata['data']['mean'] == pytest.approx([0.449])
    kernel = loaded.variables['params']['conv0']['kernel']
    expected = tiny(stem='cifar')[1]['params']['conv0']['kernel'].sum(2, keepdims=True)
    np.testing.assert_allclose(kernel, expected, atol=1e-5)
    # The weights' file is not needed to go on.
    config['train']['epochs'] = 2
    (tmp_path / 'x').unlink()
    fit.fit(config, workdir)
    assert 'resuming after epoch 1' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'is empty; download it again'),
        (b'<!DOCTYPE html><html>', 'holds no weights: it is a web page'),
        (b'\x1f\x8b\x08' + bytes(40), 'holds no weights: it is compressed'),
        (b'some text that is long enough', 'holds no weights'),
        (b'\x89PNG\r\n\x1a\n' + bytes(40), 'holds no weights'),
        (struct.pack('<Q', 500) + b'{"a": ', 'is not a valid safetensors file'),
        (struct.pack('<Q', 1 << 60) + b'{"a": ', 'is not a valid safetensors file'),
        (b'\x80\x02' + b'garbage', 'is not a valid torch file'),
        (pickle.dumps({'a': 1}, 2), 'not one of torch.save'),
        (b'PK\x03\x04' + bytes(40), 'is not a valid torch file'),
    ],
)
def test_files_that_hold_no_weights(content, message, tmp_path):
    path = tmp_path / 'x.pth'
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        weight_file.load(str(path))
    assert '\n' not in str(caught.value)


def test_another_network(tmp_path):
    arrays = {
        'conv1.weight': np.zeros((64, 3, 7, 7), np.float32),
        'layer1.0.conv1.weight': np.zeros((64, 64, 3, 3), np.float32),
        'fc.weight': np.zeros((10, 64), np.float32),
    }
    path = write_safetensors(tmp_path / 'resnet.safetensors', arrays)
    with pytest.raises(UserError, match='holds no DenseNet: it has 3 arrays'):
        weight_file.load(path)
    with pytest.raises(UserError, match='nowhere.pth: there is no such file'):
        weight_file.load(str(tmp_path / 'nowhere.pth'))


class Evil:
    """Its pickle would make a folder when it is read by pickle itself."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


@pytest.mark.parametrize('archive', [True, False])
def test_nothing_runs_from_a_file(archive, tmp_path):
    made = str(tmp_path / 'made')
    pickled = pickle.dumps({'state_dict': Evil(made)}, 2)
    path = str(tmp_path / 'evil.pth')
    if archive:
        with zipfile.ZipFile(path, 'w') as file:
            file.writestr('x/data.pkl', pickled)
    else:
        magic = pickle.dumps(torch_pickle._LEGACY_MAGIC, 2)
        rest = pickle.dumps(1001, 2) + pickle.dumps({}, 2)
        (tmp_path / 'evil.pth').write_bytes(magic + rest + pickled)
    with pytest.raises(UserError, match=r'needs \w+\.mkdir, .* none of it was run'):
        weight_file.load(path)
    assert not (tmp_path / 'made').exists()
    pickle.loads(pickled)  # the trap is a real one
    assert (tmp_path / 'made').exists()


def test_errors_of_export(tmp_path):
    trained = trained_of(*tiny(padding='same'))
    with pytest.raises(UserError, match='model.padding=same: torchvision'):
        formats.save(str(tmp_path / 'x.safetensors'), trained, 'safetensors')
    with pytest.raises(UserError, match='--format=caffe is not known; use safetens'):
        formats.save('x.caffe', trained, 'caffe')
    with pytest.raises(UserError, match='ends with .pth or .pt'):
        formats.save('x.safetensors', trained, 'torch')
    trained = trained_of(*tiny())
    with pytest.raises(UserError, match='none/x.safetensors cannot be written'):
        formats.save(str(tmp_path / 'none' / 'x.safetensors'), trained, 'safetensors')

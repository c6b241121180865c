"""Published names with files that the real libraries write, at full size.

The files have the published names and layouts, and random weights. Each is served,
loaded by its name, and its fingerprint compared with that of the library's own outputs.
"""

import dataclasses
import inspect
import io
import os
import pathlib
import re

import numpy as np
import pytest

from flax_densenet.data import images
from flax_densenet.inference import check
from flax_densenet.weights import download, published
from helpers import file_hosts

pytestmark = pytest.mark.slow


@pytest.fixture
def serve(host, monkeypatch, tmp_path):
    """Serves a file under the published name of an entry, and gives its fingerprint."""

    def put(name, content, logits):
        entry = published.find(name)
        file = entry.address.rpartition('/')[2]
        (tmp_path / file).write_bytes(content)
        digits = download.digest(tmp_path / file)
        changed = dataclasses.replace(
            entry,
            address=host.put(f'/{file}', content),
            checksum=download.Checksum('sha256', digits),
            fingerprint=check.fingerprint(logits),
        )
        table = [changed if e.name == name else e for e in published.TABLE]
        monkeypatch.setattr(published, 'TABLE', published.WeightsTable(table))
        # About what is published.
        size = entry.size or 4 * entry.parameters
        assert 0.95 < len(content) / size < 1.1
        return changed

    return put


def photo(name):
    """The photograph as the table says, float32 `[1, S, S, C]`."""
    entry = published.find(name)
    fields = dict(entry.preparation)
    mean, std = (np.array(fields.pop(key), np.float32) for key in ('mean', 'std'))
    pixels = check.load_photo(images.Preparation(fields.pop('image_size'), **fields))
    return ((pixels / np.float32(255) - mean) / std)[None].astype(np.float32)


def assert_verified(name, top=5):
    found = check.verify(name)
    assert found.agrees, found
    assert len(found.top) == top and 'verified: the published file' in str(found)
    other = tuple(number + 0.02 * found.found[-1] for number in found.found)
    assert not check.is_same(other, found.found)
    return found


@pytest.fixture(scope='module')
def torch():
    torch = pytest.importorskip('torch')
    from benchmarks import torch_models

    torch_models.import_torchvision()
    return torch


def assert_published(name, address, digits, classes):
    entry = published.find(name)
    assert entry.address == address
    assert entry.checksum is None or entry.checksum.digits == digits
    assert classes is None or list(entry.class_names) == classes
    return entry


def test_table_is_that_of_torchvision(torch):
    models = pytest.importorskip('torchvision.models')
    for size in 121, 161, 169, 201:
        found = getattr(models, f'DenseNet{size}_Weights').IMAGENET1K_V1
        digits = found.url.rpartition('-')[2].removesuffix('.pth')
        name, classes = f'torchvision:densenet{size}', found.meta['categories']
        entry = assert_published(name, found.url, digits, classes)
        assert entry.parameters == found.meta['num_params']
        top1, top5 = found.meta['_metrics']['ImageNet-1K'].values()
        assert entry.accuracy == f'{top1:.2f}% top-1, {top5:.2f}% top-5'
        assert abs(entry.size / 2**20 - found.meta['_file_size']) < 1e-3
        prepare, ours = found.transforms(), entry.preparation
        assert prepare.crop_size == [ours['image_size']]
        assert prepare.resize_size == [ours['image_size'] / ours['crop_fraction']]
        assert prepare.interpolation.value == ours['interpolation']
        assert (*prepare.mean, *prepare.std) == (*ours['mean'], *ours['std'])


def test_table_is_that_of_torchxrayvision(torch):
    urls = pytest.importorskip('torchxrayvision.models').model_urls
    names = {e.name.removeprefix('xrv:') for e in published.list_weights('xrv:')}
    assert names == {name for name in urls if name.startswith('densenet121-')}
    for name in names:
        url, labels = urls[name]['weights_url'], urls[name]['labels']
        entry = assert_published(f'xrv:{name}', url, None, None)
        empty = [number for number, label in enumerate(labels) if not label]
        assert list(entry.untrained) == empty
        trained = zip(labels, entry.class_names, strict=True)
        assert all(label in ('', ours) for label, ours in trained)


def test_table_is_that_of_timm(torch):
    models = pytest.importorskip('timm.models')
    for entry in published.list_weights('hf:'):
        found = models.get_pretrained_cfg(entry.name.rpartition('/')[2])
        assert f'hf:{found.hf_hub_id}' == entry.name and found.license in entry.license
        ours = entry.preparation
        assert found.input_size == (3, ours['image_size'], ours['image_size'])
        assert found.crop_pct == ours['crop_fraction']
        assert found.interpolation == ours['interpolation']
        assert (found.mean, found.std) == (ours['mean'], ours['std'])


def run(torch, model, name):
    """A file of the model as published, and its outputs for the photograph."""
    batch = torch.from_numpy(photo(name)).permute(0, 3, 1, 2)
    with torch.no_grad():
        return model.eval()(batch).numpy()[0]


def stir(torch, model):
    """Statistics and weights that are not those of a new network."""
    torch.manual_seed(0)
    for key, array in model.state_dict().items():
        if key.endswith('running_mean'):
            array.normal_(0, 0.1)
        elif key.endswith('running_var'):
            array.uniform_(0.5, 1.5)
    return model


def saved(torch, content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.exhaustive
def test_torchvision(torch, serve):
    """With the old names (`norm.1`) that the published files have."""
    models = pytest.importorskip('torchvision.models')
    name = 'torchvision:densenet121'
    model = stir(torch, models.densenet121(weights=None))
    logits = run(torch, model, name)
    arrays = {
        key.replace('.norm1.', '.norm.1.')
        .replace('.norm2.', '.norm.2.')
        .replace('.conv1.', '.conv.1.')
        .replace('.conv2.', '.conv.2.'): array
        for key, array in model.state_dict().items()
        if 'num_batches_tracked' not in key
    }
    assert any('.norm.1.' in key for key in arrays)
    serve(name, saved(torch, arrays), logits)
    found = assert_verified(name)
    assert found.top[0][0] in published.find(name).class_names


@pytest.mark.exhaustive
def test_torchxrayvision(torch, serve):
    """A pickled network, as published."""
    models = pytest.importorskip('torchxrayvision.models')
    name = 'xrv:densenet121-res224-nih'
    model = stir(torch, models.DenseNet(num_classes=18, in_channels=1))
    logits = run(torch, model, name)
    serve(name, saved(torch, model), logits)
    found = assert_verified(name)
    assert any('(not trained)' in label for label in published.find(name).class_names)
    assert all(0 <= share <= 1 for _, share in found.top)


@pytest.mark.exhaustive
def test_timm(torch, host, monkeypatch, tmp_path):
    """A folder of the Hub as timm saves it, through huggingface_hub."""
    timm = pytest.importorskip('timm')
    from timm.models import _hub

    name = 'hf:timm/densenet121.ra_in1k'
    model = stir(torch, timm.create_model('densenet121.ra_in1k', pretrained=False))
    logits = run(torch, model, name)
    _hub.save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
    files = {p.name: p.read_bytes() for p in (tmp_path / 'saved').iterdir()}
    host.put_repo('timm/densenet121.ra_in1k', files)
    table = [
        dataclasses.replace(e, fingerprint=check.fingerprint(logits))
        if e.name == name
        else e
        for e in published.TABLE
    ]
    monkeypatch.setattr(published, 'TABLE', published.WeightsTable(table))
    assert_verified(name)
    assert file_hosts.COMMIT and host.count('GET', '/timm/') == 2


@pytest.fixture(scope='module')
def keras():
    pytest.importorskip('h5py')
    os.environ.setdefault('KERAS_BACKEND', 'jax')
    return pytest.importorskip('keras')


def test_table_is_that_of_keras(keras):
    from keras.src.applications import densenet

    source = inspect.getsource(densenet)
    for size in 121, 169, 201:
        for ending, of_constant in ('', ''), ('-notop', '_NO_TOP'):
            constant = f'DENSENET{size}_WEIGHT_PATH{of_constant}'
            digits = re.search(rf'{constant},\s+[^)]*?file_hash="(\w+)"', source)[1]
            name, address = f'keras:densenet{size}{ending}', getattr(densenet, constant)
            assert_published(name, address, digits, None)


@pytest.mark.exhaustive
def test_keras_without_top(keras, serve, tmp_path):
    import jax

    name = 'keras:densenet121-notop'
    with jax.numpy_rank_promotion('allow'):
        model = keras.applications.DenseNet121(
            weights=None, include_top=False, pooling='avg'
        )
        outputs = np.asarray(model(photo(name)))[0]
    path = tmp_path / 'written.weights.h5'
    model.save_weights(path)
    serve(name, pathlib.Path(path).read_bytes(), outputs)
    assert_verified(name, top=0)


@pytest.mark.exhaustive
def test_keras(keras, serve, tmp_path, monkeypatch):
    """With the classifier, in the old layout and with the old names of layers."""
    import h5py
    import jax
    from keras.src.legacy.saving import legacy_h5_format

    name = 'keras:densenet121'
    with jax.numpy_rank_promotion('allow'):
        model = keras.applications.DenseNet121(weights=None, classifier_activation=None)
        outputs = np.asarray(model(photo(name)))[0]
    old = {'conv1_conv': 'conv1/conv', 'conv1_bn': 'conv1/bn', 'predictions': 'fc1000'}
    for layer in model.layers:
        layer.name = old.get(layer.name, layer.name)
    with h5py.File(tmp_path / 'written.h5', 'w') as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)
        assert 'conv1/conv' in file and 'fc1000' in file
    serve(name, (tmp_path / 'written.h5').read_bytes(), outputs)
    assert_verified(name)

"""Keras' files against Keras: equal logits, other people's files, files that attack.

Most need `pip install 'flax_densenet[keras]'` and are skipped without.
"""

import contextlib
import json
import os
import sys
import zipfile

import jax
import numpy as np
import pytest
from flax import traverse_util

from flax_densenet import create_model
from flax_densenet.errors import UserError
from flax_densenet.weights import (
    choices,
    hdf5,
    keras_files,
    keras_layers,
    weight_file,
)
from helpers.keras_networks import (
    BLOCKS,
    ENDINGS,
    KERAS_FIELDS,
    assert_equal,
    equal_arrays,
    images,
    make_keras,
    ours,
    run_keras,
    run_ours,
    save,
    scramble,
)
from helpers.marks import exhaustive_after

pytestmark = pytest.mark.usefixtures('keras_promotes_ranks')

FULL = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32)}
_EXHAUSTIVE = pytest.mark.exhaustive


def test_names():
    for name, module in {
        'conv1/conv': 'conv0',
        'densenet121/conv1/bn/conv1/bn': 'norm0',
        'conv5_block16_2_conv': 'denseblock4/denselayer16/conv2',
        'conv5_block16_0_bn': 'denseblock4/denselayer16/norm1',
        'conv5_block16_1_bn': 'denseblock4/denselayer16/norm2',
        'stack4_block16_2_bn': 'denseblock4/denselayer16/norm2',
        'pool2_bn': 'transition1/norm',
        'transition3_conv': 'transition3/conv',
        'bn': 'norm5',
        'stack1_block1_0_bn': None,
        'conv2d_4': None,
        'head_bn': None,
    }.items():
        assert keras_layers.module_of(name) == module, name


def test_recognize(tmp_path):
    def written(name, content):
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    def archive(name, members):
        with zipfile.ZipFile(tmp_path / name, 'w') as file:
            for member in members:
                file.writestr(member, b'0' * 100)
        return str(tmp_path / name)

    assert keras_files.is_keras_file(written('weights', hdf5.SIGNATURE + b'...'))
    whole = archive('a', ['metadata.json', 'config.json', 'model.weights.h5'])
    assert keras_files.is_keras_file(whole)
    with open(whole, 'rb') as file:
        assert keras_files.is_keras_file(written('cut', file.read()[:200]))
    assert not keras_files.is_keras_file(
        archive('torch.pth', ['a/data.pkl', 'a/data/0'])
    )
    assert not keras_files.is_keras_file(written('empty.h5', b''))
    assert not keras_files.is_keras_file(str(tmp_path / 'none'))
    assert not keras_files.is_keras_file(str(tmp_path))


def test_without_the_packages(tmp_path, monkeypatch):
    (tmp_path / 'a.h5').write_bytes(hdf5.SIGNATURE)
    for name in ('h5py', 'keras'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'flax_densenet\[keras\]'"):
        keras_files.read(str(tmp_path / 'a.h5'))
    module, variables = ours()
    with pytest.raises(UserError, match=r"pip install 'flax_densenet\[keras\]'"):
        keras_files.write(str(tmp_path / 'b.h5'), module, variables)


@pytest.mark.parametrize('classes', exhaustive_after(1, [5, 0]))
def test_read(keras, tmp_path, classes):
    """All formats, with and without classifier, at an odd size."""
    network = make_keras(keras, classes=classes)
    x = images()
    logits = run_keras(network, x)
    found = [save(network, tmp_path / f'a{ending}') for ending in ENDINGS]
    first, *others = (keras_files.read(path) for path in found)
    assert first[1:] == (KERAS_FIELDS, 'keras')
    ours = run_ours(first[0], first[1], x)
    # Ours ends before the last ReLU.
    assert_equal(ours if classes else np.maximum(ours, 0), logits)
    for arrays, fields, family in others:
        assert (fields, family) == first[1:]
        equal_arrays(arrays, first[0])


def test_padding_shows(keras, tmp_path):
    """At even sizes the two paddings differ; the comparison above would see it."""
    network = make_keras(keras)
    arrays, fields, _ = keras_files.read(save(network, tmp_path / 'a.keras'))
    x = images(64, 96)
    logits = run_keras(network, x)
    assert_equal(run_ours(arrays, fields, x), logits)
    other = run_ours(arrays, fields | {'padding': 'same'}, x)
    assert np.abs(other - logits).max() > 1e-2 * logits.std()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ('depth', 'classes'),
    [(121, 1000), *(pytest.param(*n, marks=_EXHAUSTIVE) for n in ((169, 7), (201, 0)))],
)
def test_full_size(keras, tmp_path, depth, classes):
    name = f'DenseNet{depth}'
    network = make_keras(keras, FULL[depth], classes=classes)
    path = save(network, tmp_path / 'a.weights.h5')
    x = images(*((224, 224) if classes == 1000 else (97, 131)))
    arrays, fields, _ = keras_files.read(path)
    ours = run_ours(arrays, fields, x, blocks=FULL[depth])
    assert_equal(ours if classes else np.maximum(ours, 0), run_keras(network, x))
    # What was written comes back through the public function.
    module = create_model(name.lower(), num_classes=classes, **fields)
    variables = traverse_util.unflatten_dict(arrays, sep='/')
    keras_files.write(str(tmp_path / 'b.h5'), module, variables)
    loaded = getattr(keras.applications, name)(
        weights=str(tmp_path / 'b.h5'),
        include_top=classes > 0,
        classes=classes or 1000,
        classifier_activation=None,
        input_tensor=keras.Input((None, None, 3)),
    )
    np.testing.assert_array_equal(run_keras(loaded, x), run_keras(network, x))


def test_training_state_is_left_out(keras, tmp_path):
    network = make_keras(keras, (1, 1, 1, 1), size=32)
    plain = save(network, tmp_path / 'plain.h5')
    expected, _, _ = keras_files.read(plain)
    network.compile('adam', 'mse', metrics=['mae'])
    network.optimizer.build(network.trainable_variables)
    for ending in ENDINGS:
        path = save(network, tmp_path / f'a{ending}')
        # Adam's two moments triple the file.
        assert os.path.getsize(path) > 2 * os.path.getsize(plain)
        equal_arrays(keras_files.read(path)[0], expected)


@pytest.mark.parametrize('ending', exhaustive_after(1, ENDINGS))
def test_network_inside_another(keras, tmp_path, ending):
    base = make_keras(keras, classes=0, size=64)
    layers = keras.layers
    network = keras.Sequential(
        [
            keras.Input((64, 64, 3)),
            layers.RandomFlip(),
            base,
            layers.GlobalAveragePooling2D(),
            layers.Dropout(0.2),
            layers.Dense(4),
        ]
    )
    scramble(network)
    # Keras writes the arrays of frozen layers after all others.
    for layer in base.layers[:20]:
        layer.trainable = False
    arrays, fields, family = keras_files.read(save(network, tmp_path / f'a{ending}'))
    assert (fields, family) == (KERAS_FIELDS, 'keras')
    x = images(64, 64)
    assert_equal(run_ours(arrays, fields, x), run_keras(network, x))


def head_of(keras, kind):
    """Layers of a head, by the name of the test."""
    layers = keras.layers
    mean, dense = layers.GlobalAveragePooling2D(), layers.Dense
    norm = layers.BatchNormalization()  # its epsilon is another than the network's
    heads = {
        'two layers': [mean, dense(8, 'relu'), layers.Dropout(0.5), dense(4)],
        'norms': [mean, norm, dense(8), layers.ReLU(), layers.Dropout(0.5), dense(4)],
        'norm in between': [mean, dense(8, 'relu'), norm, dense(4), layers.Softmax()],
        'norm in front of ReLU': [
            *(mean, dense(8, use_bias=False), norm, layers.Activation('relu')),
            *(dense(8, 'linear'), dense(6, 'relu'), dense(4, 'sigmoid')),
        ],
        'maximum': [layers.GlobalMaxPooling2D(), layers.Flatten(), dense(4)],
    }
    return heads[kind]


KINDS = (
    *('two layers', 'norms', 'norm in between', 'norm in front of ReLU'),
    'maximum',
)


@pytest.mark.parametrize('ending', exhaustive_after(1, ['.keras', '.h5']))
@pytest.mark.parametrize('kind', exhaustive_after(2, KINDS))
def test_heads_of_several_layers(kind, ending, keras, tmp_path):
    base = make_keras(keras, (1, 1, 1, 1), classes=0, size=32)
    network = keras.Sequential([keras.Input((32, 32, 3)), base, *head_of(keras, kind)])
    scramble(network)
    found = weight_file.load(save(network, tmp_path / f'a{ending}'))
    assert not found.head and not found.notes
    last = {'norm in front of ReLU': 'sigmoid', 'norm in between': 'softmax'}
    assert found.outputs == last.get(kind)
    x = images(32, 32)
    activations = {'sigmoid': jax.nn.sigmoid, 'softmax': jax.nn.softmax}
    activate = activations.get(found.outputs, lambda x: x)
    ours = activate(jax.jit(found.module.apply)(found.variables, x))
    assert_equal(ours, run_keras(network, x))


def test_heads_that_are_refused(keras, tmp_path):
    layers, base = keras.layers, make_keras(keras, (1, 1, 1, 1), classes=0, size=32)
    mean = layers.GlobalAveragePooling2D

    def read(*head, ending='.keras'):
        network = keras.Sequential([keras.Input((32, 32, 3)), base, *head])
        return weight_file.load(save(network, tmp_path / f'a{ending}'))

    refused = {
        'tanh': [mean(), layers.Dense(8, 'tanh'), layers.Dense(4)],
        'LayerNorm': [mean(), layers.LayerNormalization(center=False), layers.Dense(4)],
        'comes before the pooling': [layers.Dense(4), mean()],
    }
    for reason, head in refused.items():
        found = None
        with contextlib.suppress(UserError):  # arrays that nothing reads
            found = read(*head)
        assert found is None or reason in found.head_reason, reason
        assert found is None or found.num_classes == 0
    found = read(mean(), layers.Dense(8, 'relu'), layers.Dense(4), ending='.weights.h5')
    assert 'a ReLU between' in found.notes[0] and found.num_classes == 4
    found = read(mean(), layers.Dense(8), layers.BatchNormalization(), layers.Dense(4),
        ending='.weights.h5')  # fmt: skip
    assert 'is unclear' in found.head_reason and not found.num_classes
    # Two outputs, one beside the other.
    features = mean()(base.output)
    network = keras.Model(
        base.input, [layers.Dense(4)(features), layers.Dense(4)(features)]
    )
    found = weight_file.load(save(network, tmp_path / 'two.keras'))
    assert 'takes' in found.head_reason and not found.num_classes


def test_a_network_that_is_there_twice(keras, tmp_path, caplog):
    one, other = (make_keras(keras, (1, 1, 1, 1), classes=0, size=32) for _ in '12')
    other.name = 'other'
    given = keras.Input((32, 32, 3))
    sums = keras.layers.Add()([one(given), other(given)])
    network = keras.Model(given, keras.layers.GlobalAveragePooling2D()(sums))
    path = save(network, tmp_path / 'a.weights.h5')
    arrays = keras_files.read(path)[0]
    assert 'holds the same network twice' in caplog.text
    equal_arrays(arrays, keras_files.read(save(one, tmp_path / 'one.keras'))[0])
    scramble(other, seed=1)
    with pytest.raises(UserError, match='holds two networks, with .*; choose one'):
        keras_files.read(save(network, tmp_path / 'a.weights.h5'))


def test_a_sequential_whose_configuration_is_a_list(keras, h5py, tmp_path):
    """As Keras wrote it before 2.2.3."""
    base = make_keras(keras, (1, 1, 1, 1), classes=0, size=32)
    layers = [base, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(4)]
    front = keras.layers.Rescaling(1 / 127.5, -1.0)
    network = keras.Sequential([keras.Input((32, 32, 3)), front, *layers])
    scramble(network)
    path = save(network, tmp_path / 'a.h5')
    new = weight_file.load(path)
    with h5py.File(path, 'r+') as file:
        config = json.loads(file.attrs['model_config'])
        config['config'] = config['config']['layers']
        file.attrs['model_config'] = json.dumps(config)
    old = weight_file.load(path)
    assert old.preprocessing == new.preprocessing and 'std' in new.prepared
    assert old.fields == new.fields and old.num_classes == 4


def test_through_the_front_door(keras, tmp_path):
    """The preparation of images is the family's and that of the layers in front."""
    base = make_keras(keras, classes=0, size=64)
    layers = keras.layers
    network = keras.Sequential(
        [
            keras.Input((64, 64, 3)),
            layers.Rescaling(0.5, -1.0),
            base,
            layers.GlobalAveragePooling2D(),
            layers.Dense(4),
        ]
    )
    path = save(network, tmp_path / 'a.keras')
    found = weight_file.load(path)
    assert found.preprocessing['std'] == pytest.approx((1 / 127.5,) * 3)
    assert found.preprocessing['mean'] == pytest.approx((1 / 127.5,) * 3)
    assert found.preprocessing['image_size'] == 64 and found.outputs is None
    assert (found.family, found.num_classes) == ('keras', 4)
    assert found.fields['block_sizes'] == BLOCKS
    assert found.fields['epsilon'] == pytest.approx(1.001e-5)
    assert found.preprocessing['resize'] == 'stretch'
    x = images(64, 64)
    pooled = run_keras(network.layers[-2], run_keras(base, x))
    expected = run_keras(network.layers[-1], pooled)
    assert_equal(jax.jit(found.module.apply)(found.variables, x), expected)


def test_lambda_does_not_run(keras, tmp_path):
    marker = tmp_path / 'ran'
    ran = str(marker)
    base = make_keras(keras, (1, 1, 1, 1), classes=0, size=32)
    code = keras.layers.Lambda(lambda x: (open(ran, 'w').close(), x)[1])
    network = keras.Sequential([keras.Input((32, 32, 3)), code, base])
    path = save(network, tmp_path / 'a.keras')
    marker.unlink()  # It ran while the network was made.
    assert len(keras_files.read(path)[0]) == 64
    # What it does to images cannot be known, so nothing is assumed.
    with pytest.raises(UserError, match=r'its layer \w+ \(Lambda\) prepares images in'):
        choices.check_read(weight_file.load(path), {})
    assert not marker.exists()


def test_layers_without_names(keras, h5py, tmp_path):
    """As before Keras 3.6: the layers are known by their order."""
    network = make_keras(keras)
    path = save(network, tmp_path / 'a.weights.h5')
    expected, fields, _ = keras_files.read(path)
    with h5py.File(path, 'r+') as file:
        for layer in file['layers'].values():
            del layer['vars'].attrs['name']
    arrays, again, family = keras_files.read(path)
    assert (again, family) == (fields, 'keras')
    equal_arrays(arrays, expected)
    with h5py.File(path, 'r+') as file:
        del file['layers/batch_normalization_3']
    arrays, _, _ = keras_files.read(path)
    assert not any(name.startswith(('params/norm', 'params/den')) for name in arrays)
    assert 'layers/batch_normalization_4/vars/0' in arrays


def first_names(name):
    """The names of the published files: a stem `conv1/conv`, classifier `fc1000`."""
    stem = {'conv1_conv': 'conv1/conv', 'conv1_bn': 'conv1/bn'}
    return stem.get(name, 'fc1000' if name == 'predictions' else name)


def numbered_names():
    """Names as Keras makes them in a session that has made other networks before."""
    counts = {'conv2d': 120, 'batch_normalization': 7, 'dense': 0}

    def rename(name):
        kind = 'dense' if name == 'predictions' else 'conv2d'
        kind = 'batch_normalization' if name.endswith('bn') else kind
        counts[kind] += 1
        return f'{kind}_{counts[kind]}'

    return rename


@pytest.mark.parametrize('top', ['', 'model_weights/'])
@pytest.mark.parametrize('rename', [first_names, numbered_names()])
def test_before_keras_3(keras, h5py, tmp_path, rename, top):
    network = make_keras(keras)
    expected, _, _ = keras_files.read(save(network, tmp_path / 'a.keras'))
    with h5py.File(tmp_path / 'b.h5', 'w') as file:
        names = []
        for layer in network.layers:
            if not layer.weights:
                continue
            names.append(rename(layer.name))
            for weight in layer.weights:
                leaf = weight.path.rpartition('/')[2]
                file[f'{top}{names[-1]}/{names[-1]}/{leaf}:0'] = np.asarray(weight)
        # As Keras does where one attribute would be too large.
        group = file[top or '/']
        group.attrs['layer_names0'] = [name.encode() for name in names[:9]]
        group.attrs['layer_names1'] = [name.encode() for name in names[9:]]
    arrays, fields, family = keras_files.read(str(tmp_path / 'b.h5'))
    assert (fields, family) == (KERAS_FIELDS, 'keras')
    equal_arrays(arrays, expected)


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float64'])
def test_other_precisions(keras, tmp_path, dtype):
    network = make_keras(keras, (1, 1, 1, 1))
    # A policy set on the layers themselves would need double precision in JAX.
    kernel = np.asarray(network.get_layer('conv1_conv').weights[0])
    h5py = pytest.importorskip('h5py')
    ml_dtypes = pytest.importorskip('ml_dtypes')
    wanted = kernel.astype(getattr(ml_dtypes, dtype, dtype))
    with h5py.File(save(network, tmp_path / 'a.weights.h5'), 'r+') as file:
        del file['layers/conv2d/vars/0']
        file['layers/conv2d/vars'].create_dataset('0', data=wanted)
    arrays, _, _ = keras_files.read(str(tmp_path / 'a.weights.h5'))
    found = arrays['params/conv0/kernel']
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted.astype(np.float32))


@pytest.fixture
def hub(keras):
    keras_hub = pytest.importorskip('keras_hub')
    backbone = keras_hub.models.DenseNetBackbone(list(BLOCKS))
    return scramble(
        keras_hub.models.DenseNetImageClassifier(backbone=backbone, num_classes=5)
    )


def test_keras_hub(hub, tmp_path):
    x = images(98, 131)
    logits = run_keras(hub, x)
    hub.save_to_preset(str(tmp_path / 'preset'))
    paths = [save(hub, tmp_path / f'a{ending}') for ending in ENDINGS]
    paths.append(str(tmp_path / 'preset' / 'task.weights.h5'))
    expected, fields, _ = keras_files.read(paths[0])
    assert_equal(run_ours(expected, fields, x), logits)
    for path in paths:
        arrays, fields, family = keras_files.read(path)
        assert (fields, family) == (KERAS_FIELDS | {'padding': 'same'}, 'keras_hub')
        equal_arrays(arrays, expected)
    paths = [save(hub.backbone, tmp_path / f'b{ending}') for ending in ENDINGS]
    for path in (*paths, str(tmp_path / 'preset' / 'model.weights.h5')):
        arrays, fields, family = keras_files.read(path)
        assert (fields['padding'], family) == ('same', 'keras_hub')
        for name in ('kernel', 'bias'):
            arrays[f'params/classifier/{name}'] = expected[f'params/classifier/{name}']
        equal_arrays(arrays, expected)

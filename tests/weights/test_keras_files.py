"""Keras' files against Keras: equal logits, other people's files, files that attack.

Most need `pip install 'flax_densenet[keras]'` and are skipped without.
"""

import os
import sys
import zipfile

import jax
import numpy as np
import pytest
from flax import traverse_util

from flax_densenet import create_model
from flax_densenet.errors import UserError
from flax_densenet.models.initialization import variable_shapes
from flax_densenet.weights import hdf5, keras_files, keras_layers, weight_file

# Read by Keras when it is imported, in the tests that need it.
os.environ.setdefault('KERAS_BACKEND', 'jax')
# Two layers in some blocks; with 16 kernels, conv2d_10 sorts before conv2d_2 as text.
BLOCKS = (1, 2, 1, 2)
FULL = {
    'DenseNet121': (6, 12, 24, 16),
    'DenseNet169': (6, 12, 32, 32),
    'DenseNet201': (6, 12, 48, 32),
}
KERAS_FIELDS = dict(
    epsilon=1.001e-5, momentum=0.99, unbiased_variance=False, padding='torch'
)
ENDINGS = ('.weights.h5', '.keras', '.h5')


@pytest.fixture(autouse=True)
def keras_promotes_ranks():
    """conftest.py forbids it to us; Keras adds biases that way."""
    with jax.numpy_rank_promotion('allow'):
        yield


@pytest.fixture
def h5py():
    return pytest.importorskip('h5py')


@pytest.fixture
def keras(h5py):
    return pytest.importorskip('keras')


def make_keras(keras, blocks=BLOCKS, *, classes=5, size=None, **fields):
    from keras.src.applications.densenet import DenseNet

    return scramble(
        DenseNet(
            list(blocks),
            weights=None,
            include_top=classes > 0,
            classes=classes or 1000,
            classifier_activation=None,
            input_tensor=keras.Input((size, size, 3)),
            **fields,
        )
    )


def scramble(network, seed=0):
    """Random weights and statistics, of a size that keeps the activations."""
    rng = np.random.default_rng(seed)

    def draw(variable):
        shape, name = tuple(variable.shape), variable.path.rpartition('/')[2]
        if name == 'kernel':
            return rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[:-1]))
        if name in ('gamma', 'moving_variance'):
            return rng.uniform(0.5, 1.5, shape)
        return 0.2 * rng.standard_normal(shape)

    network.set_weights([draw(v).astype(np.float32) for v in network.weights])
    return network


def images(height=97, width=131, channels=3):
    shape = (2, height, width, channels)
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


def run_keras(network, x):
    return np.asarray(jax.jit(lambda x: network(x, training=False))(x))


def run_ours(arrays, fields, x, *, blocks=BLOCKS):
    classes = arrays.get('params/classifier/bias', np.zeros(0)).size
    module = create_model(
        'densenet121', num_classes=classes, block_sizes=blocks, **fields
    )
    shapes = traverse_util.flatten_dict(variable_shapes(module), sep='/')
    assert {k: v.shape for k, v in arrays.items()} == {
        k: v.shape for k, v in shapes.items()
    }
    assert all(array.dtype == np.float32 for array in arrays.values())
    variables = traverse_util.unflatten_dict(arrays, sep='/')
    method = None if classes else 'features'
    return np.asarray(
        jax.jit(lambda v, x: module.apply(v, x, method=method))(variables, x)
    )


def assert_equal(found, expected):
    assert found.shape == expected.shape
    assert expected.std() > 0.01
    # Measured: at most 1e-6 of the spread, 2e-6 for the full-size networks.
    assert np.abs(found - expected).max() < 1e-4 * expected.std()


def equal_arrays(found, expected):
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])


def save(network, path):
    (network.save_weights if str(path).endswith('.weights.h5') else network.save)(path)
    return str(path)


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


def _external_link(h5py, file, elsewhere):
    file['conv/kernel:0'] = h5py.ExternalLink(str(elsewhere), 'secret')


def _soft_link(h5py, file, elsewhere):
    file['conv/kernel:0'] = h5py.SoftLink('/other')


def _external_storage(h5py, file, elsewhere):
    storage = [(str(elsewhere), 0, 400)]
    file.create_dataset('conv/kernel:0', (100,), 'f4', external=storage)


def _virtual(h5py, file, elsewhere):
    layout = h5py.VirtualLayout((100,), 'f4')
    layout[:] = h5py.VirtualSource(str(elsewhere), 'secret', (100,))
    file.create_virtual_dataset('conv/kernel:0', layout)


def _huge(h5py, file, elsewhere):
    file.create_dataset('conv/kernel:0', (2**20, 2**20), 'f4', chunks=(64, 64))


def _endless(h5py, file, elsewhere):
    file['a/b/c'] = file.create_group('a')


def _text(h5py, file, elsewhere):
    file['conv/kernel:0'] = ['kernel']


@pytest.mark.parametrize(
    ('attack', 'reason'),
    [
        (_external_link, 'conv/kernel:0 is a link'),
        (_soft_link, 'conv/kernel:0 is a link'),
        (_external_storage, 'conv/kernel:0 keeps its values in another file'),
        (_virtual, 'conv/kernel:0 keeps its values in another file'),
        (_huge, 'is too large for it'),
        (_endless, 'its groups never end'),
        (_text, 'holds no numbers'),
    ],
)
def test_nothing_outside_the_file_is_read(h5py, tmp_path, attack, reason):
    with h5py.File(tmp_path / 'elsewhere.h5', 'w') as file:
        file['secret'] = np.ones(100, np.float32)
    with h5py.File(tmp_path / 'a.h5', 'w') as file:
        attack(h5py, file, tmp_path / 'elsewhere.h5')
    with pytest.raises(UserError, match='a.h5 is not a valid Keras file') as error:
        keras_files.read(str(tmp_path / 'a.h5'))
    assert reason in str(error.value)
    assert '\n' not in str(error.value)


def test_broken_files(keras, tmp_path):
    network = make_keras(keras, (1, 1, 1, 1))
    for ending in ENDINGS:
        save(network, tmp_path / f'whole{ending}')
        content = (tmp_path / f'whole{ending}').read_bytes()
        path = tmp_path / f'cut{ending}'
        for length in (40, len(content) // 2, len(content) - 30):
            path.write_bytes(content[:length])
            with pytest.raises(UserError, match='is not a valid Keras file') as error:
                keras_files.read(str(path))
            assert '\n' not in str(error.value)
    with pytest.raises(UserError, match='none.h5 is not a file'):
        keras_files.read(str(tmp_path / 'none.h5'))


def test_archive_of_zeros(h5py, tmp_path):
    path = str(tmp_path / 'a.keras')
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
        file.writestr('config.json', '{}')
        file.writestr('model.weights.h5', bytes(2**24))
    with pytest.raises(UserError, match='16777216 bytes is too large'):
        keras_files.read(path)


@pytest.mark.parametrize('classes', [5, 0])
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


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'classes'), zip(FULL, (1000, 7, 0), strict=True))
def test_full_size(keras, tmp_path, name, classes):
    network = make_keras(keras, FULL[name], classes=classes)
    path = save(network, tmp_path / 'a.weights.h5')
    x = images(*((224, 224) if classes == 1000 else (97, 131)))
    arrays, fields, _ = keras_files.read(path)
    ours = run_ours(arrays, fields, x, blocks=FULL[name])
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


@pytest.mark.parametrize('ending', ENDINGS)
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


def test_other_heads(keras, tmp_path):
    layers, base = keras.layers, make_keras(keras, (1, 1, 1, 1), classes=0, size=32)

    def read(*head, start=()):
        network = keras.Sequential([keras.Input((32, 32, 3)), *start, base, *head])
        return keras_files.read(save(network, tmp_path / 'a.keras'))[0]

    mean = layers.GlobalAveragePooling2D()
    arrays = read(mean, layers.Dense(8, 'relu'), layers.BatchNormalization(
        epsilon=1.001e-5), layers.Dense(4))  # fmt: skip
    unknown = {name for name in arrays if not name.startswith(('params', 'batch_st'))}
    assert unknown == {
        *(f'layers/dense{number}/vars/{i}' for number in ('', '_1') for i in (0, 1)),
        *(f'layers/batch_normalization/vars/{i}' for i in range(4)),
    }
    with pytest.raises(UserError, match='takes the maximum'):
        read(layers.GlobalMaxPooling2D(), layers.Dense(4))
    with pytest.raises(UserError, match='several values of epsilon'):
        read(mean, layers.BatchNormalization())
    with pytest.warns(UserWarning, match=r"Rescaling \{'scale': 0.5, 'offset': -1"):
        read(mean, layers.Dense(4), start=[layers.Rescaling(0.5, -1.0)])


def test_through_the_front_door(keras, tmp_path, capsys):
    """The family's preparation of images; a line for what is left out."""
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
    assert (
        "its layer Rescaling {'scale': 0.5, 'offset': -1.0}" in capsys.readouterr().out
    )
    assert (found.family, found.num_classes) == ('keras', 4)
    assert found.fields['block_sizes'] == BLOCKS
    assert found.fields['epsilon'] == pytest.approx(1.001e-5)
    assert found.preprocessing['resize'] == 'stretch'
    x = images(64, 64)
    assert_equal(found.module.apply(found.variables, x), run_keras(network.layers[-1],
        run_keras(network.layers[-2], run_keras(base, x))))  # fmt: skip


def test_lambda_does_not_run(keras, tmp_path):
    marker = tmp_path / 'ran'
    ran = str(marker)
    base = make_keras(keras, (1, 1, 1, 1), classes=0, size=32)
    code = keras.layers.Lambda(lambda x: (open(ran, 'w').close(), x)[1])
    network = keras.Sequential([keras.Input((32, 32, 3)), code, base])
    path = save(network, tmp_path / 'a.keras')
    marker.unlink()  # It ran while the network was made.
    with pytest.warns(UserWarning, match='its layer Lambda is left out'):
        assert len(keras_files.read(path)[0]) == 64
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


def ours(num_classes=5, *, seed=0, channels=3, **fields):
    """A module and random variables for it, norms and statistics included."""
    fields = dict(block_sizes=BLOCKS, epsilon=1.001e-5) | fields
    module = create_model('densenet121', num_classes=num_classes, **fields)
    rng = np.random.default_rng(seed)
    shapes = traverse_util.flatten_dict(variable_shapes(module, channels=channels))
    flat = {}
    for path, leaf in shapes.items():
        draw = rng.standard_normal(leaf.shape)
        if path[-1] == 'kernel':
            flat[path] = draw * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        else:
            flat[path] = np.abs(draw) if path[-1] in ('scale', 'var') else 0.2 * draw
        flat[path] = flat[path].astype(np.float32)
    return module, traverse_util.unflatten_dict(flat)


def logits_of(module, variables, x):
    found = jax.jit(module.apply)(variables, x)
    if not module.num_classes:
        apply = jax.jit(lambda v, x: module.apply(v, x, method='features'))
        found = np.maximum(apply(variables, x), 0)
    return np.asarray(found)


@pytest.mark.parametrize('ending', ENDINGS)
@pytest.mark.parametrize('classes', [5, 0])
def test_write(keras, tmp_path, ending, classes):
    module, variables = ours(classes)
    path = str(tmp_path / f'a{ending}')
    keras_files.write(path, module, variables)
    arrays, fields, family = keras_files.read(path)
    assert (fields, family) == (KERAS_FIELDS, 'keras')
    equal_arrays(arrays, traverse_util.flatten_dict(variables, sep='/'))
    assert os.listdir(tmp_path) == [f'a{ending}']
    x, wanted = images(), None
    wanted = logits_of(module, variables, x)
    network = make_keras(keras, classes=classes)
    network.load_weights(path)
    assert_equal(run_keras(network, x), wanted)
    if ending != '.weights.h5':
        network = keras.models.load_model(path, compile=False)
        if classes:
            assert network.layers[-1].activation is keras.activations.softmax
            network.layers[-1].activation = keras.activations.linear
        assert_equal(run_keras(network, x), wanted)


@pytest.mark.parametrize('epsilon', [1e-5, 1e-3])
def test_write_another_epsilon(keras, tmp_path, epsilon):
    """The same function, also where a variance is (next to) nothing."""
    module, variables = ours(epsilon=epsilon)
    for path, array in traverse_util.flatten_dict(variables['batch_stats']).items():
        if path[-1] == 'var':
            array[:3] = 0.0, 1e-12, 5e-9
    path = str(tmp_path / 'a.weights.h5')
    keras_files.write(path, module, variables)
    network = make_keras(keras)
    network.load_weights(path)
    # Features that were constant in training are multiplied by 300: a small input.
    x = 1e-2 * images()
    assert_equal(run_keras(network, x), logits_of(module, variables, x))
    arrays, fields, _ = keras_files.read(path)
    assert_equal(run_ours(arrays, fields, x), logits_of(module, variables, x))


def test_write_gray_images(keras, tmp_path):
    module, variables = ours(channels=1)
    path = str(tmp_path / 'a.keras')
    keras_files.write(path, module, variables)
    x = images(channels=1)
    network = keras.models.load_model(path, compile=False)
    network.layers[-1].activation = keras.activations.linear
    assert_equal(run_keras(network, x), logits_of(module, variables, x))


@pytest.mark.parametrize(
    ('fields', 'said'),
    [
        (dict(growth_rate=48), 'model.growth_rate=48, only with 32'),
        (dict(bottleneck=0), 'model.bottleneck=0, only with 4'),
        (dict(compression=1.0), 'model.compression=1.0, only with 0.5'),
        (dict(stem='cifar'), 'model.stem=cifar, only with imagenet'),
        (dict(stem_features=96), 'model.stem_features=96, only with 64'),
        (dict(padding='same'), 'model.padding=same, only with torch'),
        (dict(block_sizes=(1, 1)), r'model.block_sizes=\(1, 1\), only with four'),
    ],
)
def test_write_refuses(tmp_path, fields, said):
    module, variables = ours(**fields)
    with pytest.raises(UserError, match=said + r'.*; \.safetensors and \.pth files'):
        keras_files.write(str(tmp_path / 'a.keras'), module, variables)
    assert not os.listdir(tmp_path)


def test_write_keeps_the_old_file(keras, tmp_path, monkeypatch):
    module, variables = ours()
    (tmp_path / 'a.h5').write_text('old')
    with pytest.raises(UserError, match='end in .keras, .weights.h5 or .h5'):
        keras_files.write(str(tmp_path / 'a.txt'), module, variables)
    with pytest.raises(UserError, match=r'none/a.h5 cannot be written \(No such'):
        keras_files.write(str(tmp_path / 'none' / 'a.h5'), module, variables)

    def full(network, path):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(keras.Model, 'save', full)
    with pytest.raises(UserError, match=r'a.h5 cannot be written \(No space left'):
        keras_files.write(str(tmp_path / 'a.h5'), module, variables)
    assert os.listdir(tmp_path) == ['a.h5']
    assert (tmp_path / 'a.h5').read_text() == 'old'


@pytest.mark.parametrize('ending', ENDINGS)
@pytest.mark.parametrize('several', [False, True])
def test_code_of_cards(ending, several, keras, tmp_path, monkeypatch):
    """What a card says to do with a file gives the model's probabilities."""
    import re

    from PIL import Image

    from flax_densenet import init_variables
    from flax_densenet.export import formats, model_card
    from flax_densenet.weights import trained as trained_lib

    fields = {'variant': 'densenet121', 'block_sizes': BLOCKS}
    module = create_model(num_classes=3, **fields)
    variables = init_variables(module, 0)
    metadata = {
        'model': fields, 'class_names': ['a', 'b', 'c'], 'image_size': 64,
        'mean': [0.5] * 3, 'std': [0.25] * 3, 'multi_label': several, 'data': {},
    }  # fmt: skip
    trained = trained_lib.Trained(module, variables, metadata, {}, None, None)
    monkeypatch.chdir(tmp_path)
    formats.save('x' + ending, trained, 'keras')
    said = model_card.render(trained, file='x' + ending, file_format='keras')
    photo = np.random.default_rng(2).integers(0, 255, (90, 120, 3), np.uint8)
    Image.fromarray(photo).save('photo.jpg')
    names = {'print': lambda found: names.update(found=found)}
    for block in re.findall(r'```python\n(.*?)```', said, re.S):
        exec(block, names)
    logits = module.apply(variables, names['x'][None])
    expected = jax.nn.sigmoid(logits) if several else jax.nn.softmax(logits)
    np.testing.assert_allclose(names['found'], expected, atol=1e-4)

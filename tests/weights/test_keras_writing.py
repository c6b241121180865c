"""Files for Keras, read by Keras."""

import os

import jax
import numpy as np
import pytest
from flax import traverse_util

from flax_densenet import create_model
from flax_densenet.errors import UserError
from flax_densenet.weights import keras_files
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
)
from helpers.marks import exhaustive_after

pytestmark = pytest.mark.usefixtures('keras_promotes_ranks')


def logits_of(module, variables, x):
    found = jax.jit(module.apply)(variables, x)
    if not module.num_classes:
        apply = jax.jit(lambda v, x: module.apply(v, x, method='features'))
        found = np.maximum(apply(variables, x), 0)
    return np.asarray(found)


@pytest.mark.parametrize('ending', ENDINGS)
@pytest.mark.parametrize('classes', exhaustive_after(1, [5, 0]))
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


@pytest.mark.parametrize('epsilon', exhaustive_after(1, [1e-3, 1e-5]))
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


@pytest.mark.parametrize('ending', exhaustive_after(1, ENDINGS))
@pytest.mark.parametrize('several', exhaustive_after(1, [False, True]))
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
    logits = jax.jit(module.apply)(variables, names['x'][None])
    expected = jax.nn.sigmoid(logits) if several else jax.nn.softmax(logits)
    np.testing.assert_allclose(names['found'], expected, atol=1e-4)

"""Runs on images of other channels, from weights for images in color."""

import numpy as np
import pytest
from PIL import Image

import flax_densenet
from flax_densenet import UserError
from flax_densenet.export import formats
from flax_densenet.train import fit, prepare
from flax_densenet.weights import channels as channels_lib
from flax_densenet.weights import trained as trained_lib
from flax_densenet.weights import weight_file
from helpers.runs import make_weights, tiny_config


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp('rgba')
    rng = np.random.default_rng(0)
    for number, name in enumerate(('ants', 'bees')):
        (folder / name).mkdir()
        for index in range(10):
            pixels = rng.integers(0, 100, (12, 12, 4), np.uint8)
            pixels[..., 3] += 150 * number  # transparency alone tells the classes
            Image.fromarray(pixels, 'RGBA').save(folder / name / f'{index}.png')
    return folder


def config_of(photos, **fields):
    return tiny_config(
        **{
            'data.source': f'folder:{photos}',
            'data.channels': 4,
            'model.block_sizes': None,
            'data.batch_size': 8,
            'train.epochs': 1,
            **fields,
        }
    )


@pytest.mark.slow
def test_training_from_weights_in_color(photos, tmp_path, capfd):
    file = make_weights(tmp_path / 'x.safetensors')
    run = str(tmp_path / 'run')
    config = config_of(photos, **{'init_from': file})
    fit.fit(config, run)
    out = capfd.readouterr().out
    assert 'made for images with 3 channels; for data.channels=4 its first' in out
    assert 'repeated and multiplied by 3/4' in out
    model = flax_densenet.load(run)
    picture = photos / 'bees' / '0.png'
    assert model.load(str(picture)).shape == (8, 8, 4)
    array = np.asarray(Image.open(picture))
    same = [model.predict(one)[0].probabilities for one in (picture, array)]
    np.testing.assert_array_equal(*same)
    for wrong in (array[..., :3], array[..., 0]):
        with pytest.raises(UserError, match='not the 4 of data.channels=4'):
            model.predict(wrong)
    made = str(tmp_path / 'y.safetensors')
    formats.save(made, trained_lib.load_trained(run), 'safetensors')
    assert weight_file.load(made).preprocessing['channels'] == 4
    config = config_of(photos, **{'init_from': made, 'data.channels': 3})
    with pytest.raises(UserError, match='for images with 4 channels of an unknown'):
        fit.fit(config, str(tmp_path / 'other'))


def test_what_is_assumed_of_other_channels(photos, tmp_path, capfd):
    prepare.prepare(config_of(photos), str(tmp_path))
    out = capfd.readouterr().out
    assert 'data.mean=0.449 and data.std=0.226 are assumed for each of 4' in out
    given = {'data.mean': (0.5,) * 4, 'data.std': (0.2,) * 4}
    prepare.prepare(config_of(photos, **given), str(tmp_path))
    assert 'assumed' not in capfd.readouterr().out
    with pytest.raises(UserError, match='needs a number for each of 4 channels'):
        prepare.prepare(config_of(photos, **{'data.std': (0.2,)}), str(tmp_path))


def test_a_share_of_no_crop(photos, tmp_path, capfd):
    for resize, expected in (('stretch', True), ('crop', False)):
        fields = {'data.crop_fraction': 0.5, 'data.resize': resize}
        prepare.prepare(config_of(photos, **fields), str(tmp_path))
        said = 'data.crop_fraction=0.5 has no effect' in capfd.readouterr().out
        assert said == expected


@pytest.mark.parametrize(('old', 'new'), [(3, 1), (3, 2), (3, 4), (3, 7), (1, 3)])
def test_equal_channels_give_the_same(old, new):
    """As timm's adapt_input_conv; of colors in turn, the sum is kept."""
    kernel = np.random.default_rng(0).normal(size=(3, 3, old, 5)).astype(np.float32)
    kernel[...] = kernel.mean(2, keepdims=True)
    made = channels_lib.convert_channels(kernel, new)
    assert made.shape == (3, 3, new, 5)
    np.testing.assert_allclose(made.sum(2), kernel.sum(2), rtol=1e-5)

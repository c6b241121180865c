"""Images whose height and width differ: cut, resized, cropped at random."""

import numpy as np
import pytest
from PIL import Image

from flax_densenet import UserError
from flax_densenet.data import dataset, images, pipeline, upright
from flax_densenet.data.augment import geometry
from helpers.runs import write_images


def smooth(height, width):
    """An image whose colors change slowly, so that filters agree."""
    y, x = np.mgrid[:height, :width]
    planes = [255 * x / width, 255 * y / height, 127 + 127 * np.sin(6 * x / width)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


@pytest.mark.parametrize('shape', [(60, 200), (200, 60), (150, 75), (40, 20), (90, 91)])
@pytest.mark.parametrize('fraction', [1.0, 0.8])
def test_crop_covers_the_shape_and_cuts_the_center(shape, fraction):
    """As timm's ResizeKeepRatio and CenterCrop."""
    image, size = smooth(*shape), (64, 32)
    large = [int(n / fraction) for n in size]
    ratio = min(shape[0] / large[0], shape[1] / large[1])
    height, width = (round(n / ratio) for n in shape)
    whole = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - 32) / 2), round((height - 64) / 2)
    wanted = np.asarray(whole.crop((left, top, left + 32, top + 64)), int)
    how = images.Preparation(size, 'crop', fraction)
    found = images.prepare_image(image, how)
    assert found.shape == (64, 32, 3) and found.dtype == np.uint8
    assert np.abs(found - wanted).max() <= 4
    turned = images.prepare_image(image, images.Preparation((32, 64), 'crop', fraction))
    assert np.abs(turned[:32, :32].astype(int) - wanted[:32, :32]).max() > 4


def test_stretch_keeps_the_entire_image():
    image = smooth(50, 90)
    wanted = np.asarray(image.resize((10, 30), Image.Resampling.BILINEAR))
    assert (images.prepare_image(image, images.Preparation((30, 10))) == wanted).all()


@pytest.mark.parametrize('resize', images.RESIZES)
def test_a_very_large_image_is_reduced_without_losing_the_part(resize, monkeypatch):
    """A part of 1:12, longer than four times the side of a square."""
    image = smooth(128, 1536)
    how = images.Preparation((8, 96), resize)
    wanted = images.prepare_image(image, how).astype(int)
    monkeypatch.setattr(upright, 'LARGE', 10**4)
    found = images.prepare_image(image, how)
    assert (found != wanted).any() and np.abs(found - wanted).max() <= 3


def test_equal_sides_are_a_square():
    assert images.Preparation((16, 16)) == images.Preparation(16)
    assert images.Preparation([16, 8]).shape == (16, 8)


def test_a_random_part_has_the_shape_of_the_result():
    """Relative to it, the aspect is from 3:4 to 4:3."""
    rng = np.random.default_rng(0)
    parts = [geometry.crop_part((900, 900), rng, aspect=1 / 3) for _ in range(200)]
    aspects = [(right - left) / (low - top) * 3 for left, top, right, low in parts]
    inside = [0.74 < aspect < 1.35 for aspect in aspects]
    assert np.mean(inside) > 0.95 and np.std(aspects) > 0.1


@pytest.mark.parametrize('augment', geometry.RECIPES)
@pytest.mark.parametrize('cache', ['none', 'memory'])
def test_batches_have_the_shape(tmp_path, augment, cache):
    write_images(tmp_path, {'a': 4, 'b': 4}, size=(40, 70))
    source = dataset.load_source(
        f'folder:{tmp_path}', image_size=(24, 12), resize='crop', cache=cache
    )
    batches = pipeline.train_batches(
        source.train, batch_size=4, seed=0, augment=augment, threads=1
    )
    assert next(batches)['image'].shape == (4, 24, 12, 3)
    batches.close()
    assert source.train.at_size((12, 6))[0]['image'].shape == (12, 6, 3)


@pytest.mark.parametrize(
    ('size', 'message'),
    [
        ((0, 8), r'data.image_size=\(0,8\): each side must be from 1 to 65536'),
        ((8, 10**6), 'each side must be'),
        ((8, 8, 3), 'must be pixels'),
        ('8 by 9', 'must be pixels'),
    ],
)
def test_sizes_that_cannot_be(size, message):
    with pytest.raises(UserError, match=message):
        dataset.load_source('digits', image_size=size)


def test_the_cache_counts_both_sides():
    with pytest.raises(UserError, match=r'1797 images of 512x256 take 0\.66 GiB'):
        dataset.load_source(
            'digits', image_size=(512, 256), cache='memory', cache_limit_gib=0.5
        )

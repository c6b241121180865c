"""Properties of the random changes, each of which must also really change images."""

import numpy as np
import pytest
from PIL import Image

from flax_densenet.data import dataset, pipeline
from flax_densenet.data.augment import geometry
from helpers.runs import write_images

IMAGE = np.random.default_rng(0).integers(1, 256, (32, 24, 3), np.uint8)


def many(function, count=200):
    return [function(IMAGE, np.random.default_rng(seed)) for seed in range(count)]


def test_flip_is_a_mirror_half_of_the_time():
    flipped = [np.array_equal(image, IMAGE[:, ::-1]) for image in many(geometry.flip)]
    kept = [np.array_equal(image, IMAGE) for image in many(geometry.flip)]
    assert sum(flipped) + sum(kept) == 200
    assert 70 < sum(flipped) < 130


def test_shift_moves_by_up_to_an_eighth():
    padded = np.pad(IMAGE, ((4, 4), (3, 3), (0, 0)))
    windows = {
        padded[top : top + 32, left : left + 24].tobytes()
        for top in range(9)
        for left in range(7)
    }
    found = {image.tobytes() for image in many(geometry.shift, 600)}
    assert found == windows  # each of the 63 shifts, and nothing else


def test_crop_fills_the_image_with_a_part_of_it():
    constant = np.full((40, 40, 3), 77, np.uint8)
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None], (40, 40, 3))
    spans = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        np.testing.assert_array_equal(geometry.crop(constant, rng), constant)
        rows = geometry.crop(ramp, np.random.default_rng(seed))[:, 0, 0].astype(int)
        assert (np.diff(rows) >= 0).all()
        spans.append(rows[-1] - rows[0] + 1)
    assert min(spans) < 16 and max(spans) >= 38


def test_gray_images_are_cropped():
    gray = IMAGE[..., :1]
    found = [geometry.crop(gray, np.random.default_rng(seed)) for seed in range(9)]
    assert {image.shape for image in found} == {gray.shape}
    color = [geometry.crop(IMAGE, np.random.default_rng(seed)) for seed in range(9)]
    for one, other in zip(found, color, strict=True):
        np.testing.assert_array_equal(one, other[..., :1])


@pytest.mark.parametrize('channels', [3, 1])
def test_parts_are_cut_from_the_whole_photograph(tmp_path, channels):
    """And resized once, so that they have its detail."""
    write_images(tmp_path, {'a': 3, 'b': 3}, size=(120, 90))
    source = dataset.load_source(f'folder:{tmp_path}', image_size=16, channels=channels)
    picture = source.train.as_pictures()[0]['image']
    assert (picture.size, picture.mode) == ((120, 90), 'RGB')
    batches = pipeline.train_batches(
        source.train, batch_size=4, seed=0, threads=1, augment='crop_flip'
    )
    batch = next(batches)
    batches.close()
    assert batch['image'].shape == (4, 16, 16, channels)
    change = pipeline._Augment('crop_flip', (), 'none', source.train.preparation)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        found = change.random_map({'image': picture}, rng)['image']
        rng = np.random.default_rng(seed)
        box = geometry.crop_part(picture.size, rng)
        part = picture.resize((16, 16), Image.Resampling.BILINEAR, box=box)
        part = part.convert('RGB' if channels == 3 else 'L')
        expected = np.asarray(part).reshape(16, 16, channels)
        expected = expected[:, ::-1] if rng.random() < 0.5 else expected
        np.testing.assert_array_equal(found, expected)
    kept = dataset.load_source(f'folder:{tmp_path}', image_size=16, cache='memory')
    assert kept.train.as_pictures()[0]['image'].shape == (16, 16, 3)


@pytest.mark.parametrize('recipe', geometry.RECIPES)
def test_recipes(recipe):
    images = many(lambda image, rng: geometry.augment(image, rng, recipe=recipe), 20)
    assert {(image.shape, image.dtype.str) for image in images} == {
        (IMAGE.shape, IMAGE.dtype.str)
    }
    changed = [not np.array_equal(image, IMAGE) for image in images]
    assert any(changed) == (recipe != 'none')
    again = geometry.augment(IMAGE, np.random.default_rng(5), recipe=recipe)
    np.testing.assert_array_equal(again, images[5])

"""Properties of the random changes, each of which must also really change images."""

import numpy as np
import pytest

from flax_densenet import augment

IMAGE = np.random.default_rng(0).integers(1, 256, (32, 24, 3), np.uint8)


def many(function, count=200):
    return [function(IMAGE, np.random.default_rng(seed)) for seed in range(count)]


def test_flip_is_a_mirror_half_of_the_time():
    flipped = [np.array_equal(image, IMAGE[:, ::-1]) for image in many(augment.flip)]
    kept = [np.array_equal(image, IMAGE) for image in many(augment.flip)]
    assert sum(flipped) + sum(kept) == 200
    assert 70 < sum(flipped) < 130


def test_shift_moves_by_up_to_an_eighth():
    padded = np.pad(IMAGE, ((4, 4), (3, 3), (0, 0)))
    windows = {
        padded[top : top + 32, left : left + 24].tobytes()
        for top in range(9)
        for left in range(7)
    }
    found = {image.tobytes() for image in many(augment.shift, 600)}
    assert found == windows  # each of the 63 shifts, and nothing else


def test_crop_fills_the_image_with_a_part_of_it():
    constant = np.full((40, 40, 3), 77, np.uint8)
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[:, None, None], (40, 40, 3))
    spans = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        np.testing.assert_array_equal(augment.crop(constant, rng), constant)
        rows = augment.crop(ramp, np.random.default_rng(seed))[:, 0, 0].astype(int)
        assert (np.diff(rows) >= 0).all()
        spans.append(rows[-1] - rows[0] + 1)
    assert min(spans) < 16 and max(spans) >= 38


@pytest.mark.parametrize('recipe', augment.RECIPES)
def test_recipes(recipe):
    images = many(lambda image, rng: augment.augment(image, rng, recipe=recipe), 20)
    assert {(image.shape, image.dtype.str) for image in images} == {
        (IMAGE.shape, IMAGE.dtype.str)
    }
    changed = [not np.array_equal(image, IMAGE) for image in images]
    assert any(changed) == (recipe != 'none')
    again = augment.augment(IMAGE, np.random.default_rng(5), recipe=recipe)
    np.testing.assert_array_equal(again, images[5])

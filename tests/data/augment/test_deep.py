"""Operations on 16 bits do what those on 8 bits do, without their steps."""

import jax
import numpy as np
import pytest
from PIL import Image

from flax_densenet.data.augment import color, deep, mixing, policies
from flax_densenet.weights import trained


def smooth(channels=3, size=(30, 24)):
    """uint8 `[24, 30, C]` of soft colors."""
    noise = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image)[..., :channels]


def as_deep(image):
    return image.astype(np.float32) * 257


@pytest.mark.parametrize('name', policies.OPERATIONS)
def test_operations_of_policies(name):
    # Pillow's `equalize` counts in steps of a 255th of the pixels, rounded down.
    size = (300, 240) if name == 'equalize' else (30, 24)
    image, operation = smooth(size=size), policies.OPERATIONS[name]
    picture = Image.fromarray(image)
    for place in (0.3, 1.0):
        for wide in (False, True):
            amount = operation.amount(place, picture, wide)
            assert operation.amount(place, as_deep(image), wide) == amount
            for signed in (amount, -amount) if operation.signed else (amount,):
                expected = np.asarray(operation.function(picture, signed)).astype(float)
                found = deep.FUNCTIONS[name](as_deep(image), signed) / 257
                away = np.abs(found - expected)
                assert away.max() <= 2, (place, signed)
                assert away.mean() < 1


@pytest.mark.parametrize('name', deep.COLORS)
def test_color_jitter(name):
    image = smooth()
    function = {
        'brightness': color.adjust_brightness,
        'contrast': color.adjust_contrast,
        'saturation': color.adjust_saturation,
        'hue': color.adjust_hue,
    }[name]
    for factor in (-0.2, 0.3) if name == 'hue' else (0, 0.4, 1.7):
        expected = np.asarray(function(Image.fromarray(image), factor)).astype(float)
        found = deep.COLORS[name](as_deep(image), factor) / 257
        assert np.abs(found - expected).max() < 2, factor
        assert np.abs(expected - image).max() > 20  # it does something


def test_gray_images_and_levels():
    gray = smooth(1)
    rng = np.random.default_rng(1)
    strengths = color.parse((0.4, 0.4, 0.4, 0.1))
    levels = np.linspace(20_000, 30_000, 600).reshape(20, 30, 1).astype(np.uint16)
    changed = deep.change(levels, rng, strengths, None)
    assert changed.dtype == np.uint16 and changed.shape == levels.shape
    assert len(np.unique(changed)) > 500  # of 8 bits: 40
    same = deep.change(gray.astype(np.uint16) * 257, rng, None, None)
    np.testing.assert_array_equal(same, gray.astype(np.uint16) * 257)
    for name in ('saturation', 'hue'):
        np.testing.assert_array_equal(
            deep.COLORS[name](as_deep(gray), 0.3), as_deep(gray)
        )


def test_the_same_draws_as_of_8_bits():
    image, policy = smooth(size=(300, 240)), policies.parse('trivialaugment')
    for seed in range(12):
        expected = policies.apply(
            Image.fromarray(image), np.random.default_rng(seed), policy
        )
        found = deep.change(
            image.astype(np.uint16) * 257, np.random.default_rng(seed), None, policy
        )
        away = np.abs(found / 257 - np.asarray(expected).astype(float))
        assert away.mean() < 1, seed


@pytest.mark.exhaustive
@pytest.mark.slow
def test_mixing_and_normalization_have_the_scale_of_8_bits():
    images = np.stack([smooth(), smooth()[::-1], smooth()[:, ::-1], 255 - smooth()])
    wide = images.astype(np.uint16) * 257
    options = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    np.testing.assert_allclose(
        trained.normalize(wide, **options),
        trained.normalize(images, **options),
        atol=1e-5,
    )
    for fields in (dict(mixup=0.4), dict(cutmix=1.0, erase=0.5)):
        expected, found = (
            mixing.mix(
                batch, jax.random.key(0), mixing.Mixing(**fields), mean=options['mean']
            ).images
            for batch in (images, wide)
        )
        np.testing.assert_allclose(found, expected, atol=1e-3)
        assert np.abs(expected - images.astype(float)).max() > 20

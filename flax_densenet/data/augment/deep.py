"""Random changes of 16-bit training images that keep all levels.

These are the operations of `color` and `policies`, drawn in the same way, on numbers
from 0 to 65535 instead of Pillow's 8 bits.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from flax_densenet.data import deep_picture
from flax_densenet.data.augment import color, policies

FULL = deep_picture.FULL
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def change(
    image: np.ndarray,
    rng,
    strengths: color.Strengths | None,
    policy: policies.Policy | None,
) -> np.ndarray:
    """`color.jitter` and `policies.apply` for uint16 `[H, W, C]`."""
    numbers = image.astype(np.float32)
    if strengths:
        numbers = color.jitter(numbers, rng, strengths, functions=COLORS)
    if policy:
        numbers = policies.apply(numbers, rng, policy, functions=FUNCTIONS)
    return deep_picture.to_uint16(numbers)


def _clip(image):
    return np.clip(image, 0, FULL)


def _blend(from_, image, factor):
    """Interpolates: 0 is `from_`, 1 the image; values above 1 extrapolate."""
    return _clip(from_ + (image - from_) * np.float32(factor))


def _gray(image):
    return image if image.shape[-1] == 1 else (image @ _LUMA)[..., None]


def adjust_brightness(image, factor):
    """0 is black, 1 the image itself."""
    return _clip(image * np.float32(factor))


def adjust_contrast(image, factor):
    """0 is the image's mean gray, 1 the image itself."""
    return _blend(_gray(image).mean(), image, factor)


def adjust_saturation(image, factor):
    """0 is gray, 1 the image itself; gray images do not change."""
    return image if image.shape[-1] == 1 else _blend(_gray(image), image, factor)


def adjust_hue(image, shift):
    """Rotates hues by a share of the color wheel; gray images do not change."""
    if image.shape[-1] == 1:
        return image
    turned = np.empty_like(image)
    color.turn(image.reshape(-1, 3), shift, turned.reshape(-1, 3))
    return turned


def adjust_sharpness(image, factor):
    """0 is smoothed, 1 the image itself; the border does not change."""
    smooth = image.copy()
    height, width = image.shape[:2]
    if min(height, width) > 2:
        total = 4 * image[1:-1, 1:-1]
        for down in range(3):
            for right in range(3):
                total += image[down : height - 2 + down, right : width - 2 + right]
        smooth[1:-1, 1:-1] = total / 13
    return _blend(smooth, image, factor)


def posterize(image, bits):
    """Keeps the highest bits."""
    step = 2 ** (16 - bits)
    return np.floor(image / step) * step


def solarize(image, threshold):
    """Inverts values from the threshold on, which is from 0 to 255."""
    return np.where(image < threshold * 257, image, FULL - image)


def autocontrast(image):
    """Stretches each channel to the full range."""
    low = image.min((0, 1), keepdims=True)
    high = image.max((0, 1), keepdims=True)
    stretched = (image - low) * (FULL / np.maximum(high - low, 1))
    return np.where(high > low, stretched, image).astype(np.float32)


def equalize(image):
    """Spreads the levels of each channel evenly, by their ranks."""
    equal = np.empty_like(image)
    for band in range(image.shape[-1]):
        values = np.rint(image[..., band])
        levels, place, counts = np.unique(
            values, return_inverse=True, return_counts=True
        )
        below = np.cumsum(counts) - counts
        span = values.size - counts[-1]
        shares = below / span if span else levels / FULL
        equal[..., band] = (shares * FULL)[place].reshape(values.shape)
    return equal


def _on_bands(change_band: Callable[[Image.Image, float], Image.Image]):
    """A function of arrays that changes the geometry of each channel."""

    def change_all(image, amount):
        bands = deep_picture.DeepPicture.from_array(image).bands
        changed = [np.asarray(change_band(band, amount)) for band in bands]
        return np.stack(changed, -1)

    return change_all


# Functions by the names in `color` and `policies`.
COLORS = {
    'brightness': adjust_brightness,
    'contrast': adjust_contrast,
    'saturation': adjust_saturation,
    'hue': adjust_hue,
}
FUNCTIONS = {
    'identity': lambda image, _: image,
    'shear_x': _on_bands(policies.shear_x),
    'shear_y': _on_bands(policies.shear_y),
    'translate_x': _on_bands(policies.translate_x),
    'translate_y': _on_bands(policies.translate_y),
    'rotate': _on_bands(Image.Image.rotate),
    'brightness': lambda image, amount: adjust_brightness(image, 1 + amount),
    'saturation': lambda image, amount: adjust_saturation(image, 1 + amount),
    'contrast': lambda image, amount: adjust_contrast(image, 1 + amount),
    'sharpness': lambda image, amount: adjust_sharpness(image, 1 + amount),
    'posterize': posterize,
    'solarize': solarize,
    'autocontrast': lambda image, _: autocontrast(image),
    'equalize': lambda image, _: equalize(image),
}

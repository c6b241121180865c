"""Random changes of the colors of training images, like torchvision's ColorJitter.

Images are Pillow's, RGB or L (gray). They are not changed; the results are new images.

>>> image = Image.new('RGB', (4, 3), (200, 100, 50))
>>> adjust_hue(image, 1 / 3).getpixel((0, 0))
(50, 200, 100)
>>> jitter(image, np.random.default_rng(0), parse((0.4,))).size
(4, 3)
"""

import dataclasses
import numbers

import numpy as np
from PIL import Image, ImageEnhance

from flax_densenet.errors import UserError


@dataclasses.dataclass(frozen=True)
class Strengths:
    """The largest changes of `jitter`.

    Attributes:
      brightness, contrast, saturation: factors are uniform from 1 - x (at least 0) to
        1 + x.
      hue: shifts are uniform from -x to x, where 1 is a full turn of the color wheel.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0


def parse(value) -> Strengths | None:
    """Parses `data.color_jitter`; None if it changes nothing.

    Args:
      value: `()`, `(x,)` for brightness, contrast and saturation (like timm's
        `color_jitter=x`), or three or four numbers, of which the fourth is the hue.

    Raises: UserError: the value has another form, or is out of range.
    """
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    right = len(values) in (0, 1, 3, 4) and all(
        isinstance(x, numbers.Real) and 0 <= float(x) <= most
        for x, most in zip(values, (10, 10, 10, 0.5), strict=False)
    )
    if not right:
        raise UserError(
            f'data.color_jitter={value} must be (), (x,) for brightness, contrast and '
            'saturation, or all three and optionally the hue, such as '
            "'(0.4,0.4,0.4,0.1)': from 0 to 10, the hue to 0.5"
        )
    if not any(values):
        return None
    return Strengths(*(values * 3 if len(values) == 1 else values))


def jitter(image, rng, strengths: Strengths, *, functions=None):
    """Changes brightness, contrast, saturation and hue, in random order.

    Args:
      Args: image: a Pillow image.
      functions: functions of an image and a factor, by the names in `Strengths`; by
        default those of this module.
    """
    for place in rng.permutation(4):
        name, function, center = _OPERATIONS[place]
        function = functions[name] if functions else function
        most = getattr(strengths, name)
        if most:
            least = center - most if name == 'hue' else max(center - most, 0)
            image = function(image, rng.uniform(least, center + most))
    return image


def adjust_brightness(image: Image.Image, factor: float) -> Image.Image:
    """0 is black, 1 the image itself."""
    return ImageEnhance.Brightness(image).enhance(factor)


def adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
    """0 is the image's mean gray, 1 the image itself."""
    return ImageEnhance.Contrast(image).enhance(factor)


def adjust_saturation(image: Image.Image, factor: float) -> Image.Image:
    """0 is gray, 1 the image itself; gray images do not change."""
    return image if image.mode == 'L' else ImageEnhance.Color(image).enhance(factor)


def adjust_hue(image: Image.Image, shift: float) -> Image.Image:
    """Rotates hues by a share of the color wheel; gray images do not change.

    Pillow's HSV would take three times as long and round hue and saturation to 8 bits.
    """
    if image.mode == 'L':
        return image
    pixels = np.asarray(image).reshape(-1, 3)
    turned = np.empty_like(pixels)
    for start in range(0, len(pixels), _STRIP):
        strip = slice(start, start + _STRIP)
        _turn_bytes(pixels[strip], shift, turned[strip])
    return Image.fromarray(turned.reshape(image.height, image.width, 3))


# Pixels at a time that stay in the processor's cache: twice as fast as all at once.
_STRIP = 2**14


def _turn_bytes(pixels, shift, out):
    turn(pixels, shift, out, least=0.5)  # to round


def turn(pixels, shift, out, *, least=0.0):
    """Writes colors `[n, 3]` with a shifted hue to `out`.

    Args: least: added to each value.
    """
    red, green, blue = (pixels[:, band].astype(np.float32) for band in range(3))
    highest = np.maximum(np.maximum(red, green), blue)
    lowest = np.minimum(np.minimum(red, green), blue)
    chroma = highest - lowest
    # The position on the color wheel in sixths: red 0, green 2, blue 4.
    place = red - green + 4 * chroma
    np.copyto(place, blue - red + 2 * chroma, where=green == highest)
    np.copyto(place, green - blue, where=red == highest)
    place /= np.maximum(chroma, 1)
    place += np.float32(6 * shift)
    place -= 6 * np.floor(place / 6)
    lowest += np.float32(least)
    # The share of each band in the chroma is a trapezoid around its color.
    for band, share in enumerate(
        (np.abs(place - 3) - 1, 2 - np.abs(place - 2), 2 - np.abs(place - 4))
    ):
        np.maximum(share, 0, out=share)
        np.minimum(share, 1, out=share)
        out[:, band] = share * chroma + lowest


# Strength, function, and the neutral value.
_OPERATIONS = (
    ('brightness', adjust_brightness, 1),
    ('contrast', adjust_contrast, 1),
    ('saturation', adjust_saturation, 1),
    ('hue', adjust_hue, 0),
)

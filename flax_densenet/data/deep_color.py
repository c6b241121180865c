"""Reads color images with 16 bits per channel, of which Pillow keeps 8.

Pillow's decoders keep one of the two bytes of each value. So a file is decoded twice,
once for the high and once for the low bytes, by Pillow's own well-tested decoders.
"""

import dataclasses
import sys

import numpy as np
from PIL import Image

from flax_densenet.data import image_formats

_SWAPPED = {
    'B': 'L',
    'L': 'B',
    # Native byte order, in which libtiff returns values.
    'N': 'B' if sys.byteorder == 'little' else 'L',
}


@dataclasses.dataclass(frozen=True)
class DeepColor:
    """The bytes of a color image.

    Attributes:
      high, low: Pillow's images of the high and low bytes, RGB, RGBA or RGBa.
    """

    high: Image.Image
    low: Image.Image

    def crop(self, box) -> tuple[np.ndarray, np.ndarray | None]:
        """uint16 `[h, w, 3]`, and the opacity `[h, w, 1]` from 0 to 1, or None."""
        high, low = (
            np.asarray(part.crop(box)).astype(np.uint16)
            for part in (self.high, self.low)
        )
        values = high * 256 + low
        if values.shape[-1] == 3:
            return values, None
        opacity = values[..., 3:].astype(np.float32) / 65535
        color: np.ndarray = values[..., :3]
        if self.high.mode == 'RGBa':  # colors are premultiplied by the opacity
            color = color / np.maximum(opacity, 1 / 65535)
        return color, opacity


class GrayAlpha(DeepColor):
    """Gray and opacity, with four bytes that are read as four channels."""

    def crop(self, box):
        found = np.asarray(self.high.crop(box)).astype(np.uint16)
        gray, opacity = (
            found[..., n : n + 1] * 256 + found[..., n + 1 : n + 2] for n in (0, 2)
        )
        return gray.repeat(3, -1), opacity.astype(np.float32) / 65535


class PlainColor(DeepColor):
    """Reads the values of a binary PPM, `[H, W, 3]`."""

    def __init__(self, values):
        object.__setattr__(self, 'values', values)

    def crop(self, box):
        left, top, right, bottom = box
        return self.values[top:bottom, left:right], None


def load(image: Image.Image, file: str | bytes) -> DeepColor:
    """Decodes an image for which `image_formats.is_deep_color` is true.

    Args:
      image: not decoded yet.
      file: the same one, as a path or its bytes.

    Raises:
      Pillow's errors.
    """
    raw = image_formats.raw_mode(image)
    if image.format == 'PPM':
        return PlainColor(_load_ppm(image, file))
    if raw == 'LA;16B':
        _set_raw_mode(image, 'RGBA')
        image.load()
        return GrayAlpha(image, image)
    with image_formats.open_file(file) as other:
        _set_raw_mode(other, raw[:-1] + _SWAPPED[raw[-1]])
        other.load()
        image.load()
        # In a little-endian TIFF, and after libtiff, this is the high byte.
        return DeepColor(image, other)


def _set_raw_mode(image, raw):
    image.tile = [
        tile._replace(args=raw if isinstance(tile.args, str) else (raw, *tile.args[1:]))
        for tile in image.tile
    ]


def _load_ppm(image, file):
    tile = image.tile[0]
    most = tile.args[-1]
    count = image.width * image.height * 3
    content = image_formats.read_all(file)[tile.offset : tile.offset + 2 * count]
    if len(content) < 2 * count:
        raise OSError('image file is truncated')
    values = np.frombuffer(content, '>u2').reshape(image.height, image.width, 3)
    if most == 65535:
        return values.astype(np.uint16)
    scaled = values.astype(np.float32) * np.float32(65535 / most)
    return np.clip(np.rint(scaled), 0, 65535).astype(np.uint16)

"""Pictures that keep 16 bits: one number for each pixel and channel, 0 to 65535.

Pillow resizes them like any other picture, and they have the methods that the
preparation and the augmentation of images use.
"""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from flax_densenet.data import deep_color, image_formats, upright

FULL = 65535
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # weights of Pillow's gray


class DeepPicture:
    """An image as bands of float32, 0 to 65535.

    Attributes:
      bands: Pillow images of mode F: one (gray) or three (RGB).
    """

    def __init__(self, bands: Sequence[Image.Image]):
        self.bands = tuple(bands)

    @classmethod
    def from_array(cls, array: np.ndarray) -> 'DeepPicture':
        """From numbers `[H, W]`, `[H, W, 1]` or `[H, W, 3]`, 0 to 65535."""
        array = np.asarray(array, np.float32)
        array = array.reshape(*array.shape[:2], -1)
        return cls(
            [
                Image.fromarray(np.ascontiguousarray(array[..., band]))
                for band in range(array.shape[-1])
            ]
        )

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.bands[0].size

    @property
    def width(self) -> int:
        """In pixels."""
        return self.size[0]

    @property
    def height(self) -> int:
        """In pixels."""
        return self.size[1]

    def resize(self, size, resample, box=None) -> 'DeepPicture':
        """Like `Image.resize`."""
        return DeepPicture([band.resize(size, resample, box) for band in self.bands])

    def transpose(self, method) -> 'DeepPicture':
        """Like `Image.transpose`."""
        return DeepPicture([band.transpose(method) for band in self.bands])

    def to_numbers(self, channels: int) -> np.ndarray:
        """float32 `[H, W, C]`; color becomes gray as in Pillow, gray is repeated."""
        array = np.stack([np.asarray(band) for band in self.bands], -1)
        if array.shape[-1] > channels:
            array = (array @ _LUMA)[..., None]
        return np.broadcast_to(array, (*array.shape[:2], channels))

    def to_array(self, channels: int) -> np.ndarray:
        """uint16 `[H, W, C]`."""
        return to_uint16(self.to_numbers(channels))


def to_uint16(numbers: np.ndarray) -> np.ndarray:
    """Numbers of 0 to 65535, rounded and clipped."""
    return np.clip(np.rint(numbers), 0, FULL).astype(np.uint16)


def to_uint8(image: np.ndarray) -> np.ndarray:
    """An image for display: uint16 as uint8, others as they are."""
    if image.dtype != np.uint16:
        return image
    return np.rint(image * np.float32(255 / FULL)).astype(np.uint8)


def scale(values: np.ndarray, window: tuple[float, float] | None) -> np.ndarray:
    """Scales values to float32 of 0 to 65535; without a window this is their range.

    NaN becomes black.
    """
    low, high = (0, FULL) if window is None else window
    values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    return np.clip((values - low) * (FULL / (high - low)), 0, FULL).astype(np.float32)


def render(image, file, least, resize=None, window=None) -> DeepPicture:
    """Converts an open image to an upright picture; see `upright.render`.

    Args:
      image: from `image_formats.open_file`, with 8 or more bits.
      file: the same path or bytes, from which 16-bit color is read again.
    """
    read, channels = _reader(image, file, window)
    turn = upright.find_turn(image)
    picture = _assemble(
        read, channels, image.size, upright.plan(image.size, least, resize)
    )
    return picture if turn is None else picture.transpose(turn)


def from_values(values: np.ndarray, window: tuple[float, float] | None) -> DeepPicture:
    """From an array `[H, W]` or `[H, W, C]`: uint8 of 0 to 255, others by the
    window."""
    if values.dtype == np.uint8:
        return DeepPicture.from_array(values.astype(np.float32) * 257)
    return DeepPicture.from_array(scale(values, window))


def _reader(image, file, window):
    """A function from a box to float32 `[h, w, C]`, and the number C of channels."""
    if image_formats.is_deep_color(image):
        pixels = deep_color.load(image, file)

        def read(box):
            values, opacity = pixels.crop(box)
            values = scale(values, window)
            if opacity is None:
                return values
            return values * opacity + FULL * (1 - opacity)

        return read, 3
    image.load()
    if not image_formats.is_deep(image):

        def read(box):
            return np.asarray(upright.to_rgb(image.crop(box))).astype(np.float32) * 257

        return read, 3
    display, inverted = image.info.get('display'), image_formats.is_inverted(image)

    def read(box):
        values = np.asarray(image.crop(box))
        if display is not None:
            values = FULL * display.apply(values, window)
        else:
            values = scale(values, window)
            values = FULL - values if inverted else values
        return values[..., None]

    return read, 1


def _assemble(
    read: Callable[[tuple], np.ndarray],
    channels: int,
    size: tuple[int, int],
    reduction: upright.Reduction | None,
) -> DeepPicture:
    reduction = reduction or upright.Reduction((0, 0), size)
    bands = [Image.new('F', reduction.size) for _ in range(channels)]
    for row, box in reduction.strips():
        strip = DeepPicture.from_array(read(box))
        for band, part in zip(bands, strip.bands, strict=True):
            if reduction.factors != (1, 1):
                part = part.reduce(reduction.factors)
            band.paste(part, (0, row))
    return DeepPicture(bands)

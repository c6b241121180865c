"""Turns open images of any mode upright and converts them to RGB with 8 bits.

`deep_picture` does the same for images whose 16 bits are kept.
"""

import dataclasses
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

# Errors of Pillow for corrupt files; found by damaging files at random.
BROKEN = (
    UnidentifiedImageError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    ArithmeticError,
    TypeError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    UserWarning,  # if the program's filters turn warnings into errors
)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Images with more pixels are first made smaller: their copies would take 200 MB.
LARGE = 16 * 10**6
STRIP = 10**6  # pixels
_LARGEST_FACTOR = 64  # per side; Pillow is inexact for products above 2**12


def to_rgb(
    image: Image.Image, window: tuple[float, float] | None = None
) -> Image.Image:
    """Converts any mode to RGB, as a viewer would show it on a white page.

    16-bit gray is divided by 257 (Pillow would clip it at 255), and transparent pixels
    are composited over white (Pillow would show their hidden colors).

    Args:
      window: values of 16-bit, 32-bit and float gray that become black and white.
    """
    if 'display' in image.info and image.mode == 'F':  # DICOM
        gray = image.info['display'].apply(np.asarray(image), window)
        return Image.fromarray((255 * gray).round().astype(np.uint8)).convert('RGB')
    if window is not None and (image.mode.startswith('I') or image.mode == 'F'):
        low, high = window
        gray = np.nan_to_num(np.asarray(image).astype(np.float32))
        gray = np.clip((gray - low) * (255 / (high - low)), 0, 255)
        return Image.fromarray(gray.round().astype(np.uint8)).convert('RGB')
    if image.mode.startswith('I'):  # 16-bit gray, some of it read as 32-bit
        gray = np.asarray(image).astype(np.int64)
        gray = np.clip(gray, 0, 65535) // 257
        return Image.fromarray(gray.astype(np.uint8)).convert('RGB')
    if image.mode == 'F':  # TIFF with floats: from 0 to 1, otherwise from 0 to 255
        gray = np.nan_to_num(np.asarray(image))
        gray = np.clip(gray * (255 if gray.max(initial=0) <= 1 else 1), 0, 255)
        return Image.fromarray(gray.round().astype(np.uint8)).convert('RGB')
    if image.mode in ('LA', 'PA', 'RGBA', 'La', 'RGBa') or 'transparency' in image.info:
        image = image.convert('RGBA')
        page = Image.new('RGBA', image.size, 'white')
        return Image.alpha_composite(page, image).convert('RGB')
    return image if image.mode == 'RGB' else image.convert('RGB')


def render(image, least, resize=None, window=None) -> Image.Image:
    """Converts an open image to upright RGB; reduces a very large one (see `plan`)."""
    image.load()
    turn = find_turn(image)
    image = to_rgb(_shrink(image, least, resize, window), window)
    return image if turn is None else image.transpose(turn)


def find_turn(image) -> Image.Transpose | None:
    """The transposition that turns an image upright, by its EXIF data."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except BROKEN:  # corrupt EXIF data, but intact pixels
        return None


@dataclasses.dataclass(frozen=True)
class Reduction:
    """How a very large image is reduced by integer factors.

    Attributes:
      corner: left and top pixel of the part that is used.
      size: (width, height) of the result in pixels.
      factors: factors of both sides; 1 only crops.
    """

    corner: tuple[int, int]
    size: tuple[int, int]
    factors: tuple[int, int] = (1, 1)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The part that is used: left, top, right, bottom."""
        left, top = self.corner
        right, bottom = (
            start + n * factor
            for start, n, factor in zip(
                self.corner, self.size, self.factors, strict=True
            )
        )
        return left, top, right, bottom

    def strips(self) -> Iterator[tuple[int, tuple[int, int, int, int]]]:
        """Rows of the result, and the boxes of a million pixels that they come from."""
        left, top, right, _ = self.box
        height, down = self.size[1], self.factors[1]
        rows = max(1, STRIP // ((right - left) * down))
        for row in range(0, height, rows):
            last = min(row + rows, height)
            yield row, (left, top + row * down, right, top + last * down)


def plan(
    size: tuple[int, int], least: tuple[int, int] | None, resize: str | None
) -> Reduction | None:
    """Plans the reduction of an image of (width, height), not below `least`.

    For `stretch` each side has its own factor, for `crop` only the middle of a long
    image is kept, and for None the image keeps its shape. Converting the mode copies an
    image several times; strips of a million pixels need little memory.

    Returns:
      The reduction, or None if the image is not that large.
    """
    if not least or size[0] * size[1] <= LARGE:
        return None
    cut = (0, 0)
    if resize == 'crop':
        # Four times the part with the shape of `least`, so that this part in the center
        # and all surrounding pixels that affect its resizing are kept.
        most = (
            4 * size[1] * least[0] // least[1],
            4 * size[0] * least[1] // least[0],
        )
        cut = max(0, (size[0] - most[0]) // 2), max(0, (size[1] - most[1]) // 2)
        size = size[0] - 2 * cut[0], size[1] - 2 * cut[1]
    across, down = (
        min(max(1, n // m), _LARGEST_FACTOR) for n, m in zip(size, least, strict=True)
    )
    if resize != 'stretch':
        across = down = min(across, down)
    if across == down == 1:
        return Reduction(cut, size) if any(cut) else None
    # Pixels that do not fill a block are cut off, equally on both sides.
    corner = cut[0] + size[0] % across // 2, cut[1] + size[1] % down // 2
    return Reduction(corner, (size[0] // across, size[1] // down), (across, down))


def _shrink(image, least, resize, window):
    """Reduces a very large image according to `plan`; RGB if it is reduced."""
    reduction = plan(image.size, least, resize)
    if reduction is None:
        return image
    if reduction.factors == (1, 1):
        return image.crop(reduction.box)
    if image.mode == 'F':  # its range depends on the entire image
        return image.reduce(reduction.factors, reduction.box)
    small = Image.new('RGB', reduction.size)
    for row, box in reduction.strips():
        strip = to_rgb(image.crop(box), window)
        small.paste(strip.reduce(reduction.factors), (0, row))
    return small

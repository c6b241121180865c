"""Images with channels other than gray or color, read without conversion.

`data.channels` of 1 and 3 convert every image to gray or color. Any other number keeps
the channels of the file, which must have as many: gray and transparency (2), RGBA (4),
or the bands of a TIFF.
"""

import contextlib
import io
import math

import numpy as np
from PIL import Image, UnidentifiedImageError

from flax_densenet import errors
from flax_densenet.data import deep_picture, image_formats, upright
from flax_densenet.errors import UserError

MOST = 256  # channels
NEEDS_WINDOW = (
    "set data.window to the values that become black and white, such as '(0,10000)'; "
    "'()' is the full range of 16 bits"
)
_MODES = {2: ('LA', 'La'), 4: ('RGBA', 'RGBa')}
_PLAIN = {'La': 'LA', 'RGBa': 'RGBA'}  # colors not premultiplied by alpha
_BIG_TIFF = (b'II+\0', b'MM\0+')


def are_kept(channels: int) -> bool:
    """Whether images keep their channels, and are not converted to gray or color."""
    return channels not in (1, 3)


def check_count(channels) -> None:
    """Raises `UserError` for invalid values of `data.channels`."""
    if type(channels) is not int or not 1 <= channels <= MOST:
        raise UserError(
            f'data.channels={channels} must be from 1 to {MOST}: 1 for gray, 3 for '
            'color, another number for files with that many'
        )


def to_visible(image: np.ndarray) -> np.ndarray:
    """Images `[..., H, W, C]` as RGB: the first three channels, else the first one."""
    chosen = [0, 1, 2] if image.shape[-1] > 2 else [0, 0, 0]
    return np.ascontiguousarray(image[..., chosen])


class BandPicture:
    """An image with any number of channels that resizes as in Pillow.

    Attributes:
      array: uint8 `[H, W, C]`.
    """

    def __init__(self, array: np.ndarray):
        self.array = array

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.width, self.height

    @property
    def width(self) -> int:
        """In pixels."""
        return self.array.shape[1]

    @property
    def height(self) -> int:
        """In pixels."""
        return self.array.shape[0]

    def to_array(self, channels: int) -> np.ndarray:
        """uint8 `[H, W, C]`."""
        return self.array

    def resize(self, size, resample, box=None) -> 'BandPicture':
        """Resizes each channel separately, as `Image.resize`."""
        parts = [
            np.asarray(
                Image.fromarray(np.ascontiguousarray(self.array[..., band])).resize(
                    size, resample, box=box
                )
            )
            for band in range(self.array.shape[-1])
        ]
        return BandPicture(np.stack(parts, -1))


def render(image: Image.Image, channels: int) -> np.ndarray:
    """Converts an open Pillow image to an upright array `[H, W, C]`.

    Raises:
      UserError: it has another number of channels.
    """
    check_mode(image, channels)
    image.load()
    turn = upright.find_turn(image)
    if 'transparency' in image.info:
        image = image.convert('LA' if channels == 2 else 'RGBA')
    plain = _PLAIN.get(image.mode)
    image = image.convert(plain) if plain else image
    return np.asarray(image if turn is None else image.transpose(turn))


def check_mode(image: Image.Image, channels: int):
    """Raises `UserError` if an open Pillow image has other channels."""
    mode = image.mode
    if 'transparency' in image.info:
        mode = 'LA' if mode in ('1', 'L') else 'RGBA'
    if mode in _MODES.get(channels, ()):
        if image_formats.is_deep_color(image):
            raise UserError(
                f'has 16 bits per channel; with {channels} channels these are read '
                'only from TIFF files'
            )
        return
    count = 3 if mode == 'P' else len(image.getbands())
    raise _other_count(count, mode, channels)


def _other_count(count, kind, channels):
    plural = 's' * (count > 1)
    return UserError(
        f'has {count} channel{plural} ({kind}), not the {channels} of '
        f'data.channels={channels}'
    )


def to_picture(
    values: np.ndarray,
    channels: int,
    *,
    window: tuple[float, float] | None = None,
    deep: bool = False,
) -> BandPicture | deep_picture.DeepPicture:
    """Converts an array `[H, W, C]`, uint8 or with a window of values, to a picture.

    Args:
      deep: whether to keep 16 bits.

    Raises:
      UserError: the array has another shape, or values that need a window.
    """
    if values.ndim != 3 or values.shape[-1] != channels:
        count = 1 if values.ndim == 2 else values.shape[-1]
        raise _other_count(count, f'shape {list(values.shape)}', channels)
    is_short = values.dtype in (np.uint8, np.uint16)
    if deep and (window is not None or is_short):
        return deep_picture.from_values(values, window)
    if values.dtype != np.uint8:
        if window is None:
            raise UserError(f'has {values.dtype} values: {NEEDS_WINDOW}')
        values = deep_picture.scale(values, window) * (255 / deep_picture.FULL)
        values = np.rint(values).astype(np.uint8)
    return BandPicture(np.ascontiguousarray(values))


def needs_tifffile(file: str | bytes, channels: int) -> bool:
    """Whether a file is a TIFF with bands that Pillow does not read."""
    try:
        with image_formats.open_file(file) as image:
            known = image.mode in _MODES.get(channels, ())
            return image.format == 'TIFF' and not (
                known and not image_formats.is_deep_color(image)
            )
    except image_formats.OtherTiffError:
        return True
    except UnidentifiedImageError:
        return image_formats.read_start(file, 4) in _BIG_TIFF


def read_tiff(
    file: str | bytes, channels: int, *, most_pixels: int, decode: bool = True
) -> np.ndarray:
    """The bands of a TIFF `[H, W, C]`: samples per pixel, or pages of equal size.

    Args:
      most_pixels: maximum for four channels; proportionally fewer with more channels.
      decode: False only reads and checks the header, and returns no bands.

    Raises:
      UserError: it has another number of bands, too many pixels, or tifffile is not
        installed.
    """
    with _open_tiff(file, channels) as tiff:
        series = tiff.series[0]
        axes, shape = series.axes, series.shape
        other = [n for n, name in enumerate(axes) if name not in 'YX' and shape[n] > 1]
        count = math.prod(shape[n] for n in other)
        if len(other) != 1 or count != channels or not {'Y', 'X'} <= set(axes):
            kind = f'a TIFF of {" x ".join(map(str, shape))}'
            raise _other_count(count, kind, channels)
        if math.prod(shape) > 4 * most_pixels:
            raise UserError(
                f'has {math.prod(shape) / 1e6:.3g} million values; at most '
                f'{4 * most_pixels / 1e6:.3g} million are read'
            )
        if not decode:
            return np.zeros((0, 0, channels), series.dtype)
        values = series.asarray()
    order = [axes.index('Y'), axes.index('X'), other[0]]
    rest = [n for n in range(len(axes)) if n not in order]  # of length 1
    values = values.transpose(*order, *rest)
    return values.reshape(values.shape[:3])


@contextlib.contextmanager
def _open_tiff(file, channels):
    with errors.extra('tiff', f'a TIFF with data.channels={channels}'):
        import tifffile
    source = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with tifffile.TiffFile(source) as tiff:
            yield tiff
    except AssertionError as error:
        raise UserError('is a damaged TIFF') from error


def find_dtype(raw: str | bytes | np.ndarray, channels: int) -> np.dtype:
    """The dtype of an image's values, from its header."""
    if isinstance(raw, np.ndarray):
        return raw.dtype
    if not needs_tifffile(raw, channels):
        return np.dtype(np.uint8)
    with _open_tiff(raw, channels) as tiff:
        return np.dtype(tiff.series[0].dtype)

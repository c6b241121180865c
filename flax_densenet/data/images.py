"""Decodes and resizes image files of all common formats to uint8 arrays."""

import functools
import io
import os
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from flax_densenet.data import image_formats
from flax_densenet.data import preparation as preparation_lib
from flax_densenet.errors import UserError

# The formats that are tried, whatever the file is called, and the endings of names.
FORMATS = image_formats.FORMATS
EXTENSIONS = image_formats.EXTENSIONS
RESIZES = preparation_lib.RESIZES
INTERPOLATIONS = preparation_lib.INTERPOLATIONS
Preparation = preparation_lib.Preparation
# What Pillow raises for corrupt files; found by damaging files at random.
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
_STRIP = 10**6  # pixels
_LARGEST_FACTOR = 64  # per side; Pillow is inexact for products above 2**12
_LONGEST_JPEG = 65500  # side in pixels


class TooManyPixels(UserError):
    """The header of an image has more pixels than are allowed."""


def to_rgb(
    image: Image.Image, window: tuple[float, float] | None = None
) -> Image.Image:
    """Converts any mode to RGB, as a viewer would show it on a white page.

    16-bit gray is divided by 257 (Pillow would clip it at 255), and transparent pixels
    are composited over white (Pillow would show their hidden colors).

    Args:
      window: values of 16-bit, 32-bit and float gray that become black and white.
    """
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


def load_image(
    file, preparation: Preparation, *, max_pixels: int | None = None
) -> np.ndarray:
    """Reads the first frame of an image and turns it upright.

    If the EXIF data cannot be read, the image is not turned.

    Args:
      file: a path, or the bytes of the file.
      preparation: how to resize it.
      max_pixels: the most pixels of an image that is decoded; by default Pillow's limit
        of 179 million. Decoding takes up to 4 bytes per pixel, so 0.7 GB; much less for
        a JPEG, which is decoded at a fraction of its size.

    Returns:
      uint8 `[height, width, channels]`.

    Raises:
      TooManyPixels: the header has more pixels; nothing was decoded.
      UserError: the reason why the file is not an image, or is truncated.
    """
    return _load(
        file,
        preparation.least(),
        preparation.resize,
        preparation.apply,
        max_pixels,
        preparation.window,
    )


def load_picture(file, preparation: Preparation) -> Image.Image:
    """`load_image` without resizing: RGB, of its own size or four times the target.

    So a crop of a quarter of each side still has enough pixels.
    """
    height, width = preparation.shape
    return _load(
        file,
        (4 * width, 4 * height) if preparation.size else None,
        None,
        lambda image: image,
        window=preparation.window,
    )


def _without_png_text(read):
    """Reads a PNG again without its texts where Pillow gives it up for them."""

    @functools.wraps(read)
    def read_twice(file, *args, **options):
        try:
            return read(file, *args, **options)
        except UserError as error:
            if not image_formats.is_text_limit(error):
                raise
        try:
            slim = image_formats.without_text(file)
        except BROKEN as error:
            raise UserError(_reason(error)) from error
        return read(slim, *args, **options)

    return read_twice


def _check_pixels(image, file, most=None):
    """Raises where a header tells of more pixels than are decoded."""
    pixels = image_formats.count_pixels(image, file)
    bound = image_formats.most_pixels(image)
    most = bound if most is None else min(most, bound)
    if pixels > most:
        raise TooManyPixels(_too_many(f'{pixels / 1e6:.3g} million', most))


@_without_png_text
def _load(file, least, resize, finish, max_pixels=None, window=None):
    """Applies `finish` to the upright RGB image in a file; `least`: see `_shrink`."""
    try:
        with image_formats.open_file(file) as image:
            _check_pixels(image, file, max_pixels)
            if least and image.format in ('JPEG', 'MPO'):
                # Decode at a half, a quarter or an eighth if the result still has at
                # least twice the target: much less work without a visible difference.
                image.draft(None, least)
            return finish(_upright(image, least, resize, window))
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Programs can turn the warning into an error.
        most = 2 * Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
        raise TooManyPixels(_too_many('too many', most)) from error
    except BROKEN as error:
        raise UserError(_reason(error)) from error


@_without_png_text
def make_smaller(file: str | bytes, side: int, *, quality: int) -> bytes:
    """Makes an image file whose shorter side is at most `side` pixels.

    A smaller image, or one that is too long for a JPEG, is returned unchanged. Others
    become an upright RGB JPEG, resized like in `load_image`.

    Args:
      file: a path, or the bytes of the file.
      side: in pixels.
      quality: of the JPEG, from 1 to 100. Color has half the resolution.

    Raises:
      UserError: see `load_image`.
    """
    try:
        with image_formats.open_file(file) as image:
            _check_pixels(image, file)
            if min(image.size) <= side or _is_deep(image):
                return image_formats.read_all(file)
            if image.format in ('JPEG', 'MPO'):
                image.draft(None, (2 * side,) * 2)
            longest = max(image.size) * side / min(image.size)
            if longest > _LONGEST_JPEG:
                return image_formats.read_all(file)
            image = _upright(image, (2 * side,) * 2)
        short = min(image.size)
        shape = [max(1, round(n * side / short)) for n in image.size]
        out = io.BytesIO()
        image = image.resize(shape, Image.Resampling.BILINEAR)
        image.save(out, 'JPEG', quality=quality)
        return out.getvalue()
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixels(
            _too_many('too many', 2 * Image.MAX_IMAGE_PIXELS)
        ) from error
    except BROKEN as error:
        raise UserError(_reason(error)) from error


def prepare_image(image: Image.Image, preparation: Preparation) -> np.ndarray:
    """`load_image` for an image of Pillow, which is not changed.

    Raises:
      UserError: see `load_image`; Pillow may read the file only now.
    """
    try:
        least = preparation.least()
        return preparation.apply(
            _upright(image, least, preparation.resize, preparation.window)
        )
    except BROKEN as error:
        raise UserError(_reason(error)) from error


def _upright(image, least, resize=None, window=None):
    """An open image as upright RGB; a very large one is made smaller by `_shrink`."""
    image.load()
    turn = _find_turn(image)
    image = to_rgb(_shrink(image, least, resize, window), window)
    return image if turn is None else image.transpose(turn)


def _is_deep(image):
    """Whether a JPEG would lose values, of which a window may be wanted."""
    return image.mode.startswith('I') or image.mode == 'F'


def _find_turn(image):
    """The transposition that turns an image upright, by its EXIF data; or None."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except BROKEN:  # corrupt EXIF data, but intact pixels
        return None


def _shrink(image, least, resize, window=None):
    """Reduces a very large image to RGB with integer factors, not below `least`.

    For `stretch` each side has its own factor, for `crop` only the middle of a long
    image is kept, for None the image keeps its shape. Converting the mode copies an
    image several times; strips of a million pixels need little memory.
    """
    if not least or image.width * image.height <= LARGE:
        return image
    if resize == 'crop':
        image = _cut_ends(image, least)
    factors = [
        min(max(1, n // m), _LARGEST_FACTOR)
        for n, m in zip(image.size, least, strict=True)
    ]
    if resize != 'stretch':
        factors = [min(factors)] * 2
    if factors == [1, 1]:
        return image
    across, down = factors
    # Pixels that do not fill a block are cut off, equally on both sides.
    width, height = (n // factor for n, factor in zip(image.size, factors, strict=True))
    left, top = (n % factor // 2 for n, factor in zip(image.size, factors, strict=True))
    if image.mode == 'F':  # its range depends on the entire image
        box = (left, top, left + width * across, top + height * down)
        return image.reduce((across, down), box)
    small = Image.new('RGB', (width, height))
    rows = max(1, _STRIP // (image.width * down))
    for row in range(0, height, rows):
        above, below = row * down, min(row + rows, height) * down
        strip = image.crop((left, top + above, left + width * across, top + below))
        small.paste(to_rgb(strip, window).reduce((across, down)), (0, row))
    return small


def _cut_ends(image, least):
    """Cuts an image to at most four times the part with the shape of `least`.

    Equally at both ends. Four times, so that this part in the center and all
    surrounding pixels that affect its resizing are kept.
    """
    most = (
        4 * image.height * least[0] // least[1],
        4 * image.width * least[1] // least[0],
    )
    cut = [max(0, (n - m) // 2) for n, m in zip(image.size, most, strict=True)]
    if not any(cut):
        return image
    (width, height), (left, top) = image.size, cut
    return image.crop((left, top, width - left, height - top))


def prepare_array(image: np.ndarray, preparation: Preparation) -> np.ndarray:
    """`load_image` for a uint8 array `[H, W]`, `[H, W, 1]` or `[H, W, 3]`."""
    return preparation.apply(to_picture(image))


def to_picture(image: np.ndarray) -> Image.Image:
    """An array as an RGB image."""
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    return to_rgb(Image.fromarray(image))


def _too_many(count, most):
    return f'has {count} pixels; at most {most / 1e6:.3g} million are read'


def _reason(error):
    if isinstance(error, FileNotFoundError):
        return 'is not there'
    if isinstance(error, UnidentifiedImageError):
        return f'is not an image ({", ".join(FORMATS)})'
    if isinstance(error, OSError) and error.strerror:
        return f'cannot be read ({error.strerror})'
    reason = ' '.join(str(error).split())[:100] or type(error).__name__
    return f'cannot be decoded ({reason})'


def check_image(file: str | bytes, *, decode: bool) -> str | None:
    """Why a file is not an intact image, or None if it is.

    Args:
      file: a path, or the bytes of the file.
      decode: True decodes the image. False reads its first and last bytes, which takes
        about 0.1 ms, and decodes it only if the end marker of its format is missing.
    """
    try:
        _check(file, decode)
    except UserError as error:
        return str(error)
    return None


@_without_png_text
def _check(file, decode):
    try:
        if not decode:
            with image_formats.open_file(file) as image:
                decode = not _has_end_mark(file, image.format)
        if decode:
            load_image(file, Preparation(8))  # JPEG is fastest at a small size
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixels(
            _too_many('too many', 2 * Image.MAX_IMAGE_PIXELS)
        ) from error
    except BROKEN as error:
        raise UserError(_reason(error)) from error


def _has_end_mark(file, image_format):
    if isinstance(file, bytes):
        end = file[-12:]
    else:
        with open(file, 'rb') as opened:
            opened.seek(-min(12, os.path.getsize(file)), os.SEEK_END)
            end = opened.read()
    marks = {'JPEG': b'\xff\xd9', 'GIF': b';', 'PNG': b'IEND\xaeB`\x82'}
    return image_format in marks and end.endswith(marks[image_format])

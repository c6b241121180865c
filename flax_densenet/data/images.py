"""Decodes and resizes image files of all common formats to arrays."""

import functools
import io
import os

import numpy as np
from PIL import Image, UnidentifiedImageError

from flax_densenet.data import bands, deep_picture, image_formats, upright
from flax_densenet.data import preparation as preparation_lib
from flax_densenet.errors import UserError

# The formats that are tried, regardless of the file name, and the file extensions.
FORMATS = image_formats.FORMATS
EXTENSIONS = image_formats.EXTENSIONS
RESIZES = preparation_lib.RESIZES
INTERPOLATIONS = preparation_lib.INTERPOLATIONS
Preparation = preparation_lib.Preparation
BROKEN = upright.BROKEN  # errors of Pillow for corrupt files
_LONGEST_JPEG = 65500  # side in pixels


class TooManyPixels(UserError):
    """The header of an image specifies more pixels than are allowed."""


def load_image(
    file, preparation: Preparation, *, max_pixels: int | None = None
) -> np.ndarray:
    """Reads the first frame of an image and turns it upright.

    If the EXIF data cannot be read, the image is not turned.

    Args:
      file: a path, or the bytes of the file.
      preparation: how to resize it.
      max_pixels: maximum number of pixels of an image; by default Pillow's limit of 179
        million. Decoding takes up to 4 bytes per pixel, so 0.7 GB; much less for a
        JPEG, which is decoded at a fraction of its size.

    Returns:
      `[height, width, channels]` of `preparation.dtype`.

    Raises: TooManyPixels: the header specifies more pixels; nothing was decoded.
      UserError: the reason why the file is not an image, or is truncated.
    """
    least = preparation.least()
    return preparation.apply(
        _load(file, preparation, least, preparation.resize, max_pixels)
    )


def load_picture(
    file, preparation: Preparation
) -> Image.Image | deep_picture.DeepPicture:
    """`load_image` without resizing: RGB, in its own size or four times the target.

    So a crop with a quarter of each side still has enough pixels.
    """
    height, width = preparation.shape
    least = (4 * width, 4 * height) if preparation.size else None
    return _load(file, preparation, least, None)


def _without_png_text(read):
    """Reads a PNG again without its texts if Pillow rejects it because of them."""

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
    """Raises if a header specifies too many pixels."""
    pixels = image_formats.count_pixels(image, file)
    bound = image_formats.most_pixels(image)
    most = bound if most is None else min(most, bound)
    if pixels > most:
        raise TooManyPixels(_too_many(f'{pixels / 1e6:.3g} million', most))


@_without_png_text
def _load(file, preparation, least, resize, max_pixels=None):
    """The upright picture in a file; `least` and `resize`: see `upright.plan`."""
    channels = preparation.channels
    try:
        if bands.are_kept(channels) and bands.needs_tifffile(file, channels):
            return _read_tiff(file, preparation, max_pixels)
        with image_formats.open_file(file) as image:
            _check_pixels(image, file, max_pixels)
            if least and image.format in ('JPEG', 'MPO'):
                # Decode at a half, a quarter or an eighth if the result still has at
                # least twice the target: much less work without a visible difference.
                image.draft(None, least)
            return _render(image, file, preparation, least, resize)
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        # Programs can turn the warning into an error.
        most = 2 * Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
        raise TooManyPixels(_too_many('too many', most)) from error
    except BROKEN as error:
        raise UserError(_reason(error)) from error


def _read_tiff(file, preparation, max_pixels=None):
    most = max_pixels or 2 * (Image.MAX_IMAGE_PIXELS or 2**62)
    values = bands.read_tiff(file, preparation.channels, most_pixels=most)
    return to_picture(values, preparation)


def _render(image, file, preparation, least, resize):
    window = preparation.window
    if bands.are_kept(preparation.channels):
        return to_picture(bands.render(image, preparation.channels), preparation)
    if preparation.is_deep:
        return deep_picture.render(image, file, least, resize, window)
    return upright.render(image, least, resize, window)


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
            # A JPEG would lose the values of deep images.
            if min(image.size) <= side or image_formats.is_deep(image):
                return image_formats.read_all(file)
            if image.format in ('JPEG', 'MPO'):
                image.draft(None, (2 * side,) * 2)
            longest = max(image.size) * side / min(image.size)
            if longest > _LONGEST_JPEG:
                return image_formats.read_all(file)
            image = upright.render(image, (2 * side,) * 2)
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
            _too_many('too many', 2 * (Image.MAX_IMAGE_PIXELS or 0))
        ) from error
    except BROKEN as error:
        raise UserError(_reason(error)) from error


def prepare_image(image: Image.Image, preparation: Preparation) -> np.ndarray:
    """`load_image` for a Pillow image, which is not changed.

    Raises:
      UserError: see `load_image`; Pillow may read the file only now.
    """
    try:
        least = preparation.least()
        return preparation.apply(
            _render(image, None, preparation, least, preparation.resize)
        )
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(_reason(error)) from error


def picture_of(
    image: Image.Image, preparation: Preparation
) -> Image.Image | deep_picture.DeepPicture:
    """`load_picture` for a Pillow image, which is not changed.

    Raises:
      UserError: see `load_image`; Pillow may read the file only now.
    """
    try:
        return _render(image, None, preparation, None, None)
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(_reason(error)) from error


def prepare_array(image: np.ndarray, preparation: Preparation) -> np.ndarray:
    """`load_image` for an array `[H, W]`, `[H, W, 1]` or `[H, W, 3]`.

    If the preparation keeps other channels: `[H, W, C]` with as many.

    Args:
      image: uint8 from 0 to 255, or the values of an image of more than 8 bits.
    """
    return preparation.apply(to_picture(image, preparation))


def to_picture(
    image: np.ndarray, preparation: Preparation | None = None
) -> Image.Image | deep_picture.DeepPicture | bands.BandPicture:
    """An array as a picture: RGB, or 16 bits or channels as in the preparation."""
    if preparation is not None and bands.are_kept(preparation.channels):
        return bands.to_picture(
            image,
            preparation.channels,
            window=preparation.window,
            deep=preparation.is_deep,
        )
    if preparation is not None and preparation.is_deep:
        return deep_picture.from_values(image, preparation.window)
    if image.ndim == 3 and image.shape[-1] == 1:
        image = image[..., 0]
    window = preparation.window if preparation else None
    return upright.to_rgb(Image.fromarray(image), window)


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


def check_image(file: str | bytes, *, decode: bool, channels: int = 3) -> str | None:
    """Why a file is not an intact image, or None if it is.

    Args:
      file: a path, or the bytes of the file.
      decode: True decodes the image. False reads its first and last bytes, which takes
        about 0.1 ms, and decodes it only if the end marker of its format is missing.
      channels: see `Preparation`; if they are kept, the file must have as many.
    """
    try:
        if bands.are_kept(channels):
            _check_bands(file, decode, channels)
        else:
            _check(file, decode)
    except UserError as error:
        return str(error)
    return None


@_without_png_text
def _check(file, decode):
    try:
        with image_formats.open_file(file) as image:
            decode = decode or not _has_end_mark(file, image.format)
            bits = 16 if image_formats.is_deep(image) else 8
        if decode:
            # JPEG is fastest at a small size.
            load_image(file, Preparation(8, bit_depth=bits))
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixels(
            _too_many('too many', 2 * Image.MAX_IMAGE_PIXELS)
        ) from error
    except BROKEN as error:
        raise UserError(_reason(error)) from error


@_without_png_text
def _check_bands(file, decode, channels):
    try:
        if bands.needs_tifffile(file, channels):
            bands.read_tiff(
                file, channels, most_pixels=2 * Image.MAX_IMAGE_PIXELS, decode=decode
            )
        elif decode:
            load_image(file, Preparation(8, channels=channels))
        else:
            with image_formats.open_file(file) as image:
                bands.check_mode(image, channels)
    except UserError:
        raise
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

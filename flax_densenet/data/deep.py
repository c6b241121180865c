"""Images of more than 8 bits: finds their bits, and the values for black and white.

16-bit files often hold 10, 12 or 14 bits, and files of numbers any range; without a
window these would be black, or only a few gray levels.
"""

import contextlib
import dataclasses

import numpy as np

from flax_densenet.data import bands, deep_color, image_formats, images, notes, upright
from flax_densenet.errors import UserError

BIT_DEPTHS = (8, 16)  # least and most
_HEADERS, _DECODED = 64, 16  # files to inspect
_BITS = (8, 10, 12, 14)
_RARE = 0.1  # percentile of signed and float values on each side


def check(window) -> tuple[float, float] | None:
    """Parses `data.window` as two numbers; None if it is empty or not set.

    Raises:
      UserError: it is anything else.
    """
    if window is None or (isinstance(window, (tuple, list)) and not window):
        return None
    try:
        low, high = (float(value) for value in window)
    except (TypeError, ValueError):
        low = high = 0.0
    if not (np.isfinite([low, high]).all() and low < high):
        raise UserError(
            f'data.window={window} must be two numbers, the values that become black '
            'and white, such as (0,4095)'
        )
    return low, high


def check_bit_depth(bit_depth):
    """Raises `UserError` if `data.bit_depth` is not 0 (detect) or 8 to 16."""
    least, most = BIT_DEPTHS
    if bit_depth and not least <= bit_depth <= most:
        raise UserError(
            f'data.bit_depth={bit_depth} must be from {least} to {most}, or 0 to '
            'detect it from the images'
        )


def resolve(
    preparation: images.Preparation, reader, indices, *, window, bit_depth: int
) -> images.Preparation:
    """The preparation with the bit depth and the window of a source's images.

    Values that are not set are detected from the images and reported in a line.

    Args:
      window: `data.window`: None to detect it, `()` for the full range.
      bit_depth: `data.bit_depth`, 0 to detect it.
    """
    if bands.are_kept(preparation.channels):
        return _resolve_bands(preparation, reader, indices, window, bit_depth)
    if window is None and 8 < bit_depth < 16:
        window = (0, 2**bit_depth - 1)
    sample = _Sample(reader, indices)
    if sample.pages:
        notes.say(
            f'{sample.pages} of {sample.looked_at} inspected images are TIFF files '
            'with several pages, of which only the first is read; save other pages as '
            'separate files'
        )
    if window is None and bit_depth != 16:
        window = _find_window(sample, keeps=bit_depth != 8)
    elif window and not sample.deep and sample.looked_at:
        notes.say(
            f'data.window={_text(window)} changes nothing: the images have 8 bits'
        )
    if not bit_depth:
        bit_depth = 16 if sample.deep or (window and not sample.looked_at) else 8
        if bit_depth == 16 and not window:
            notes.say(
                'data.bit_depth=16: images have more than 8 bits, which are kept'
                + (
                    '; values are shown by the window of each file'
                    if sample.is_stated
                    else ''
                )
                + '; data.bit_depth=8 reduces them to 8'
            )
    return dataclasses.replace(
        preparation, window=check(window), bit_depth=int(bit_depth)
    )


def _resolve_bands(preparation, reader, indices, window, bit_depth):
    """For images that keep their channels; the first image determines the dtype."""
    dtype = np.dtype(np.uint8)
    if len(indices):
        raw = reader[int(indices[0])]
        with contextlib.suppress(images.BROKEN):  # reported when it is decoded
            dtype = bands.find_dtype(raw, preparation.channels)
    if dtype != np.uint8 and window is None:
        raise UserError(f'the images have {dtype} values: {bands.NEEDS_WINDOW}')
    bit_depth = bit_depth or (8 if dtype == np.uint8 else 16)
    return dataclasses.replace(
        preparation, window=check(window), bit_depth=int(bit_depth)
    )


class _Sample:
    """Some images of a source.

    Attributes:
      Attributes: looked_at: number of headers that were read; 0 if reading an image is
        slow.
      deep: indices of images with more than 8 bits.
      is_stated: whether most of these specify their own display (DICOM).
      pages: number of TIFF files with several pages.
    """

    def __init__(self, reader, indices):
        self._reader = reader
        chosen: list[int] = []
        if reader.labels_in_memory and len(indices):
            places = np.unique(np.linspace(0, len(indices) - 1, _HEADERS).astype(int))
            chosen = [int(indices[place]) for place in places]
        self.looked_at = len(chosen)
        self.deep: list[int] = []
        self.pages = stated = 0
        for index in chosen:
            raw = self._read(index)
            is_deep, is_stated = _look(raw)
            if is_deep:
                self.deep.append(index)
                stated += is_stated
            self.pages += _has_pages(raw)
        self.is_stated = 2 * stated > len(self.deep)

    def values(self):
        """The values of some of the deep images."""
        chosen = self.deep[:: max(1, len(self.deep) // _DECODED)]
        found = (_values(self._read(index)) for index in chosen)
        return [values for values in found if values is not None]

    def _read(self, index):
        """An image from the reader; None if it is damaged, which is reported later."""
        try:
            return self._reader[index]
        except UserError:
            return None


def _find_window(sample, *, keeps):
    """Detects the window of the deep images of a sample, and prints a line about it.

    Returns:
      None without deep images, for a full range of 16 bits, or if files have their own
      windows.
    """
    if not sample.deep or sample.is_stated:
        return None
    values = sample.values()
    if not values:
        return None
    kinds = {found.dtype.kind for found in values}
    flat = np.concatenate(
        [found.ravel()[:: 1 + found.size // 10**6] for found in values]
    )
    low, high = float(flat.min()), float(max(found.max() for found in values))
    if 'f' not in kinds and low >= 0:
        bits = next((b for b in _BITS if high < 2**b), 16)
        if bits == 16 and high < 2**16:
            return None
        window, what = (0.0, 2.0**bits - 1), f'16-bit images hold {bits}-bit values'
        if high >= 2**16:
            window, what = (0.0, high), 'images hold values of more than 16 bits'
    elif low >= 0 and high <= 255:
        if not keeps:  # each image is then read with its own
            return None
        top = 1.0 if high <= 1 else 255.0
        window, what = (0.0, top), f'images hold numbers from 0 to {top:g}'
    else:
        window = tuple(float(x) for x in np.percentile(flat, (_RARE, 100 - _RARE)))
        what = 'images hold signed or float values'
    if not window[0] < window[1]:
        return None
    notes.say(
        f'data.window={_text(window)}: {what} ({low:g} to {high:g} in {len(values)} of '
        'them), so this range becomes black to white and other values are clipped; set '
        'data.window to change it'
    )
    return window


def _text(window):
    return f'({window[0]:g},{window[1]:g})'


def _look(raw):
    """Whether an image has more than 8 bits, and whether it specifies their display."""
    if raw is None:
        return False, False
    if isinstance(raw, np.ndarray):
        return raw.dtype != np.uint8, False
    try:
        with image_formats.open_file(raw) as image:
            display = image.info.get('display')
            stated = display is not None and display.is_stated
            return image_formats.is_deep(image), stated
    except (UserError, *images.BROKEN):  # reported when it is decoded
        return False, False


def _has_pages(raw):
    """Whether an image is a TIFF with several pages."""
    if raw is None or isinstance(raw, np.ndarray):
        return False
    try:
        if image_formats.read_start(raw, 2) not in (b'II', b'MM'):
            return False
        with image_formats.open_file(raw) as image:
            return bool(getattr(image, 'is_animated', False))
    except (UserError, *images.BROKEN):
        return False


def _values(raw):
    """The values of an image, without NaN and infinity; None if there are none."""
    if isinstance(raw, np.ndarray):
        values = raw
    else:
        try:
            with image_formats.open_file(raw) as image:
                if image.width * image.height > upright.LARGE:
                    return None
                values = _decode(image, raw)
        except (UserError, *images.BROKEN):
            return None
    if values.dtype.kind == 'f':
        values = values[np.isfinite(values)]
    return values if values.size else None


def _decode(image, raw):
    if not image_formats.is_deep_color(image):
        return np.asarray(image)
    pixels = deep_color.load(image, raw)
    return pixels.crop((0, 0, *image.size))[0]

"""Images of more than 8 bits: which range of values becomes black to white.

Files of 16 bits often hold 10, 12 or 14, and those of numbers any range; without a
window these would be black, or a few gray levels.
"""

import numpy as np

from flax_densenet.data import image_formats, images, notes
from flax_densenet.errors import UserError

_HEADERS, _DECODED = 64, 16  # files that are looked at
_BITS = (8, 10, 12, 14)
_RARE = 0.1  # percent of the values of signed and float images on each side


def check(window) -> tuple[float, float] | None:
    """`data.window` as two numbers; None where it is empty or not set.

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
            'and white, as (0,4095)'
        )
    return low, high


def find_window(reader, indices) -> tuple[float, float] | None:
    """The window of a source's images, with a line about it.

    Returns:
      None where images are of 8 bits, or of a full range that needs none: 16 bits,
      floats from 0 to 1 or to 255.
    """
    if not reader.labels_in_memory or not len(indices):
        return None  # to read an image is slow
    sample = np.unique(np.linspace(0, len(indices) - 1, _HEADERS).astype(int))
    looked_at = (int(indices[place]) for place in sample)
    deep = [index for index in looked_at if _is_deep(_read(reader, index))]
    chosen = deep[:: max(1, len(deep) // _DECODED)]
    values = [found for i in chosen if (found := _values(_read(reader, i))) is not None]
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
        return None
    else:
        window = tuple(float(x) for x in np.percentile(flat, (_RARE, 100 - _RARE)))
        what = 'images hold signed or float values'
    if not window[0] < window[1]:
        return None
    notes.say(
        f'data.window=({window[0]:g},{window[1]:g}): {what} ({low:g} to {high:g} in '
        f'{len(values)} of them), so this range becomes black to white and what is '
        'beyond it is clipped; set data.window to change it'
    )
    return window


def _read(reader, index):
    """An image as the reader has it; None if it is damaged, which training tells."""
    try:
        return reader[index]
    except UserError:
        return None


def _is_deep(raw):
    """Whether the header of an image tells of more than 8 bits."""
    if raw is None or isinstance(raw, np.ndarray):
        return False
    try:
        with image_formats.open_file(raw) as image:
            return image.mode.startswith('I') or image.mode == 'F'
    except images.BROKEN:  # told when it is decoded
        return False


def _values(raw):
    """The values of an image, without what is no number; None if there are none."""
    try:
        with image_formats.open_file(raw) as image:
            if image.width * image.height > images.LARGE:
                return None
            values = np.asarray(image)
    except images.BROKEN:
        return None
    if values.dtype.kind == 'f':
        values = values[np.isfinite(values)]
    return values if values.size else None

"""What the methods of a `Predictor` accept as images, in any form."""

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from flax_densenet.data import bands, images
from flax_densenet.errors import UserError
from flax_densenet.system import arguments

_GIVE = 'give file names, the bytes of files, Pillow images or arrays'
_ONE = str | os.PathLike | bytes | Image.Image


def to_numpy(value: Any) -> Any:
    """Arrays of JAX and other libraries as numpy arrays; anything else unchanged.

    Arrays of texts or objects, such as a column of a table, become lists.

    Raises:
      UserError: the library cannot convert its array.
    """
    if isinstance(value, Image.Image) or not hasattr(value, '__array__'):
        return value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f'{arguments.describe(value)} cannot be converted to numpy ({error})'
        ) from error
    return array.tolist() if array.dtype.kind in 'OUS' else array


def as_list(files: Any) -> Iterable[Any]:
    """One image or several as an iterable of images.

    Raises:
      UserError: it is neither.
    """
    files = to_numpy(files)
    if isinstance(files, _ONE) or (isinstance(files, np.ndarray) and files.ndim < 4):
        return [files]
    if not isinstance(files, Iterable):
        raise UserError(f'files={arguments.describe(files)}: {_GIVE}')
    return files


def check_file(file: Any):
    """Raises `UserError` for an object that is not an image in any form."""
    if not isinstance(file, str | os.PathLike | bytes):
        raise UserError(f'is {arguments.describe(file)}; {_GIVE}')


def check_array(array: np.ndarray, preparation: images.Preparation):
    """Raises `UserError` for an array of another type or shape than an image has."""
    kept = preparation.channels
    if bands.are_kept(kept):  # `images.prepare_array` checks their number
        wanted = f'[H, W, {kept}]'
    else:
        wanted = '[H, W], [H, W, 1] or [H, W, 3]'
        if array.ndim == 3 and array.shape[-1] not in (1, 3):
            hint = ', the first three of RGBA' if array.shape[-1] == 4 else ''
            raise UserError(f'has {array.shape[-1]} channels; give {wanted}{hint}')
    known = array.dtype == np.uint8 or (
        array.dtype == np.uint16 and (preparation.is_deep or array.ndim == 2)
    )
    if not known or array.ndim not in (2, 3) or 0 in array.shape:
        raise UserError(
            f'is an array of {array.dtype} {list(array.shape)}; give uint8, 0 to 255, '
            + wanted
        )

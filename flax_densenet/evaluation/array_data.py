"""Images and labels in arrays, as data to measure a model with."""

from typing import Any

import numpy as np

from flax_densenet.data import bands, images, labeled_images, readers
from flax_densenet.errors import UserError
from flax_densenet.system import arguments


def make_examples(
    images_given: Any,
    labels_given: Any,
    *,
    classes: int,
    multi_label: bool,
    preparation: images.Preparation,
) -> labeled_images.Examples:
    """Examples for `results.collect`.

    Args:
      images_given: uint8 `[N, H, W, 3]` or `[N, H, W, 1]`, or `[N, H, W, C]` if the
        network has another number of channels.
      labels_given: int `[N]`; with `multi_label`, float `[N, classes]` of 0, 1 and NaN.
      classes: number of classes of the model.
      multi_label: whether an image can have several labels.
      preparation: how the model prepares images.

    Raises:
      UserError: an array has another type, shape or values.
    """
    pixels, labels = (
        _to_array('images', images_given),
        _to_array('labels', labels_given),
    )
    _check_images(pixels, preparation)
    count = len(pixels)
    if labels.shape != ((count, classes) if multi_label else (count,)):
        raise UserError(
            f'labels: an array of shape {list(labels.shape)}; the images need '
            + (f'[{count}, {classes}]' if multi_label else f'[{count}]')
        )
    if labels.dtype.kind not in 'biuf':
        raise UserError(f'labels: an array of {labels.dtype}; give numbers')
    if multi_label and not (np.isin(labels, (0, 1)) | np.isnan(labels)).all():
        raise UserError('labels: must be 0, 1 or NaN (unknown)')
    if not multi_label and not np.isin(labels, np.arange(classes)).all():
        raise UserError(f'labels: must be integers from 0 to {classes - 1}')
    reader = readers.ArrayReader(
        pixels, labels.astype(np.float32 if multi_label else np.int32)
    )
    return labeled_images.Examples(reader, np.arange(count), preparation)


def _to_array(name, values):
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f'{name}: cannot be converted to an array ({error})') from error


def _check_images(pixels, preparation):
    kept = preparation.channels
    channels = (kept,) if bands.are_kept(kept) else (3, 1)
    wanted = ' or '.join(f'[N, H, W, {count}]' for count in channels)
    dtypes = map(np.dtype, (np.uint8, preparation.dtype))
    if pixels.dtype not in dtypes or pixels.ndim != 4 or 0 in pixels.shape:
        raise UserError(f'images: {arguments.describe(pixels)}; give uint8 {wanted}')
    if pixels.shape[-1] not in channels:
        raise UserError(f'images: {list(pixels.shape)}; give {wanted}')

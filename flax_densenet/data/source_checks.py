"""Checks of the fields of `config.data` that concern all images of a source."""

import logging

import numpy as np

from flax_densenet.data import bands, deep, images
from flax_densenet.errors import UserError
from flax_densenet.settings import sizes

_LOGGER = logging.getLogger(__name__)

BAD_IMAGES = ('error', 'skip')
CACHES = ('none', 'memory')
_GIB = 2**30


def check_preparation(preparation: images.Preparation, window, bit_depth: int):
    """Raises `UserError` for fields of an image's preparation that are invalid."""
    deep.check(window)
    deep.check_bit_depth(bit_depth)
    check_choice('resize', preparation.resize, images.RESIZES)
    check_choice('interpolation', preparation.interpolation, images.INTERPOLATIONS)
    bands.check_count(preparation.channels)
    sizes.check(preparation.size, least=0 if isinstance(preparation.size, int) else 1)
    if not 0 < preparation.crop_fraction <= 1:
        raise UserError(
            f'data.crop_fraction={preparation.crop_fraction} must be above 0 and at '
            'most 1'
        )


def check_fields(
    test_fraction: float, val_fraction: float, bad_images: str, cache: str
):
    """Raises `UserError` for invalid values of `dataset.load_source`."""
    check_choice('bad_images', bad_images, BAD_IMAGES)
    check_choice('cache', cache, CACHES)
    if not 0 <= val_fraction < 1:
        raise UserError(
            f'data.val_fraction={val_fraction} must be 0 (none) or above, and below 1'
        )
    if not 0 < test_fraction < 1:
        raise UserError(f'data.test_fraction={test_fraction} must be between 0 and 1')


def check_choice(field: str, value, valid):
    """Raises `UserError` if a field of `config.data` has an invalid value."""
    if value not in valid:
        choices = ', '.join(map(str, valid))
        raise UserError(f'data.{field}={value} is not known; use {choices}')


def check_cache(count: int, preparation: images.Preparation, limit_gib: float):
    """Logs the memory for `data.cache=memory`.

    Raises:
      UserError: it is more than `data.cache_limit_gib`.
    """
    height, width = preparation.shape
    each = np.dtype(preparation.dtype).itemsize * preparation.channels
    need = count * height * width * each / _GIB
    if need > limit_gib:
        raise UserError(
            f'data.cache=memory: {count} images of {height}x{width} take {need:.2f} '
            f'GiB, more than data.cache_limit_gib={limit_gib:g}; raise it or use '
            'data.cache=none'
        )
    _LOGGER.info(f'data.cache=memory: {count} decoded images take {need:.2f} GiB')

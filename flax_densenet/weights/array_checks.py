"""Checks the arrays of a weight file before anything is computed with them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from flax_densenet.errors import UserError, list_first
from flax_densenet.weights import rdnet_names


def check(
    path: str,
    arrays: Mapping[str, np.ndarray],
    wanted: Mapping[str, Any],
    show: Callable[[str], str],
) -> None:
    """Raises if an array is missing, unexpected, or has another shape or dtype.

    Args:
      path: the file, for messages.
      arrays: `{our name: array}` of the file.
      wanted: `{our name: shape and dtype}` of the network.
      show: gives the name in the file for one of ours.

    Raises:
      UserError: lists the first arrays of each kind.
    """
    lists = {
        'missing': sorted(map(show, wanted.keys() - arrays.keys())),
        'unexpected': sorted(map(show, arrays.keys() - wanted.keys())),
        'of another shape': [
            f'{show(name)} {list(arrays[name].shape)}, not {list(wanted[name].shape)}'
            for name in sorted(wanted.keys() & arrays.keys())
            if arrays[name].shape != wanted[name].shape
        ],
        # Quantized arrays store something else.
        'not of floating point': [
            f'{show(name)} {arrays[name].dtype}'
            for name in sorted(wanted.keys() & arrays.keys())
            if not jax.dtypes.issubdtype(arrays[name].dtype, np.floating)
        ],
    }
    if any(lists.values()):
        raise UserError(
            f'{path} does not fit {_describe(wanted)}: '
            + '; '.join(
                f'{len(names)} {kind}: {list_first(names)}'
                for kind, names in lists.items()
                if names
            )
        )


def check_values(
    path: str, arrays: Mapping[str, np.ndarray], show: Callable[[str], str]
) -> None:
    """Raises if a number is not finite, or a variance is negative.

    A network can give finite outputs nevertheless: a maximum with 0 hides NaN.

    Args:
      path: the file, for messages.
      arrays: `{our name: array}` in the precision that is computed with.
      show: gives the name in the file for one of ours.
    """
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            count = int((~np.isfinite(array)).sum())
            raise UserError(
                f'{path}: {show(name)} has {count} of {array.size} values that are not '
                'finite, as after training that diverged, or where numbers above 65504 '
                'were stored as float16; use an intact copy'
            )
        if name.endswith('/var') and (array < 0).any():
            raise UserError(
                f'{path}: {show(name)} has a negative variance, {array.min():g}; use '
                'an intact copy'
            )


def _describe(wanted):
    kind = 'an RDNet' if rdnet_names.is_rdnet(wanted) else 'a DenseNet'
    return f'{kind} of {len(wanted)} arrays'

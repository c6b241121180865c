"""Chooses among several copies of a network in a PyTorch file."""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flax_densenet.errors import UserError, printable

_LOGGER = logging.getLogger(__name__)
_AVERAGE = re.compile(r'(.*_)?(ema|swa|averaged|average|avg|shadow)(_.*)?')


def is_average(start: str) -> bool:
    """Whether a prefix of names belongs to a moving average."""
    return any(_AVERAGE.fullmatch(part.lower()) for part in start.split('.'))


def choose(
    path: str,
    names: Sequence[str],
    averages: Sequence[int],
    *,
    are_equal: Callable[[], bool],
    remedy: str,
) -> int:
    """Chooses among copies: the only moving average, or the first if all are equal.

    Args:
      path: the file, for messages.
      names: of the copies, two or more.
      averages: numbers of those that are moving averages.
      are_equal: compares the arrays of all copies.
      remedy: how to save one of them alone.

    Raises:
      UserError: the copies differ, and it is unclear which to use.
    """
    shown = ' and '.join(printable(name) for name in names[:4])
    if len(averages) == 1:
        _LOGGER.warning(
            '%s holds the network %s, as %s; the moving average %s is used; to use '
            'another, save it alone',
            path,
            'twice' if len(names) == 2 else f'{len(names)} times',
            *(shown, printable(names[averages[0]])),
        )
        return averages[0]
    if are_equal():
        _LOGGER.warning('%s holds the same network as %s; one is used', path, shown)
        return 0
    raise UserError(
        f'{path} holds {len(names)} networks, as {shown}; choose one and save it '
        f'alone: {remedy}'
    )


def equal_arrays(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two dicts hold the same arrays under the same names."""
    return one.keys() == other.keys() and all(
        np.array_equal(one[name], other[name]) for name in one
    )

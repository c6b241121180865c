"""Training images that grow during training (progressive resizing).

>>> schedule = parse(((0.5, 16), (0.8, 24)))
>>> [size_in(schedule, epoch, epochs=10, last=32) for epoch in (1, 5, 6, 8, 9, 10)]
[16, 16, 24, 24, 32, 32]
>>> describe(schedule, epochs=10, last=32)
'16x16 up to epoch 5, 24x24 up to epoch 8, then 32x32'
"""

import numbers

from flax_densenet.errors import UserError
from flax_densenet.models import network
from flax_densenet.settings import sizes

Schedule = tuple[tuple[float, sizes.Size], ...]


def parse(value) -> Schedule:
    """Parses `data.size_schedule`.

    Args:
      value: `((share, size), ...)`, or `(share, size)` for a single one. Up to this
        share of the epochs, images have this size: pixels per side or (height, width).
        After the last share they have `data.image_size`.

    Raises:
      UserError: the value is not such a tuple.
    """
    found = _pairs(value)
    right = all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and isinstance(pair[0], numbers.Real)
        and _is_size(pair[1])
        for pair in found
    )
    shares = [0, *(pair[0] for pair in found)] if right else []
    rising = all(a < b <= 1 for a, b in zip(shares, shares[1:], strict=False))
    if not right or not rising:
        raise UserError(
            f'data.size_schedule={value} must be shares of the epochs, rising up to 1, '
            "each with the pixels per side until then, '((0.5,16),(0.8,24))', or with "
            "height and width, '((0.5,(16,8)),)'"
        )
    return tuple((float(share), sizes.parse(size)) for share, size in found)


def _pairs(value):
    """The pairs of share and size; a single pair may lack the outer tuple."""
    found = tuple(value)
    if len(found) == 2 and not isinstance(found[0], list | tuple):
        return (found,)
    return found


def _is_size(value):
    try:
        sizes.check(sizes.parse(value))
    except UserError:
        return False
    return not isinstance(value, str)


def check(value, module: network.Network, last: sizes.Size):
    """Raises `UserError` if the model cannot take one of the sizes.

    Args:
      last: `data.image_size`; if it is not square, each size must be a pair.
    """
    for given, (_, size) in zip(_pairs(value), parse(value), strict=True):
        if isinstance(given[1], int) and not isinstance(last, int):
            raise UserError(
                f'data.size_schedule={value}: data.image_size={sizes.plain(last)} is '
                "not square, so give height and width of each size: '((0.5,(16,8)),)'"
            )
        try:
            module.check_image_size(sizes.pair(size))
        except UserError as error:
            raise UserError(f'data.size_schedule={value}: {error}') from error


def size_in(
    schedule: Schedule, epoch: int, *, epochs: int, last: sizes.Size
) -> sizes.Size:
    """The size in an epoch, counted from 1; `last` after the end of the schedule."""
    for share, size in schedule:
        if epoch <= round(share * epochs):
            return size
    return last


def describe(schedule: Schedule, *, epochs: int, last: sizes.Size) -> str:
    """The sizes and their epochs in words; empty if there is only one size."""
    parts, begin = [], 0
    for share, size in schedule:
        end = round(share * epochs)
        if end > begin:  # with few epochs a share may have none
            parts.append(f'{sizes.describe(size)} up to epoch {end}')
            begin = end
    if schedule and begin < epochs:
        shown = sizes.describe(last)
        parts.append(f'then {shown}' if parts else shown)
    return ', '.join(parts)

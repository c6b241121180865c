"""Training images that grow with training (progressive resizing).

>>> schedule = parse(((0.5, 16), (0.8, 24)))
>>> [size_in(schedule, epoch, epochs=10, last=32) for epoch in (1, 5, 6, 8, 9, 10)]
[16, 16, 24, 24, 32, 32]
>>> describe(schedule, epochs=10, last=32)
'16x16 up to epoch 5, 24x24 up to epoch 8, then 32x32'
"""

import numbers

from flax_densenet.errors import UserError
from flax_densenet.models import network

Schedule = tuple[tuple[float, int], ...]


def parse(value) -> Schedule:
    """The schedule that `data.size_schedule` says.

    Args:
      value: `((share, size), ...)` or, of one, `(share, size)`: up to this share of
        the epochs images have this many pixels a side; behind the last share they have
        `data.image_size`.

    Raises:
      UserError: it is not such a tuple.
    """
    found = tuple(value)
    if len(found) == 2 and not isinstance(found[0], list | tuple):
        found = (found,)
    right = all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and isinstance(pair[0], numbers.Real)
        and isinstance(pair[1], int)
        and 1 <= pair[1] <= 2**16
        for pair in found
    )
    shares = [0, *(pair[0] for pair in found)] if right else []
    rising = all(a < b <= 1 for a, b in zip(shares, shares[1:], strict=False))
    if not right or not rising:
        raise UserError(
            f'data.size_schedule={value} must be shares of the epochs, rising up to 1, '
            "each with the pixels a side that hold until then: '((0.5,16),(0.8,24))'"
        )
    return tuple((float(share), size) for share, size in found)


def check(value, module: network.Network):
    """Raises `UserError` where the model cannot take one of the sizes."""
    for _, size in parse(value):
        try:
            module.check_image_size((size, size))
        except UserError as error:
            raise UserError(f'data.size_schedule={value}: {error}') from error


def size_in(schedule: Schedule, epoch: int, *, epochs: int, last: int) -> int:
    """Pixels a side in an epoch, counted from 1; `last` behind the schedule's end."""
    for share, size in schedule:
        if epoch <= round(share * epochs):
            return size
    return last


def describe(schedule: Schedule, *, epochs: int, last: int) -> str:
    """Which sizes there are when, in words; empty where there is one size."""
    parts, begin = [], 0
    for share, size in schedule:
        end = round(share * epochs)
        if end > begin:  # of few epochs a share may have none
            parts.append(f'{size}x{size} up to epoch {end}')
            begin = end
    if schedule and begin < epochs:
        parts.append(f'then {last}x{last}' if parts else f'{last}x{last}')
    return ', '.join(parts)

"""Sizes of images: a number of pixels for a square, or (height, width).

>>> parse('100,50'), parse((64, 64)), parse(224)
((100, 50), 64, 224)
>>> describe((100, 50)), describe(224)
('100x50', '224x224')
"""

import re
from typing import Any

from flax_densenet.errors import UserError

# A square is always the one number, so that it is saved and compared as such.
Size = int | tuple[int, int]

LARGEST = 2**16  # pixels per side
_TEXT = re.compile(r'\s*[(\[]?\s*(\d+)\s*(?:[,x×]\s*(\d+)\s*,?)?\s*[)\]]?\s*', re.I)


def parse(value: Any, field: str = 'data.image_size') -> Size:
    """Parses a size.

    Args:
      value: a number, two numbers (height and width), or text with them: `224`,
        `(100,50)`, `100,50`, `100x50`.
      field: name of the field, for the error.

    Raises:
      UserError: it is none of these.
    """
    sides = value
    if isinstance(value, str) and (match := _TEXT.fullmatch(value)):
        sides = [int(side) for side in match.groups() if side is not None]
        sides = sides[0] if len(sides) == 1 else sides
    if _is_whole(sides):
        return int(sides)
    is_pair = isinstance(sides, list | tuple) and len(sides) == 2
    if not is_pair or not all(map(_is_whole, sides)):
        raise UserError(
            f'{field}={value!r} must be pixels: 224 for a square, or height and width, '
            "as '(100,50)'"
        )
    height, width = map(int, sides)
    return height if height == width else (height, width)


def _is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def are_sides(*sides: Any) -> bool:
    """Whether all are numbers of pixels."""
    return all(_is_whole(side) and 0 < side <= LARGEST for side in sides)


def pair(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def check(size: Size, field: str = 'data.image_size', *, least: int = 1):
    """Raises `UserError` if a side is not from `least` to `LARGEST` pixels."""
    if any(not least <= side <= LARGEST for side in pair(size)):
        each = '' if isinstance(size, int) else ': each side'
        raise UserError(
            f'{field}={plain(size)}{each} must be from {least} to {LARGEST}'
        )


def plain(size: Size) -> str:
    """As a user writes it: `224`, `(100,50)`."""
    return str(size).replace(' ', '')


def describe(size: Size) -> str:
    """Height x width."""
    height, width = pair(size)
    return f'{height}x{width}'

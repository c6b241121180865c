"""Checks of what Python callers pass: the type of an argument, by its name."""

import numbers
import os
from typing import Any

from flax_densenet.errors import UserError
from flax_densenet.system import paths


def describe(value: Any) -> str:
    """A value in a message: itself if it is short, an array by its shape, or its type.

    >>> describe(2.5), describe(None), describe([1, 2]), describe(object())
    ('2.5', 'None', '[1, 2]', 'an object of type object')
    """
    shape, dtype = getattr(value, 'shape', None), getattr(value, 'dtype', None)
    if isinstance(shape, tuple) and dtype is not None:
        return f'an array of {dtype} {list(shape)}'
    plain = str | bytes | numbers.Number | list | tuple | dict | set
    if value is None or isinstance(value, plain):
        text = repr(value)
        if len(text) <= 60:
            return text
    name = type(value).__name__
    return f'an object of type {name}'


def check_whole(name: str, value: Any, *, least: int = 1):
    """Raises `UserError` unless a value is a whole number of at least `least`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise UserError(f'{name}={describe(value)} must be a whole number')
    if value < least:
        raise UserError(f'{name}={value} must be at least {least}')


def is_path(value: Any) -> bool:
    """Whether a value is text or a `pathlib` path."""
    return isinstance(value, str | os.PathLike)


def check_path(name: str, value: Any, what: str) -> str:
    """The text of a path, as it was given.

    Args:
      name: of the argument.
      value: of the argument.
      what: what the argument names, such as `a file`.

    Raises:
      UserError: it is no path, or empty.
    """
    if not is_path(value):
        raise UserError(f'{name}: {describe(value)} is not a path; give {what}')
    text = os.fsdecode(value)
    if not text:
        raise UserError(f"{name}='' is empty; give {what}")
    return text


def resolve(name: str, value: Any, what: str) -> str:
    """`check_path`, then `paths.resolve`: `~` and variables as in the commands."""
    return paths.resolve(check_path(name, value, what), f'{name}=')

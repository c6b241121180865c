"""The base class of the entries of `decisions.Decisions`, and their format in files.

Fields of type `np.ndarray` go into a safetensors file, the others into JSON. A file may
come from a stranger, so reading checks the types, and `check` checks the values.
"""

import dataclasses
import math
import types
import typing
from typing import Any, Self

import numpy as np

_FLOATS = (np.float16, np.float32, np.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """A fitted entry; subclasses are frozen dataclasses.

    A field is a `bool`, `int`, `float` or `str`, a tuple of one of them (such as
    `tuple[float | None, ...]`), or an `np.ndarray` of float16, float32 or float64.
    """

    def check(self, classes: int):
        """Checks the values of the fields.

        Args:
          classes: number of outputs of the model.

        Raises:
          ValueError: a value is invalid; the message says why.
        """

    def to_files(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The fields for the JSON file, and the arrays by field name."""
        plain, arrays = {}, {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                arrays[field.name] = value
            else:
                plain[field.name] = list(value) if isinstance(value, tuple) else value
        return plain, arrays

    @classmethod
    def from_files(cls, plain: Any, arrays: dict[str, np.ndarray]) -> Self:
        """Restores the entry from the result of `to_files`.

        Missing fields get their defaults; unknown fields are ignored.

        Raises:
          ValueError: a field without a default is missing, or a field has the wrong
            type.
        """
        if not isinstance(plain, dict):
            raise ValueError('it must be an object')
        found = {}
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            name, kind = field.name, hints[field.name]
            given = arrays if kind is np.ndarray else plain
            if name in given:
                found[name] = _convert(name, given[name], kind)
            elif (
                field.default is dataclasses.MISSING
                and field.default_factory is dataclasses.MISSING
            ):
                raise ValueError(f'{name} is missing')
        return cls(**found)


def _convert(name, value, kind):
    if kind is np.ndarray:
        if value.dtype not in _FLOATS or not np.isfinite(value).all():
            raise ValueError(f'{name} must be finite floats')
        return value
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f'{name} is {value!r:.60}')
        return tuple(_convert(name, one, typing.get_args(kind)[0]) for one in value)
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if float in kinds and type(value) is int and abs(value) < 2**53:
        value = float(value)
    good = type(value) in kinds or (value is None and types.NoneType in kinds)
    if not good or (type(value) is float and not math.isfinite(value)):
        raise ValueError(f'{name} is {value!r:.60}')
    return value

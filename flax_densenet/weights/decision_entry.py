"""The base class of what `decisions.Decisions` holds, and its form in files.

Fields of type `np.ndarray` go into a safetensors file, the others into JSON. A file may
come from a stranger, so that types are checked when it is read, and values by `check`.
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

    Fields are of type `bool`, `int`, `float`, `str`, tuples of one of them (such as
    `tuple[float | None, ...]`), or `np.ndarray`, which is float16, float32
    or float64.
    """

    def check(self, classes: int):
        """Raises `ValueError` with what is wrong, in words.

        Args:
          classes: number of the model's outputs.
        """

    def to_files(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The fields for JSON, and the arrays."""
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

        Fields that are missing have their defaults; unknown ones are left out.

        Raises:
          ValueError: a field is missing or has another type.
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

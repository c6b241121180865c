"""Finds columns that divide the images into subgroups: age, sex, site, view.

Columns that identify people or images (names, patient numbers, dates of birth) are
never used, since the report shows the values.
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flax_densenet.data import cells as cells_lib
from flax_densenet.data import group_columns
from flax_densenet.errors import UserError

_MOST_VALUES, _MOST_CHOSEN = 12, 50  # values of a detected column, or of a named one
_MOST_COLUMNS = 6
_LONGEST = 40  # characters of a value
_words = str.split
# Preferred columns.
_KNOWN = _words(
    'age sex gender race ethnicity site hospital center centre institution country '
    'region scanner camera device manufacturer vendor model view projection position '
    'laterality side location localization skintype dataset source'
)
_IDENTIFIER = re.compile(
    r'.*(?:id|uid|uuid|name|mrn|ssn|number|index|date|birthday|dob|birth|time|'
    r'timestamp|phone|email|mail|address|zip|zipcode|postcode|accession|path|file|'
    r'filename|url|hash|md5|comment|comments|remark|note|notes|report|text|'
    r'description)'
)
_AGE = re.compile(r'0*(\d{1,3})Y', re.IGNORECASE)  # as in DICOM


def check(setting: str):
    """Raises `UserError` for an invalid value of `data.subgroups`."""
    if setting.startswith('path:'):
        _pattern(setting)
    elif not setting.strip():
        raise UserError(
            'data.subgroups is empty; use auto, none, columns such as age,sex, or '
            'path:REGEX'
        )


def _pattern(setting):
    try:
        pattern = re.compile(setting.removeprefix('path:'))
    except re.error as error:
        raise UserError(f'data.subgroups={setting}: {error}') from error
    if not pattern.groupindex:
        raise UserError(
            f'data.subgroups={setting} has no named group; write the part that divides '
            'the images as path:(?P<site>[a-z]+)_'
        )
    return pattern


def find(
    columns: Mapping[str, Sequence[str]], setting: str, below: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], str]:
    """Finds the columns that divide images into subgroups.

    Args:
      columns: cells of the images by column, for columns that are neither the image,
        its labels, its part nor its group.
      setting: `data.subgroups`.
      below: the images' paths below the source's folder.

    Returns:
      For each column float64 `[N]` (NaN for missing numbers), or words `[N]` (empty if
      missing), and a line about the choice, or ''.

    Raises:
      UserError: a named column does not exist, or identifies people.
    """
    check(setting)
    if setting == 'none':
        return {}, ''
    if setting.startswith('path:'):
        return _of_paths(setting, below), ''
    if setting != 'auto':
        names = [name.strip() for name in setting.split(',') if name.strip()]
        return {name: _named(columns, name, setting) for name in names}, ''
    found: dict[str, np.ndarray] = {}
    for name in sorted(columns, key=_order):  # stable: else in table order
        values = None if _is_identifier(name) else _values(columns[name])
        if values is not None and len(found) < _MOST_COLUMNS and _divides(name, values):
            found[name] = values
    if not found:
        return {}, ''
    return found, (
        f'metrics are also shown by {", ".join(found)}; data.subgroups names other '
        'columns, or none'
    )


def _order(name):
    """The rank of a column among the known ones, by a word in its name."""
    words = re.findall(r'[A-Z]?[a-z]+|[A-Z]+(?![a-z])', name)
    words = {word.lower() for word in words} | {cells_lib.key(name)}
    return next((n for n, known in enumerate(_KNOWN) if known in words), len(_KNOWN))


def candidates(names: Sequence[str], setting: str) -> list[str]:
    """The columns that `find` may take of a source whose columns cost time to read.

    Args:
      names: of all columns that hold numbers or words.
      setting: `data.subgroups`.

    Raises:
      UserError: a column that was named is not there.
    """
    if setting == 'auto':
        return [name for name in names if not _is_identifier(name)]
    if setting == 'none' or setting.startswith('path:'):
        return []
    chosen = [name.strip() for name in setting.split(',') if name.strip()]
    for name in chosen:
        _check_there(names, name, setting)
    return chosen


def to_cell(value: Any) -> str:
    """A number, word or missing value of another source as the cell of a table."""
    if value is None:
        return ''
    return value.decode(errors='replace') if isinstance(value, bytes) else str(value)


def _is_identifier(name):
    key = cells_lib.key(name)
    if not key or group_columns.identifies_people(name) or key.startswith('unnamed'):
        return True
    return _IDENTIFIER.fullmatch(key) is not None


def _values(cells):
    """Numbers, or words without missing ones; also ages in DICOM's form."""
    plain = [
        _AGE.sub(r'\1', c) if _AGE.fullmatch(c) else c for c in map(str.strip, cells)
    ]
    known = {cell: cells_lib.number(cell) for cell in set(plain)}
    missing = {cell for cell in known if cells_lib.is_missing(cell)}
    numbers = [known[cell] for cell in known.keys() - missing]
    if len(numbers) > _MOST_VALUES and None not in numbers:
        return np.array([np.nan if c in missing else known[c] for c in plain], float)
    return np.array(['' if cell in missing else cell for cell in plain])


def _divides(name, values):
    """Whether a column makes a few groups, and does not number the images."""
    if values.dtype == float:
        numbers = values[~np.isnan(values)]
        whole = (numbers == np.round(numbers)).all()
        counts = whole and len(np.unique(numbers)) > 0.9 * len(numbers)
        return not counts or _order(name) < len(_KNOWN)
    words = values[values != '']
    different = len(np.unique(words))
    return (
        2 <= different <= min(_MOST_VALUES, len(words) / 2)
        and max(map(len, words)) <= _LONGEST
    )


def _named(columns, name, setting):
    _check_there(columns, name, setting)
    if group_columns.identifies_people(name):
        raise UserError(
            f'data.subgroups={setting}: {name} identifies people, and the report would '
            'show it; leave it out'
        )
    values = _values(columns[name])
    different = len(np.unique(values))
    if values.dtype != float and different > _MOST_CHOSEN:
        raise UserError(
            f'data.subgroups={setting}: {name} has {different} different values, and '
            f'at most {_MOST_CHOSEN} can be shown; choose another column'
        )
    return values


def _check_there(columns, name, setting):
    if name not in columns:
        raise UserError(
            f'data.subgroups={setting}: there is no column {name} to divide the images '
            f'by; there are {", ".join(columns)[:200] or "none"}'
        )


def _of_paths(setting, below):
    """A column for each named capture group of the pattern, called `site (path)`."""
    pattern = _pattern(setting)
    matches = [pattern.search(path) for path in below]
    if not any(matches):
        first = f'; the first path is {below[0]}' if len(below) else ''
        raise UserError(f'data.subgroups={setting} matches no path{first}')
    columns = {
        f'{name} (path)': [(m and m[name]) or '' for m in matches]
        for name in pattern.groupindex
    }
    return {name: _named(columns, name, setting) for name in columns}


def add_of_columns(
    reader: Any,
    setting: str,
    columns: Mapping[str, Sequence[str]],
    field: str,
    below: Sequence[str] = (),
) -> str:
    """Subgroups of images whose source has columns, or fields, besides the labels.

    Args:
      reader: a `readers.Reader`, which gets them.
      setting: `data.subgroups`.
      columns: cells of each image, by `candidates`.
      field: how messages call the source.
      below: paths that the source has for its images.

    Returns:
      A line about the choice, or ''.

    Raises:
      UserError: a column that was named tells people apart, or a pattern matches no
        path.
    """
    reader.subgroups, line = find(columns, setting, below)
    return line and f'{field}: {line}'


def keep(reader: Any, setting: str):
    """Keeps those subgroups that a setting names, of images that have some.

    Args:
      reader: a `readers.Reader`.
      setting: `data.subgroups`.

    Raises:
      UserError: there is no such one.
    """
    if setting == 'auto' or not reader.subgroups:
        return
    names = candidates(list(reader.subgroups), setting)
    reader.subgroups = {name: reader.subgroups[name] for name in names}


def add_of_paths(reader: Any, setting: str):
    """Subgroups of images that no table describes: by their paths, if asked for.

    Args:
      reader: a `readers.Reader`, which gets them.
      setting: `data.subgroups`.

    Raises:
      UserError: it names columns of images that have none, or its pattern is none or
        matches no path.
    """
    if setting in ('auto', 'none') or reader.subgroups:
        return
    check(setting)
    if not setting.startswith('path:'):
        raise UserError(
            f'data.subgroups={setting} needs a table, data.labels; path:REGEX derives '
            'them from the paths'
        )
    keys = reader.keys(range(len(reader.labels))) if reader.labels_in_memory else None
    below = [os.fsdecode(key) for key in keys or ()]
    reader.subgroups = find({}, setting, below)[0]


def is_of_paths(name: str) -> bool:
    """Whether a column comes from the images' paths."""
    return name.endswith(' (path)')

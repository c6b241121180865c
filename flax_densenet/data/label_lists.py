"""Cells of a table that hold several names: `Effusion|Mass`, `a; b`, `['a', 'b']`."""

import re

import numpy as np

from flax_densenet.data import cells as cells_lib

NOTHING = 'no finding'
_words = str.split
_KEYS = _words('findinglabels findings labels label tags classes diagnoses categories')
# Class names may contain blanks, but tags are often separated by them.
_KEYS_WITH_BLANKS = _words('tags labels')
_BRACKETS = re.compile(r'[\[({].*[\])}]', re.DOTALL)
_NAMES = {'|': 'bars', ';': 'semicolons', ',': 'commas', ' ': 'spaces'}


def find(name: str, key: str, cells, *, chosen: bool, several: bool) -> str | None:
    """The separator of names in the cells of a column; None if they are not lists.

    Args:
      key: normalized name of the column.
      chosen: whether the user named the column.
      several: whether the user set that images have several labels.
    """
    if name.lower() == 'finding labels':
        found = (s for s in '|;,' if any(s in cell for cell in cells))
        return next(found, '|')
    if not (chosen or key in _KEYS):
        return None
    if any('|' in cell for cell in cells):
        return '|'
    different = {cell for cell in cells if not cells_lib.is_missing(cell)}
    if different and all(_BRACKETS.fullmatch(cell) for cell in different):
        return ','
    separators = [';', ','] + ([' '] if key in _KEYS_WITH_BLANKS else [])
    for separator in separators:
        if not any(separator in cell for cell in different):
            continue
        # Names that occur in several combinations are labels, not classes.
        pieces = {piece for cell in different for piece in split(cell, separator)}
        if (several and separator != ' ') or len(pieces) < len(different):
            return separator
    return None


def split(cell: str, separator: str) -> list[str]:
    """The names in a cell."""
    if _BRACKETS.fullmatch(cell):
        cell = cell[1:-1]
    pieces = (piece.strip().strip('\'"').strip() for piece in cell.split(separator))
    return [piece for piece in pieces if piece]


def read(cells, separator: str) -> tuple[list[str], np.ndarray]:
    """The sorted names of the labels, and float32 `[N, L]` of 0 and 1.

    Missing values, such as NA and none, are not labels.
    """
    rows = [
        [name for name in split(cell, separator) if not cells_lib.is_missing(name)]
        for cell in cells
    ]
    names = sorted({name for row in rows for name in row})
    names = [name for name in names if name.lower() != NOTHING]
    values = [[float(name in row) for name in names] for row in rows]
    return names, np.array(values, np.float32).reshape(len(rows), len(names))


def describe(column: str, separator: str) -> str:
    """A line about the guess; empty for bars, which are unambiguous."""
    if separator == '|':
        return ''
    return (
        f'the cells of {column} are read as lists of labels separated by '
        f'{_NAMES[separator]}; data.label_kind=classes reads each as one class'
    )


def describe_blank(column: str, cells, separator: str) -> str:
    """A line about cells that name no label; empty if there are none."""
    blank = [cell for cell in cells if cells_lib.is_missing(cell)]
    words = {cell for cell in blank if cell}
    lines = []
    if blank:
        named = f' ({", ".join(sorted(words)[:5])})' if words else ''
        lines.append(
            f'{len(blank)} blank cells of {column}{named} are read as no label'
        )
    beside = [
        name
        for cell in cells
        if not cells_lib.is_missing(cell)
        for name in split(cell, separator)
        if cells_lib.is_missing(name)
    ]
    if beside:
        lines.append(
            f'{len(beside)} missing values inside the lists of {column} '
            f'({", ".join(sorted(set(beside))[:5])}) are left out'
        )
    return '; '.join(lines)

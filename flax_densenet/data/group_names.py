"""Numbers for the groups of images, whose names may be written in several ways."""

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from flax_densenet.data import cells as cells_lib

_WHOLE = re.compile(r'(0|[1-9]\d*)[.,]0+')
_ZEROS = re.compile(r'(?<!\d)0+(?=\d)')


def _plain(name):
    """A name without case, blanks and, of whole numbers, decimals."""
    plain = re.sub(r'\s+', '', name).casefold()
    return match[1] if (match := _WHOLE.fullmatch(plain)) else plain


def number(
    cells: Sequence[str], origin: str, owner: str, lines: Sequence[int] = ()
) -> tuple[np.ndarray, list[str]]:
    """int64 `[N]`, the group of each image, and a line about each guess.

    Names that differ only in case, blanks or decimals (`5` and `5.0`) are of one
    group; names that differ in leading zeros are not. A group has the number of its
    first name in the alphabet, so that other images do not change it.

    Args:
      cells: the names; missing ones count as separate groups.
      origin: how messages call the source of the names: `the column patient`.
      owner: how messages call what images without a name lack.
      lines: the line of each name in its file.
    """
    spellings = defaultdict(set)
    for cell in set(cells):
        if not cells_lib.is_missing(cell):
            spellings[_plain(cell)].add(cell)
    first = {name: min(names) for names in spellings.values() for name in names}
    blank = [i for i, cell in enumerate(cells) if cell not in first]
    own = [first.get(cell, f'\0{i}') for i, cell in enumerate(cells)]
    notes = _describe(spellings, origin)
    if blank and len(blank) < len(cells):
        where = f' (line {lines[blank[0]]})' if len(lines) else ''
        notes.append(
            f'{len(blank)} images have no {owner}{where}; each counts as a separate '
            'group'
        )
    return cells_lib.hash_names(own), notes


def _describe(spellings, origin):
    notes = []
    merged = [sorted(names) for names in spellings.values() if len(names) > 1]
    if merged:
        one, other = min(merged)[:2]
        notes.append(
            f'{len(merged)} groups of {origin} are written in several ways, such as '
            f'{one!r} and {other!r}, and each counts as one group'
        )
    padded = defaultdict(list)
    for plain, names in spellings.items():
        padded[_ZEROS.sub('', plain)].append(min(names))
    alike = sorted(sorted(names)[:2] for names in padded.values() if len(names) > 1)
    if alike:
        one, other = alike[0]
        notes.append(
            f'{one!r} and {other!r} of {origin} count as two groups; write them '
            'alike if they are one'
        )
    return notes

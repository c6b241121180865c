"""The meaning of cells in a table: yes, no, unknown, a class, a group, a part."""

import hashlib
import re

import numpy as np

from flax_densenet.data import parts

_UNCERTAIN = -1.0
_MISSING = frozenset(
    ('', 'nan', 'na', 'n/a', '#n/a', '<na>', 'n.a.', 'null', 'none', 'nil', '-', '--')
    + ('?', '.', 'missing', 'unknown', 'undefined')
)
_WORDS = {
    **dict.fromkeys(('true', 'yes', 'positive', 'pos', 'present'), 1.0),
    **dict.fromkeys(('false', 'no', 'negative', 'neg', 'absent'), 0.0),
}
# Letters count only if both occur: F alone may be a sex.
_LETTERS = ({'y': 1.0, 'n': 0.0}, {'t': 1.0, 'f': 0.0}, {'+': 1.0, '-': 0.0})
# Crosses, in a column with otherwise empty cells.
_MARKS = frozenset('x\u2713\u2714\u2611')
# Missing values that can also name a class: `none`, `mild`, `severe`.
_CLASS_WORDS = frozenset(('none', 'nil', 'unknown', 'undefined', 'missing', 'na'))
# Always read as unknown: a column of only these is a label as well.
_PLAIN_MISSING = frozenset(('', 'nan'))


def key(name: str) -> str:
    """The name of a column without case, blanks and punctuation."""
    return re.sub(r'[\W_]+', '', name).lower()


def is_missing(cell: str) -> bool:
    """Whether a cell means that the value is unknown."""
    return cell.strip().lower() in _MISSING


def may_be_class(cell: str) -> bool:
    """Whether a cell that `is_missing` can also be the name of a class."""
    return cell.strip().lower() in _CLASS_WORDS


def number(cell: str) -> float | None:
    """A number, also with a decimal comma; None for anything else."""
    if '_' in cell:  # Python reads 1_0 as 10
        return None
    try:
        value = float(cell.replace(',', '.', 1))
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def yes_or_no(cells) -> tuple[list[float | None], list[int]]:
    """1, 0, -1 (uncertain) or NaN (missing) per cell; indices of other cells."""
    known = {}
    words = {cell.lower() for cell in cells}
    letters = next((pair for pair in _LETTERS if set(pair) <= words), {})
    if words & _MISSING and words - _MISSING and words - _MISSING <= _MARKS:
        letters = dict.fromkeys(_MARKS, 1.0)
    for cell in set(cells):
        low = cell.lower()
        value = _WORDS.get(low, letters.get(low))
        if value is None and low in _MISSING:
            value = np.nan
        elif value is None and (found := number(cell)) in (0.0, 1.0, _UNCERTAIN):
            value = found
        known[cell] = value
    values = [known[cell] for cell in cells]
    return values, [i for i, value in enumerate(values) if value is None]


def says_nothing(cells) -> bool:
    """Whether all cells are missing, some of them marked by a word."""
    found = {cell.lower() for cell in cells}
    return found <= _MISSING and not found <= _PLAIN_MISSING


def hash_names(names) -> np.ndarray:
    """int64 `[N]`: a number for each distinct name."""
    known = {
        name: hashlib.blake2b(name.encode(), digest_size=8).digest()
        for name in set(names)
    }
    return np.frombuffer(b''.join(known[name] for name in names), '>i8').astype('i8')


def roles(cells) -> list[str | None]:
    """The part that each cell names, or None."""
    known = {cell: parts.role(cell) for cell in set(cells)}
    return [known[cell] for cell in cells]


# The owner of an image, from the folder or the beginning of the file name.
_OWNERS = re.compile(
    r'(?:^|[/_. -])((?:patient|pat|subject|subj|sub|case|person|participant|animal|'
    r'mouse|lesion|specimen|slide|donor|individual|proband|pid)[ _-]?\d+|p\d{6,})'
    r'(?=[/_. -]|$)',
    re.IGNORECASE,
)


def is_owner(name: str) -> bool:
    """Whether a folder is named after a patient, such as `patient00007`."""
    return _OWNERS.match(name) is not None


def find_owners(paths, pattern: re.Pattern | None = None) -> list[str | None]:
    """The owner of each image, from paths such as `patient00007/study1/view1.png`.

    Args:
      pattern: pattern of the owner: its first capture group, or the whole match if it
        has none.
    """
    pattern = pattern or _OWNERS
    matches = map(pattern.search, paths)
    place = 1 if pattern.groups else 0
    return [None if match is None else match[place] or '' for match in matches]


def owners(paths, pattern: re.Pattern | None = None) -> list[str] | None:
    """The owners of `find_owners` if all images have one that divides them.

    Returns:
      None unless every path has an owner, and there are fewer owners than images but
      more than one.
    """
    found = [owner for owner in find_owners(paths, pattern) if owner is not None]
    return found if 1 < len(set(found)) < len(found) == len(paths) else None

"""Tables of labels: which images have which of several labels (CSV).

One row an image. A column with the image's name (`image`, `filename`, `Image Index`,
...; else the first), and a column of 0 and 1 for each label; empty, `nan` and -1 (said
of uncertain ones) are not known. Or one column `Finding Labels` with names between
bars, as the NIH's chest X-rays have it. Images of one `Patient ID` (or `patient`,
`subject`, `group`) never go to both sides of a split; a column `split` of train and
test decides it.
"""

import csv
import dataclasses
import hashlib
from collections import Counter

import numpy as np

from flax_densenet.errors import UserError
from flax_densenet.system import paths

_NAME_COLUMNS = ('image', 'image index', 'filename', 'file', 'path', 'image_id', 'name')
_GROUP_COLUMNS = (
    'patient',
    'patient id',
    'patient_id',
    'patientid',
    'subject',
    'group',
)
_LISTS = 'finding labels'
_NOTHING = 'No Finding'
_VALUES = {'': np.nan, 'nan': np.nan, '-1': np.nan, '-1.0': np.nan}
_VALUES |= {'0': 0.0, '0.0': 0.0, '1': 1.0, '1.0': 1.0}
_PARTS = {'train': 0, 'training': 0, 'test': 1, 'val': 1, 'valid': 1, 'validation': 1}


@dataclasses.dataclass(frozen=True)
class Labels:
    """A table of labels.

    Attributes:
      images: names of the images, N of them.
      names: of the labels, L of them.
      values: float32 `[N, L]` of 0, 1 and NaN.
      groups: int64 `[N]`, whose image it is, or None.
      parts: int64 `[N]`, 0 to train on and 1 to test on, or None.
      ignored: columns that were taken for none of these.
    """

    images: list[str]
    names: tuple[str, ...]
    values: np.ndarray
    groups: np.ndarray | None
    parts: np.ndarray | None
    ignored: tuple[str, ...]


def read(path: str) -> Labels:
    """Reads a CSV file.

    Raises:
      UserError: the file cannot be read, names an image twice, or has no labels.
    """
    field = f'data.labels={path}'
    try:
        path = paths.resolve(path, 'data.labels=')
        with open(path, newline='', encoding='utf-8-sig') as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if any(row)]
    except UnicodeDecodeError as error:
        raise UserError(
            f'{field} is no text in UTF-8 (byte {error.start}); save it as CSV in UTF-8'
        ) from error
    except (OSError, csv.Error) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'{field} cannot be read ({reason})') from error
    if len(rows) < 2:
        raise UserError(f'{field} has no rows under its heading')
    rows = [(line, [cell.strip() for cell in row]) for line, row in rows]
    heading, rows = rows[0][1], rows[1:]
    if len(heading) == 1:
        raise UserError(f'{field} has one column; commas must separate the cells')
    # Of columns without a name, as of a comma at the end of each line, none is used.
    twice = next((name for name, n in Counter(heading).items() if name and n > 1), None)
    if twice is not None:
        raise UserError(f'{field}: the column {twice} is there twice; rename one')
    for line, row in rows:
        if len(row) != len(heading):
            raise UserError(
                f'{field}: line {line} has {len(row)} cells, the heading {len(heading)}'
            )
        if any('\0' in cell for cell in row):
            raise UserError(f'{field}: line {line} holds a zero byte; it is no text')
    cells = zip(*(row for _, row in rows), strict=True)
    return _take(field, dict(zip(heading, cells, strict=True)))


def _take(field, columns):
    lower = {name.lower(): name for name in columns}
    images = next((lower[n] for n in _NAME_COLUMNS if n in lower), next(iter(columns)))
    group = next((lower[n] for n in _GROUP_COLUMNS if n in lower), None)
    split = lower.get('split')
    left = [name for name in columns if name not in (images, group, split, '')]
    twice = next((x for x, n in Counter(columns[images]).items() if n > 1), None)
    if twice is not None:
        raise UserError(f'{field}: the image {twice} is there more than once')
    if _LISTS in lower:
        lists = [cell.split('|') for cell in columns[lower[_LISTS]]]
        names = sorted({name for found in lists for name in found} - {_NOTHING, ''})
        values = [[float(name in found) for name in names] for found in lists]
        used = {lower[_LISTS]}
    else:
        names = [n for n in left if all(c.lower() in _VALUES for c in columns[n])]
        values = [[_VALUES[c.lower()] for c in columns[n]] for n in names]
        values = list(zip(*values, strict=True))
        used = set(names)
    if not names:
        found = ', '.join(columns)
        raise UserError(
            f'{field}: no column holds only 0, 1 and empty cells; it has {found[:200]}'
        )
    return Labels(
        images=list(columns[images]),
        names=tuple(names),
        values=np.array(values, np.float32),
        groups=None if group is None else _number(columns[group]),
        parts=None if split is None else _parts(field, columns[split]),
        ignored=tuple(name for name in left if name not in used),
    )


def _number(cells):
    """A number of each name that does not depend on what other names there are."""
    known = {
        cell: hashlib.blake2b(cell.encode(), digest_size=8).digest()
        for cell in set(cells)
    }
    return np.frombuffer(b''.join(known[cell] for cell in cells), '>i8').astype('i8')


def _parts(field, cells):
    wrong = next((cell for cell in cells if cell.lower() not in _PARTS), None)
    if wrong is not None:
        raise UserError(f'{field}: split={wrong} is not known; use train and test')
    return np.array([_PARTS[cell.lower()] for cell in cells])

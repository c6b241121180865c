"""Points out an unused column of a table that may tell patients apart."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from flax_densenet.data import cells as cells_lib
from flax_densenet.data import group_columns

_words = str.split
_ID_WORDS = frozenset(
    _words('id ids uid uuid nr no num number nummer code key case study pseudonym hash')
)
_ID_END = re.compile(r'.{2,}(?:id|nr|number|nummer|code|case|study)')
# Columns of classes, of places and devices, of the image itself, and of measures.
_OTHER_WORDS = frozenset(
    _words(
        'class classes label labels category target diagnosis dx species breed finding '
        'findings type grade stage score severity site center centre hospital '
        'institution scanner device camera manufacturer vendor model dataset source '
        'country region city zip postcode location ward doctor physician reader rater '
        'annotator operator age sex gender race date time datetime timestamp year '
        'month day birth dob fold split part view position projection frame slice '
        'image img instance file filename path url row index size width height '
        'comment comments note notes description report text remark remarks'
    )
)
_DATE = re.compile(r'\d{1,4}[-/.:]\d{1,2}[-/.:]\d{1,4}.*')
_LEAST_ROWS, _LEAST_IDS, _LEAST_NAMES = 10, 5, 10
_LONGEST = 64  # characters of a name


def find(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """A line about a column whose values are each in several rows; empty for none.

    A column such as `cow_id` needs 5 values and half of the rows to share theirs. Any
    other needs 10 values, no numbers or dates, and 2 rows for each value on average.
    Columns of ages, sites, views, dates and the like are left out by their names.

    Args:
      columns: cells by name, of columns without a role.
    """
    found = [name for name, cells in columns.items() if _may_group(name, cells)]
    if not found:
        return []
    name = min(found, key=lambda n: not _is_id(n))
    known = [cell for cell in columns[name] if not cells_lib.is_missing(cell)]
    return [
        'no column names patients, so images are split one by one unless their paths '
        f'do; the column {name} has {len(set(known))} values in {len(known)} rows: '
        f'{group_columns.setting(name)} keeps images of the same {name} together'
    ]


def _parts(name):
    """The words in the name of a column: `cow_id`, `CowID`."""
    found = re.findall(r'[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![a-z])', name)
    return [word.lower() for word in found]


def _is_id(name):
    words = _parts(name)
    is_id = _ID_END.fullmatch(cells_lib.key(name)) is not None
    return is_id or bool(words and words[-1] in _ID_WORDS)


def _may_group(name, cells):
    if not cells_lib.key(name) or _OTHER_WORDS & {*_parts(name), cells_lib.key(name)}:
        return False
    counts = Counter(cell for cell in cells if not cells_lib.is_missing(cell))
    known = sum(counts.values())
    if known < max(_LEAST_ROWS, len(cells) / 2) or max(map(len, counts)) > _LONGEST:
        return False
    if sum(_DATE.fullmatch(cell) is not None for cell in counts) > len(counts) / 2:
        return False
    numbers = [cells_lib.number(cell) for cell in counts]
    if _is_id(name):
        if any(value is not None and value % 1 for value in numbers):
            return False
        shared = sum(count for count in counts.values() if count > 1)
        return len(counts) >= _LEAST_IDS and shared >= known / 2
    are_names = sum(value is None for value in numbers) > len(counts) / 2
    return are_names and _LEAST_NAMES <= len(counts) <= known / 2

"""Reads a table as text: CSV files of spreadsheets, R, pandas and people."""

import codecs
import csv
import dataclasses
import io
import re
from collections import Counter
from collections.abc import Callable

from flax_densenet.data import listing, other_files
from flax_densenet.errors import UserError

_SEPARATORS = {
    ',': 'commas',
    ';': 'semicolons',
    '\t': 'tabs',
    '|': 'bars',
    ' ': 'blanks',
}
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_UTF_32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
# The separator that Excel reads from a first line such as `sep=;`.
_SEP_LINE = re.compile(r'"?sep=([,;|\t])"?[,;|\t]*\r?\n')
_ROW_NAMES = 'row name'
_BINARY = {b'PK\x03\x04': 'an Excel file or an archive', b'PAR1': 'a Parquet file'}
_BINARY[b'\xd0\xcf\x11\xe0'] = 'an old Excel file'
_MARKUP = {'{': 'JSON', '[{': 'JSON', '<': 'HTML or XML'}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
      columns: `{name: cells}`, without blanks around the cells.
      lines: the line number of each row in the file, for messages.
      notes: a line about each guess.
    """

    columns: dict[str, tuple[str, ...]]
    lines: list[int]
    notes: list[str]


def read(path: str, field: str, is_image: Callable[[str], bool] | None = None) -> Table:
    """Reads a table with or without a heading.

    Args:
      Args: field: name of the table in messages.
      is_image: function that tells whether a cell names an image; by its extension if
        None. A first line that names one is not a heading.

    Raises:
      UserError: the file cannot be read or is not a table.
    """
    notes: list[str] = []
    rows = _rows(field, _text(field, path), notes)
    heading, body = rows[0][1], rows[1:]
    if any(_names_image(cell, is_image) for cell in heading):
        heading, body = [f'column {n}' for n in range(1, len(heading) + 1)], rows
        notes.append(
            'its first line is not a heading: it names an image; the columns are '
            'called '
            f'{", ".join(heading[:4])}{", ..." if len(heading) > 4 else ""}'
        )
    if not body:
        raise UserError(f'{field} has no rows under its heading')
    # Columns without a name, such as from a comma at the end of each line, are not
    # used.
    twice = next((name for name, n in Counter(heading).items() if name and n > 1), None)
    if twice is not None:
        raise UserError(f'{field}: the column {twice} occurs twice; rename one')
    for line, row in body:
        if len(row) != len(heading):
            raise UserError(
                f'{field}: line {line} has {len(row)} cells, the heading {len(heading)}'
            )
        if any('\0' in cell for cell in row):
            raise UserError(f'{field}: line {line} holds a zero byte; it is not text')
    cells = zip(*(row for _, row in body), strict=True)
    columns = dict(zip(heading, cells, strict=True))
    return Table(columns, [line for line, _ in body], notes)


def _names_image(cell, is_image):
    if listing.is_image_name(cell):
        return True
    return is_image is not None and cell.isdecimal() and is_image(cell)


def _text(field, path):
    try:
        with open(path, 'rb') as file:
            content = file.read()
    except OSError as error:
        raise UserError(f'{field} cannot be read ({error.strerror})') from error
    if what := other_files.describe_compressed(path):
        raise UserError(f'{field} {what} and name the file that this makes')
    for start, what in _BINARY.items():
        if content.startswith(start):
            raise UserError(f'{field} is {what}; save the table as CSV in UTF-8')
    try:
        text = content.decode(_encoding(content))
    except UnicodeDecodeError as error:
        raise UserError(
            f'{field} is not text in UTF-8 (byte {error.start}); save it as CSV in '
            'UTF-8'
        ) from error
    for start, what in _MARKUP.items():
        if text.lstrip().startswith(start):
            raise UserError(f'{field} is {what}, not a table; save it as CSV in UTF-8')
    return text


def _encoding(content):
    """The encoding from the first bytes; UTF-16 without a mark by its zero bytes."""
    if content.startswith(_UTF_32):
        return 'utf-32'
    if content.startswith(_UTF_16):
        return 'utf-16'
    start = content[:200]
    if len(start) > 3 and b'\0' in start:
        zeros = [start[side::2].count(0) / len(start[side::2]) for side in (0, 1)]
        if min(zeros) == 0 and max(zeros) > 0.8:
            return 'utf-16-be' if zeros[0] else 'utf-16-le'
    return 'utf-8-sig'


def _rows(field, text, notes):
    """`[(line, cells)]` with the first separator that gives rows of one length."""
    found, first_line, separators = None, 0, tuple(_SEPARATORS)
    if match := _SEP_LINE.match(text):
        text, first_line, separators = text[match.end() :], 1, (match[1],)
    for separator in separators:
        if separator not in text:
            continue
        rows = _split(field, text, separator, first_line)
        for table, note in _readings(rows):
            widths = {len(row) for _, row in table}
            if len(table) > 1 and len(widths) == 1 and widths != {1}:
                notes += note
                return table
        found = found or rows  # to report what is wrong with it
    found = found or _split(field, text, ',', first_line)
    if len(found) < 2:
        raise UserError(f'{field} has no rows under its heading')
    if len(found[0][1]) == 1:
        raise UserError(
            f'{field} has one column; commas must separate the cells (or semicolons '
            'or tabs)'
        )
    return found


def _readings(rows):
    """Ways to read a table, each with its note, from the plainest on."""
    yield rows, []
    for table, note in ((rows, []), _without_comments(rows)):
        if note:
            yield table, note
        if len(table) < 2 or len(table[0][1]) < 2:
            continue
        (line, heading), *body = table
        if any(len(row) != len(heading) + 1 for _, row in body):
            continue
        if not any(row[-1] for _, row in body):  # a comma at the end of each row
            yield [(line, [*heading, '']), *body], note
        elif _ROW_NAMES not in heading and _are_numbers(body):
            more = (
                'its heading has one cell less than its rows, as R writes tables; '
                f'their first cell is called {_ROW_NAMES!r}'
            )
            yield [(line, [_ROW_NAMES, *heading]), *body], [*note, more]


def _are_numbers(body):
    """Whether the first cells are distinct row numbers."""
    first = [row[0] for _, row in body]
    return all(map(str.isdecimal, first)) and len(set(first)) == len(first)


def _without_comments(rows):
    """The rows after comment lines with `#`, and a note if there are any."""
    count = 0
    while count < len(rows) and rows[count][1][0].startswith('#'):
        count += 1
    note = f'{count} lines at its beginning that start with # are left out'
    return rows[count:], [note] if count else []


def _split(field, text, separator, first_line):
    reader = csv.reader(
        io.StringIO(text, newline=''),
        delimiter=separator,
        skipinitialspace=separator == ' ',
    )
    try:
        rows = [(reader.line_num + first_line, row) for row in reader if any(row)]
    except csv.Error as error:
        raise UserError(f'{field} cannot be read ({error})') from error
    return [(line, [cell.strip() for cell in row]) for line, row in rows]

"""Reads a table as text: CSV as spreadsheets, R, pandas and people write it."""

import codecs
import csv
import dataclasses
import io
from collections import Counter
from collections.abc import Callable

from flax_densenet.data import listing
from flax_densenet.errors import UserError

_SEPARATORS = {
    ',': 'commas',
    ';': 'semicolons',
    '\t': 'tabs',
    '|': 'bars',
    ' ': 'blanks',
}
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BINARY = {b'PK\x03\x04': 'an Excel file or an archive', b'PAR1': 'a Parquet file'}
_BINARY[b'\xd0\xcf\x11\xe0'] = 'an old Excel file'


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
      columns: `{name: cells}`, without blanks around the cells.
      lines: the line of each row in the file, for messages.
      notes: what was guessed, a line each.
    """

    columns: dict[str, tuple[str, ...]]
    lines: list[int]
    notes: list[str]


def read(path: str, field: str, is_image: Callable[[str], bool] | None = None) -> Table:
    """Reads a table with or without a heading.

    Args:
      field: how messages call the table.
      is_image: whether a cell names an image; by its ending if None. A first line that
        names one is no heading.

    Raises:
      UserError: the file cannot be read or is no table.
    """
    rows = _rows(field, _text(field, path))
    notes = []
    heading, body = rows[0][1], rows[1:]
    if any(_names_image(cell, is_image) for cell in heading):
        heading, body = [f'column {n}' for n in range(1, len(heading) + 1)], rows
        notes.append(
            'its first line is no heading but names an image; the columns are called '
            f'{", ".join(heading[:4])}{", ..." if len(heading) > 4 else ""}'
        )
    if not body:
        raise UserError(f'{field} has no rows under its heading')
    # Of columns without a name, as of a comma at the end of each line, none is used.
    twice = next((name for name, n in Counter(heading).items() if name and n > 1), None)
    if twice is not None:
        raise UserError(f'{field}: the column {twice} is there twice; rename one')
    for line, row in body:
        if len(row) != len(heading):
            raise UserError(
                f'{field}: line {line} has {len(row)} cells, the heading {len(heading)}'
            )
        if any('\0' in cell for cell in row):
            raise UserError(f'{field}: line {line} holds a zero byte; it is no text')
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
    for start, what in _BINARY.items():
        if content.startswith(start):
            raise UserError(f'{field} is {what}; save the table as CSV in UTF-8')
    encoding = 'utf-16' if content.startswith(_UTF_16) else 'utf-8-sig'
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f'{field} is no text in UTF-8 (byte {error.start}); save it as CSV in UTF-8'
        ) from error


def _rows(field, text):
    """`[(line, cells)]` by the first separator that makes rows of one length."""
    found = None
    for separator in _SEPARATORS:
        if separator not in text:
            continue
        rows = _split(field, text, separator)
        widths = {len(row) for _, row in rows}
        if len(rows) > 1 and len(widths) == 1 and widths != {1}:
            return rows
        found = found or rows  # to tell what is wrong with it
    found = found or _split(field, text, ',')
    if len(found) < 2:
        raise UserError(f'{field} has no rows under its heading')
    if len(found[0][1]) == 1:
        raise UserError(
            f'{field} has one column; commas must separate the cells (or semicolons '
            'or tabs)'
        )
    return found


def _split(field, text, separator):
    reader = csv.reader(
        io.StringIO(text, newline=''),
        delimiter=separator,
        skipinitialspace=separator == ' ',
    )
    try:
        rows = [(reader.line_num, row) for row in reader if any(row)]
    except csv.Error as error:
        raise UserError(f'{field} cannot be read ({error})') from error
    return [(line, [cell.strip() for cell in row]) for line, row in rows]

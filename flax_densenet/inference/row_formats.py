"""Predictions as text: a table to read, CSV and JSON lines for programs.

Each form is a function `make(out, class_names, top)` that writes what stands before the
rows and returns `write(prediction)`. No name of a file can break a row: a line feed in
it is quoted (CSV) or escaped, and bytes that are no UTF-8 come through as they are in
CSV, as Python's `\\udcXX` in JSON and as `\\xXX` in the table.
"""

import csv
import json
import unicodedata
from collections.abc import Callable
from typing import Any

from flax_densenet.errors import printable
from flax_densenet.inference.prediction import Prediction

# Of a table: characters of a line, of the widest column of classes and of one's path.
_LINE, _CLASS, _PATH = 96, 32, 60
_NUMBER = 7


def _make_table(out, class_names, top):
    """One line for each class; the path stands on an image's first."""
    names = [printable(name) for name in class_names]
    wide = min(max(_width(name) for name in [*names, 'class']), _CLASS)
    path_wide = min(_LINE - wide - _NUMBER - 4, _PATH)
    out.write(f'{"path":<{path_wide}}  {"class":<{wide}}  {"prob.":>{_NUMBER}}\n')

    def write(found: Prediction):
        path = _pad(_clip_start(printable(found.path), path_wide), path_wide)
        if found.error:
            out.write(f'{path}  error: {printable(found.error)}\n')
        for likely in found.top(top):
            name = _pad(_clip_end(printable(likely.class_name), wide), wide)
            share = f'{likely.probability * 100:.1f} %'
            out.write(f'{path}  {name}  {share:>{_NUMBER}}\n')
            path = ' ' * path_wide

    return write


def _make_csv(out, class_names, top):
    rows = csv.writer(out, lineterminator='\n')
    pairs = [(f'class{n}', f'probability{n}') for n in range(1, top + 1)]
    rows.writerow(['path', 'error', *(name for pair in pairs for name in pair)])

    def write(found: Prediction):
        cells = [
            cell
            for likely in found.top(top)
            for cell in (likely.class_name, _rounded(likely.probability))
        ]
        rows.writerow([found.path, found.error, *cells, *[''] * (2 * top - len(cells))])

    return write


def _make_jsonl(out, class_names, top):
    def write(found: Prediction):
        row: dict[str, Any] = {'path': found.path}
        if found.error:
            row['error'] = found.error
        else:
            row['classes'] = [
                {'class': name, 'probability': _rounded(probability)}
                for name, probability in found.top(top)
            ]
        # ASCII: a byte of a name that is no UTF-8 becomes \udcXX, as Python has it.
        out.write(json.dumps(row) + '\n')

    return write


FORMATS: dict[str, Callable] = {
    'table': _make_table,
    'csv': _make_csv,
    'jsonl': _make_jsonl,
}


def _rounded(probability):
    """Six digits, which is what float32 has to offer."""
    return float(f'{probability:.6g}')


def _width(text):
    """Columns on a terminal: two for East Asian characters, none for accents."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in 'WF')
        for c in text
    )


def _pad(text, width):
    return text + ' ' * (width - _width(text))


def _clip_end(text, width):
    if _width(text) <= width:
        return text
    while _width(text) > width - 1:
        text = text[:-1]
    return text + '…'


def _clip_start(text, width):
    """A path's end tells more than its start."""
    if _width(text) <= width:
        return text
    while _width(text) > width - 1:
        text = text[1:]
    return '…' + text

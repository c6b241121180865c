"""Formats predictions as text: a table for people, CSV and JSON lines for programs.

Each format is a function `make(out, class_names, top, value)` that writes the heading
and returns `write(prediction)`; `value` says what the numbers are, `probability` or
`value`. File names cannot break a row: a line feed is quoted (CSV)
or escaped, and bytes that are not UTF-8 stay as they are in CSV, become Python's
`\\udcXX` in JSON and `\\xXX` in the table.
"""

import csv
import json
import unicodedata
from collections.abc import Callable
from typing import Any

from flax_densenet.errors import printable
from flax_densenet.inference.prediction import Prediction

# Characters of a line in a table, and at most in its columns: the class, the path, the
# classes that follow.
_LINE, _CLASS, _PATH, _NEXT = 80, 28, 60, 26
_NUMBER = 6


def _make_table(out, class_names, top, value='probability'):
    """A table with a line per image: the likeliest class, then the next ones.

    On a terminal, long texts are cut off to fit its line; files and pipes get them all.
    """
    clip_start, clip_end = (_clip_start, _clip_end) if out.isatty() else (_all, _all)
    names = [printable(name) for name in class_names]
    wide = min(max(_width(name) for name in [*names, 'class']), _CLASS)
    next_wide = _NEXT + 2 if top > 1 else 0
    path_wide = min(_LINE - wide - _NUMBER - 4 - next_wide, _PATH)
    title, show = ('prob.', _share) if value == 'probability' else (value, _plain)
    head = f'{"path":<{path_wide}}  {"class":<{wide}}  {title:>{_NUMBER}}'
    out.write(head + '  next\n' * (top > 1) + '\n' * (top == 1))

    def write(prediction: Prediction):
        path = _pad(clip_start(printable(prediction.path), path_wide), path_wide)
        if prediction.error:
            out.write(f'{path}  error: {printable(prediction.error)}\n')
            return
        best, *others = prediction.top(top)
        name = _pad(clip_end(printable(best.class_name), wide), wide)
        line = f'{path}  {name}  {show(best.probability):>{_NUMBER}}'
        if others:
            rest = ', '.join(
                f'{printable(one.class_name)} {show(one.probability)}' for one in others
            )
            line += f'  {clip_end(rest, _NEXT)}'
        out.write(line + '\n')

    return write


def _make_csv(out, class_names, top, value='probability'):
    rows = csv.writer(out, lineterminator='\n')
    pairs = [(f'class{n}', f'{value}{n}') for n in range(1, top + 1)]
    rows.writerow(['path', 'error', *(name for pair in pairs for name in pair)])

    def write(prediction: Prediction):
        cells = [
            cell
            for likely in prediction.top(top)
            for cell in (likely.class_name, _rounded(likely.probability))
        ]
        rows.writerow(
            [prediction.path, prediction.error, *cells, *[''] * (2 * top - len(cells))]
        )

    return write


def _make_jsonl(out, class_names, top, value='probability'):
    def write(prediction: Prediction):
        row: dict[str, Any] = {'path': prediction.path}
        if prediction.error:
            row['error'] = prediction.error
        else:
            row['classes'] = [
                {'class': name, value: _rounded(probability)}
                for name, probability in prediction.top(top)
            ]
        # ASCII: bytes of names that are not UTF-8 become \udcXX, as in Python.
        out.write(json.dumps(row) + '\n')

    return write


FORMATS: dict[str, Callable] = {
    'table': _make_table,
    'csv': _make_csv,
    'jsonl': _make_jsonl,
}


def _share(probability):
    return f'{probability * 100:.1f}%'


def _plain(value):
    return f'{value:.4g}'


def _rounded(probability):
    """Rounds to six digits, the precision of float32."""
    return float(f'{probability:.6g}')


def _width(text):
    """Columns on a terminal: two for East Asian characters, none for accents."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in 'WF')
        for c in text
    )


def _pad(text, width):
    return text + ' ' * (width - _width(text))


def _all(text, width):
    return text


def _clip_end(text, width):
    if _width(text) <= width:
        return text
    while _width(text) > width - 1:
        text = text[:-1]
    return text + '…'


def _clip_start(text, width):
    """Cuts off the start, because the end of a path says more."""
    if _width(text) <= width:
        return text
    while _width(text) > width - 1:
        text = text[1:]
    return '…' + text

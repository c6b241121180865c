"""Formats predictions as text: a table for people, CSV and JSON lines for programs.

Each format is a function `make(out, class_names, top, value, columns)` that writes the
heading and returns `write(prediction)`. `value` names the numbers (`probability` or
`value`), and `columns` lists what else is shown. File names cannot break a row: a line
feed is quoted (CSV) or escaped. Bytes that are not UTF-8 are kept in CSV, and become
`\\udcXX` (as in Python) in JSON and `\\xXX` in the table.
"""

import csv
import dataclasses
import json
import unicodedata
from collections.abc import Callable
from typing import Any

from flax_densenet.errors import printable
from flax_densenet.inference.prediction import Prediction

# Characters in a line of a table, and the limits for its columns: the class, the path,
# and the other classes.
_LINE, _CLASS, _PATH, _NEXT = 80, 28, 60, 26
_NUMBER = 6
_UNUSUAL = 'unusual'


@dataclasses.dataclass(frozen=True)
class Columns:
    """What is shown besides the most likely classes.

    Attributes:
      positive: whether to show the classes above their thresholds.
      unusual: whether to show the score of unusual images.
      coverage: coverage of the set of classes (`Prediction.classes`); None for no set.
    """

    positive: bool = False
    unusual: bool = False
    coverage: float | None = None


NO_COLUMNS = Columns()


def _make_table(out, class_names, top, value='probability', columns=NO_COLUMNS):
    """A table with one line per image: the most likely class, then the next ones.

    Classes above their thresholds have a star. With a coverage, the classes in the set
    are shown. The score of unusual images is shown for unusual images. On a terminal,
    long texts are cut off to fit the line; files and pipes get the full text.
    """
    clip_start, clip_end = (_clip_start, _clip_end) if out.isatty() else (_all, _all)
    names = [printable(name) + '*' * columns.positive for name in class_names]
    of_classes = 'class (* positive)' if columns.positive else 'class'
    wide = min(max(_width(name) for name in [*names, of_classes]), _CLASS)
    has_next = top > 1 or columns.coverage
    next_wide = _NEXT + 2 if has_next else 0
    score_wide = len(_UNUSUAL) + 2 if columns.unusual else 0
    path_wide = min(_LINE - wide - _NUMBER - 4 - next_wide - score_wide, _PATH)
    title, show = ('prob.', _share) if value == 'probability' else (value, _plain)
    head = f'{"path":<{path_wide}}  {of_classes:<{wide}}  {title:>{_NUMBER}}'
    head += f'  {_UNUSUAL}' * columns.unusual
    more = f'also in the set of {columns.coverage:.4g}' if columns.coverage else 'next'
    out.write(head + f'  {more}' * bool(has_next) + '\n')

    def write(prediction: Prediction):
        path = _pad(clip_start(printable(prediction.path), path_wide), path_wide)
        if prediction.error:
            out.write(f'{path}  error: {printable(prediction.error)}\n')
            return
        best, *others = prediction.top(top)
        above = prediction.positive or ()

        def shown(one):
            return printable(one.class_name) + '*' * (one.class_name in above)

        name = _pad(clip_end(shown(best), wide), wide)
        line = f'{path}  {name}  {show(best.probability):>{_NUMBER}}'
        if columns.unusual:
            score = f'{prediction.unusual:.1f}' if prediction.is_unusual else ''
            line += f'  {score:>{len(_UNUSUAL)}}'
        if columns.coverage:
            inside = prediction.classes(columns.coverage)
            others = [one for one in inside if one.class_name != best.class_name]
        if others:
            rest = ', '.join(f'{shown(one)} {show(one.probability)}' for one in others)
            line += f'  {clip_end(rest, _NEXT)}'
        out.write(line.rstrip() + '\n')

    return write


def _make_csv(out, class_names, top, value='probability', columns=NO_COLUMNS):
    rows = csv.writer(out, lineterminator='\n')
    pairs = [(f'class{n}', f'{value}{n}') for n in range(1, top + 1)]
    more = ['positive'] * columns.positive + ['unusual'] * columns.unusual
    more += ['set'] * bool(columns.coverage)
    rows.writerow(['path', 'error', *(name for pair in pairs for name in pair), *more])

    def write(prediction: Prediction):
        cells = [
            cell
            for likely in prediction.top(top)
            for cell in (likely.class_name, _rounded(likely.probability))
        ]
        cells += [''] * (2 * top - len(cells))
        if columns.positive:
            cells.append(';'.join(prediction.positive or ()))
        if columns.unusual:
            score = prediction.unusual
            cells.append('' if score is None else _rounded(score))
        if columns.coverage:
            inside = prediction.classes(columns.coverage)
            cells.append(';'.join(one.class_name for one in inside))
        rows.writerow([prediction.path, prediction.error, *cells])

    return write


def _make_jsonl(out, class_names, top, value='probability', columns=NO_COLUMNS):
    def write(prediction: Prediction):
        row: dict[str, Any] = {'path': prediction.path}
        if prediction.error:
            row['error'] = prediction.error
        else:
            row['classes'] = [
                {'class': name, value: _rounded(probability)}
                for name, probability in prediction.top(top)
            ]
            if columns.positive:
                row['positive'] = list(prediction.positive or ())
            if columns.unusual:
                row['unusual'] = _rounded(prediction.unusual)
                row['is_unusual'] = prediction.is_unusual
            if columns.coverage:
                row['set'] = [
                    one.class_name for one in prediction.classes(columns.coverage)
                ]
        # ASCII: bytes in names that are not UTF-8 become \udcXX, as in Python.
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
    """The width on a terminal: two columns for East Asian characters, 0 for accents."""
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
    """Cuts off the start, because the end of a path is more informative."""
    if _width(text) <= width:
        return text
    while _width(text) > width - 1:
        text = text[1:]
    return '…' + text

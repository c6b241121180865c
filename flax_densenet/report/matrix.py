"""A confusion matrix as a table of buttons, or as an SVG if it is large.

`style.css` has its colors: one hue for correct predictions, another for errors.
"""

import html

import numpy as np

from flax_densenet.report import render

TABLE = 30  # classes; a larger matrix has no room for names
_LEVELS = 8  # color levels in a large one


def draw(matrix: np.ndarray, names: list[str], places: list[int]) -> str:
    """The matrix as HTML.

    Args:
      matrix: counts `[true, predicted]`.
      names: of its classes.
      places: indices of the classes in the model.
    """
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    if len(names) > TABLE:
        return _draw_large(matrix, shares)
    return _draw_table(matrix, shares, [html.escape(name) for name in names], places)


def _draw_table(matrix, shares, names, places):
    heads = ''.join(f'<th scope="col"><span>{name}</span></th>' for name in names)
    lines = []
    for row, name in enumerate(names):
        cells = []
        for column, other in enumerate(names):
            count, share = int(matrix[row, column]), render.percent(shares[row, column])
            if not count:
                cells.append('<td></td>')
                continue
            kind = 'hit' if row == column else 'miss'
            cells.append(
                f'<td class="{kind}" style="--v:{shares[row, column]:.3f}"><button '
                f'type="button" data-cell="{places[row]},{places[column]}" '
                f'aria-label="Actual {name}, predicted {other}: {count:,} images, '
                f'{share} of the row" aria-pressed="false"><span class="count">'
                f'{count:,}</span> <span class="share">{share}</span></button></td>'
            )
        lines.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
    size = 'few' if len(names) <= 8 else 'many'
    size += ' tiny' * (len(names) <= 3)
    long = ' long' if max(map(len, names)) > 6 and len(names) > 4 else ''
    return (
        f'<div class="scroll wide" tabindex="0" role="region" '
        f'aria-label="Confusion matrix"><table class="matrix {size}{long}" '
        f'id="confusion"><thead><tr><td class="corner">Actual ↓ '
        f'Predicted →</td>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
        '</div>'
    )


def _draw_large(matrix, shares):
    count = len(matrix)
    parts = []
    for hits in (False, True):
        kept = np.eye(count, dtype=bool) == hits
        levels = np.ceil(shares * _LEVELS).astype(int)
        for level in range(1, _LEVELS + 1):
            cells = np.argwhere(kept & (levels == level) & (matrix > 0))
            path = ''.join(f'M{x} {y}h1v1h-1z' for y, x in cells.tolist())
            if path:
                kind = 'hit' if hits else 'miss'
                parts.append(
                    f'<path class="{kind}" style="--v:{level / _LEVELS:g}" d="{path}"/>'
                )
    return (
        f'<svg class="matrix" id="confusion" viewBox="0 0 {count} {count}" role="img" '
        f'aria-label="Confusion matrix of {count} classes: rows are actual, columns '
        f'predicted classes">{"".join(parts)}</svg>'
        '<p class="soft">Rows: actual class. Columns: predicted class.</p>'
    )

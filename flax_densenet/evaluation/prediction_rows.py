"""The rows of `predictions.csv`."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from flax_densenet.evaluation import metrics as metrics_lib

LIKELIEST = 10  # classes to list if there are very many


def make(results) -> Iterator[list[Any]]:
    """Path, actual and predicted class, and the probability of every class.

    With more than `metrics.WIDE` classes only the most likely ones, since all would
    take gigabytes. `predicted` is the most likely class, or the labels above their
    thresholds. If classes have thresholds, `positive` names the classes above them.

    Args:
      results: a `results.Results`.
    """
    names, several = results.class_names, results.multi_label
    if len(names) > metrics_lib.WIDE and not several:
        yield from _rows_of_likeliest(results)
        return
    known: list[Any] = [f'true_{name}' for name in names] if several else []
    decided = not several and results.thresholds is not None
    yield [
        *('path', 'true', 'predicted'),
        *['positive'] * decided,
        *known,
        *(f'probability_{name}' for name in names),
    ]
    for row, (label, line) in enumerate(
        zip(results.labels, results.probabilities, strict=True)
    ):
        if several:
            actual, predicted = (
                ';'.join(names[c] for c in np.flatnonzero(chosen))
                for chosen in (label == 1, results.positive[row])
            )
            known = ['' if np.isnan(value) else int(value) for value in label]
        else:
            actual, predicted = names[label], names[line.argmax()]
            if decided:
                above = np.flatnonzero(results.positive[row])
                known = [';'.join(names[c] for c in above)]
        yield [
            results.name(row),
            actual,
            predicted,
            *known,
            *(f'{p:.6g}' for p in line),
        ]


def _rows_of_likeliest(results):
    names = results.class_names
    numbers = range(1, LIKELIEST + 1)
    more = (f'{what}_{n}' for n in numbers for what in ('class', 'probability'))
    yield ['path', 'true', 'predicted', 'probability_of_true', *more]
    for row, line in enumerate(results.probabilities):
        label = results.labels[row]
        best = np.argpartition(-line, LIKELIEST)[:LIKELIEST]
        best = best[np.argsort(-line[best], kind='stable')]
        cells = (cell for c in best for cell in (names[c], f'{line[c]:.6g}'))
        true = names[label], names[results.predicted[row]], f'{line[label]:.6g}'
        yield [results.name(row), *true, *cells]

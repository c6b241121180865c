"""Intervals and subgroups in the table of `eval`, and groups in `predictions.csv`."""

import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from flax_densenet.evaluation import intervals, subgroups

WIDTH = 80  # characters
# Means over classes: the key and the name of each metric.
_MEANS = {
    'balanced_accuracy': 'balanced accuracy',
    'f1': 'F1',
    'auroc': 'AUROC',
    'average_precision': 'average precision',
}


def format_means(metrics: dict[str, Any]) -> list[str]:
    """Lines with the means over classes and their intervals; none without intervals.

    Args:
      metrics: from `Results.metrics`.
    """
    found = metrics['intervals']
    told = [
        f'{name} {metrics["macro"][key]:.3f} ({ends[0]:.3f} to {ends[1]:.3f})'
        for key, name in _MEANS.items()
        if found and (ends := found['macro'].get(key))
    ]
    if not told:
        return []
    return [f'means, 95% intervals by {intervals.describe(found)}:', *_fill(told)]


def _fill(pieces):
    """The pieces as indented lines."""
    lines: list[str] = []
    for piece in pieces:
        if lines and len(lines[-1]) + len(piece) + 2 <= WIDTH:
            lines[-1] += f', {piece}'
        else:
            lines.append(f'  {piece}')
    return lines


def format_subgroups(metrics: dict[str, Any]) -> list[str]:
    """Lines about the worst part of each column.

    Args:
      metrics: from `Results.metrics`.
    """
    sentences = filter(None, map(subgroups.describe, metrics['subgroups']))
    return [
        line
        for sentence in sentences
        for line in textwrap.wrap(sentence, WIDTH, subsequent_indent='  ')
    ]


def add_groups(rows: Iterable[list], groups: np.ndarray | None) -> Iterator[list]:
    """Adds a last column `group` to rows with a heading: a number for each group.

    Args:
      groups: `[N]`; the numbers do not reveal these values. None adds nothing.
    """
    if groups is None:
        yield from rows
        return
    numbers: dict[int, int] = {}
    for place, row in enumerate(rows):
        if place:
            number = numbers.setdefault(int(groups[place - 1]), len(numbers))
        yield [*row, number if place else 'group']

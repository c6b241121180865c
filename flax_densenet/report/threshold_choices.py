"""What decisions at other thresholds would be, for the slider of the report."""

from typing import Any

import numpy as np

from flax_densenet.evaluation import choosing
from flax_densenet.report import render

MOST = 200  # thresholds of a class
_MANY = 10  # classes, above which there are fewer thresholds of each
_FEW = 60
CLASSES = 100


def tabulate(found, values) -> list[dict[str, Any]]:
    """Counts at many thresholds, for each class that has a threshold.

    Args:
      found: a `results.Results`.
      values: C thresholds, None for classes without one.

    Returns:
      Rows of at most `CLASSES` classes that have both positives and negatives: `name`;
      the numbers of `positives` and `negatives`; `thresholds`, ascending from 0 to 1,
      and for each how many positives are `found` and how many negatives are false
      `alarms`; and `start`, the place of the class's own threshold.
    """
    if found.probabilities.min(initial=0) < 0 or found.probabilities.max(initial=0) > 1:
        return []  # outputs of another kind
    places = [place for place, value in enumerate(values) if value is not None]
    most = MOST if len(places) <= _MANY else _FEW
    rows = []
    for place in places:
        true, probability = choosing.of_class(found.labels, found.probabilities, place)
        if true.any() and not true.all():
            row = count(true, probability, float(values[place]), most=most)
            name = render.isolate(str(found.class_names[place]))
            rows.append({'name': name} | row)
    return rows[:CLASSES]


def count(
    true: np.ndarray, probability: np.ndarray, own: float, *, most: int = MOST
) -> dict[str, Any]:
    """A row of `tabulate` without its name.

    Args:
      true: bool `[N]`.
      probability: `[N]`, from 0 to 1.
      own: a threshold to include.
      most: number of thresholds.
    """
    positives, negatives = np.sort(probability[true]), np.sort(probability[~true])
    scores, kept = np.unique(probability), np.unique(probability)
    room = most - 3  # besides 0, 1 and `own`
    if len(scores) > room:
        # Half of them by the positives, which can be rare and then lie close together.
        parts = (
            part[np.linspace(0, len(part) - 1, room // 2).round().astype(int)]
            for part in (positives, negatives)
        )
        kept = np.unique(np.concatenate(list(parts)))
    between = {
        _between(scores[place - 1], scores[place])
        for place in np.searchsorted(scores, kept)
        if place
    }
    # Each step of the slider changes a decision.
    same = np.searchsorted(scores, own, side='right')
    steps = {
        value
        for value in between
        if np.searchsorted(scores, value, side='right') != same
    }
    values = sorted({0.0, 1.0, own} | steps)

    def above(part):
        return (len(part) - np.searchsorted(part, values, side='right')).tolist()

    return {
        'positives': len(positives),
        'negatives': len(negatives),
        'thresholds': values,
        'found': above(positives),
        'alarms': above(negatives),
        'start': values.index(own),
    }


def _between(low, high):
    """The shortest decimal that separates two scores: at least the lower one."""
    middle = (low + high) / 2
    for digits in range(2, 17):
        value = round(float(middle), digits)
        if low <= value < high:
            return value
    return float(low)

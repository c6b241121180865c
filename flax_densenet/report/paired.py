"""Predictions of several runs for the same images: tests and disagreements.

>>> one = {'a': ('cat', 'cat'), 'b': ('dog', 'dog'), 'c': ('dog', 'cat')}
>>> two = {'a': ('cat', 'dog'), 'b': ('dog', 'dog'), 'c': ('dog', 'cat')}
>>> mcnemar(one, two)
1.0
>>> [row['name'] for row in find_disagreements([one, two], 9)]
['a']
"""

import csv
import os
from typing import Any

from flax_densenet.errors import UserError
from flax_densenet.evaluation import results

Predictions = dict[str, tuple[str, str]]


def load(workdir: str) -> Predictions:
    """Actual and predicted class of each image of `predictions.csv`, by its path.

    Empty where there is no such file.

    Raises:
      UserError: it is not what evaluation writes.
    """
    path = os.path.join(workdir, results.PREDICTIONS_FILE)
    options: dict[str, Any] = {'encoding': 'utf-8', 'errors': 'surrogateescape'}
    try:
        with open(path, newline='', **options) as file:
            rows = csv.DictReader(file)
            return {row['path']: (row['true'], row['predicted']) for row in rows}
    except FileNotFoundError:
        return {}
    except (OSError, KeyError, csv.Error) as error:
        raise UserError(
            f'{path} cannot be read ({error}); run eval {workdir} again'
        ) from error


def mcnemar(one: Predictions, other: Predictions) -> float:
    """The p-value of McNemar's exact test: both are right equally often.

    Args:
      one, other: of the same images.
    """
    from scipy import stats

    right = [
        (one[name][0] == one[name][1], other[name][0] == other[name][1]) for name in one
    ]
    gained, lost = right.count((True, False)), right.count((False, True))
    if not gained + lost:
        return 1.0
    return float(stats.binomtest(gained, gained + lost).pvalue)


def find_disagreements(runs: list[Predictions], most: int) -> list[dict[str, Any]]:
    """Images for which runs predict different classes.

    Args:
      runs: of the same images.
      most: images, those that most runs got wrong first.

    Returns:
      `name`, `actual` and `predicted`, of each run, with `wrong`, how many are.
    """
    rows: list[dict[str, Any]] = []
    for name, (actual, _) in runs[0].items():
        predicted = [run[name][1] for run in runs]
        if len(set(predicted)) > 1:
            wrong = sum(one != actual for one in predicted)
            row: dict[str, Any] = {
                'name': name,
                'actual': actual,
                'predicted': predicted,
            }
            rows.append(row | {'wrong': wrong})
    return sorted(rows, key=lambda row: (-row['wrong'], row['name']))[:most]

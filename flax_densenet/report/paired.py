"""Predictions of several runs for the same images: tests and disagreements.

>>> one = {'a': ('cat', 'cat'), 'b': ('dog', 'dog'), 'c': ('dog', 'cat')}
>>> two = {'a': ('cat', 'dog'), 'b': ('dog', 'dog'), 'c': ('dog', 'cat')}
>>> mcnemar(one, two)
1.0
>>> [row['name'] for row in find_disagreements([one, two], 9)]
['a']
"""

import csv
import dataclasses
import functools
import os
from typing import Any

import numpy as np

from flax_densenet.errors import UserError
from flax_densenet.evaluation import bootstrap, delong, intervals, results, weighted

Predictions = dict[str, tuple[str, str]]
NAMES = {'accuracy': 'accuracy', 'auroc': 'mean AUROC', 'f1': 'F1'}
_MOST_WORK = intervals.WORK // 2  # classes of one run
_CHUNK = 2**22  # weights at a time
_LEVEL = 0.05  # of significance


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of two runs in a metric on the same images.

    Attributes:
      metric: `accuracy`, `auroc` or `f1`.
      value: the metric of the first run minus that of the other.
      interval: its 95% interval; None if all resamples are equal.
      p_value: probability of a difference at least as large if the two are equal.
      test: the name of the test.
    """

    metric: str
    value: float
    interval: tuple[float, float] | None
    p_value: float
    test: str


@dataclasses.dataclass(frozen=True)
class Scored:
    """The content of `predictions.csv`, as arrays in the order of the image paths.

    Attributes:
      labels: int `[N]`, or `[N, L]` of 0, 1 and NaN.
      scores: `[N, C]`; None if the file has only the most likely classes.
      predicted: int `[N]`, or bool `[N, L]`.
      groups: int `[N]`, or None.
    """

    labels: np.ndarray
    scores: np.ndarray | None
    predicted: np.ndarray
    groups: np.ndarray | None


def load(workdir: str) -> Predictions:
    """Actual and predicted class of each image in `predictions.csv`, by its path.

    Empty if there is no such file.

    Raises:
      UserError: the file is not one that evaluation writes.
    """
    rows = _read(workdir)
    return {row['path']: (row['true'], row['predicted']) for row in rows}


def _read(workdir):
    path = os.path.join(workdir, results.PREDICTIONS_FILE)
    options: dict[str, Any] = {'encoding': 'utf-8', 'errors': 'surrogateescape'}
    try:
        with open(path, newline='', **options) as file:
            rows = list(csv.DictReader(file))
            if rows:
                _ = rows[0]['path'], rows[0]['true'], rows[0]['predicted']
            return rows
    except FileNotFoundError:
        return []
    except (OSError, KeyError, csv.Error) as error:
        raise UserError(
            f'{path} cannot be read ({error}); run eval {workdir} again'
        ) from error


def load_scores(workdir: str) -> Scored | None:
    """The arrays of `predictions.csv`; None if there is no such file.

    Raises:
      UserError: the file is not one that evaluation writes.
    """
    rows = sorted(_read(workdir), key=lambda row: row['path'])
    if not rows:
        return None
    try:
        return _to_arrays(rows)
    except (KeyError, TypeError, ValueError) as error:
        path = os.path.join(workdir, results.PREDICTIONS_FILE)
        raise UserError(
            f'{path} is not a file that eval writes ({error!r}); run eval {workdir} '
            'again'
        ) from error


def _to_arrays(rows):
    columns = list(rows[0])
    named = 'probability_'
    names = [c.removeprefix(named) for c in columns if c.startswith(named)]
    several = bool(names) and all(f'true_{name}' in columns for name in names)
    scores = None
    if 'class_1' not in columns or several:
        table = [[row[f'{named}{name}'] for name in names] for row in rows]
        scores = np.array(table, np.float64)
    if several:
        known = [[row[f'true_{name}'] or 'nan' for name in names] for row in rows]
        labels = np.array(known, np.float64)
        predicted = np.array([_present(row, names) for row in rows])
    else:
        kinds = names
        if scores is None:
            kinds = sorted({row[key] for row in rows for key in ('true', 'predicted')})
        place = {name: number for number, name in enumerate(kinds)}
        labels, predicted = (
            np.array([place[row[key]] for row in rows]) for key in ('true', 'predicted')
        )
        if scores is not None:
            scores = _sharpen(scores)
    groups = None
    if rows[0].get('group'):
        groups = np.array([int(row['group']) for row in rows])
    return Scored(labels, scores, predicted, groups)


def _present(row, names):
    """The predicted labels: by their names, or above 0.5 if names contain `;`."""
    found = set(row['predicted'].split(';')) - {''}
    if found <= set(names):
        return [name in found for name in names]
    return [float(row[f'probability_{name}']) > 0.5 for name in names]


def _sharpen(scores):
    """Log odds; from the sum of the others if a value close to 1 lacks digits."""
    others = scores.sum(-1, keepdims=True) - scores
    if scores.shape[-1] == 2:
        others = scores[:, ::-1]
    tiny = np.finfo(float).tiny
    return np.log(np.maximum(scores, tiny)) - np.log(np.maximum(others, tiny))


def mcnemar(one: Predictions, other: Predictions) -> float:
    """The p-value of McNemar's exact test that both are right equally often.

    Args:
      one, other: predictions for the same images.
    """
    right = np.array(
        [
            (one[name][0] == one[name][1], other[name][0] == other[name][1])
            for name in one
        ]
    )
    return _mcnemar(*right.T)


def _mcnemar(one, other):
    from scipy import stats

    gained, lost = int((one & ~other).sum()), int((other & ~one).sum())
    if not gained + lost:
        return 1.0
    return float(stats.binomtest(gained, gained + lost).pvalue)


class Resampled:
    """Runs on the same images, with metrics on shared resamples."""

    def __init__(self, runs: list[Scored]):
        self._runs = runs
        count = len(runs[0].labels)
        classes = max(1 if run.scores is None else run.scores.shape[-1] for run in runs)
        resamples = min(bootstrap.RESAMPLES, _MOST_WORK // (count * classes))
        self._ranked = resamples >= 200 and all(run.scores is not None for run in runs)
        self._resamples = resamples if self._ranked else bootstrap.RESAMPLES
        self._made: dict[int, Any] = {}

    def _metrics(self, place):
        """The metrics of a run on all images, and on each resample."""
        if place not in self._made:
            run = self._runs[place]
            scores = run.scores
            if scores is None:
                classes = 1 + max(run.labels.max(), run.predicted.max())
                scores = np.zeros((len(run.labels), classes), np.float32)
            made = weighted.Weighted(
                run.labels, scores, predicted=run.predicted, ranked=self._ranked
            )
            measure = functools.partial(_pick, made)
            found = measure(np.ones((len(run.labels), 1), np.float32))
            drawn = bootstrap.replicate(
                measure, len(run.labels), groups=run.groups, resamples=self._resamples
            )
            self._made[place] = found, drawn
        return self._made[place]

    def compare(self, one: int, other: int) -> list[Difference]:
        """The differences between two runs, by their indices in the list."""
        runs = self._runs[one], self._runs[other]
        (found, drawn), (found2, drawn2) = self._metrics(one), self._metrics(other)
        swapped = _swap(*runs)
        differences = []
        for metric in found:
            value = float(found[metric][0] - found2[metric][0])
            values = drawn[metric] - drawn2[metric]
            if np.isnan(value):
                continue
            p_value = swapped.get(metric)
            differences.append(_describe(metric, value, values, runs, p_value))
        return differences


def _pick(metrics, weights):
    found = metrics.measure(weights)
    macro = {name: found['macro'][name] for name in NAMES if name in found['macro']}
    return {'accuracy': found['accuracy'], **macro}


def _swap(one: Scored, other: Scored) -> dict[str, float]:
    """p-values of accuracy and F1: a permutation test.

    If two models are equally good, their predictions for an image, or for all images of
    a group, can be swapped. Where they differ on a few images only, this is exact,
    unlike the bootstrap, in whose resamples these few are missing too rarely.
    """
    count = len(one.labels)
    predicted = np.concatenate([one.predicted, other.predicted])
    labels = np.concatenate([one.labels, other.labels])
    classes = (
        labels.shape[1] if labels.ndim == 2 else 1 + max(labels.max(), predicted.max())
    )
    scores = np.zeros((2 * count, classes), np.float32)
    metrics = weighted.Weighted(labels, scores, predicted=predicted, ranked=False)
    units, place = count, np.arange(count)
    if one.groups is not None:
        names, place = np.unique(one.groups, return_inverse=True)
        units = len(names)
    rng, parts = np.random.default_rng(0), []
    size = max(1, min(bootstrap.RESAMPLES, _CHUNK // count))
    for start in range(0, bootstrap.RESAMPLES, size):
        columns = min(size, bootstrap.RESAMPLES - start)
        first = rng.integers(0, 2, (units, columns)).astype(np.float32)[place]
        parts.append(_between(metrics, first))
    found = _between(metrics, np.ones((count, 1), np.float32))
    drawn = {name: np.concatenate([part[name] for part in parts]) for name in found}
    return {
        name: float(
            (1 + (np.abs(drawn[name]) >= abs(found[name][0]) - 1e-9).sum())
            / (1 + bootstrap.RESAMPLES)
        )
        for name in found
    }


def _between(metrics, first):
    """Differences if the first run has the rows with weight 1, the other the rest."""
    halves = np.concatenate([first, 1 - first]), np.concatenate([1 - first, first])
    one, other = (_pick(metrics, weights) for weights in halves)
    return {name: one[name] - other[name] for name in one}


def _describe(metric, value, values, runs, swapped):
    one, other = runs
    ends = bootstrap.interval(values, np.float64(value))
    interval = (float(ends[0]), float(ends[1])) if ends[0] < ends[1] else None
    p_value, test = bootstrap.p_value(values, value), 'paired bootstrap'
    several = one.labels.ndim == 2
    if swapped is not None:
        p_value, test = swapped, 'paired permutation test'
        if interval and p_value >= _LEVEL:  # narrow where few images differ
            interval = min(interval[0], 0.0), max(interval[1], 0.0)
    if one.groups is not None:
        test += ' of groups'
    elif metric == 'accuracy' and not several:
        right = (run.labels == run.predicted for run in runs)
        p_value, test = _mcnemar(*right), "McNemar's exact test"
    elif metric == 'auroc' and one.scores.shape[-1] <= 2 - several:
        # A single area: of the label, or of either of two classes, which are equal.
        true = one.labels[:, 0] == 1 if several else one.labels == 1
        known = ~np.isnan(one.labels[:, 0]) if several else slice(None)
        areas = (run.scores[known, -1] for run in (one, other))
        found = delong.compare(true[known], *areas)
        interval, p_value, test = found.interval, found.p_value, "DeLong's test"
    return Difference(metric, value, interval, p_value, test)


def tell(
    name: str, best: str, differences: list[Difference], *, comparisons: int = 1
) -> str:
    """One or two sentences on whether the differences of two runs can be chance.

    Args:
      name, best: names of the runs; the differences are the first minus the other.
      comparisons: number of compared runs; the significance level of 5% is divided
        by it (Bonferroni).
    """
    limit = _LEVEL / comparisons
    pieces: list[str] = []
    real: list[str] = []
    chance: list[str] = []
    for one in differences:
        called = NAMES[one.metric]
        percent = one.metric == 'accuracy'
        ends = ''
        if one.interval is not None:
            low, high = (_signed(end, percent) for end in one.interval)
            ends = f'95% interval {low} to {high}, '
        unit = ' points' if percent else ''
        pieces.append(
            f'{called} {_signed(one.value, percent)}{unit} '
            f'({ends}{_p(one)}, {one.test})'
        )
        (real if one.p_value < limit else chance).append(called)
    if not pieces:
        return f'{name} and {best} cannot be compared: no metric is defined for both.'
    if not real:
        verdict = 'Each of these differences could be chance.'
    elif not chance:
        verdict = 'Chance alone is an unlikely explanation of these differences.'
    else:
        verdict = (
            f'The difference in {_join(real)} is unlikely to be chance; that in '
            f'{_join(chance)} could be.'
        )
    return f'{name} compared with {best}: {"; ".join(pieces)}. {verdict}'


def _signed(value, percent):
    text = f'{abs(value) * 100:.1f}' if percent else f'{abs(value):.3f}'
    if not float(text):
        return text
    return ('+' if value > 0 else '\u2212') + text


def _p(one):
    # The smallest of resamples, which are of one side, and of permutations.
    sides = 2 if one.test.startswith('paired bootstrap') else 1
    least = sides / (bootstrap.RESAMPLES + 1)
    if one.test.startswith('paired') and one.p_value <= least:
        return f'p \u2264 {least:.3f}'
    return 'p < 0.001' if one.p_value < 0.001 else f'p = {one.p_value:.3f}'


def _join(names):
    *first, last = names
    return f'{", ".join(first)} and {last}' if first else last


def find_disagreements(runs: list[Predictions], most: int) -> list[dict[str, Any]]:
    """Images for which runs predict different classes.

    Args:
      runs: predictions for the same images.
      most: maximum number of images; those that most runs got wrong come first.

    Returns:
      `name`, `actual`, `predicted` by each run, and `wrong`, the number of wrong runs.
    """
    rows: list[dict[str, Any]] = []
    for name, (actual, _) in runs[0].items():
        predicted = [run[name][1] for run in runs]
        if len(set(predicted)) > 1:
            wrong = sum(one != actual for one in predicted)
            row = {'name': name, 'actual': actual, 'predicted': predicted}
            rows.append(row | {'wrong': wrong})
    return sorted(rows, key=lambda row: (-row['wrong'], row['name']))[:most]

"""95% intervals of all metrics of a test, in bounded time.

Shares of images (recall, specificity, precision, accuracy) have Wilson's interval, the
other metrics that of a bootstrap. If images belong to groups, such as patients, all
come from a bootstrap of whole groups.
"""

from typing import Any

import numpy as np

from flax_densenet.evaluation import bootstrap, delong, weighted
from flax_densenet.evaluation import metrics as metrics_lib

# Images, times classes, times resamples of areas under curves: some 15 s on one core.
WORK = 10**9
# Beyond, areas have DeLong's interval; and beyond this many images times classes none.
_MOST_RANKS = 10**8
_FEWEST_RESAMPLES = 200
LEAST = 5  # units with and without a class, for intervals that no share has


def measure(
    labels: np.ndarray,
    scores: np.ndarray,
    *,
    predicted: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics with their intervals.

    Args:
      labels: int `[N]`, or float `[N, L]` of 0, 1 and NaN (not known).
      scores: `[N, C]`, probabilities.
      predicted: of `weighted.Weighted`.
      groups: `[N]`, such as the patient of each image; None: images are independent.
      seed: of the resamples; the same one gives the same intervals.

    Returns:
      Values for JSON: `resamples`; `units`, what is drawn (`images` or `groups`), and
      `unit_count`; `values` and `intervals`, both with `accuracy`, `macro` (metric:
      value) and `classes` (a mapping for each class). An interval is `[low, high]`, or
      None where none can be told.
    """
    count, classes = scores.shape
    resamples = min(bootstrap.RESAMPLES, WORK // max(1, count * classes))
    ranked = resamples >= _FEWEST_RESAMPLES
    resamples = resamples if ranked else bootstrap.RESAMPLES
    metrics = weighted.Weighted(labels, scores, predicted=predicted, ranked=ranked)
    found = metrics.measure(np.ones((count, 1), np.float32))
    values = _pick(found, lambda array: array[..., 0])
    units = count if groups is None else len(np.unique(groups))
    about = {
        'resamples': resamples,
        'units': 'images' if groups is None else 'groups',
        'unit_count': units,
        'values': _tidy(values),
    }
    if units < 2:
        return about | {'intervals': None}
    drawn = bootstrap.replicate(
        metrics.measure, count, groups=groups, resamples=resamples, seed=seed
    )
    ends = _pick(drawn, bootstrap.percentiles)
    if not ranked and count * classes <= _MOST_RANKS:
        _add_areas(ends, labels, scores, groups)
    places = None if groups is None else np.unique(groups, return_inverse=True)[1]
    _correct(ends, values, labels, _positive(labels, scores, predicted), places)
    return about | {'intervals': _tidy(ends, pairs=True)}


def _positive(labels, scores, predicted):
    """Which classes are predicted: bool `[N, C]`, or int `[N]`."""
    if predicted is not None:
        return predicted
    return scores > 0.5 if labels.ndim == 2 else scores.argmax(-1)


def _pick(found, change):
    return {
        name: _pick(value, change) if isinstance(value, dict) else change(value)
        for name, value in found.items()
    }


def _add_areas(ends, labels, scores, groups):
    """DeLong's intervals of AUROC, of the classes and of their mean."""
    count, classes = scores.shape
    rows, total, areas = np.full((classes, 2), np.nan), np.zeros(count), []
    for c in range(classes):
        known, true = _known(labels, c)
        if not true.any() or true.all():
            continue
        area, moves = delong.influence(true, scores[known, c])
        areas.append(area)
        total[known] += moves
        own = None if groups is None else groups[known]
        found = delong.interval(area, delong.deviation(moves, own))
        if found is not None:
            rows[c] = found
    ends['classes']['auroc'] = rows
    mean = np.array([np.nan, np.nan])
    if areas:
        spread = delong.deviation(total / len(areas), groups)
        mean = np.array(delong.interval(float(np.mean(areas)), spread) or mean)
    ends['macro']['auroc'] = mean


def _known(labels, c):
    """Rows of which a class is known, and whether they have it."""
    if labels.ndim == 2:
        known = np.flatnonzero(~np.isnan(labels[:, c]))
        return known, labels[known, c] > 0.5
    return np.arange(len(labels)), labels == c


def _correct(ends, values, labels, predicted, places):
    """Intervals where resamples tell too little: shares, few images, perfect values."""
    rows = ends['classes']
    for c in range(len(rows['f1'])):
        known, true = _known(labels, c)
        says = predicted[known, c] if labels.ndim == 2 else predicted == c
        own = None if places is None else places[known]
        for name, among, right in (
            ('recall', true, says),
            ('precision', says, true),
            ('specificity', ~true, ~says),
        ):
            flat = not rows[name][c, 0] < rows[name][c, 1]
            if own is None or flat:
                rows[name][c] = _share(among, right, own)
        kinds = [_units(chosen, own) for chosen in (true, ~true)]
        if min(kinds) < LEAST:
            for name in ('f1', *weighted.RANKED):
                if name in rows:
                    rows[name][c] = np.nan
            continue
        if values['classes']['f1'][c] in (0, 1):
            low, high = _share(true | says, true & says, own)
            rows['f1'][c] = 2 * low / (1 + low), 2 * high / (1 + high)
        if 'auroc' in rows and values['classes']['auroc'][c] in (0, 1):
            rows['auroc'][c] = delong.bound(values['classes']['auroc'][c], *kinds)
    for name, interval in ends['macro'].items():
        if not interval[0] < interval[1]:  # every resample is perfect
            ends['macro'][name] = np.array([np.nan, np.nan])
    if places is None or not ends['accuracy'][0] < ends['accuracy'][1]:
        ends['accuracy'] = _accuracy(labels, predicted, places)


def _units(chosen, places):
    return int(chosen.sum()) if places is None else len(np.unique(places[chosen]))


def _share(among, right, places):
    """Wilson's interval; with groups, as if each of them were one image."""
    total = int(among.sum())
    if not total:
        return np.nan, np.nan
    share = int((among & right).sum()) / total
    units = _units(among, places)
    return metrics_lib.wilson(round(share * units), units)


def _accuracy(labels, predicted, places):
    if labels.ndim == 2:
        return np.array([np.nan, np.nan])  # that of `metrics.measure_labels`
    right = labels == predicted
    return np.array(_share(np.ones(len(right), bool), right, places))


def _tidy(found, *, pairs=False):
    """The arrays as JSON: `classes` as a mapping for each class, None for NaN.

    Args:
      pairs: the last axis of an array is an interval.
    """
    classes = {
        name: [_plain(value, pairs) for value in array]
        for name, array in found['classes'].items()
    }
    return {
        'accuracy': _plain(found['accuracy'], pairs),
        'macro': {name: _plain(value, pairs) for name, value in found['macro'].items()},
        'classes': [
            dict(zip(classes, row, strict=True))
            for row in zip(*classes.values(), strict=True)
        ],
    }


def _plain(value, pairs):
    if np.isnan(value).any():
        return None
    return [float(end) for end in value] if pairs else float(value)

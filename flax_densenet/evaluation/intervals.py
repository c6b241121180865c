"""95% intervals of all metrics of a test, in bounded time.

Shares of images (recall, specificity, precision, accuracy) have Wilson's interval, the
other metrics a bootstrap interval. If images belong to groups, such as patients, all
intervals come from a bootstrap of groups.
"""

from typing import Any

import numpy as np

from flax_densenet.evaluation import bootstrap, delong, weighted

# Images times classes times resamples of areas under curves: about 15 s on one core.
WORK = 10**9
# Above that, areas get DeLong's interval; above this many images times classes, none.
_MOST_RANKS = 10**8
_FEWEST_RESAMPLES = 200
LEAST = 5  # units with and without a class; shares need none


def measure(
    labels: np.ndarray,
    scores: np.ndarray,
    *,
    predicted: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    resamples: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Computes metrics with their intervals.

    Args:
      labels: int `[N]`, or float `[N, L]` of 0, 1 and NaN (not known).
      scores: `[N, C]`, probabilities.
      predicted: as in `weighted.Weighted`.
      groups: `[N]`, such as the patient of each image; None: images are independent.
      resamples: resamples for areas under curves. With fewer than 200, DeLong's
        intervals are used instead. None: as many as `WORK` allows.
      seed: seed of the resamples; the same seed gives the same intervals.

    Returns:
      Values for JSON: `resamples`; `units`, what is resampled (`images` or `groups`),
      and `unit_count`; `values` and `intervals`, both with `accuracy`, `macro` (metric:
      value) and `classes` (a mapping for each class). An interval is `[low, high]`, or
      None if it cannot be estimated.
    """
    count, classes = scores.shape
    if resamples is None:
        resamples = min(bootstrap.RESAMPLES, WORK // max(1, count * classes))
    ranked = resamples >= _FEWEST_RESAMPLES
    resamples = resamples if ranked else bootstrap.RESAMPLES
    metrics = weighted.Weighted(labels, scores, predicted=predicted, ranked=ranked)
    one_each = np.ones((count, 1), np.float32)
    found = metrics.measure(one_each)
    values = _pick(found, lambda array: array[..., 0])
    units = count if groups is None else len(np.unique(groups))
    areas = None
    if not ranked and count * classes <= _MOST_RANKS:
        areas = _delong(labels, scores, groups)
        for place in ('macro', 'classes'):
            values[place]['auroc'] = areas[place][0]
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
    ends = _ends(drawn, values)
    if areas:
        for place in ('macro', 'classes'):
            ends[place]['auroc'] = areas[place][1]
    places = None if groups is None else np.unique(groups, return_inverse=True)[1]
    if predicted is None:
        predicted = scores > 0.5 if labels.ndim == 2 else scores.argmax(-1)
    counts = [number[:, 0] for number in metrics.counts(one_each)]
    _correct(ends, values, counts, labels, predicted, places)
    if places is None or not ends['accuracy'][0] < ends['accuracy'][1]:
        # The accuracy of labels, a mean of shares, has the interval of
        # `measure_labels`.
        several = labels.ndim == 2
        ends['accuracy'] = wilson(np.nan if several else values['accuracy'], units)
    return about | {'intervals': _tidy(ends, pairs=True)}


def _pick(found, change):
    return {
        name: _pick(value, change) if isinstance(value, dict) else change(value)
        for name, value in found.items()
    }


def _ends(drawn, values):
    """Intervals of the metrics that are shares."""
    return {
        name: _ends(value, values[name])
        if isinstance(value, dict)
        else bootstrap.interval(value, values[name]).clip(0, 1)
        for name, value in drawn.items()
    }


def _delong(labels, scores, groups):
    """AUROC of each class and their mean, with DeLong's intervals."""
    count, classes = scores.shape
    areas, rows = np.full(classes, np.nan), np.full((classes, 2), np.nan)
    total = np.zeros(count)
    for c in range(classes):
        known, true = _known(labels, c)
        if not true.any() or true.all():
            continue
        areas[c], moves = delong.influence(true, scores[known, c])
        total[known] += moves
        own = None if groups is None else groups[known]
        found = delong.interval(areas[c], delong.deviation(moves, own))
        rows[c] = (np.nan, np.nan) if found is None else found
    there = ~np.isnan(areas)
    mean, ends = np.float64(np.nan), np.array([np.nan, np.nan])
    if there.any():
        mean = areas[there].mean()
        spread = delong.deviation(total / there.sum(), groups)
        ends = np.array(delong.interval(float(mean), spread) or ends)
    return {'macro': (mean, ends), 'classes': (areas, rows)}


def _known(labels, c):
    """The rows with a known label for a class, and whether they have it."""
    if labels.ndim == 2:
        known = np.flatnonzero(~np.isnan(labels[:, c]))
        return known, labels[known, c] > 0.5
    return np.arange(len(labels)), labels == c


def _correct(ends, values, counts, labels, positive, places):
    """Intervals for which resamples are not enough: shares, few images, perfect values.

    Args:
      counts: from `weighted.Weighted.counts`, for all images: `[C]` each.
      positive: predicted classes, `[N, L]` or `[N]`.
      places: the number of each image's group, or None.
    """
    hits, true, predicted, known = counts
    rows, found = ends['classes'], values['classes']
    shares = {
        'recall': (hits, true, 'true'),
        'precision': (hits, predicted, 'says'),
        'specificity': (known - true - predicted + hits, known - true, 'false'),
    }
    units = dict(true=true, says=predicted, false=known - true, either=true)
    if places is not None:
        units = _count_units(labels, positive, places, len(hits))
    for name, (right, total, among) in shares.items():
        flat = ~(rows[name][:, 0] < rows[name][:, 1])
        if places is None:
            flat[:] = True
        with np.errstate(invalid='ignore', divide='ignore'):
            flat_ends = wilson(right / total, units[among])
        rows[name][flat] = flat_ends[flat]
    either = true + predicted - hits if places is None else units['either']
    with np.errstate(invalid='ignore', divide='ignore'):
        both = wilson(hits / (true + predicted - hits), either)
    flat = np.isin(found['f1'], (0, 1))
    rows['f1'][flat] = (2 * both / (1 + both))[flat]
    if 'auroc' in rows and 'auroc' in found:
        for c in np.flatnonzero(np.isin(found['auroc'], (0, 1))):
            kinds = units['true'][c], units['false'][c]
            rows['auroc'][c] = delong.bound(found['auroc'][c], *kinds)
    few = np.minimum(units['true'], units['false']) < LEAST
    for name in ('f1', *weighted.RANKED):
        if name in rows:
            rows[name][few] = np.nan
    for name, interval in ends['macro'].items():
        if not interval[0] < interval[1]:  # every resample is perfect
            ends['macro'][name] = np.array([np.nan, np.nan])


def _count_units(labels, positive, places, classes):
    """The number of groups with images of each kind, by class."""
    units = {name: np.zeros(classes) for name in ('true', 'says', 'false', 'either')}
    for c in range(classes):
        known, true = _known(labels, c)
        says = positive[known, c] if labels.ndim == 2 else positive == c
        own = places[known]
        kinds = dict(true=true, says=says, false=~true, either=true | says)
        for name, chosen in kinds.items():
            units[name][c] = len(np.unique(own[chosen]))
    return units


def wilson(share, count) -> np.ndarray:
    """Wilson's 95% intervals of shares, `[..., 2]`."""
    z = 1.959963984540054
    share, count = np.asarray(share, float), np.asarray(count, float)
    middle = share + z**2 / (2 * count)
    spread = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    ends = np.stack([middle - spread, middle + spread], -1)
    return (ends / (1 + z**2 / count)[..., None]).clip(0, 1)


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


def extend(
    metrics: dict[str, Any],
    labels,
    scores,
    groups: np.ndarray | None = None,
    *,
    predicted: np.ndarray | None = None,
) -> dict[str, Any]:
    """Extends the result of `metrics.measure` by further metrics and all intervals.

    Adds specificity and average precision to `macro` and to each of `classes`,
    `balanced_accuracy` to `macro`, and `intervals`: the `units` and resamples of
    `measure`, with `macro` and `classes`; None with fewer than two images. With groups,
    `accuracy_interval` is based on groups.
    """
    if not len(labels):
        return metrics | {'intervals': None}
    found = measure(labels, scores, predicted=predicted, groups=groups)
    values, ends = found.pop('values'), found.pop('intervals')
    names = 'specificity', 'average_precision'
    more = {name: values['macro'].get(name) for name in (*names, 'balanced_accuracy')}
    extended = metrics | {
        'macro': metrics['macro'] | more,
        'classes': [
            row | {name: value.get(name) for name in names}
            for row, value in zip(metrics['classes'], values['classes'], strict=True)
        ],
        'intervals': None,
    }
    if ends is None:
        return extended
    if groups is not None and ends['accuracy']:
        extended['accuracy_interval'] = ends['accuracy']
    chosen = {name: ends[name] for name in ('macro', 'classes')}
    return extended | {'intervals': found | chosen}


def describe(intervals: dict[str, Any]) -> str:
    """How intervals were computed: `bootstrap of 153 images`.

    Args:
      intervals: `intervals` from `extend`.
    """
    return f'bootstrap of {intervals["unit_count"]:,} {intervals["units"]}'

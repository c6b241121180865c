"""Metrics of subgroups of the test images: by age, sex, site or camera.

Columns of numbers are divided into decades (ages) or quartiles. Each part is compared
with all other images, and the number of comparisons is reported, since some of many
parts look bad by chance.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from flax_densenet.evaluation import delong, intervals

LEAST = 10  # images needed to show a part
SMALL = 30  # fewer images are called few
_RESAMPLES = 400
_AGE = re.compile(r'age|patientage|.*[^a-z]age|age[^a-z].*', re.IGNORECASE)
METRICS = (*('accuracy', 'auroc', 'f1', 'recall', 'specificity', 'average_precision'),)
NAMES = {'accuracy': 'accuracy', 'auroc': 'mean AUROC'}


def measure(
    columns: Mapping[str, np.ndarray],
    labels: np.ndarray,
    scores: np.ndarray,
    *,
    predicted: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """The metrics of each part, and which part is worst.

    Args:
      columns: from `Examples.subgroups`: numbers or words for each image. labels,
        scores,
      predicted, groups: as in `intervals.measure`.

    Returns:
      For each column, as JSON: `column`; `bins`, `decades`, `quartiles` or None;
      `metric`, the one that is compared; `unknown` images without a value; `left_out`
      images in parts of fewer than `LEAST`; `looks`, the number of parts compared in
      all columns; and `rows`: `name`, `count`, `units` (groups, or images), `values`
      and `intervals` of `METRICS`, `rest` (the metric of all other images), `p_value`
      of the difference, and `worst`. Columns with fewer than two parts are left out.
    """
    several = labels.ndim == 2
    found = []
    for column, values in columns.items():
        parts, bins = divide(column, values)
        shown = {name: rows for name, rows in parts.items() if len(rows) >= LEAST}
        if len(shown) < 2 or (not several and _is_label(shown, labels)):
            continue
        known = sum(map(len, parts.values()))
        about = {
            'column': column,
            'bins': bins,
            'metric': 'auroc' if several else 'accuracy',
            'unknown': len(values) - known,
            'left_out': known - sum(map(len, shown.values())),
        }
        found.append((about, shown))
    looks = sum(len(shown) for _, shown in found)
    if predicted is None:
        predicted = scores > 0.5 if several else scores.argmax(-1)
    resamples = intervals.WORK // (2 * scores.size * len(found)) if found else 0
    images = _Images(labels, scores, predicted, groups, min(_RESAMPLES, resamples))
    return [
        about | {'looks': looks, 'rows': images.describe(shown, about['metric'])}
        for about, shown in found
    ]


def divide(column: str, values: np.ndarray) -> tuple[dict[str, np.ndarray], str | None]:
    """The rows of each part by its name, in order, and how numbers were divided.

    >>> parts, bins = divide('Patient Age', np.array([41.0, 49.0, 87.0, np.nan]))
    >>> {name: rows.tolist() for name, rows in parts.items()}, bins
    ({'40–49': [0, 1], '80–89': [2]}, 'decades')
    """
    if values.dtype != float:
        names = sorted(set(values.tolist()) - {''}, key=_natural)
        return {name: np.flatnonzero(values == name) for name in names}, None
    known = values[~np.isnan(values)]
    if not len(known):
        return {}, None
    if _is_age(column, known):
        starts = np.unique(known // 10 * 10).astype(int)
        return {
            f'{n}–{n + 9}': np.flatnonzero((values >= n) & (values < n + 10))
            for n in starts.tolist()
        }, 'decades'
    edges = np.unique(np.quantile(known, (0.25, 0.5, 0.75)))
    place = np.searchsorted(edges, values, side='left')
    parts = {}
    for n in range(len(edges) + 1):
        rows = np.flatnonzero((place == n) & ~np.isnan(values))
        if len(rows):
            low, high = values[rows].min(), values[rows].max()
            parts[f'{low:.6g} to {high:.6g}'] = rows
    return parts, 'quartiles'


def _is_age(column, known):
    words = re.sub(r'[\W_]+', ' ', column).strip()
    return _AGE.fullmatch(words) is not None and known.min() >= 0 and known.max() < 130


def _natural(name):
    """A sort key that orders numbers within names by value."""
    return [
        (0, int(piece), '') if piece.isdigit() else (1, 0, piece.lower())
        for piece in re.split(r'(\d+)', name)
    ]


def _is_label(parts, labels):
    """Whether all parts have one class only: the column repeats the class."""
    return all(len(np.unique(labels[rows])) == 1 for rows in parts.values())


class _Images:
    """All images; computes the metrics of their parts."""

    def __init__(self, labels, scores, predicted, groups, resamples):
        self._labels, self._scores, self._predicted = labels, scores, predicted
        self._groups, self._resamples = groups, resamples

    def describe(self, parts, metric):
        rows = []
        for name, chosen in parts.items():
            found = intervals.measure(
                self._labels[chosen],
                self._scores[chosen],
                predicted=self._predicted[chosen],
                groups=None if self._groups is None else self._groups[chosen],
                resamples=self._resamples,
            )
            values, ends = ({}, {})
            for key in METRICS:
                for source, kept in (('values', values), ('intervals', ends)):
                    of_all = found[source] or {'macro': {}}
                    one = of_all if key == 'accuracy' else of_all['macro']
                    kept[key] = one.get(key)
            rest, p_value = self._compare(chosen, metric)
            rows.append(
                {
                    'name': name,
                    'count': len(chosen),
                    'units': found['unit_count'],
                    'values': values,
                    'intervals': ends,
                    'rest': rest,
                    'p_value': p_value,
                    'worst': False,
                }
            )
        known = [row for row in rows if row['values'][metric] is not None]
        if known:
            worst = min(known, key=lambda row: row['values'][metric])
            worst['worst'] = worst['rest'] is not None and (
                worst['values'][metric] < worst['rest']
            )
        return rows

    def _compare(self, chosen, metric):
        """The metric of the other images, and the p-value of the difference.

        The p-value is None with fewer than `intervals.LEAST` units (images or groups)
        of a kind. Labels that one side has too few of are not compared.
        """
        from scipy import stats

        inside = np.zeros(len(self._labels), bool)
        inside[chosen] = True
        sides = np.flatnonzero(inside), np.flatnonzero(~inside)
        rest = self._influence(sides[1], metric, range(self._labels.shape[-1]))[0]
        if metric == 'accuracy' and self._groups is None:
            right = self._labels == self._predicted
            table = [[int(right[s].sum()), int((~right[s]).sum())] for s in sides]
            p_value = stats.fisher_exact(table).pvalue
            return rest, None if rest is None else float(p_value)
        shared = []
        if metric == 'auroc':
            shared = [
                c
                for c in range(self._labels.shape[-1])
                if min(self._fewest(rows, c) for rows in sides) >= intervals.LEAST
            ]
        # Influence of each image on the difference; the parts share no image.
        moves, means, fewest = np.zeros(len(inside)), [], []
        for rows, sign in zip(sides, (1, -1), strict=True):
            mean, change, units = self._influence(rows, metric, shared)
            if mean is None or units < intervals.LEAST:
                return rest, None
            means.append(mean)
            fewest.append(units)
            moves[rows] = sign * change
        spread = delong.deviation(moves, self._groups)
        if not spread:
            return rest, 1.0 if means[0] == means[1] else None
        distance = abs(means[0] - means[1]) / spread
        return rest, float(2 * stats.t.sf(distance, min(fewest) - 1))

    def _units(self, rows):
        """How many images, or groups, there are."""
        if self._groups is None:
            return len(rows)
        return len(np.unique(self._groups[rows]))

    def _fewest(self, rows, c):
        """Units with a label and without it, whichever are fewer."""
        label = self._labels[rows, c]
        return min(self._units(rows[label > 0.5]), self._units(rows[label <= 0.5]))

    def _influence(self, rows, metric, places):
        """A metric of some images, the influence of each, and units of the rarest kind.

        Influences are enlarged as the variance of a small sample is.

        Args:
          places: labels of which it is the mean AUROC.
        """
        labels, predicted = self._labels[rows], self._predicted[rows]
        units = self._units(rows)
        if not len(rows):
            return None, None, 0
        if metric == 'accuracy':
            right = (labels == predicted).astype(float)
            moves = (right - right.mean()) / len(rows)
            return float(right.mean()), moves * _enlarge(units), units
        areas, moves = [], np.zeros(len(rows))
        for c in places:
            known = np.flatnonzero(~np.isnan(labels[:, c]))
            true = labels[known, c] > 0.5
            if not len(true) or true.all() or not true.any():
                continue
            area, change = delong.influence(true, self._scores[rows[known], c])
            for kind in (true, ~true):
                change[kind] *= _enlarge(self._units(rows[known[kind]]))
            areas.append(area)
            moves[known] += change
            units = min(units, self._fewest(rows, c))
        if not areas:
            return None, None, 0
        return float(np.mean(areas)), moves / len(areas), units


def _enlarge(count):
    """From the deviation of so many to the estimate of that of their population."""
    return np.sqrt(count / max(count - 1, 1))


def describe(found: dict[str, Any]) -> str:
    """A sentence about the worst part of a column; '' if there is none.

    Args:
      found: an element of the result of `measure`.
    """
    worst = next((row for row in found['rows'] if row['worst']), None)
    if worst is None:
        return ''
    metric = found['metric']
    value, rest = worst['values'][metric], worst['rest']
    value, rest = (_figure(number, metric) for number in (value, rest))
    count = worst['count']
    text = (
        f'Lowest {NAMES[metric]} by {found["column"]}: {worst["name"]} with {value} '
        f'({count:,} images), {rest} on the other images'
    )
    p_value, looks = worst['p_value'], found['looks']
    if p_value is None:
        return f'{text} (too few to tell whether that is chance).'
    told = 'p < 0.001' if p_value < 0.001 else f'p = {p_value:.3f}'
    verdict = f'could be chance: {looks} parts were compared'
    if p_value < 0.05 / looks:
        verdict = f'unlikely to be chance, though {looks} parts were compared'
    few = f'; {count} images are few' if count < SMALL else ''
    return f'{text} ({told}, {verdict}{few}).'


def _figure(value, metric):
    return f'{value * 100:.1f}%' if metric == 'accuracy' else f'{value:.3f}'

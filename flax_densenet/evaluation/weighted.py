"""Metrics of weighted images, for many weightings at once.

A bootstrap resample is a weighting: the number of times that each image was drawn. Sums
over weighted images are matrix products, so a thousand resamples of ten thousand images
take a fraction of a second per class. scikit-learn computes the same for one weighting.

>>> import numpy as np
>>> one_each = np.ones((4, 1), np.float32)
>>> scores = np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])
>>> metrics = Weighted(np.array([0, 0, 1, 1]), scores).measure(one_each)
>>> metrics['accuracy'].tolist(), metrics['classes']['auroc'][:, 0].tolist()
([0.75], [0.75, 0.75])
"""

from typing import Any

import numpy as np

# Metrics of one class against the others, and their means; `accuracy` and
# `balanced_accuracy` are for all classes.
COUNTED = ('precision', 'recall', 'specificity', 'f1')
RANKED = ('auroc', 'average_precision')


class Ranking:
    """ROC and precision-recall areas of one class, for weightings of the images.

    Args:
      true: bool `[N]`, which images have the class.
      score: `[N]`.
      rows: int `[N]`, positions of the images in a weighting.
      count: number of images in a weighting.
    """

    def __init__(self, true, score, rows, count: int):
        order = np.argsort(-score, kind='stable')
        true, rows = true[order], rows[order]
        # Images with equal scores form a block. Only blocks with positives are steps of
        # the curves; the negatives between two of them are summed.
        block = np.cumsum(np.diff(score[order], prepend=score[order][:1]) != 0)
        steps, step = np.unique(block[true], return_inverse=True)
        place = np.searchsorted(steps, block[~true])
        inside = place < len(steps)
        tied = np.zeros(len(place), bool)
        tied[inside] = steps[place[inside]] == block[~true][inside]
        negative = rows[~true]
        size = len(steps), count
        self._negative = _sums(np.zeros(len(negative), int), negative, (1, count))
        self._positives = _sums(step, rows[true], size)
        self._above = _sums(place[inside], negative[inside], size)
        self._tied = _sums(place[tied], negative[tied], size) if tied.any() else None

    def measure(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """AUROC and average precision.

        Args:
          weights: float32 `[N, B]`, integer values.

        Returns:
          float64 `[B]` twice; NaN where a weighting leaves only one kind of image.
        """
        positives = self._positives @ weights
        found = np.cumsum(positives, 0)
        false = np.cumsum(self._above @ weights, 0)
        negatives = (self._negative @ weights)[0]
        below = negatives - false
        if self._tied is not None:
            below += (self._tied @ weights) / 2
        kinds = found[-1].astype(np.float64) * negatives
        with np.errstate(divide='ignore', invalid='ignore'):
            auroc = (positives * below).sum(0, dtype=np.float64) / kinds
            precision = found / (found + false)
            precision[~np.isfinite(precision)] = 0
            ap = (positives * precision).sum(0, dtype=np.float64) / found[-1]
        ap[kinds == 0] = np.nan
        return auroc, ap


def _sums(row, column, shape):
    """A sparse matrix that sums weights, with a one at each (row, column)."""
    from scipy import sparse

    ones = np.ones(len(row), np.float32)
    return sparse.csr_array((ones, (row, column)), shape=shape)


class Weighted:
    """Predictions whose metrics are computed for many weightings of their images.

    Args:
      labels: int `[N]`; or `[N, L]` of 0, 1 and NaN (not known).
      scores: `[N, C]`; higher means more likely.
      predicted: int `[N]`, by default the highest score; or bool `[N, L]`, by default
        scores above a half.
      ranked: whether areas under curves are computed, which take most of the time.
    """

    def __init__(self, labels, scores, *, predicted=None, ranked: bool = True):
        self.several = labels.ndim == 2
        self._count, self._classes = scores.shape
        if predicted is None:
            predicted = scores > 0.5 if self.several else scores.argmax(-1)
        if self.several:
            self._prepare_labels(labels, predicted)
        else:
            self._prepare_classes(labels, predicted)
        self._rankings: list[Ranking | None] = []
        if ranked:
            self._rankings = [
                self._rank(labels, scores, c) for c in range(self._classes)
            ]

    def _prepare_classes(self, labels, predicted):
        rows, size = np.arange(self._count), (self._classes, self._count)
        right = labels == predicted
        self._right = right.astype(np.float32)
        self._hits = _sums(labels[right], rows[right], size)
        self._true = _sums(labels, rows, size)
        self._predicted = _sums(predicted, rows, size)
        self._known = None

    def _prepare_labels(self, labels, predicted):
        known, true = ~np.isnan(labels), labels > 0.5
        wrong = (known & (predicted != true)).sum(-1)
        self._right = (1 - wrong / np.maximum(known.sum(-1), 1)).astype(np.float32)
        self._hits, self._true, self._predicted, self._known = (
            np.ascontiguousarray(chosen.T, np.float32)
            for chosen in (
                known & true & predicted,
                known & true,
                known & predicted,
                known,
            )
        )

    def _rank(self, labels, scores, c):
        rows = np.arange(self._count)
        true = labels == c
        if self.several:
            rows = np.flatnonzero(~np.isnan(labels[:, c]))
            true = labels[rows, c] > 0.5
        if not len(true) or true.all() or not true.any():
            return None
        return Ranking(true, scores[rows, c], rows, self._count)

    def counts(self, weights: np.ndarray) -> tuple[np.ndarray, ...]:
        """Counts per class: true positives, actual, predicted and known images.

        Returns:
          float64 `[C, B]` four times.
        """
        hits, true, predicted = (
            np.asarray(matrix @ weights, np.float64)
            for matrix in (self._hits, self._true, self._predicted)
        )
        if self._known is not None:
            return hits, true, predicted, np.asarray(self._known @ weights, np.float64)
        total = weights.sum(0, dtype=np.float64)
        return hits, true, predicted, np.broadcast_to(total, hits.shape)

    def measure(self, weights: np.ndarray) -> dict[str, Any]:
        """The metrics of each weighting.

        Args:
          weights: float32 `[N, B]`, integer values.

        Returns:
          `accuracy`, float64 `[B]`; `classes` with `COUNTED` and `RANKED`, `[C, B]`;
          `macro` with their means and `balanced_accuracy`, `[B]`. NaN where a metric
          is not defined; means are of the classes that a weighting has.
        """
        hits, true, predicted, known = self.counts(weights)
        total = weights.sum(0, dtype=np.float64)
        with np.errstate(divide='ignore', invalid='ignore'):
            classes = {
                'precision': hits / predicted,
                'recall': hits / true,
                'specificity': 1 - (predicted - hits) / (known - true),
                'f1': 2 * hits / (true + predicted),
            }
            accuracy = (self._right @ weights) / total
        if self._rankings:
            shape = len(self._rankings), weights.shape[1]
            areas = np.full((2, *shape), np.nan)
            for c, ranking in enumerate(self._rankings):
                if ranking is not None:
                    areas[:, c] = ranking.measure(weights)
            classes |= dict(zip(RANKED, areas, strict=True))
        return {
            'accuracy': np.float64(accuracy),
            'classes': classes,
            'macro': self._means(classes, true, known),
        }

    def _means(self, classes, true, known):
        there = (true > 0) if not self.several else (known > 0)
        macro = {
            name: _mean(np.where(there, values, np.nan))
            for name, values in classes.items()
        }
        balanced = classes['recall']
        if self.several:
            balanced = (balanced + classes['specificity']) / 2
        return macro | {'balanced_accuracy': _mean(balanced)}


def _mean(values):
    """Mean over the first axis of the values that are not NaN."""
    known = ~np.isnan(values)
    with np.errstate(divide='ignore', invalid='ignore'):
        return np.where(known, values, 0).sum(0) / known.sum(0)

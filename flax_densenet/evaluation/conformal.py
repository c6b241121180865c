"""Fits conformal sets (`weights.conformal`) and measures their coverage and size."""

import dataclasses
from typing import Any

import numpy as np

from flax_densenet.evaluation import evaluate, metrics
from flax_densenet.evaluation import selection as selection_lib
from flax_densenet.weights import conformal, heads
from flax_densenet.weights import decisions as decisions_lib

MOST = 10_000  # probabilities to keep; for all labels together, 100 times as many
_MOST_OF_ALL = 1_000_000
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99)
_SPLITS = 20


def fit_entry(
    selection: selection_lib.Selection,
    rules: selection_lib.Rules,
    made: decisions_lib.Decisions,
) -> conformal.ConformalSets | None:
    """The sets fitted on the selection part (one of `fitting.FITTERS`)."""
    trained = selection.trained
    if trained.outputs == heads.NONE:
        return None
    fitted = dataclasses.replace(trained, decisions=made)
    logits = evaluate.finish_logits(fitted, selection.logits)
    return fit(metrics.activate(logits, trained.outputs), selection.labels)


def fit(probabilities: np.ndarray, labels: np.ndarray) -> conformal.ConformalSets:
    """Fits sets from the probability of the true class of each validation image.

    Args:
      probabilities: `[N, C]`, calibrated as in predictions.
      labels: int `[N]`, or float `[N, L]` of 0, 1 and NaN (unknown, left out).
    """
    several = labels.ndim == 2
    if several:
        most = max(min(MOST, _MOST_OF_ALL // labels.shape[1]), 100)
        parts = [
            _choose(probabilities[labels[:, n] == 1, n], most)
            for n in range(labels.shape[1])
        ]
    else:
        true = np.take_along_axis(probabilities, labels[:, None].astype(int), -1)[:, 0]
        parts = [_choose(true, MOST)]
    joined = np.concatenate(parts).astype(np.float32)
    return conformal.ConformalSets(tuple(map(len, parts)), joined, several)


def _choose(values, most):
    """The values in ascending order; a random part of very many keeps the guarantee."""
    if len(values) > most:
        values = np.random.default_rng(0).permutation(values)[:most]
    return np.sort(np.float32(values))


def measure(
    sets: conformal.ConformalSets,
    probabilities: np.ndarray,
    labels: np.ndarray,
    coverage: float,
) -> dict[str, Any]:
    """Coverage and size of the sets of labeled images.

    Args:
      sets: fitted on other images.
      probabilities, labels: as for `fit`.
      coverage: the requested coverage.

    Returns:
      `asked`; `coverage`, the share of images whose true class is in the set (with
      several labels, the share of labels that the images have) and its 95% `interval`;
      `size`, the mean number of classes; `single` and `empty`, the shares of sets with
      one class and with none; `classes`, the coverage of each class. Values without
      images are None.
    """
    inside = sets.contains(probabilities, coverage)
    if sets.several:
        there = labels == 1
        hits, totals = (inside & there).sum(0), there.sum(0)
    else:
        hit = np.take_along_axis(inside, labels[:, None].astype(int), -1)[:, 0]
        count = probabilities.shape[1]
        hits, totals = (
            np.bincount(labels[hit], minlength=count),
            np.bincount(labels, minlength=count),
        )
    size, total = inside.sum(-1), int(totals.sum())
    return {
        'asked': coverage,
        'coverage': float(hits.sum() / total) if total else None,
        'interval': metrics.wilson(int(hits.sum()), total),
        'size': float(size.mean()),
        'single': float((size == 1).mean()),
        'empty': float((size == 0).mean()),
        'classes': [
            float(hit / all_) if all_ else None
            for hit, all_ in zip(hits, totals, strict=True)
        ],
    }


def curve(
    sets: conformal.ConformalSets | None,
    probabilities: np.ndarray,
    labels: np.ndarray,
    levels=LEVELS,
) -> list[dict[str, Any]]:
    """`measure` at several coverages.

    Args:
      sets: fitted on other images. None to fit and measure on halves of these images,
        averaged over 20 random splits; sets that are measured on the images they were
        fitted on would always have the requested coverage.
    """
    if sets is not None:
        return [measure(sets, probabilities, labels, level) for level in levels]
    random, found = np.random.default_rng(0), []
    for _ in range(_SPLITS):
        order = random.permutation(len(labels))
        first, second = np.array_split(order, 2)
        half = fit(probabilities[first], labels[first])
        found.append(
            [
                measure(half, probabilities[second], labels[second], level)
                for level in levels
            ]
        )
    return [_mean_of(rows) for rows in zip(*found, strict=True)]


def _mean_of(rows):
    """The mean row of several splits, with the widest intervals."""

    def mean(values):
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    names = 'coverage', 'size', 'single', 'empty'
    found = {name: mean([row[name] for row in rows]) for name in names}
    classes = zip(*(row['classes'] for row in rows), strict=True)
    return found | {
        'asked': rows[0]['asked'],
        'interval': None,
        'classes': [mean(values) for values in classes],
    }


def risk_curve(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Errors among the images with the highest confidence (risk-coverage curve).

    Args:
      confidence: `[N]`, higher for images to answer first.
      right: bool `[N]`, whether the answer is right.

    Returns:
      `share` of images that are answered, ascending to 1, and the `risk`, the share of
      errors among them; `area` under that curve over all N steps, and `best`, the area
      if all errors came last. Images with equal confidence are answered together.
    """
    order = np.argsort(-confidence, kind='stable')
    wrong, count = ~right[order], len(right)
    answered = np.arange(1, count + 1)
    # Positions where the confidence changes; equal values share a point.
    ends = np.flatnonzero(np.append(np.diff(confidence[order]) != 0, True))
    errors = np.cumsum(wrong)[ends]
    shares, risks = answered[ends] / count, errors / answered[ends]
    steps = np.diff(np.append(0, answered[ends]))
    late = np.sort(wrong)
    return {
        'share': shares.tolist(),
        'risk': risks.tolist(),
        'area': float((risks * steps).sum() / count),
        'best': float((np.cumsum(late) / answered).mean()),
    }

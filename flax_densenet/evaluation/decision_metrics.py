"""Metrics of decisions: calibration before and after, and metrics at thresholds."""

from typing import Any

import numpy as np

from flax_densenet.evaluation import calibrating, choosing, delong, intervals
from flax_densenet.evaluation import metrics as metrics_lib

# points of a decision curve
PROBABILITIES = np.arange(1, 100) / 100


def of_classes(
    logits: np.ndarray,
    raw_logits: np.ndarray | None,
    labels: np.ndarray,
    scale: float | None,
) -> dict[str, Any]:
    """Calibration of one class per image: applied, or as it could be.

    Args:
      logits: `[N, C]`, as predictions have them.
      raw_logits: before the model's calibration; None if it has none.
      labels: int `[N]`.
      scale: of the model's calibration; None if it has none, or if each fold of a
        cross-validation has its own.

    Returns:
      `applied`, whether the model is calibrated; `temperature`, its own (None if each
      fold has its own) or, if it has none, the best for these very images; `before`
      and `after`, each with `error` (expected calibration error) and `bins` of
      `metrics.reliability`, `loss` (nats) and `brier`.
    """
    if raw_logits is not None:
        made = {'applied': True, 'temperature': 1 / scale if scale else None}
        before, after = raw_logits, logits
    else:
        temperature = metrics_lib.best_temperature(
            lambda value: metrics_lib.log_losses(logits, labels, value).mean()
        )
        made = {'applied': False, 'temperature': temperature}
        before, after = logits, logits.astype(np.float64) / temperature
    return made | {
        'before': _of_classes(before, labels),
        'after': _of_classes(after, labels),
    }


def _of_classes(logits, labels):
    count = len(labels)
    confidence, right, squares = np.empty(count), np.empty(count, bool), np.empty(count)
    for rows in metrics_lib.chunks(logits):
        probabilities = metrics_lib.softmax(logits[rows])
        confidence[rows] = probabilities.max(-1)
        right[rows] = probabilities.argmax(-1) == labels[rows]
        squares[rows] = _squared_errors(probabilities, labels[rows])
    return metrics_lib.reliability(confidence, right) | {
        'loss': float(metrics_lib.log_losses(logits, labels).mean()),
        'brier': float(squares.mean()),
    }


def _squared_errors(probabilities, labels):
    """Brier scores of images: the sum over classes; for two, the second's term."""
    squares = np.square(probabilities).sum(-1)
    true = np.take_along_axis(probabilities, labels[:, None], -1)[:, 0]
    return (squares - 2 * true + 1) / (2 if probabilities.shape[-1] == 2 else 1)


def of_labels(
    logits: np.ndarray, raw_logits: np.ndarray | None, labels: np.ndarray, names
) -> dict[str, Any]:
    """Calibration metrics for several labels, before and after the calibration.

    Args:
      logits: `[N, L]`, as in predictions.
      raw_logits: before the model's calibration; None if it has none.
      labels: `[N, L]` of 0, 1 and NaN (unknown, left out).
      names: L names.

    Returns:
      `applied`, whether the model is calibrated; `temperature`, None, since labels have
      separate ones; `before` and `after` (None if it is not calibrated): for all known
      labels together, `error` and `bins` of `metrics.reliability`, where a bin's
      `accuracy` is the share of positives; `loss` of `metrics.label_loss`; `brier`, the
      mean over the labels; and `labels`, a row for each label with its name and its
      `error`, `loss` and `brier`.
    """
    if raw_logits is None:
        return {
            'applied': False,
            'temperature': None,
            'before': _of_labels(logits, labels, names),
            'after': None,
        }
    return {
        'applied': True,
        'temperature': None,
        'before': _of_labels(raw_logits, labels, names),
        'after': _of_labels(logits, labels, names),
    }


def _of_labels(logits, labels, names):
    probabilities = metrics_lib.sigmoid(logits)
    losses = calibrating.label_log_losses(logits, labels)
    known = ~np.isnan(labels)
    rows = []
    for c, name in enumerate(names):
        there = known[:, c]
        row: dict[str, Any] = {'name': str(name)}
        row |= dict.fromkeys(('error', 'loss', 'brier'))
        if there.any():
            p, true = probabilities[there, c], labels[there, c] > 0.5
            row['error'] = metrics_lib.reliability(p, true)['error']
            row['loss'] = float(losses[there, c].mean())
            row['brier'] = float(np.square(p - true).mean())
        rows.append(row)
    all_of_them = metrics_lib.reliability(probabilities[known], labels[known] > 0.5)
    return all_of_them | {
        'loss': metrics_lib.label_loss(logits, labels),
        'brier': metrics_lib.mean([row['brier'] for row in rows]),
        'labels': rows,
    }


def at_thresholds(
    labels: np.ndarray,
    probabilities: np.ndarray,
    values,
    names,
    groups: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """Metrics of the classes with a threshold, at that threshold.

    Args:
      labels: int `[N]`, or `[N, C]` of 0, 1 and NaN.
      probabilities: `[N, C]`.
      values: C thresholds, None for classes without one.
      names: C names.
      groups: `[N]`, whose image each is; None if that is unknown.

    Returns:
      A row for each class with a threshold: `name`, `threshold`, `positives` and
      `negatives` (actual ones); the images that are `found`, `missed`, `false_alarms`
      and `left_alone` at the threshold; of each of `sensitivity`, `specificity`,
      `ppv`, `npv` and `accuracy` (right decisions) the share and, with `_interval`,
      its 95% interval of `share_interval`; None where there is nothing to divide by.
      Also `average_precision`.
    """
    rows = []
    for place, value in enumerate(values):
        if value is not None:
            true, probability = choosing.of_class(labels, probabilities, place)
            own = groups
            if groups is not None and labels.ndim == 2:
                own = groups[~np.isnan(labels[:, place])]
            row = at_threshold(true, probability, value, own)
            rows.append({'name': str(names[place])} | row)
    return rows


def at_threshold(
    true: np.ndarray,
    probability: np.ndarray,
    threshold: float,
    groups: np.ndarray | None = None,
) -> dict[str, Any]:
    """A row of `at_thresholds` without its name.

    Args:
      true: bool `[N]`.
      probability: `[N]`.
      groups: `[N]`, or None.
    """
    positive = probability > threshold
    right = positive == true
    row: dict[str, Any] = {
        'threshold': float(threshold),
        'positives': int(true.sum()),
        'negatives': int((~true).sum()),
        'found': int((positive & true).sum()),
        'missed': int((~positive & true).sum()),
        'false_alarms': int((positive & ~true).sum()),
        'left_alone': int((~positive & ~true).sum()),
    }
    for name, rows in (
        ('sensitivity', true),
        ('specificity', ~true),
        ('ppv', positive),
        ('npv', ~positive),
        ('accuracy', np.ones_like(true)),
    ):
        row[name] = float(right[rows].mean()) if rows.any() else None
        row[f'{name}_interval'] = share_interval(
            right[rows], None if groups is None else groups[rows]
        )
    row['average_precision'] = average_precision(true, probability)
    return row


def share_interval(
    hits: np.ndarray, groups: np.ndarray | None = None
) -> list[float] | None:
    """Wilson's 95% interval of a share; None if it cannot be told.

    With groups it is that of as many independent images as would vary as much as the
    groups do (Korn and Graubard, Survey Methodology 1998); of shares of 0 and 1, of
    which the variance is not known, as many as there are groups.

    Args:
      hits: bool `[n]`.
      groups: `[n]`, whose image each is, or None.
    """
    count = len(hits)
    if groups is None or not count:
        return metrics_lib.wilson(int(hits.sum()), count)
    units = len(np.unique(groups))
    if units < 2:
        return None
    share = float(hits.mean())
    variance = delong.deviation((hits - share) / count, groups) ** 2
    independent = float(units)
    if 0 < share < 1:
        independent = min(count, share * (1 - share) / max(variance, 1e-300))
    return intervals.wilson(share, independent).tolist()


def average_precision(true: np.ndarray, probability: np.ndarray) -> float | None:
    """scikit-learn's average precision; None without positives or negatives."""
    from sklearn import metrics as sklearn_metrics

    if true.all() or not true.any():
        return None
    return float(sklearn_metrics.average_precision_score(true, probability))


def precision_recall(
    true: np.ndarray,
    probability: np.ndarray,
    *,
    points: int = metrics_lib.CURVE_POINTS,
) -> dict[str, list[float]] | None:
    """A precision-recall curve, from a recall of 0 to 1.

    Args:
      points: maximum number of points, evenly spaced in recall if the curve has more.

    Returns:
      None with only one class.
    """
    from sklearn import metrics as sklearn_metrics

    if not len(true) or true.all() or not true.any():
        return None
    precision, recall, _ = sklearn_metrics.precision_recall_curve(true, probability)
    precision, recall = precision[::-1], recall[::-1]
    keep = np.arange(len(recall))
    if len(keep) > points:
        places = np.searchsorted(recall, np.linspace(0, 1, points))
        keep = np.unique(
            np.append(places.clip(0, len(recall) - 1), [0, len(recall) - 1])
        )
    return {
        'recall': np.round(recall[keep], 4).tolist(),
        'precision': np.round(precision[keep], 4).tolist(),
    }


def decision_curve(true: np.ndarray, probability: np.ndarray) -> dict[str, list[float]]:
    """Net benefit by threshold probability (Vickers and Elkin, 2006).

    If one acts at probabilities above t, a false positive costs t / (1 - t) times the
    gain of a true positive. The benefit is in true positives per image.

    Returns:
      `probability`, the `benefit` of acting on the model's positives, and that of
      acting on `all` images; acting on none has 0.
    """
    count = max(len(true), 1)
    of_true, of_false = np.sort(probability[true]), np.sort(probability[~true])
    t = PROBABILITIES
    tp = len(of_true) - np.searchsorted(of_true, t, side='right')
    fp = len(of_false) - np.searchsorted(of_false, t, side='right')
    odds = t / (1 - t)
    return {
        'probability': t.tolist(),
        'benefit': ((tp - odds * fp) / count).tolist(),
        'all': ((len(of_true) - odds * len(of_false)) / count).tolist(),
    }

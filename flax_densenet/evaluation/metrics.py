"""Metrics of a classifier, as shown by `eval` and the report.

scikit-learn and scipy compute most of them, except the calibration error and the
temperature that corrects it (Guo et al., arXiv 1706.04599).

>>> import numpy as np
>>> logits = np.log([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7]])
>>> metrics = measure(logits, np.array([0, 1, 1]), ('ants', 'bees'))
>>> round(metrics['accuracy'], 3), metrics['confusion']
(0.667, [[1, 0], [1, 1]])
"""

from collections.abc import Callable
from typing import Any

import numpy as np

WIDE = 1000  # classes; with more, files with all pairs or probabilities are too large
_CHUNK = 2**22  # float64 numbers at a time
BINS = 15  # bins of the reliability diagram
CURVE_POINTS = 400  # points of an ROC curve, unless it has fewer


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Probabilities `[N, C]` of logits `[N, C]`, in float64."""
    from scipy import special

    logits = np.asarray(logits)
    probabilities = np.empty(logits.shape, np.float64)
    for rows in chunks(logits):
        probabilities[rows] = special.softmax(
            np.asarray(logits[rows], np.float64) / temperature, axis=-1
        )
    return probabilities


def chunks(logits):
    """Slices of rows `[N, C]`, so that temporary arrays of many classes stay small."""
    length = max(1, _CHUNK // max(1, logits.shape[-1]))
    for start in range(0, len(logits), length):
        yield slice(start, start + length)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities of independent labels, in float64."""
    from scipy import special

    return special.expit(np.asarray(logits, np.float64))


def log_sigmoid(logits: np.ndarray) -> np.ndarray:
    """Logarithm of `sigmoid`, in float64."""
    from scipy import special

    return special.log_expit(np.asarray(logits, np.float64))


def activate(logits: np.ndarray, outputs: str) -> np.ndarray:
    """Applies `outputs` (softmax, sigmoid or none) to logits, in float64."""
    if outputs == 'none':
        return np.asarray(logits, np.float64)
    return {'softmax': softmax, 'sigmoid': sigmoid}[outputs](logits)


def measure(
    logits: np.ndarray,
    labels: np.ndarray,
    class_names,
    *,
    calibration: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Metrics of a classifier with one class per image.

    Args:
      logits: `[N, C]`.
      labels: int `[N]`.
      class_names: C names.
      calibration: replaces the result of `calibrate`, if it is known.

    Returns:
      Values for JSON: `count`, `accuracy` and its 95% interval (Wilson's), `loss` in
      nats, `top5` if there are more than five classes, `classes` (name, precision,
      recall, f1, support, auroc; None if the denominator is 0, such as the precision of
      a class that is never predicted), `macro` averages of the defined values,
      `confusion` `[true][predicted]` or None with more than `WIDE` classes, `confused`
      (pairs that occur: true, predicted, count), and `calibration` before and after
      temperature scaling.
    """
    from sklearn import metrics as sklearn_metrics

    classes = range(len(class_names))
    probabilities = softmax(logits)
    predicted = probabilities.argmax(-1)
    right = predicted == labels
    precision, recall, f1, support = sklearn_metrics.precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=np.nan
    )
    areas = [area(labels == c, probabilities[:, c]) for c in classes]
    there = support > 0
    matrix = confusion(labels, predicted, len(classes))
    return {
        'count': len(labels),
        'accuracy': float(right.mean()),
        'accuracy_interval': wilson(int(right.sum()), len(labels)),
        'loss': float(log_losses(logits, labels).mean()),
        'top5': _top(probabilities, labels, 5) if len(class_names) > 5 else None,
        'macro': {
            'precision': mean(_defined(precision[there])),
            'recall': mean(_defined(recall[there])),
            'f1': mean(_defined(f1[there])),
            'auroc': mean(areas),
        },
        'classes': [
            {
                'name': str(class_names[c]),
                **dict(zip(('precision', 'recall', 'f1'), scores, strict=True)),
                'support': int(support[c]),
                'auroc': areas[c],
            }
            for c, scores in enumerate(
                zip(*map(_defined, (precision, recall, f1)), strict=True)
            )
        ],
        'confusion': matrix.toarray().tolist() if len(classes) <= WIDE else None,
        'confused': count_confused(matrix),
        'calibration': calibration or calibrate(logits, labels),
    }


def measure_labels(
    logits: np.ndarray,
    labels: np.ndarray,
    names,
    *,
    thresholds=0.5,
    calibration: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Metrics of a classifier with several labels per image.

    Args:
      logits: `[N, L]`.
      labels: `[N, L]` of 0, 1 and NaN (unknown, left out).
      names: L names.
      thresholds: thresholds of the probability, one for all labels or L values.
      calibration: copied to the result.

    Returns:
      The keys of `measure`. The accuracy is the share of an image's known labels that
      are correct at the thresholds, averaged over images; support is the number of
      images with the label. A label without known values has None and is left out of
      the means.
    """
    from sklearn import metrics as sklearn_metrics

    probabilities, known = sigmoid(logits), ~np.isnan(labels)
    positive = probabilities > np.asarray(thresholds, np.float64)
    rows = []
    for c, name in enumerate(names):
        if not known[:, c].any():
            nothing = dict.fromkeys(('precision', 'recall', 'f1', 'auroc'))
            rows.append({'name': str(name)} | nothing | {'support': 0})
            continue
        true, probability = labels[known[:, c], c] > 0.5, probabilities[known[:, c], c]
        scores = sklearn_metrics.precision_recall_fscore_support(
            true, positive[known[:, c], c], average='binary', zero_division=np.nan
        )
        scores = _defined(scores[:3])
        row: dict[str, Any] = dict(
            zip(('precision', 'recall', 'f1'), scores, strict=True)
        )
        row |= {'support': int(true.sum()), 'auroc': area(true, probability)}
        rows.append({'name': str(name)} | row)
    # As in training (`losses.measure`): the share of the known labels of each image.
    number = np.maximum(known.sum(-1), 1)
    wrong = known & (positive != (labels > 0.5))
    right = 1 - wrong.sum(-1) / number
    return {
        'count': len(labels),
        'accuracy': float(right.mean()),
        'accuracy_interval': _normal_interval(right),
        'loss': label_loss(logits, labels),
        'top5': None,
        'macro': {
            name: mean([rows[c][name] for c in np.flatnonzero(known.any(0))])
            for name in ('precision', 'recall', 'f1', 'auroc')
        },
        'classes': rows,
        'confusion': None,
        'confused': None,
        'calibration': calibration,
    }


def label_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Cross-entropy of the known labels of an image, averaged over images; in nats.

    Args:
      logits: `[N, L]`.
      labels: `[N, L]` of 0, 1 and NaN (unknown, left out).
    """
    known = ~np.isnan(labels)
    signs = np.where(labels > 0.5, -1.0, 1.0)
    losses = np.where(known, np.logaddexp(0, signs * np.asarray(logits, float)), 0)
    return float((losses.sum(-1) / np.maximum(known.sum(-1), 1)).mean())


def _defined(values):
    """Floats; None for undefined values."""
    return [None if np.isnan(value) else float(value) for value in values]


def majority(metrics: dict[str, Any]) -> tuple[str, float] | None:
    """The most frequent class, and the accuracy of always predicting it.

    Args: metrics: from `measure`. Returns None for those from `measure_labels`.
    """
    if metrics['confused'] is None or not metrics['count']:
        return None
    largest = max(metrics['classes'], key=lambda row: row['support'])
    return largest['name'], largest['support'] / metrics['count']


def temperature_helps(calibration: dict[str, Any]) -> bool:
    """Whether temperature scaling lowers the displayed calibration error.

    Args:
      calibration: from `measure`; False if it is already applied.
    """
    if calibration.get('applied') or calibration.get('after') is None:
        return False
    before, after = (calibration[name]['error'] for name in ('before', 'after'))
    return round(after, 3) < round(before, 3)


def calibration_error(metrics: dict[str, Any]) -> float | None:
    """The calibration error of the probabilities in predictions.

    Args:
      metrics: from `measure` or `measure_labels`, also of earlier versions.
    """
    calibration = metrics['calibration']
    if not calibration:
        return None
    return calibration['after' if calibration.get('applied') else 'before']['error']


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int):
    """Counts images by true and predicted class: scipy's sparse int64 matrix `[C, C]`.

    With 10,000 classes, nearly all of the hundred million pairs are empty.
    """
    from scipy import sparse

    ones = np.ones(len(labels), np.int64)
    shape = classes, classes
    matrix = sparse.csr_array((ones, (labels, predicted)), shape=shape)
    matrix.sum_duplicates()
    return matrix


def count_confused(matrix) -> list[list[int]]:
    """`[true, predicted, count]` of pairs of unequal classes, most frequent first."""
    pairs = matrix.tocoo()
    true, predicted = pairs.coords
    order = np.argsort(-pairs.data, kind='stable')
    return [
        [int(true[i]), int(predicted[i]), int(pairs.data[i])]
        for i in order
        if true[i] != predicted[i]
    ]


def wilson(right: int, count: int) -> list[float] | None:
    """Wilson's 95% interval of a share; None without images."""
    from scipy import stats

    if not count:
        return None
    interval = stats.binomtest(right, count).proportion_ci(method='wilson')
    return [float(interval.low), float(interval.high)]


def _normal_interval(values):
    """95% interval of a mean over images; labels of an image are dependent."""
    if len(values) < 2:
        return None
    middle = float(values.mean())
    margin = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
    return [max(middle - margin, 0.0), min(middle + margin, 1.0)]


def log_losses(
    logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0
) -> np.ndarray:
    """Cross-entropy of each image in nats, float64 `[N]`, of `logits / temperature`."""
    from scipy import special

    losses = np.empty(len(labels))
    for rows in chunks(logits):
        scaled = np.asarray(logits[rows], np.float64) / temperature
        true = np.take_along_axis(scaled, labels[rows, None], -1)[:, 0]
        losses[rows] = special.logsumexp(scaled, axis=-1) - true
    return losses


def _top(probabilities, labels, most):
    right = 0
    for rows in chunks(probabilities):
        best = np.argpartition(-probabilities[rows], most - 1, axis=-1)[:, :most]
        right += int((best == labels[rows, None]).any(-1).sum())
    return right / len(labels)


def area(true: np.ndarray, score: np.ndarray) -> float | None:
    """Area under the ROC curve; None if `true` has only one value."""
    from sklearn import metrics as sklearn_metrics

    if true.all() or not true.any():
        return None
    return float(sklearn_metrics.roc_auc_score(true, score))


def mean(values) -> float | None:
    """Mean of the values that are not None; None if there are none."""
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def roc(
    true: np.ndarray, probability: np.ndarray, *, points: int = CURVE_POINTS
) -> dict[str, list[float]] | None:
    """An ROC curve: straight lines between its points, which are all of its corners.

    Args:
      points: maximum number of points, evenly spaced along the curve if it has more
        corners.

    Returns:
      None with only one class.
    """
    from sklearn import metrics as sklearn_metrics

    if not len(true) or true.all() or not true.any():
        return None
    false_rate, true_rate, _ = sklearn_metrics.roc_curve(true, probability)
    keep = np.arange(len(true_rate))
    if len(keep) > points:  # evenly along the curve, whose length is at most 2
        length = false_rate + true_rate
        wanted = np.linspace(0, length[-1], points)
        keep = np.unique(np.searchsorted(length, wanted).clip(0, len(length) - 1))
    return {
        'false_positive_rate': np.round(false_rate[keep], 4).tolist(),
        'true_positive_rate': np.round(true_rate[keep], 4).tolist(),
    }


def calibrate(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Expected calibration error before and after the best temperature.

    The temperature T minimizes the cross-entropy of logits / T on the same images. It
    is a single number, so the result on new images is similar.

    Args:
      logits: `[N, C]`.
      labels: int `[N]`.

    Returns:
      `{'temperature', 'before', 'after'}`; the latter two have `error` and `bins`, each
      with confidence, accuracy and count.
    """
    temperature = best_temperature(
        lambda temperature: log_losses(logits, labels, temperature).mean()
    )
    return {
        'temperature': temperature,
        'before': reliability(*_predictions(logits, labels, 1.0)),
        'after': reliability(*_predictions(logits, labels, temperature)),
    }


def best_temperature(loss: Callable[[float], float]) -> float:
    """The temperature with the lowest loss, between 1/20 and 20."""
    from scipy import optimize

    solution = optimize.minimize_scalar(
        lambda log_t: loss(np.exp(log_t)), bounds=(-3, 3), method='bounded'
    )
    return float(np.exp(solution.x))


def _predictions(logits, labels, temperature):
    """The highest probability of each image, and whether it is correct."""
    confidence, right = np.empty(len(labels)), np.empty(len(labels), bool)
    for rows in chunks(logits):
        probabilities = softmax(logits[rows], temperature)
        confidence[rows] = probabilities.max(-1)
        right[rows] = probabilities.argmax(-1) == labels[rows]
    return confidence, right


def reliability(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Bins of confidence, and the mean gap between accuracy and confidence.

    Args:
      confidence: `[N]`, the probability of the predicted class.
      right: bool `[N]`, whether it is correct.
    """
    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins, error = [], 0.0
    for place in range(BINS):
        inside = places == place
        count = int(inside.sum())
        row: dict[str, Any] = {'count': count, 'confidence': None, 'accuracy': None}
        if count:
            row['confidence'] = float(confidence[inside].mean())
            row['accuracy'] = float(right[inside].mean())
            gap = abs(row['accuracy'] - row['confidence'])
            error += gap * count / len(right)
        bins.append(row)
    return {'error': error, 'bins': bins}


def auroc(logits: np.ndarray, labels: np.ndarray) -> list[float | None]:
    """Area under the ROC curve of each label; None if all known values are equal.

    Args:
      logits: `[N, L]`.
      labels: `[N, L]` of 0, 1 and NaN.
    """
    areas = []
    for score, label in zip(logits.T, labels.T, strict=True):
        known = ~np.isnan(label)
        areas.append(area(label[known] > 0.5, score[known]))
    return areas


def mean_auroc(areas: list[float | None]) -> float | None:
    """Mean of the areas that are not None; None if there are none."""
    return mean(areas)

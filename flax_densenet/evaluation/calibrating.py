"""Fits the calibration of a model's probabilities.

With one class per image, all classes share a temperature. With several labels, each
label gets nothing, a temperature, or Platt's scale and bias, whichever has the lowest
Akaike information criterion. The criterion estimates the log loss on other images: each
fitted number has to lower the total log loss by more than 1 nat, so a calibration that
only follows chance is not applied.
"""

import logging

import numpy as np

from flax_densenet.errors import list_first
from flax_densenet.evaluation import metrics as metrics_lib
from flax_densenet.evaluation import selection as selection_lib
from flax_densenet.weights import calibration as calibration_lib
from flax_densenet.weights import decisions as decisions_lib
from flax_densenet.weights import heads

_LOGGER = logging.getLogger(__name__)
FEWEST = 20  # images to fit a temperature
FEWEST_OF_LABEL = 10  # images with a label, and the same number without
# A temperature beyond this, up or down, is a bound of the search and not an optimum.
_BOUND = 19


def fit(
    selection: selection_lib.Selection,
    rules: selection_lib.Rules,
    found: decisions_lib.Decisions,
) -> calibration_lib.Calibration | None:
    """One of `fitting.FITTERS`; logs what it did."""
    if not rules.calibrate:
        return None
    outputs = selection.trained.outputs
    if outputs == heads.NONE or (outputs == heads.SIGMOID) != selection.multi_label:
        _LOGGER.info(
            'probabilities are not calibrated: the outputs are '
            f'{"sigmoids" if outputs == heads.SIGMOID else "not probabilities"}, and '
            'the images have one class each'
        )
        return None
    if selection.multi_label:
        made = fit_labels(selection.logits, selection.labels, selection.class_names)
    else:
        made = fit_temperature(selection.logits, selection.labels)
    for note in made.notes:
        _LOGGER.info(f'calibration on {found.where}: {note}')
    return made


def fit_temperature(
    logits: np.ndarray, labels: np.ndarray
) -> calibration_lib.Calibration:
    """The temperature with the lowest log loss, unless it does not help.

    Args:
      logits: `[N, C]`.
      labels: int `[N]`.
    """
    mistakes = int((logits.argmax(-1) != labels).sum())
    if len(labels) < FEWEST:
        return _unchanged(f'not calibrated: fewer than {FEWEST} images')
    if not mistakes:
        return _unchanged(
            'not calibrated: all images are predicted correctly, so there is no best '
            'temperature'
        )
    before = metrics_lib.log_losses(logits, labels).mean()
    temperature = metrics_lib.best_temperature(
        lambda temperature: metrics_lib.log_losses(logits, labels, temperature).mean()
    )
    after = metrics_lib.log_losses(logits, labels, temperature).mean()
    if not len(labels) * (before - after) > 1 or _is_at_bound(temperature):
        return _unchanged(
            f'not calibrated: a temperature of {temperature:.2f} would not lower the '
            f'log loss of {before:.4f} by more than chance'
        )
    note = (
        f'temperature {temperature:.2f}, log loss {before:.4f} before and {after:.4f} '
        'after'
    )
    return calibration_lib.Calibration(
        ('temperature',), (1 / temperature,), (0.0,), (note,)
    )


def _unchanged(note):
    return calibration_lib.Calibration(('none',), (1.0,), (0.0,), (note,))


def fit_labels(
    logits: np.ndarray, labels: np.ndarray, names
) -> calibration_lib.Calibration:
    """Calibrates each label separately.

    Args:
      logits: `[N, L]`.
      labels: `[N, L]` of 0, 1 and NaN (unknown, left out).
      names: L names, for the messages.
    """
    methods, scales, biases, few, inverted = [], [], [], [], []
    for name, logit, label in zip(names, logits.T, labels.T, strict=True):
        known = ~np.isnan(label)
        true, z = label[known] > 0.5, np.asarray(logit[known], np.float64)
        method, scale, bias = 'none', 1.0, 0.0
        smaller = min(true.sum(), (~true).sum())
        if smaller < FEWEST_OF_LABEL:
            few.append(f'{name} ({true.sum()} of {len(true)})')
        else:
            method, scale, bias = _fit_label(z, true)
            if scale <= 0:
                inverted.append(str(name))
                method, scale, bias = 'none', 1.0, 0.0
        methods.append(method)
        scales.append(scale)
        biases.append(bias)
    notes = [_describe(logits, labels, methods, scales, biases)]
    if few:
        notes.append(
            f'{len(few)} of {len(labels.T)} labels have fewer than {FEWEST_OF_LABEL} '
            f'positives or negatives and are not calibrated: {list_first(few)}'
        )
    if inverted:
        notes.append(
            'the logits of these labels rank images worse than chance, so they are not '
            f'calibrated: {list_first(inverted)}'
        )
    return calibration_lib.Calibration(
        tuple(methods), tuple(scales), tuple(biases), tuple(notes)
    )


def _describe(logits, labels, methods, scales, biases):
    made = calibration_lib.Calibration(tuple(methods), tuple(scales), tuple(biases))
    before, after = (
        metrics_lib.label_loss(one, labels)
        for one in (logits, made.apply(np.float64(logits)))
    )
    if not made.changes:
        return (
            'not calibrated: neither a temperature nor Platt scaling would lower the '
            f'log loss of {before:.4f} by more than chance'
        )
    return (
        f'{calibration_lib.describe(made)}; log loss {before:.4f} before and '
        f'{after:.4f} after'
    )


def _fit_label(logits, true):
    """The method, scale and bias of one label with the lowest AIC."""
    signs = np.where(true, -1.0, 1.0)

    def total(scale, bias):
        return float(np.logaddexp(0, signs * (scale * logits + bias)).sum())

    scale, bias = platt(logits, true)
    if scale <= 0:
        return 'platt', scale, bias
    found = [(total(1.0, 0.0), 'none', 1.0, 0.0)]
    # Without mistakes, the smallest temperature would be best.
    if ((logits > 0) != true).any():
        temperature = metrics_lib.best_temperature(
            lambda temperature: np.logaddexp(0, signs * logits / temperature).mean()
        )
        if not _is_at_bound(temperature):
            factor = 1 / temperature
            found.append((1 + total(factor, 0.0), 'temperature', factor, 0.0))
    if 1e-3 < scale < 1e3 and abs(bias) < 1e3:
        found.append((2 + total(scale, bias), 'platt', scale, bias))
    return min(found)[1:]


def platt(logits: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Scale and bias of Platt scaling, with Platt's targets.

    With n positives and m negatives, the target of a positive is (n + 1) / (n + 2) and
    that of a negative 1 / (m + 2), so that the numbers stay finite if the label is
    predicted without mistakes.

    Args:
      logits: `[N]`.
      true: bool `[N]`.
    """
    from scipy import optimize, special

    positives = int(true.sum())
    targets = np.where(
        true, (positives + 1) / (positives + 2), 1 / (len(true) - positives + 2)
    )
    # Scaled by their spread, which the search needs.
    middle, spread = logits.mean(), logits.std() or 1.0
    z = (logits - middle) / spread

    def loss(numbers):
        value = numbers[0] * z + numbers[1]
        wrong = special.expit(value) - targets
        total = np.logaddexp(0, value) - targets * value
        return total.mean(), np.array([(wrong * z).mean(), wrong.mean()])

    share = targets.mean()
    start = np.array([1.0, np.log(share / (1 - share))])
    solution = optimize.minimize(
        loss, start, jac=True, method='BFGS', options={'gtol': 1e-9}
    )
    scale = float(solution.x[0] / spread)
    return scale, float(solution.x[1] - scale * middle)


def _is_at_bound(temperature):
    return not 1 / _BOUND < temperature < _BOUND


def label_log_losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross-entropy of each label in nats, float64 `[N, L]`; NaN where unknown."""
    signs = np.where(labels > 0.5, -1.0, 1.0)
    losses = np.logaddexp(0, signs * np.asarray(logits, np.float64))
    return np.where(np.isnan(labels), np.nan, losses)

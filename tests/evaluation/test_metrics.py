"""The figures beside scikit-learn's own, and by hand where it has none."""

import numpy as np
import pytest

from flax_densenet.evaluation import metrics
from helpers import lazy

sklearn_metrics = lazy.module('sklearn.metrics')


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 400)
    labels[labels == 6] = 2  # a class that is not there
    logits = 2 * rng.standard_normal((400, 7))
    logits[np.arange(400), labels] += 2
    return logits, labels


NAMES = 'abcdefg'


def test_beside_scikit_learn(case):
    logits, labels = case
    found = metrics.measure(logits, labels, NAMES)
    predicted = logits.argmax(-1)
    assert found['count'] == 400
    assert found['accuracy'] == sklearn_metrics.accuracy_score(labels, predicted)
    report = sklearn_metrics.classification_report(
        labels, predicted, labels=range(6), output_dict=True, zero_division=0
    )
    for number, row in enumerate(found['classes'][:6]):
        theirs = report[str(number)]
        assert row['name'] == NAMES[number]
        # Without a prediction there is no precision, where scikit-learn has 0.
        assert (row['precision'] is None) == (number not in predicted)
        scores = row['precision'] or 0, row['recall'], row['f1'], row['support']
        assert scores == (
            pytest.approx(
                (theirs['precision'], theirs['recall'], theirs['f1-score'],
                 theirs['support'])
            )
        )  # fmt: skip
    assert found['classes'][6] | {'precision': 0} == {
        'name': 'g', 'precision': 0, 'recall': None,
        'f1': 0.0 if 6 in predicted else None,
        'support': 0, 'auroc': None,
    }  # fmt: skip
    matrix = sklearn_metrics.confusion_matrix(labels, predicted, labels=range(7))
    assert found['confusion'] == matrix.tolist()
    probabilities = metrics.softmax(logits)
    assert found['loss'] == pytest.approx(
        sklearn_metrics.log_loss(labels, probabilities, labels=range(7))
    )
    assert found['top5'] == sklearn_metrics.top_k_accuracy_score(
        labels, probabilities, k=5, labels=range(7)
    )
    area = sklearn_metrics.roc_auc_score(labels == 3, probabilities[:, 3])
    assert found['classes'][3]['auroc'] == area
    assert metrics.measure(logits[:, :2], labels.clip(0, 1), 'ab')['top5'] is None


def test_interval_by_hand():
    """Wilson: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    z, p, n = 1.959964, 0.9, 50
    middle = p + z**2 / (2 * n)
    spread = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    expected = [(middle + s * spread) / (1 + z**2 / n) for s in (-1, 1)]
    assert metrics.wilson(45, 50) == pytest.approx(expected, rel=1e-6)
    assert metrics.wilson(0, 0) is None


def test_calibration(case):
    logits, labels = case
    # Labels drawn from the probabilities themselves: calibrated by construction.
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((20000, 4)) * 2
    probabilities = metrics.softmax(logits)
    labels = (probabilities.cumsum(-1) < rng.random((20000, 1))).sum(-1)
    honest = metrics.calibrate(logits, labels)
    assert honest['temperature'] == pytest.approx(1, abs=0.03)
    assert honest['before']['error'] < 0.012
    sure = metrics.calibrate(3 * logits, labels)
    assert sure['temperature'] == pytest.approx(3, abs=0.1)
    assert sure['before']['error'] > 0.1 and sure['after']['error'] < 0.012
    counts = [row['count'] for row in sure['before']['bins']]
    assert sum(counts) == 20000 and counts[0] == 0  # none below a quarter
    # Two images of confidence 0.75, one of them right: a gap of 0.25.
    found = metrics.reliability(np.array([0.75, 0.75]), np.array([True, False]))
    assert found['error'] == pytest.approx(0.25)


def test_calibration_error_of_what_is_predicted():
    """After calibration only if predictions are calibrated."""
    calibration = {'before': {'error': 0.2}, 'after': {'error': 0.1}}
    assert metrics.calibration_error({'calibration': calibration}) == 0.2
    calibration['applied'] = True
    assert metrics.calibration_error({'calibration': calibration}) == 0.1
    assert metrics.calibration_error({'calibration': None}) is None


def test_roc(case):
    logits, labels = case
    true, score = labels == 1, metrics.softmax(logits)[:, 1]
    curve = metrics.roc(true, score)
    x, y = curve['false_positive_rate'], curve['true_positive_rate']
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert len(x) <= metrics.CURVE_POINTS
    area = sklearn_metrics.roc_auc_score(true, score)
    assert sklearn_metrics.auc(x, y) == pytest.approx(area, abs=0.01)
    assert metrics.roc(np.ones(4, bool), np.ones(4)) is None


def test_several_labels(case):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((60, 2))
    labels = (logits + rng.standard_normal((60, 2)) > 0).astype(float)
    labels[:20, 1] = np.nan
    found = metrics.measure_labels(logits, labels, ('x', 'y'))
    for c, start in enumerate((0, 20)):
        true, predicted = labels[start:, c], logits[start:, c] > 0
        row = found['classes'][c]
        assert row['f1'] == pytest.approx(sklearn_metrics.f1_score(true, predicted))
        assert row['support'] == true.sum()
        assert row['auroc'] == sklearn_metrics.roc_auc_score(true, logits[start:, c])
    right = (logits > 0) == (labels > 0.5)
    known = ~np.isnan(labels)
    assert found['accuracy'] == pytest.approx(right[known].mean())

"""Calibration equals scikit-learn's, and what only chance explains is left alone."""

import numpy as np
import pytest
from scipy import special

from flax_densenet.evaluation import calibrating, decision_metrics
from flax_densenet.evaluation import metrics as metrics_lib
from helpers import lazy

metrics = lazy.module('sklearn.metrics')


def fit_sklearn(method, logits, labels):
    """The calibrated classifier of scikit-learn."""
    from sklearn import base, calibration, frozen

    class Passed(base.ClassifierMixin, base.BaseEstimator):
        """A classifier of scikit-learn whose logits are its inputs."""

        def fit(self, x, y):
            self.classes_ = np.unique(y)
            return self

        def decision_function(self, x):
            return x[:, 0] if x.shape[1] == 1 else x

        def predict(self, x):
            return self.classes_[self.decision_function(x).argmax(-1)]

    known = frozen.FrozenEstimator(Passed().fit(logits, labels))
    made = calibration.CalibratedClassifierCV(known, method=method, ensemble=False)
    return made.fit(logits, labels)


def draw(rng, count, classes, *, factor):
    """Logits that are `factor` times those that the labels are drawn by."""
    logits = rng.normal(0, 1.5, (count, classes))
    p = special.softmax(logits, -1)
    labels = (p.cumsum(-1) < rng.random((count, 1))).sum(-1).clip(0, classes - 1)
    return logits * factor, labels


def test_temperature_is_that_of_scikit_learn():
    logits, labels = draw(np.random.default_rng(0), 600, 4, factor=3)
    made = calibrating.fit_temperature(logits, labels)
    assert made.methods == ('temperature',) and made.changes
    assert 2.5 < made.temperature < 3.5
    expected = fit_sklearn('temperature', logits, labels).predict_proba(logits)
    found = special.softmax(made.apply(logits), -1)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert f'temperature {made.temperature:.2f}' in made.notes[0]


def test_a_temperature_that_does_not_help():
    rng = np.random.default_rng(1)
    logits, labels = draw(rng, 600, 4, factor=1)
    made = calibrating.fit_temperature(logits, labels)
    assert not made.changes and 'would not lower' in made.notes[0]
    np.testing.assert_array_equal(made.apply(logits), logits)
    right = np.eye(4)[labels] * 5
    assert 'predicted correctly' in calibrating.fit_temperature(right, labels).notes[0]
    few = calibrating.fit_temperature(logits[:19] * 9, labels[:19])
    assert not few.changes and 'fewer than 20' in few.notes[0]


@pytest.mark.parametrize(('factor', 'changes'), [(1.3, False), (1.4, True)])
def test_the_total_log_loss_must_fall_by_more_than_1(factor, changes):
    logits, labels = draw(np.random.default_rng(4), 50, 4, factor=factor)
    losses = metrics_lib.log_losses
    best = metrics_lib.best_temperature(lambda t: losses(logits, labels, t).mean())
    gain = (losses(logits, labels) - losses(logits, labels, best)).sum()
    assert 0.8 < gain < 1.6 and bool(gain > 1) is changes
    assert calibrating.fit_temperature(logits, labels).changes is changes


@pytest.mark.slow
def test_chance_rarely_changes_what_is_calibrated():
    """AIC takes one superfluous number in some 16% of draws: P(chi2 > 2)."""
    changed = [
        calibrating.fit_temperature(
            *draw(np.random.default_rng(seed), 200, 3, factor=1)
        ).changes
        for seed in range(100)
    ]
    assert 4 <= sum(changed) <= 30


def draw_labels(rng, count):
    """Three labels: calibrated, too sure, and too sure with a shift."""
    logits = rng.normal(0, 2, (count, 3))
    labels = (rng.random((count, 3)) < special.expit(logits)).astype(np.float32)
    return logits * [1, 4, 3] + [0, 0, -4], labels


def test_platt_is_that_of_scikit_learn():
    logits, labels = draw_labels(np.random.default_rng(0), 500)
    for z, y in zip(logits.T, labels.T, strict=True):
        scale, bias = calibrating.platt(z, y > 0.5)
        made = fit_sklearn('sigmoid', z[:, None], y)
        expected = made.predict_proba(z[:, None])[:, 1]
        np.testing.assert_allclose(special.expit(scale * z + bias), expected, atol=2e-4)
    # Scale and offset of logits do not matter.
    other = calibrating.platt(1e4 * z + 3e5, y > 0.5)
    np.testing.assert_allclose(
        special.expit(other[0] * (1e4 * z + 3e5) + other[1]), expected, atol=2e-4
    )


def test_each_label_gets_what_it_needs():
    logits, labels = draw_labels(np.random.default_rng(0), 2000)
    labels[::3, 1] = np.nan
    made = calibrating.fit_labels(logits, labels, 'abc')
    assert made.methods == ('none', 'temperature', 'platt')
    np.testing.assert_allclose(made.scale, [1, 1 / 4, 1 / 3], rtol=0.15)
    np.testing.assert_allclose(made.bias, [0, 0, 4 / 3], atol=0.2)
    # Unknown labels play no part.
    known = ~np.isnan(labels[:, 1])
    alone = calibrating.fit_labels(logits[known, 1:2], labels[known, 1:2], 'b')
    assert alone.scale[0] == made.scale[1]


def test_labels_that_are_left_alone():
    rng = np.random.default_rng(0)
    logits, labels = draw_labels(rng, 400)
    labels[:, 1] = 0
    labels[:9, 1] = 1
    labels[:, 2] = 1 - labels[:, 2]
    made = calibrating.fit_labels(logits, labels, ('a', 'few', 'inverted'))
    assert made.methods[1:] == ('none', 'none')
    text = ' '.join(made.notes)
    assert '1 of 3 labels have fewer than 10' in text and 'few (9 of 400)' in text
    assert 'worse than chance' in text and 'inverted' in text


def test_labels_without_mistakes_stay_finite():
    logits = np.linspace(-1, 1, 100)[:, None]
    labels = (logits > 0).astype(np.float32)
    made = calibrating.fit_labels(logits, labels, 'a')
    assert made.methods == ('platt',) and 1 < made.scale[0] < 100
    made.check(1)


def test_before_and_after_are_those_of_scikit_learn():
    logits, labels = draw(np.random.default_rng(0), 300, 3, factor=3)
    found = decision_metrics.of_classes(logits / 3, logits, labels, 1 / 3)
    assert found['applied'] and found['temperature'] == pytest.approx(3)
    for name, one in (('before', logits), ('after', logits / 3)):
        p = special.softmax(one, -1)
        assert found[name]['loss'] == pytest.approx(metrics.log_loss(labels, p))
        expected = np.square(p - np.eye(3)[labels]).sum(-1).mean()
        assert found[name]['brier'] == pytest.approx(expected)
    assert found['after']['error'] < found['before']['error']
    two, binary = logits[:, :2], (labels == 1).astype(int)
    found = decision_metrics.of_classes(two, None, binary, None)
    assert not found['applied'] and found['temperature'] > 2
    expected = metrics.brier_score_loss(binary, special.softmax(two, -1)[:, 1])
    assert found['before']['brier'] == pytest.approx(expected)
    assert found['after']['loss'] < found['before']['loss']


def test_labels_before_and_after():
    logits, labels = draw_labels(np.random.default_rng(0), 300)
    labels[:50, 0] = np.nan
    labels[:, 2] = np.nan
    found = decision_metrics.of_labels(logits / 3, logits, labels, 'abc')
    rows = found['before']['labels']
    assert rows[2] == {'name': 'c', 'error': None, 'loss': None, 'brier': None}
    for c, start in ((0, 50), (1, 0)):
        y, p = labels[start:, c], special.expit(logits[start:, c])
        assert rows[c]['loss'] == pytest.approx(metrics.log_loss(y, p))
        assert rows[c]['brier'] == pytest.approx(metrics.brier_score_loss(y, p))
    mean = (rows[0]['brier'] + rows[1]['brier']) / 2
    assert found['before']['brier'] == pytest.approx(mean)
    assert sum(row['count'] for row in found['after']['bins']) == 550
    found = decision_metrics.of_labels(logits, None, labels, 'abc')
    assert not found['applied'] and found['after'] is None


def test_losses_of_labels_are_those_of_the_metrics():
    """Also with unknown labels, so that the numbers before and after compare."""
    rng = np.random.default_rng(5)
    labels = np.float32(rng.random((80, 3)) < 0.3)
    labels[rng.random((80, 3)) < 0.3] = np.nan
    raw = np.float32(rng.normal(0, 3, (80, 3)))
    found = decision_metrics.of_labels(raw / 2, raw, labels, 'abc')
    for logits, part in (raw, 'before'), (raw / 2, 'after'):
        metrics = metrics_lib.measure_labels(logits, labels, 'abc')
        assert found[part]['loss'] == metrics['loss']
    assert found['after']['loss'] != found['before']['loss']


def test_folds_with_calibrations_of_their_own_are_calibrated():
    rng = np.random.default_rng(6)
    labels, raw = rng.integers(0, 2, 50), rng.normal(0, 3, (50, 2))
    found = decision_metrics.of_classes(raw / 3, raw, labels, None)
    assert found['applied'] and found['temperature'] is None
    expected = metrics_lib.log_losses(raw, labels).mean()
    assert found['before']['loss'] == pytest.approx(expected)
    assert found['before']['loss'] > found['after']['loss']

"""Conformal sets: their guarantee, and what MAPIE computes of the same predictions."""

import numpy as np
import pytest

from flax_densenet.errors import UserError
from flax_densenet.evaluation import conformal
from flax_densenet.weights import conformal as conformal_lib


def draw(random, count, classes=5, sharpness=2.0):
    """Probabilities and labels; the probabilities are not calibrated."""
    labels = random.integers(classes, size=count)
    logits = random.normal(size=(count, classes))
    logits[np.arange(count), labels] += sharpness * random.random(count)
    e = np.exp(3 * logits)
    return e / e.sum(-1, keepdims=True), labels


def draw_several(random, count, labels=3):
    truth = (random.random((count, labels)) < (0.5, 0.3, 0.1)).astype(np.float64)
    logits = random.normal(size=truth.shape) + 2 * truth - 1
    truth[random.random(truth.shape) < 0.1] = np.nan
    return 1 / (1 + np.exp(-3 * logits)), truth


@pytest.mark.slow
@pytest.mark.parametrize('coverage, count', [(0.9, 50), (0.8, 101), (0.95, 19)])
def test_guarantee(coverage, count):
    """Over 1,000 draws: at least the coverage, at most 1 / (n + 1) more."""
    random, hits = np.random.default_rng(1), []
    for _ in range(1000):
        sets = conformal.fit(*draw(random, count))
        probabilities, labels = draw(random, 40)
        # Without the likeliest class, which raises the coverage.
        inside = probabilities >= sets.thresholds(coverage)
        hits.append(inside[np.arange(40), labels].mean())
    error = 4 * np.std(hits) / 1000**0.5
    assert coverage - error <= np.mean(hits) <= coverage + 1 / (count + 1) + error
    assert error < 0.01


def test_guarantee_of_several_labels():
    """For each label, among the images that have it."""
    random, hits = np.random.default_rng(2), []
    for _ in range(1000):
        sets = conformal.fit(*draw_several(random, 120))
        probabilities, labels = draw_several(random, 300)
        inside, there = sets.contains(probabilities, 0.8), labels == 1
        hits.append((inside & there).sum(0) / there.sum(0))
    error = 4 * np.std(hits, axis=0) / 1000**0.5
    found = np.mean(hits, axis=0)
    assert (found >= 0.8 - error).all()
    # 120 * 0.9 images times the share of each label.
    assert (found <= 0.8 + 1 / (np.array([54, 32, 11]) * 0.75) + error).all()
    assert error.max() < 0.02


@pytest.mark.parametrize('spread', [0.3, 1.0])
def test_averages_of_folds_are_covered(spread):
    """Sets fitted on out-of-fold probabilities, each of one of five models."""
    random, hits = np.random.default_rng(3), []

    def draw_members(count):
        labels = random.integers(5, size=count)
        logits = random.normal(size=(count, 1, 5))
        logits[np.arange(count), 0, labels] += 2
        logits = logits + spread * random.normal(size=(count, 5, 5))
        e = np.exp(logits)
        return e / e.sum(-1, keepdims=True), labels

    rows = np.arange(100)
    for _ in range(500):
        members, labels = draw_members(100)
        sets = conformal.fit(members[rows, rows % 5], labels)
        members, labels = draw_members(100)
        inside = sets.contains(members.mean(1), 0.9)
        hits.append(inside[rows, labels].mean())
    error = 4 * np.std(hits) / 500**0.5
    assert 0.9 - error <= np.mean(hits) and error < 0.01
    assert (np.mean(hits) > 0.95) == (spread == 1)


@pytest.mark.parametrize('coverage', [0.6, 0.9, 0.95])
def test_equals_mapie(coverage):
    """The same sets, apart from the likeliest class, which MAPIE can leave out."""
    mapie = pytest.importorskip('mapie.classification')
    from sklearn import base

    class Given(base.ClassifierMixin, base.BaseEstimator):
        """Its inputs are the probabilities."""

        def fit(self, x, y):
            self.classes_ = np.unique(y)
            return self

        def predict(self, x):
            return x.argmax(-1)

        def predict_proba(self, x):
            return x

    random = np.random.default_rng(3)
    (fitted, labels), (probabilities, _) = draw(random, 137), draw(random, 200)
    peer = mapie.SplitConformalClassifier(
        Given().fit(fitted, labels),
        confidence_level=coverage,
        prefit=True,
        conformity_score='lac',
    )
    wanted = peer.conformalize(fitted, labels).predict_set(probabilities)[1][..., 0]
    sets = conformal.fit(fitted, labels)
    inside = probabilities >= sets.thresholds(coverage)
    assert wanted.any() and not wanted.all()
    assert (inside == wanted).all()
    full = sets.contains(probabilities, coverage)
    assert (full >= inside).all() and full.any(-1).all()


def test_too_few_images():
    """All classes are in each set, and a warning tells the user."""
    random = np.random.default_rng(4)
    probabilities, labels = draw(random, 8)
    sets = conformal.fit(probabilities, labels)
    assert sets.contains(probabilities, 0.9).all()
    assert '9 validation images and there were 8' in sets.warn(0.9, 'abcde')
    assert not sets.warn(0.8, 'abcde')
    probabilities, labels = draw_several(random, 40)
    labels[:, 2] = 0
    sets = conformal.fit(probabilities, labels)
    assert sets.contains(probabilities, 0.9)[:, 2].all()
    assert not sets.contains(probabilities, 0.8)[:, 0].all()
    assert 'there were fewer of c, which' in sets.warn(0.9, 'abc')


@pytest.mark.parametrize('coverage', [0, 1, -1, 90, float('nan')])
def test_refuses_a_coverage(coverage):
    sets = conformal_lib.ConformalSets((1,), np.ones(1, np.float32))
    with pytest.raises(UserError, match='must be between 0 and 1'):
        sets.thresholds(coverage)


def test_of_very_many_images():
    """A random part is kept, small and in order."""
    random = np.random.default_rng(5)
    probabilities, labels = draw(random, 30_000)
    sets = conformal.fit(probabilities, labels)
    assert sets.counts == (conformal.MOST,)
    true = probabilities[np.arange(30_000), labels]
    assert sets.thresholds(0.9)[0] == pytest.approx(np.quantile(true, 0.1), abs=0.01)
    assert len(np.unique(sets.probabilities)) > 0.9 * conformal.MOST
    sets.check(5)


def test_written_and_read():
    sets = conformal.fit(*draw_several(np.random.default_rng(6), 40))
    again = conformal_lib.ConformalSets.from_files(*sets.to_files())
    again.check(3)
    assert (again.thresholds(0.8) == sets.thresholds(0.8)).all()
    with pytest.raises(ValueError, match='counts has 3 values'):
        again.check(4)
    backward = conformal_lib.ConformalSets((2,), np.float32([0.5, 0.2]))
    with pytest.raises(ValueError, match='not sorted'):
        backward.check(2)
    with pytest.raises(ValueError, match='differ'):
        conformal_lib.ConformalSets((3,), np.float32([0.5, 0.2])).check(2)


def test_measure():
    """Counted by hand."""
    sets = conformal_lib.ConformalSets((9,), np.float32([0.3] * 9))
    probabilities = np.array([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6], [0.4, 0.35, 0.25]])
    found = conformal.measure(sets, probabilities, np.array([1, 0, 0]), 0.9)
    assert found['coverage'] == pytest.approx(2 / 3)
    assert found['size'] == pytest.approx(5 / 3)
    assert found['single'] == pytest.approx(1 / 3) and found['empty'] == 0
    assert found['classes'] == [0.5, 1.0, None]
    assert found['interval'][0] < 2 / 3 < found['interval'][1]


def test_curve_on_the_same_images():
    """Halves, as sets that are measured where they were fitted look exact."""
    random = np.random.default_rng(7)
    probabilities, labels = draw(random, 60)
    rows = conformal.curve(None, probabilities, labels, (0.7, 0.9))
    same = conformal.curve(
        conformal.fit(probabilities, labels), probabilities, labels, (0.7,)
    )
    assert abs(same[0]['coverage'] - 0.7) < 0.02
    assert [row['asked'] for row in rows] == [0.7, 0.9]
    assert rows[0]['coverage'] < rows[1]['coverage']
    assert rows[0]['size'] < rows[1]['size']
    assert abs(rows[1]['coverage'] - 0.9) < 0.1


def test_risk_curve():
    """By hand, with two images of equal confidence."""
    found = conformal.risk_curve(
        np.array([0.9, 0.5, 0.5, 0.2]), np.array([True, True, False, False])
    )
    assert found['share'] == [0.25, 0.75, 1.0]
    assert found['risk'] == pytest.approx([0, 1 / 3, 1 / 2])
    assert found['area'] == pytest.approx((0 + 2 / 3 + 1 / 2) / 4)
    assert found['best'] == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)

"""How often 95% intervals hold the true value, by simulation."""

import numpy as np
import pytest

from flax_densenet.evaluation import bootstrap, delong, weighted
from helpers.marks import exhaustive_after

pytestmark = pytest.mark.slow


def draw(rng, count, classes, shift, sizes=None):
    """Labels and scores of a classifier that is right more often than not."""
    labels = rng.choice(classes, count, p=sizes)
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), labels] += shift
    exp = np.exp(logits)
    return labels, exp / exp.sum(-1, keepdims=True)


def measure(labels, scores):
    return weighted.Weighted(labels, scores).measure(
        np.ones((len(labels), 1), np.float32)
    )


METRICS = ('f1', 'auroc', 'average_precision', 'balanced_accuracy')


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ('count', 'classes', 'shift', 'sizes'),
    exhaustive_after(
        1,
        [
            *((60, 2, 1.0, (0.75, 0.25)), (200, 2, 2.0, (0.75, 0.25))),
            (200, 10, 1.5, None),
        ],
    ),
)
def test_bootstrap(count, classes, shift, sizes):
    """Of 300 test sets. The standard error of a coverage of 95% is 1.3 points."""
    rng = np.random.default_rng(1)
    truth = measure(*draw(rng, 200_000, classes, shift, sizes))['macro']
    held = dict.fromkeys(METRICS, 0)
    for seed in range(300):
        labels, scores = draw(rng, count, classes, shift, sizes)
        found = measure(labels, scores)['macro']
        draws = bootstrap.replicate(
            weighted.Weighted(labels, scores).measure, count, resamples=500, seed=seed
        )['macro']
        for name in METRICS:
            low, high = bootstrap.interval(draws[name], found[name][0])
            held[name] += low <= truth[name][0] <= high
    coverage = {name: number / 300 for name, number in held.items()}
    assert all(0.88 <= share <= 0.985 for share in coverage.values()), coverage


@pytest.mark.exhaustive
def test_groups():
    """50 patients of 1 to 9 images with errors in common; images alone cover less."""
    rng = np.random.default_rng(2)
    truth = _patients(rng, 100_000)
    truth = delong.placements(truth[0], truth[1])[0]
    held = np.zeros(3)
    for seed in range(300):
        true, score, groups = _patients(rng, 50)
        both = np.stack([-score, score], -1)
        for place, drawn in enumerate((groups, None)):
            metrics = weighted.Weighted(true.astype(int), both)
            found = measure(true.astype(int), both)['classes']['auroc'][1, 0]
            draws = bootstrap.replicate(
                metrics.measure, len(true), groups=drawn, resamples=400, seed=seed
            )['classes']['auroc'][1]
            low, high = bootstrap.interval(draws, found)
            held[place] += low <= truth <= high
        area, moves = delong.influence(true, score)
        low, high = delong.interval(area, delong.deviation(moves, groups))
        held[2] += low <= truth <= high
    coverage = held / 300
    assert 0.89 <= coverage[0] <= 0.985 and 0.89 <= coverage[2] <= 0.985
    assert coverage[1] < coverage[0] - 0.1


def _patients(rng, count):
    """Images of patients, of whom each is ill or not and has an error of its own."""
    sizes = rng.integers(1, 10, count)
    groups = np.repeat(np.arange(count), sizes)
    ill, error = rng.random(count) < 0.4, rng.normal(size=count)
    score = 1.5 * ill[groups] + error[groups] + 0.5 * rng.normal(size=len(groups))
    return ill[groups], score, groups


@pytest.mark.exhaustive
def test_delong():
    """Its interval, and how often it calls equal models different."""
    rng = np.random.default_rng(3)
    truth = delong.placements(*_binary(rng, 400_000)[:2])[0]
    held = found = 0
    for _ in range(2000):
        true, one, other = _binary(rng, 100)
        area, moves = delong.influence(true, one)
        low, high = delong.interval(area, delong.deviation(moves)) or (area, area)
        held += low <= truth <= high
        found += delong.compare(true, one, other).p_value < 0.05
    assert 0.93 <= held / 2000 <= 0.97
    assert 0.03 <= found / 2000 <= 0.07


def _binary(rng, count):
    """Two scores that are equally good, with errors in common."""
    true = rng.random(count) < 0.3
    shared = 1.2 * true + 0.7 * rng.normal(size=count)
    return true, *(shared + 0.7 * rng.normal(size=count) for _ in range(2))


@pytest.mark.exhaustive
def test_paired_bootstrap():
    """How often the F1 of two models that are equally good is called different."""
    rng = np.random.default_rng(4)
    alarms = 0
    for seed in range(300):
        labels = rng.integers(0, 3, 150)
        shared = rng.normal(size=(150, 3))
        shared[np.arange(150), labels] += 1.5
        pair = [
            weighted.Weighted(labels, shared + 0.7 * rng.normal(size=(150, 3)))
            for _ in range(2)
        ]

        def difference(weights, pair=pair):
            one, other = (metrics.measure(weights)['macro']['f1'] for metrics in pair)
            return {'f1': one - other}

        found = difference(np.ones((150, 1), np.float32))['f1'][0]
        draws = bootstrap.replicate(difference, 150, resamples=400, seed=seed)['f1']
        low, high = bootstrap.interval(draws, found)
        p = bootstrap.p_value(draws, found)
        assert (p < 0.05) == (not low <= 0 <= high) or abs(p - 0.05) < 0.02
        alarms += p < 0.05
    assert 0.02 <= alarms / 300 <= 0.1

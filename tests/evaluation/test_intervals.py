"""Intervals beside scikit-learn, scipy, direct sums over pairs and exact cases."""

import types

import numpy as np
import pytest

from flax_densenet.evaluation import (
    bootstrap,
    delong,
    intervals,
    metrics,
    results,
    weighted,
)
from helpers import lazy
from helpers.pages import many

stats = lazy.module('scipy.stats')
sklearn_metrics = lazy.module('sklearn.metrics')


@pytest.fixture(scope='module')
def classes():
    """Labels, scores with many ties, and three weightings of the images."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    scores = rng.normal(size=(200, 3)).round(1)
    scores[np.arange(200), labels] += 1
    return labels, scores, next(bootstrap.draw(200, resamples=3))


def test_weighted_classes_equal_scikit_learn(classes):
    labels, scores, weights = classes
    found = weighted.Weighted(labels, scores).measure(weights)
    predicted = scores.argmax(-1)
    for b, weight in enumerate(weights.T):
        assert (weight == 0).any() and (weight > 1).any()
        about = {'sample_weight': weight}
        scored = sklearn_metrics.precision_recall_fscore_support(
            labels, predicted, **about
        )
        for name, values in zip(('precision', 'recall', 'f1'), scored, strict=False):
            np.testing.assert_allclose(found['classes'][name][:, b], values)
            assert found['macro'][name][b] == pytest.approx(values.mean())
        for c in range(3):
            of_class = found['classes']
            true, score = labels == c, scores[:, c]
            area = sklearn_metrics.roc_auc_score(true, score, **about)
            assert of_class['auroc'][c, b] == pytest.approx(area)
            area = sklearn_metrics.average_precision_score(true, score, **about)
            assert of_class['average_precision'][c, b] == pytest.approx(area, abs=1e-6)
            other = sklearn_metrics.recall_score(~true, predicted != c, **about)
            assert of_class['specificity'][c, b] == pytest.approx(other)
        balanced = sklearn_metrics.balanced_accuracy_score(labels, predicted, **about)
        assert found['macro']['balanced_accuracy'][b] == pytest.approx(balanced)
        share = sklearn_metrics.accuracy_score(labels, predicted, **about)
        assert found['accuracy'][b] == pytest.approx(share)


def test_weighted_labels_equal_scikit_learn():
    """Unknown labels count in nothing."""
    rng = np.random.default_rng(1)
    scores = rng.random((150, 2))
    labels = (scores + 0.4 * rng.normal(size=(150, 2)) > 0.5).astype(float)
    labels[:60, 1] = np.nan
    weights = next(bootstrap.draw(150, resamples=2))
    found = weighted.Weighted(labels, scores).measure(weights)
    for b, c in np.ndindex(2, 2):
        known = ~np.isnan(labels[:, c])
        true, score, about = (
            labels[known, c], scores[known, c],
            {'sample_weight': weights[known, b]},
        )  # fmt: skip
        for name, value in (
            ('f1', sklearn_metrics.f1_score(true, score > 0.5, **about)),
            ('auroc', sklearn_metrics.roc_auc_score(true, score, **about)),
            (
                'average_precision',
                sklearn_metrics.average_precision_score(true, score, **about),
            ),
        ):
            assert found['classes'][name][c, b] == pytest.approx(value, abs=1e-6), name
    one_each = weighted.Weighted(labels, scores).measure(np.ones((150, 1), np.float32))
    logits = np.log(scores / (1 - scores))
    own = metrics.measure_labels(logits, labels, 'ab')
    assert one_each['accuracy'][0] == pytest.approx(own['accuracy'])
    for name in ('precision', 'recall', 'f1', 'auroc'):
        assert one_each['macro'][name][0] == pytest.approx(own['macro'][name])


def test_weightings_that_lack_a_class_define_no_area():
    labels, scores = np.array([0, 0, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]])
    weights = np.array([[1, 1], [1, 2], [1, 0]], np.float32)
    found = weighted.Weighted(labels, scores).measure(weights)
    assert found['classes']['auroc'][:, 0].tolist() == [0.5, 0.5]
    assert np.isnan(found['classes']['auroc'][:, 1]).all()
    assert np.isnan(found['classes']['average_precision'][:, 1]).all()


def test_groups_are_drawn_whole(monkeypatch):
    groups = np.array([7, 7, 3, 3, 3, 9])
    monkeypatch.setattr(bootstrap, '_CHUNK', 6 * 20)
    parts = list(bootstrap.draw(6, groups=groups, resamples=50))
    assert [part.shape for part in parts] == [(6, 20), (6, 20), (6, 10)]
    weights = np.concatenate(parts, -1)
    assert (weights[0] == weights[1]).all() and (weights[2:5] == weights[2]).all()
    assert (weights[[0, 2, 5]].sum(0) == 3).all() and weights.max() > 1
    again = np.concatenate(list(bootstrap.draw(6, groups=groups, resamples=50)), -1)
    assert (weights == again).all()
    other = np.concatenate(
        list(bootstrap.draw(6, groups=groups, resamples=50, seed=1)), -1
    )
    assert (weights != other).any()


def test_interval_of_a_mean_equals_scipy():
    """Of a mean, which resamples do not bias: the same, but for the draws."""
    values = np.random.default_rng(0).gamma(2, size=80)
    draws = bootstrap.replicate(
        lambda weights: {'mean': values @ weights / weights.sum(0)},
        80, resamples=20_000,
    )['mean']  # fmt: skip
    own = bootstrap.interval(draws, values.mean())
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method='BCa', rng=0
    ).confidence_interval
    width = theirs.high - theirs.low
    np.testing.assert_allclose(own, theirs, atol=0.05 * width)
    assert bootstrap.p_value(draws - own[0], values.mean() - own[0]) == pytest.approx(
        0.05, abs=0.002
    )
    assert bootstrap.p_value(draws - values.mean(), 0.0) > 0.9
    assert bootstrap.p_value(np.zeros(20), 0.0) == 1


def test_resamples_that_define_too_little_have_no_interval():
    values = np.array([[0.5, np.nan, np.nan], [0.2, 0.4, np.nan]])
    found = bootstrap.interval(values, np.array([0.5, 0.3]))
    assert np.isnan(found[0]).all() and not np.isnan(found[1]).any()


def test_copies_of_an_image_say_nothing_new(classes):
    """Images that are there four times, in groups, have the interval of one each."""
    labels, scores, _ = classes
    once = intervals.measure(labels, scores)
    groups = np.repeat(np.arange(200), 4)
    four = np.repeat(labels, 4), np.repeat(scores, 4, 0)
    grouped = intervals.measure(*four, groups=groups)
    alone = intervals.measure(*four)
    assert (grouped['units'], grouped['unit_count']) == ('groups', 200)
    assert alone['unit_count'] == 800
    for name in ('f1', 'auroc', 'average_precision', 'balanced_accuracy'):
        ends = [np.array(made['intervals']['macro'][name]) for made in (once, grouped)]
        np.testing.assert_allclose(ends[0], ends[1], atol=1e-6)
        width = np.ptp(alone['intervals']['macro'][name])
        assert width < 0.6 * np.ptp(ends[0])  # half, if copies are taken for new ones
    # Shares are Wilson's for images and resampled for groups.
    wilson, drawn = (
        made['intervals']['classes'][0]['recall'] for made in (once, grouped)
    )
    np.testing.assert_allclose(wilson, drawn, atol=0.03)
    found = int((scores[labels == 0].argmax(-1) == 0).sum())
    assert wilson == pytest.approx(metrics.wilson(found, int((labels == 0).sum())))


def test_perfect_metrics_are_not_certain():
    """Every resample of a perfect test is perfect; its intervals are not."""
    labels = np.array([0] * 10 + [1] * 15)
    scores = np.where(labels[:, None] == np.arange(2), 0.9, 0.1)
    found = intervals.measure(labels, scores)
    row = found['intervals']['classes'][1]
    assert row['recall'] == pytest.approx(metrics.wilson(15, 15))
    low, high = row['auroc']
    middle = 25 / 2 - 1
    spread = 1 + middle * ((1 - low) / (2 - low) + low / (1 + low))
    variance = low * (1 - low) * spread / 150
    assert high == 1 and 1 - low == pytest.approx(1.959964 * variance**0.5, rel=1e-4)
    assert delong.bound(0, 10, 15) == pytest.approx((0, 1 - low))
    share = metrics.wilson(15, 15)[0]  # of a class and what is taken for it
    assert row['f1'] == [pytest.approx(2 * share / (1 + share)), 1]
    assert found['intervals']['macro']['auroc'] is None
    # Of three patients, less is known than of 25 images.
    grouped = intervals.measure(labels, scores, groups=np.arange(25) % 3)
    row = grouped['intervals']['classes'][1]
    assert row['recall'] == pytest.approx(metrics.wilson(3, 3))
    assert row['auroc'] is None


def direct_delong(true, one, other):
    """From the paper, by comparing every pair of images."""

    def kernel(score):
        difference = score[true][:, None] - score[~true][None]
        return (difference > 0) + 0.5 * (difference == 0)

    parts = [kernel(score) for score in (one, other)]
    areas = [part.mean() for part in parts]
    m, n = parts[0].shape
    s10 = np.cov([part.mean(1) for part in parts])
    s01 = np.cov([part.mean(0) for part in parts])
    return areas, s10 / m + s01 / n


def test_delong_equals_pairs_of_images():
    rng = np.random.default_rng(3)
    true = rng.random(120) < 0.3
    one = (true + rng.normal(size=120)).round(1)
    other = one + rng.normal(size=120).round(1)
    areas, covariance = direct_delong(true, one, other)
    found = delong.compare(true, one, other)
    for area, score in zip(areas, (one, other), strict=True):
        assert delong.placements(true, score)[0] == pytest.approx(area)
        assert area == pytest.approx(sklearn_metrics.roc_auc_score(true, score))
    spread = (covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) ** 0.5
    assert found.difference == pytest.approx(areas[0] - areas[1])
    assert found.p_value == pytest.approx(
        2 * stats.norm.sf(abs(areas[0] - areas[1]) / spread)
    )
    width = found.interval[1] - found.interval[0]
    assert width == pytest.approx(2 * 1.959964 * spread)
    assert delong.compare(true, one, one * 2).p_value == 1
    # What each image adds up to is the same variance, but for m / (m - 1).
    area, moves = delong.influence(true, one)
    assert moves.sum() == pytest.approx(0, abs=1e-12)
    assert delong.deviation(moves) == pytest.approx(covariance[0, 0] ** 0.5, rel=0.02)
    # Each image twice, as a group: nothing new.
    twice = delong.influence(np.repeat(true, 2), np.repeat(one, 2))[1]
    groups = np.repeat(np.arange(120), 2)
    assert delong.deviation(twice, groups) == pytest.approx(delong.deviation(moves))
    low, high = delong.interval(area, delong.deviation(moves))
    assert 0 < low < area < high < 1
    assert delong.interval(1.0, 0.0) is None


def test_large_tests_have_delong_in_place_of_a_bootstrap(classes, monkeypatch):
    labels, scores, _ = classes
    slow = intervals.measure(labels, scores)
    monkeypatch.setattr(intervals, 'WORK', 100)
    quick = intervals.measure(labels, scores)
    for one, other in (
        (slow['intervals']['macro'], quick['intervals']['macro']),
        *zip(*(m['intervals']['classes'] for m in (slow, quick)), strict=True),
    ):
        np.testing.assert_allclose(one['auroc'], other['auroc'], atol=0.01)
        assert 'average_precision' not in other
        assert one['f1'] == other['f1']
    monkeypatch.setattr(intervals, '_MOST_RANKS', 100)
    none = intervals.measure(labels, scores)['intervals']
    assert 'auroc' not in none['macro'] and none['macro']['f1']


def test_metrics_of_results(tmp_path):
    found = many(classes=3, count=60)
    made = found.metrics
    assert (
        made['intervals']['unit_count'] == 60 and made['intervals']['units'] == 'images'
    )
    for row, ends in zip(made['classes'], made['intervals']['classes'], strict=True):
        for name in ('f1', 'auroc', 'average_precision', 'specificity', 'recall'):
            low, high = ends[name]
            assert 0 <= low <= row[name] <= high <= 1
    text = results.format_metrics_table(found, '60 images')
    assert 'means, 95% intervals by bootstrap of 60 images:' in text
    low, high = made['intervals']['macro']['auroc']
    assert f'AUROC {made["macro"]["auroc"]:.3f} ({low:.3f} to {high:.3f})' in text
    assert max(map(len, text.splitlines())) <= 90
    # Patients: the accuracy has their interval, too.
    found.examples.groups = np.arange(60) // 6
    grouped = results.Results(
        found.examples, found.class_names, found.logits, found.labels
    ).metrics
    assert grouped['accuracy'] == made['accuracy']
    assert grouped['accuracy_interval'] != made['accuracy_interval']
    assert grouped['intervals']['units'] == 'groups'
    assert grouped['intervals']['unit_count'] == 10


def test_labels_have_one_interval_in_both_tables():
    rng = np.random.default_rng(0)
    labels = np.float32(rng.random((90, 2)) < 0.4)
    logits = np.float32(2 * labels - 1 + rng.normal(0, 2, (90, 2)))
    examples = types.SimpleNamespace(groups=np.arange(90) // 3)
    found = results.Results(examples, ('a', 'b'), logits, labels).metrics
    for row, ends in zip(
        found['thresholds']['classes'], found['intervals']['classes'], strict=True
    ):
        assert row['sensitivity_interval'] == ends['recall']
        assert row['specificity_interval'] == ends['specificity']
        assert row['ppv_interval'] == ends['precision']
        assert row['npv_interval'][0] < row['npv'] < row['npv_interval'][1]

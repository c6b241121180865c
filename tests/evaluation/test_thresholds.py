"""Thresholds by rules, against all possible ones; metrics at them as scikit-learn's."""

import logging
import types

import numpy as np
import pytest

from flax_densenet.errors import UserError
from flax_densenet.evaluation import (
    choosing,
    decision_metrics,
    decision_text,
    evaluate,
    intervals,
    results,
    selection,
    threshold_rules,
)
from flax_densenet.evaluation import metrics as metrics_lib
from flax_densenet.report import decisions as decisions_page
from flax_densenet.weights import calibration, decisions, thresholds
from flax_densenet.weights import trained as trained_lib
from helpers import lazy
from helpers.marks import slow_after

stats = lazy.module('scipy.stats')
metrics = lazy.module('sklearn.metrics')


def draw(seed, count=200, *, rounded=2):
    rng = np.random.default_rng(seed)
    true = rng.random(count) < 0.3
    p = np.clip(rng.normal(0.4 + 0.25 * true, 0.2), 0.01, 0.99)
    return true, np.round(p, rounded)  # with ties


def rates(true, p, threshold):
    tn, fp, fn, tp = metrics.confusion_matrix(true, p > threshold).ravel()
    return tp / (tp + fn), tn / (tn + fp), fn, fp


def everything(true, p):
    """All thresholds that differ, and what each gives."""
    edges = np.concatenate([[0.0], np.unique(p), [1.0]])
    between = (edges[1:] + edges[:-1]) / 2
    return between, [rates(true, p, one) for one in between]


@pytest.mark.parametrize('seed', slow_after(1, range(3)))
@pytest.mark.parametrize(
    ('text', 'score'),
    [
        ('youden', lambda sens, spec, fn, fp: sens + spec),
        ('cost=5:1', lambda sens, spec, fn, fp: -(5 * fn + fp)),
        ('cost=1:2.5', lambda sens, spec, fn, fp: -(fn + 2.5 * fp)),
        ('sensitivity=0.95', lambda sens, spec, fn, fp: spec - 9 * (sens < 0.95)),
        ('sensitivity=1', lambda sens, spec, fn, fp: spec - 9 * (sens < 1)),
        ('specificity=0.9', lambda sens, spec, fn, fp: sens - 9 * (spec < 0.9)),
    ],
)
def test_no_threshold_is_better(seed, text, score):
    true, p = draw(seed)
    found = threshold_rules.choose(threshold_rules.parse(text), true, p)
    between, made = everything(true, p)
    scores = [score(*one) for one in made]
    best = max(scores)
    assert score(*rates(true, p, found)) == pytest.approx(best)
    as_good = [b for b, s in zip(between, scores, strict=True) if s > best - 1e-9]
    assert found == pytest.approx(max(as_good))
    assert min(scores) < best - 0.05


@pytest.mark.parametrize('seed', slow_after(1, range(3)))
def test_f1(seed):
    true, p = draw(seed)
    found = threshold_rules.choose(threshold_rules.parse('f1'), true, p)
    best = max(
        metrics.f1_score(true, p > one, zero_division=0)
        for one in everything(true, p)[0]
    )
    assert metrics.f1_score(true, p > found) == pytest.approx(best)


def test_ends():
    """Everything positive, or nothing, where a cost wants it."""
    true, p = draw(0)
    rule = threshold_rules.parse('cost=1000:1')
    assert threshold_rules.choose(rule, true, p) < p[true].min()
    rule = threshold_rules.parse('cost=1:1000')
    assert threshold_rules.choose(rule, true, p) > p[~true].max()


@pytest.mark.parametrize(
    'text',
    [
        *('best', 'youden=1', 'f1=', 'sensitivity', 'sensitivity=0', 'sensitivity=2'),
        *('specificity=x', 'cost=5', 'cost=0:1', 'cost=1:inf', 'cost=1:2:3', '='),
    ],
)
def test_rules_that_are_not_known(text):
    with pytest.raises(UserError, match='use youden, f1, sensitivity=SHARE') as raised:
        threshold_rules.parse(text, '--threshold')
    assert f'--threshold={text} is not known' in str(raised.value)


def test_metrics_at_a_threshold():
    true, p = draw(3)
    row = decision_metrics.at_threshold(true, p, 0.5)
    positive = p > 0.5
    for name, value, right, count in (
        ('sensitivity', metrics.recall_score(true, positive), None, true.sum()),
        ('specificity', metrics.recall_score(~true, ~positive), None, (~true).sum()),
        ('ppv', metrics.precision_score(true, positive), None, positive.sum()),
        ('npv', metrics.precision_score(~true, ~positive), None, (~positive).sum()),
    ):
        assert row[name] == pytest.approx(value)
        right = round(value * count)
        ends = stats.binomtest(right, int(count)).proportion_ci(method='wilson')
        assert row[f'{name}_interval'] == pytest.approx([ends.low, ends.high])
    expected = metrics.average_precision_score(true, p)
    assert row['average_precision'] == pytest.approx(expected)
    counts = [row[name] for name in ('left_alone', 'false_alarms', 'missed', 'found')]
    assert counts == metrics.confusion_matrix(true, positive).ravel().tolist()
    assert row['accuracy'] == metrics.accuracy_score(true, positive)
    nothing = decision_metrics.at_threshold(np.zeros(3, bool), np.full(3, 0.2), 0.5)
    assert nothing['sensitivity'] is None and nothing['ppv'] is None
    assert nothing['npv'] == 1 and nothing['average_precision'] is None


@pytest.mark.slow
def test_intervals_of_groups_hold_the_true_share():
    """Those that take the images of a group for independent do not."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 8)
    held, naive = [], []
    for _ in range(300):
        hits = rng.uniform(size=240) < np.repeat(rng.beta(2, 0.5, 30), 8)
        for kept, given in (held, groups), (naive, None):
            low, high = decision_metrics.share_interval(hits, given)
            kept.append(low <= 0.8 <= high)
    assert np.mean(held) > 0.92 and np.mean(naive) < 0.85
    alone = np.arange(240)
    one, other = (decision_metrics.share_interval(hits, g) for g in (alone, None))
    np.testing.assert_allclose(one, other, atol=1e-3)
    assert decision_metrics.share_interval(np.ones(8, bool), np.zeros(8)) is None
    low, high = decision_metrics.share_interval(np.ones(8, bool), np.arange(8) // 4)
    assert high == 1 and low == pytest.approx(intervals.wilson(1, 2)[0])


def test_thresholds_of_labels_take_the_groups_of_known_images():
    labels = np.array([[1, 0], [1, np.nan], [0, 1], [0, 0]], np.float32)
    p = np.array([[0.9, 0.1], [0.8, 0.9], [0.2, 0.7], [0.6, 0.2]])
    groups = np.array([0, 0, 1, 2])
    rows = decision_metrics.at_thresholds(labels, p, (0.5, 0.5), 'ab', groups)
    assert [row['accuracy'] for row in rows] == [0.75, 1]
    expected = intervals.wilson(1, 3)  # of the three images whose label is known
    assert rows[1]['accuracy_interval'] == pytest.approx(expected)
    one = decision_metrics.at_thresholds(labels, p, (0.5, 0.5), 'ab', 0 * groups)
    told = {'rule': 'f1', 'classes': one}
    lines = decision_text.threshold_lines({'thresholds': told, 'confused': None})
    assert lines[-1].split() == ['b', '0.500', '1.000', '1.000', '1.000', '1.000']


def test_what_is_not_of_the_threshold_is_said():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 60)
    logits = np.stack([np.zeros(60), 2 * labels - 1 + rng.normal(0, 1.5, 60)], -1)
    chosen = thresholds.Thresholds('youden', (None, 0.8))
    made = decisions.Decisions(1, 'x', 2, '', 'val', 60, thresholds=chosen)
    found = results.Results(
        [], ('ant', 'bee'), logits.astype('f4'), labels, decisions=made
    )
    (row,) = found.metrics['thresholds']['classes']
    assert row['accuracy'] == np.mean((found.probabilities[:, 1] > 0.8) == labels)
    assert row['accuracy'] != found.metrics['accuracy']
    lines = decision_text.threshold_lines(found.metrics)
    line = ' '.join(map(str.strip, lines[4:]))
    assert line.startswith('The accuracy, precision, recall, F1 and the confusion')
    assert max(map(len, lines[1:])) <= 80
    share = f'{row["accuracy"]:.1%}'
    assert f'{row["found"]} of its {labels.sum()} images are found' in line
    assert f'{row["false_alarms"]} false alarms' in line and share in line
    page = decisions_page.describe(found, '', own=True)
    assert page['likeliest'] == line


def test_rows_of_classes_and_of_labels():
    p = np.array([[0.2, 0.8], [0.6, 0.4], [0.9, 0.1], [0.3, 0.7]])
    labels = np.array([1, 0, 0, 0])
    rows = decision_metrics.at_thresholds(labels, p, (None, 0.5), 'ab')
    assert [row['name'] for row in rows] == ['b']
    assert (rows[0]['positives'], rows[0]['sensitivity'], rows[0]['ppv']) == (1, 1, 0.5)
    several = np.array([[1, 0], [0, np.nan], [1, 0], [0, 1]], np.float32)
    rows = decision_metrics.at_thresholds(several, p, (0.5, 0.5), 'ab')
    assert [row['positives'] + row['negatives'] for row in rows] == [4, 3]
    found = thresholds.is_positive(p, (None, 0.5))
    assert found.tolist() == [[False, True], [False, False], [False, False]] + [
        [False, True]
    ]


def test_precision_recall_curve():
    true, p = draw(0, 5000, rounded=6)
    curve = decision_metrics.precision_recall(true, p, points=100)
    recall, precision = np.array(curve['recall']), np.array(curve['precision'])
    assert len(recall) <= 101 and recall[0] == 0 and recall[-1] == 1
    assert (np.diff(recall) >= 0).all()
    all_p, all_r, _ = metrics.precision_recall_curve(true, p)
    pairs = set(zip(np.round(all_r, 4), np.round(all_p, 4), strict=True))
    assert set(zip(recall, precision, strict=True)) <= pairs
    small = decision_metrics.precision_recall(true[:20], p[:20])
    expected = metrics.precision_recall_curve(true[:20], p[:20])[1]
    np.testing.assert_allclose(small['recall'], expected[::-1], atol=1e-4)
    assert decision_metrics.precision_recall(np.ones(3, bool), p[:3]) is None


def test_decision_curve():
    true, p = draw(1)
    curve = decision_metrics.decision_curve(true, p)
    for place in (0, 19, 49, 79):
        t = curve['probability'][place]
        tp, fp = (true & (p > t)).sum(), (~true & (p > t)).sum()
        expected = tp / len(p) - fp / len(p) * t / (1 - t)
        assert curve['benefit'][place] == pytest.approx(expected)
        everyone = true.mean() - (~true).mean() * t / (1 - t)
        assert curve['all'][place] == pytest.approx(everyone)


def select(logits, labels, names, **metadata):
    """The images that may choose, of a model that is nothing but its outputs."""
    trained = trained_lib.Trained(
        module=types.SimpleNamespace(num_classes=len(names)),
        variables={},
        metadata={'multi_label': labels.ndim == 2, **metadata},
        metrics={},
        step=1,
        mesh=None,
    )
    outputs = evaluate.Outputs(np.float32(logits), labels)
    return selection.Selection(trained, names, 'x', 'val', [], None, outputs, {})


def fitted(**entries):
    return decisions.Decisions(1, '', 2, 'x', 'val', 9, **entries)


def test_two_classes_have_the_threshold_of_the_positive_one(caplog):
    true, p = draw(0)
    z = np.stack([np.zeros(len(p)), np.log(p / (1 - p))], -1)
    chosen = select(z, true.astype(np.int32), ('benign', 'malignant'))
    with caplog.at_level(logging.INFO):
        made = choosing.fit(chosen, selection.Rules(threshold='youden'), fitted())
    rule = threshold_rules.parse('youden')
    expected = threshold_rules.choose(rule, true, metrics_lib.softmax(z)[:, 1])
    assert made.values == (None, pytest.approx(expected, abs=1e-6))
    assert 'the second class counts as the positive one' in caplog.text
    rules = selection.Rules(threshold='youden', positive_class='benign')
    other = choosing.fit(chosen, rules, fitted()).values
    assert other[1] is None and other[0] == pytest.approx(1 - expected, abs=0.05)
    half = calibration.Calibration(('temperature',), (0.5,), (0.0,))
    made = choosing.fit(
        chosen, selection.Rules(threshold='youden'), fitted(calibration=half)
    )
    expected = threshold_rules.choose(rule, true, metrics_lib.softmax(z / 2)[:, 1])
    assert made.values[1] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(UserError, match='is not a class of the model; use benign or'):
        choosing.places_of(('benign', 'malignant'), 'odd', several=False)


def test_few_images_get_no_threshold_of_their_own():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60).astype(np.int32)
    labels[:9] = 2
    chosen = select(rng.normal(size=(60, 3)), labels, ('a', 'b', 'few'))
    made = choosing.fit(chosen, selection.Rules(threshold='f1'), fitted())
    assert made.values[2] is None and None not in made.values[:2]
    assert 'few (9 of 60)' in made.notes[-1]
    several = np.stack([labels == 0, labels == 2], -1).astype(np.float32)
    chosen = select(rng.normal(size=(60, 2)), several, ('a', 'few'))
    made = choosing.fit(chosen, selection.Rules(threshold='f1'), fitted())
    assert made.values[1] == 0.5 and made.values[0] != 0.5


def test_operating_points_become_thresholds_of_calibrated_probabilities():
    """What was above its point still is."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 2, (80, 3))
    labels = (rng.random((80, 3)) < 0.4).astype(np.float32)
    points = [0.2, 0.05, None]
    chosen = select(logits, labels, ('a', 'b', 'c'), operating_points=points)
    assert choosing.fit(chosen, selection.Rules(), fitted()) is None
    platt = calibration.Calibration(
        ('platt', 'none', 'none'), (0.5, 1.0, 1.0), (0.3, 0.0, 0.0)
    )
    made = choosing.fit(chosen, selection.Rules(), fitted(calibration=platt))
    assert made.values[1:] == (pytest.approx(0.05), None)
    shares = metrics_lib.sigmoid(platt.apply(logits))
    above = thresholds.is_positive(shares, made.values)
    np.testing.assert_array_equal(above[:, 0], metrics_lib.sigmoid(logits)[:, 0] > 0.2)
    assert 0 < above[:, 0].sum() < 80 and not above[:, 2].any()

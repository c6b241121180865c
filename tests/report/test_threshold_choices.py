"""The counts at other thresholds, for the slider of the report."""

import dataclasses

import numpy as np
import pytest

from flax_densenet.evaluation import decision_metrics, results
from flax_densenet.report import decisions, threshold_choices
from helpers.marks import slow_after
from helpers.pages import several


def draw(count, *, share=0.5, digits=None):
    random = np.random.default_rng(count)
    true = random.random(count) < share
    true[:2] = True, False
    logits = 2 * true + random.normal(size=count) - 1
    probability = 1 / (1 + np.exp(-logits))
    return true, probability if digits is None else probability.round(digits)


@pytest.mark.parametrize(
    ('count', 'share', 'digits'),
    slow_after(
        2,
        [
            (2, 0.5, None),
            (60, 0.5, 1),
            (60, 0.5, None),
            (300, 0.5, 2),
            (5000, 0.5, None),
            (5000, 0.005, None),
        ],
    ),
)
def test_counts_are_those_of_the_table(count, share, digits):
    true, probability = draw(count, share=share, digits=digits)
    row = threshold_choices.count(true, probability, 0.3123456)
    values = row['thresholds']
    assert values[row['start']] == 0.3123456
    assert values[0] == 0 and values[-1] == 1 and values == sorted(set(values))
    assert len(values) <= threshold_choices.MOST
    for value, found, alarms in zip(values, row['found'], row['alarms'], strict=True):
        expected = decision_metrics.at_threshold(true, probability, value)
        for name in ('positives', 'negatives'):
            assert row[name] == expected[name]
        assert (found, alarms) == (expected['found'], expected['false_alarms'])


def test_every_decision_is_there_if_there_are_few():
    true, probability = draw(60)
    row = threshold_choices.count(true, probability, 0.5)
    pairs = set(zip(row['found'], row['alarms'], strict=True))
    assert len(pairs) == 61


def test_rare_positives_are_told_apart():
    true, probability = draw(5000, share=0.01)
    row = threshold_choices.count(true, probability, 0.5)
    assert set(row['found']) == set(range(true.sum() + 1))


def test_thresholds_are_short_where_scores_allow():
    true = np.array([False, True, False, True])
    near = np.nextafter(0.9, 1)
    probability = np.array([0.1, 0.2, 0.9, near])
    row = threshold_choices.count(true, probability, 0.5)
    assert row['thresholds'] == [0, 0.15, 0.5, 0.9, 1]  # not 0.55, as 0.5 is the same
    assert row['found'] == [2, 2, 1, 1, 0]
    assert row['alarms'] == [2, 1, 1, 0, 0]


def two_classes(**changes):
    random = np.random.default_rng(0)
    logits = random.normal(size=(50, 2)).astype(np.float32)
    labels = (np.arange(50) % 3 == 0).astype(np.int32)
    found = results.Results(several().examples, ('ill', 'healthy'), logits, labels)
    return dataclasses.replace(found, **changes)


@pytest.mark.parametrize(
    ('positive', 'name'), [(None, 'healthy'), ('ill', 'ill'), ('gone', 'healthy')]
)
def test_two_classes_start_at_a_half(positive, name):
    shown = decisions.describe(two_classes(), 'x', own=True, positive=positive)
    (row,), (static,) = shown['choices'], shown['thresholds']
    assert row['name'] == static['name'] == name
    assert row['thresholds'][row['start']] == static['threshold'] == 0.5
    share = row['found'][row['start']] / row['positives']
    assert static['shares'][0][0] == pytest.approx(share)
    assert not shown['decision_curves'] and shown['threshold_rule'] is None


def test_labels_start_at_their_thresholds():
    found = several()
    found.labels[:, 1] = 0  # no positives: nothing to choose
    shown = decisions.describe(found, 'x', own=True)
    assert [row['name'] for row in shown['choices']] == ['mass', '<5 mm']
    assert len(shown['thresholds']) == 3


def test_none_for_more_classes_or_other_outputs():
    logits = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    labels = np.arange(9, dtype=np.int32) % 3
    found = results.Results(several().examples, ('a', 'b', 'c'), logits, labels)
    shown = decisions.describe(found, 'x', own=True)
    assert shown['choices'] == shown['thresholds'] == []
    found = two_classes(outputs='none')
    assert threshold_choices.tabulate(found, (None, 0.5)) == []

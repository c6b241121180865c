"""Metrics of parts of the images, against scikit-learn on the same rows."""

import numpy as np
import pytest

from flax_densenet.evaluation import delong, intervals, subgroups
from helpers import lazy

stats = lazy.module('scipy.stats')
sklearn_metrics = lazy.module('sklearn.metrics')


@pytest.fixture(scope='module')
def case():
    """300 images of three classes; those of site b are harder."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    site = np.array(['a', 'b', 'c'])[rng.integers(0, 3, 300)]
    logits = rng.normal(size=(300, 3))
    logits[np.arange(300), labels] += np.where(site == 'b', 0.3, 3)
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    age = rng.integers(18, 90, 300).astype(float)
    age[:20] = np.nan
    return labels, scores, {'site': site, 'age': age}


def test_each_part_has_its_metrics(case):
    labels, scores, columns = case
    by_site, by_age = subgroups.measure(columns, labels, scores)
    assert by_site['looks'] == by_age['looks'] == 3 + 8
    assert [row['name'] for row in by_site['rows']] == ['a', 'b', 'c']
    for row in by_site['rows']:
        chosen = columns['site'] == row['name']
        true, score = labels[chosen], scores[chosen]
        predicted = score.argmax(-1)
        assert row['count'] == chosen.sum()
        right = true == predicted
        values = row['values']
        assert values['accuracy'] == pytest.approx(right.mean())
        f1 = sklearn_metrics.f1_score(true, predicted, average='macro')
        assert values['f1'] == pytest.approx(f1)
        area = sklearn_metrics.roc_auc_score(true, score, multi_class='ovr')
        assert values['auroc'] == pytest.approx(area)
        for name, (low, high) in row['intervals'].items():
            assert low <= values[name] <= high, name
        rest = (labels == scores.argmax(-1))[~chosen]
        assert row['rest'] == pytest.approx(rest.mean())
        table = [[right.sum(), (~right).sum()], [rest.sum(), (~rest).sum()]]
        assert row['p_value'] == pytest.approx(stats.fisher_exact(table).pvalue)
        assert row['worst'] == (row['name'] == 'b')
    text = subgroups.describe(by_site)
    assert text.startswith('Lowest accuracy by site: b with ')
    assert 'p < 0.001, unlikely to be chance, though 11 parts were compared' in text
    assert (by_age['bins'], by_age['unknown']) == ('decades', 20)
    assert sum(row['count'] for row in by_age['rows']) + by_age['left_out'] == 280
    assert sum(row['worst'] for row in by_age['rows']) == 1
    assert 'could be chance: 11 parts were compared' in subgroups.describe(by_age)


def test_labels_and_patients(case):
    """AUROC is compared by its influence; of patients, less is sure."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, (200, 2)).astype(float)
    scores = 1 / (1 + np.exp(-(2 * labels - 1 + rng.normal(size=(200, 2)))))
    labels[:30, 0] = np.nan
    sex = np.where(np.arange(200) % 2, 'F', 'M')
    found, grouped = (
        subgroups.measure({'sex': sex}, labels, scores, groups=groups)[0]
        for groups in (None, np.arange(200) // 10)
    )
    assert found['metric'] == 'auroc'
    areas, variance, fewest = [], 0.0, 200
    for name in ('F', 'M'):
        moves, own = np.zeros(200), []
        for c in range(2):
            rows = np.flatnonzero((sex == name) & ~np.isnan(labels[:, c]))
            area, change = delong.influence(labels[rows, c] == 1, scores[rows, c])
            own.append(area)
            for kind in (labels[rows, c] == 1, labels[rows, c] == 0):
                count = kind.sum()
                fewest = min(fewest, count)
                change[kind] *= np.sqrt(count / (count - 1))
            moves[rows] += change / 2
        areas.append(np.mean(own))
        variance += np.sum(moves**2)
    row = found['rows'][0]
    assert (row['values']['auroc'], row['rest']) == pytest.approx(tuple(areas))
    distance = abs(areas[0] - areas[1]) / variance**0.5
    p_value = 2 * stats.t.sf(distance, fewest - 1)
    assert row['p_value'] == pytest.approx(p_value, rel=0.02)
    assert (row['units'], grouped['rows'][0]['units']) == (100, 20)
    assert grouped['rows'][0]['p_value'] != row['p_value']


def test_small_parts_and_other_names_of_the_class(case):
    labels, scores, _ = case
    few = np.array(['x'] * 9 + ['y'] * 100 + ['z'] * 190 + [''])
    finding = np.array(['none', 'mild', 'severe'])[labels]
    site = np.array(['one'] * 300)
    found = subgroups.measure(
        {'few': few, 'finding': finding, 'site': site}, labels, scores
    )
    assert [one['column'] for one in found] == ['few']
    assert [row['name'] for row in found[0]['rows']] == ['y', 'z']
    assert (found[0]['left_out'], found[0]['unknown']) == (9, 1)


def test_numbers_are_divided():
    values = np.array([1.5, 2, 3, 4, 5, 6, 7, 8, np.nan])
    parts, bins = subgroups.divide('bmi', values)
    assert bins == 'quartiles' and [len(rows) for rows in parts.values()] == [2] * 4
    assert list(parts)[0] == '1.5 to 2' and sum(map(len, parts.values())) == 8
    # Not everything with these letters is an age, and no age is 400.
    assert subgroups.divide('image dosage', values)[1] == 'quartiles'
    assert subgroups.divide('age_at_scan', values)[1] == 'decades'
    assert subgroups.divide('age', 100 * values)[1] == 'quartiles'
    words = np.array(['10 mm', '2 mm', 'x', '2 mm', ''])
    parts, bins = subgroups.divide('slice', words)
    assert list(parts) == ['2 mm', '10 mm', 'x'] and bins is None
    assert parts['2 mm'].tolist() == [1, 3]


def test_large_tests_take_bounded_time(case, monkeypatch):
    """Beyond, DeLong's intervals take the place of resampled areas."""
    labels, scores, columns = case
    monkeypatch.setattr(intervals, 'WORK', 1000)
    found = subgroups.measure(columns, labels, scores)[0]['rows'][0]
    assert found['values']['auroc'] and found['intervals']['auroc']
    assert found['values']['average_precision'] is None
    assert subgroups.measure({}, labels, scores) == []


@pytest.mark.slow
def test_parts_that_differ_by_chance_alone_are_rarely_marked():
    """Small parts, rare labels and patients among them: 5% of the tests at most.

    Labels differ in how well they are told, so that parts without one differ as well.
    """
    marked, told = 0, 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        groups = np.sort(rng.integers(0, 60, 180))
        labels = np.float32(rng.random((180, 2)) < (0.3, 0.08))
        noise = rng.normal(0, 1.3, (180, 2)) + rng.normal(0, 0.5, (60, 2))[groups]
        scores = (2 * labels - 1) * (0.5, 2) + noise
        age = rng.integers(18, 95, 60)[groups].astype(float)
        images = subgroups._Images(labels, scores, scores > 0, groups, 0)
        parts = subgroups.divide('age', age)[0].values()
        parts = [rows for rows in parts if len(rows) >= subgroups.LEAST]
        p_values = [images._compare(rows, 'auroc')[1] for rows in parts]
        known = [value for value in p_values if value is not None]
        told += len(known)
        marked += min(known, default=1) < 0.05 / len(parts)
    assert told > 200 and marked <= 6, (told, marked)


def test_parts_of_too_few_patients_are_not_compared():
    labels = np.float32(np.arange(80) % 2)[:, None]
    scores = np.linspace(0, 1, 80)[:, None]
    site = np.array(['a'] * 20 + ['b'] * 60)
    groups = np.where(site == 'a', np.arange(80) % 3, np.arange(80))
    alone, few = (
        subgroups.measure({'site': site}, labels, scores, groups=given)[0]
        for given in (None, groups)
    )
    assert alone['rows'][0]['p_value'] is not None
    row = few['rows'][0]
    assert row['p_value'] is None and row['rest'] == alone['rows'][0]['rest']
    for one in few['rows']:
        one['worst'] = one is row
    assert 'too few to tell whether that is chance' in subgroups.describe(few)

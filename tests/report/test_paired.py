"""Runs compared on the same images: their files, the tests and the sentences."""

import json

import numpy as np
import pytest

from flax_densenet import UserError
from flax_densenet.evaluation import delong, results
from flax_densenet.report import compare, paired
from helpers import lazy
from helpers.pages import write_run

stats = lazy.module('scipy.stats')


class Named(list):
    """Images with names, and groups if there are any."""

    def __init__(self, count, groups=None):
        super().__init__(range(count))
        self.groups = groups

    def name(self, row):
        return f'image {row:04}'


def saved(folder, logits, labels, groups=None, step=20):
    names = tuple('abcd'[: logits.shape[-1]])
    found = results.Results(Named(len(labels), groups), names, logits, labels)
    write_run(folder)
    results.save(str(folder), found, results.Measured('here', 2, step))
    return str(folder)


def classes(rng, count, noise, shift=1.5, number=3):
    labels = rng.integers(0, number, count)
    shared = rng.normal(size=(count, number))
    shared[np.arange(count), labels] += shift
    return labels, [
        np.float32(shared + n * rng.normal(size=(count, number))) for n in noise
    ]


def test_files_come_back_as_arrays(tmp_path):
    rng = np.random.default_rng(0)
    labels, (logits, _) = classes(rng, 50, (1, 1), number=2)
    groups = rng.integers(100, 105, 50)
    # So sure that the probabilities have no digits left.
    logits *= 30
    found = paired.load_scores(saved(tmp_path / 'one', logits, labels, groups))
    assert (found.labels == labels).all()
    assert (found.predicted == logits.argmax(-1)).all()
    _, first = np.unique(groups, return_inverse=True)
    assert len(set(zip(first, found.groups, strict=True))) == len(set(groups))
    assert found.groups.max() < 5  # numbers, not the identifiers
    area = delong.placements(labels == 1, logits[:, 1] - logits[:, 0])[0]
    assert delong.placements(labels == 1, found.scores[:, 1])[0] == pytest.approx(area)
    several = np.float32(rng.integers(0, 2, (50, 3)))
    several[:5, 0] = np.nan
    logits = np.float32(rng.normal(size=(50, 3)))
    found = paired.load_scores(saved(tmp_path / 'two', logits, several))
    assert np.array_equal(found.labels, several, equal_nan=True)
    assert (found.predicted == (logits > 0)).all() and found.groups is None
    assert paired.load_scores(str(tmp_path)) is None
    (tmp_path / 'predictions.csv').write_text('path,true,predicted,probability_a\n1,b')
    with pytest.raises(UserError, match='is not a file that eval writes'):
        paired.load_scores(str(tmp_path))


def test_differences(tmp_path):
    """Each test, by what it is made of; the better one is found better."""
    rng = np.random.default_rng(1)
    labels, (good, bad) = classes(rng, 300, (0.1, 3), number=2)
    runs = [
        paired.load_scores(saved(tmp_path / name, logits, labels))
        for name, logits in (('good', good), ('bad', bad))
    ]
    made = {one.metric: one for one in paired.Resampled(runs).compare(1, 0)}
    right = [run.labels == run.predicted for run in runs]
    lost, gained = (right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum()
    accuracy = made['accuracy']
    assert accuracy.value == pytest.approx((gained - lost) / 300)
    assert accuracy.p_value == stats.binomtest(gained, gained + lost).pvalue
    low, high = accuracy.interval
    assert low < accuracy.value < high < 0
    theirs = delong.compare(labels == 1, bad[:, 1] - bad[:, 0], good[:, 1] - good[:, 0])
    assert made['auroc'].p_value == pytest.approx(theirs.p_value, rel=1e-3)
    assert made['auroc'].test == "DeLong's test"
    assert made['f1'].test == 'paired permutation test' and made['f1'].p_value < 0.01
    text = paired.tell('bad', 'good', list(made.values()))
    assert text.startswith('bad compared with good: accuracy −')
    assert 'Chance alone is an unlikely explanation' in text
    same = paired.Resampled([runs[0], runs[0]]).compare(1, 0)
    assert [one.p_value for one in same] == [1, 1, 1]
    text = paired.tell('x', 'y', same)
    assert 'accuracy 0.0 points (p = 1.000' in text and 'could be chance' in text


def test_patients_are_drawn_whole(tmp_path):
    """What differs in one patient of many images says little."""
    rng = np.random.default_rng(2)
    labels, (good, _) = classes(rng, 200, (0.1, 3))
    groups = np.arange(200) // 20
    bad = good.copy()
    bad[:20] = rng.normal(size=(20, 3)) * 3
    p_values = {}
    for name, owners in (('images', None), ('patients', groups)):
        runs = [
            paired.load_scores(saved(tmp_path / name / str(n), logits, labels, owners))
            for n, logits in enumerate((good, bad))
        ]
        made = paired.Resampled(runs).compare(1, 0)
        p_values[name] = made[0].p_value
    assert 'groups' in made[0].test and 'groups' in made[1].test
    assert p_values['images'] < 0.01 and p_values['patients'] > 0.1


@pytest.mark.slow
@pytest.mark.parametrize('group_size', [1, 3])
def test_few_differences_are_no_proof(group_size):
    """Of equally good models that differ on few images, about 5% look different."""
    rng, count, found = np.random.default_rng(4), 60, []
    for number in range(200):
        labels = (rng.random((count, 2)) < 0.5).astype(float)
        right = rng.random((2, count, 2)) < 0.9
        groups = np.arange(count) // group_size
        same = rng.random(count // group_size) > 3 * group_size / count
        right[1, same[groups]] = right[0, same[groups]]
        runs = [
            paired.Scored(labels, rng.random((count, 2)), labels == one, groups)
            for one in right
        ]
        by_swaps = paired._swap(*runs)
        if number < 5:
            made = paired.Resampled(runs).compare(0, 1)[0]
            assert made.p_value == by_swaps['accuracy']
            if made.p_value >= 0.05 and made.interval:
                assert made.interval[0] <= 0 <= made.interval[1]
        found.append([by_swaps[name] < 0.05 for name in ('accuracy', 'f1')])
    assert (np.mean(found, 0) <= 0.05 + 4 * 0.05**0.5 / 200**0.5).all()


def test_permutations_agree_with_the_exact_test():
    """Of McNemar, where images have one class and no groups."""
    rng = np.random.default_rng(5)
    labels = rng.integers(3, size=200)
    runs = []
    for share in (0.85, 0.75):
        right = rng.random(200) < share
        predicted = np.where(right, labels, (labels + 1) % 3)
        runs.append(paired.Scored(labels, None, predicted, None))
    wanted = {one.metric: one for one in paired.Resampled(runs).compare(0, 1)}
    assert wanted['accuracy'].test == "McNemar's exact test"
    found = paired._swap(*runs)['accuracy']
    exact = wanted['accuracy'].p_value
    assert 0.001 < exact < 0.5
    assert found == pytest.approx(exact, abs=4 * (exact / 1000) ** 0.5 + 0.01)


def test_the_verdict_counts_the_comparisons():
    one = paired.Difference('accuracy', -0.02, (-0.04, -0.001), 0.03, 'a test')
    two = paired.Difference('f1', 0.001, (-0.04, 0.05), 0.8, 'a test')
    text = paired.tell('x', 'y', [one, two])
    assert text.endswith(
        'The difference in accuracy is unlikely to be chance; that in F1 could be.'
    )
    assert 'accuracy −2.0 points (95% interval −4.0 to −0.1, p = 0.030, a test)' in text
    text = paired.tell('x', 'y', [one, two], comparisons=2)
    assert text.endswith('Each of these differences could be chance.')


def test_page_says_whether_it_is_chance(tmp_path):
    rng = np.random.default_rng(3)
    labels, (good, same, bad) = classes(rng, 200, (0.1, 0.1, 4))
    runs = [
        saved(tmp_path / name, logits, labels)
        for name, logits in (('one', good), ('two', same), ('three', bad))
    ]
    for run, accuracy in zip(runs, (0.8, 0.79, 0.7), strict=True):
        path = f'{run}/metrics.jsonl'
        with open(path) as file:
            lines = [json.loads(line) for line in file.read().splitlines()[:2]]
        lines[1]['test_accuracy'] = accuracy
        with open(path, 'w') as file:
            file.writelines(json.dumps(line) + '\n' for line in lines)
    path = str(tmp_path / 'compare.html')
    compare.save(runs, path)
    with open(path) as file:
        text = ' '.join(file.read().split())
    assert 'Could the differences be chance?' in text
    two, three = (text.index(f'<p>“{name}” compared with') for name in ('two', 'three'))
    assert 'could be chance' in text[two:three]
    assert 'unlikely explanation' in text[three : three + 500]
    assert 'p = 0.05 / 2 (Bonferroni)' in text and 'not significant' in text
    # Labels that were corrected in between.
    saved(tmp_path / 'two', same, (labels + 1) % 3)
    compare.save(runs, path)
    with open(path) as file:
        assert 'The labels of some images changed' in file.read()

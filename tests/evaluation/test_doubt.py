"""What is measured of a model's doubt."""

import numpy as np
import pytest

from flax_densenet.evaluation import conformal, doubt
from flax_densenet.weights import decisions, unusual


@pytest.fixture(scope='module')
def data():
    random = np.random.default_rng(0)
    labels = random.integers(3, size=600)
    logits = random.normal(size=(600, 3)) + 2 * np.eye(3)[labels]
    e = np.exp(logits)
    return e / e.sum(-1, keepdims=True), labels


def decided(sets, score=None):
    return decisions.Decisions(1, '', 3, '', 'val', 300, unusual=score, sets=sets)


def test_of_other_images(data):
    probabilities, labels = (part[:300] for part in data)
    sets = conformal.fit(*(part[300:] for part in data))
    scores = np.linspace(-1, 1.5, 300)
    others = doubt.Others('cats', np.linspace(0.9, 4, 50))
    made = decided(sets, unusual.Unusual('energy', 0, 1, 0.95, 0, 300))
    found = doubt.measure(probabilities, labels, made, scores=scores, others=others)
    assert not found['sets_halved']
    row = next(row for row in found['sets'] if row['asked'] == 0.9)
    assert row == conformal.measure(sets, probabilities, labels, 0.9)
    right = probabilities.argmax(-1) == labels
    beyond = scores > 1
    assert found['unusual'] == {
        'share': 0.95,
        'flagged': pytest.approx(0.2, abs=0.01),
        'accuracy_usual': right[~beyond].mean(),
        'accuracy_unusual': right[beyond].mean(),
    }
    assert found['risk']['risk'][-1] == pytest.approx(1 - right.mean())
    assert len(found['risk']['share']) == 200
    lines = doubt.describe(found)
    assert len(lines) == 3
    assert lines[0].startswith(
        f'sets for a coverage of 90%: they contain {row["coverage"]:.1%} of'
    )
    assert 'halves' not in lines[0]
    assert lines[1].startswith('unusual: 20.0% of these images (5.0% of those that set')
    assert lines[2].startswith('50 images of cats: ') and 'AUROC 0.9' in lines[2]


def test_of_the_images_that_were_fitted(data):
    """Halves, which a model of two parts needs."""
    sets = conformal.fit(*data)
    found = doubt.measure(*data, decided(sets))
    assert found['sets_halved'] and 'unusual' not in found
    assert 'on random halves' in doubt.describe(found)[0]
    row = next(row for row in found['sets'] if row['asked'] == 0.9)
    assert row['coverage'] != conformal.measure(sets, *data, 0.9)['coverage']


def test_of_nothing(data):
    found = doubt.measure(*data)
    assert set(found) == {'risk'} and doubt.describe(found) == []
    several = np.eye(3)[data[1]]
    assert doubt.measure(data[0], several) == {}
    scores = np.zeros(600)
    assert doubt.measure(data[0], several, scores=scores)['unusual'] == {
        'share': None,
        'flagged': 0.0,
        'accuracy_usual': None,
        'accuracy_unusual': None,
    }

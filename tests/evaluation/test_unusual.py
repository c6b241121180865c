"""Scores of unusual images: against scikit-learn and scipy, their limit, their size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from flax_densenet.evaluation import unusual
from flax_densenet.weights import unusual as unusual_lib
from helpers import lazy

covariance = lazy.module('sklearn.covariance')
metrics = lazy.module('sklearn.metrics')
neighbors = lazy.module('sklearn.neighbors')


@pytest.fixture(scope='module')
def data():
    """Features around three class means, and logits; of three kinds of images."""
    random = np.random.default_rng(0)
    means = 3 * random.normal(size=(3, 20))
    mix = random.normal(size=(20, 20)) / 4

    def draw(count):
        labels = random.integers(3, size=count)
        features = means[labels] + random.normal(size=(count, 20)) @ mix
        logits = -((features[:, None] - means) ** 2).sum(-1) / 10
        return {'features': features + 5, 'logits': logits, 'labels': labels}

    far = 4 * random.normal(size=(200, 20)) + 5
    others = {'features': far, 'logits': random.normal(size=(200, 3)) - 9}
    return draw(400), draw(300), others


def fit(method, data, **options):
    train, val, _ = data
    return unusual.fit(
        method,
        features=train['features'],
        labels=train['labels'],
        val_features=val['features'],
        val_logits=val['logits'],
        **options,
    )


def plain(found, part):
    return unusual.compute(found.plain, part['features'], part['logits'])


def test_energy(data):
    """scipy's logsumexp; of several labels the sum of softplus."""
    logits = 50 * data[1]['logits']
    wanted = -special.logsumexp(logits, axis=-1)
    found = unusual_lib.energy(logits, several=False)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    wanted = special.log_expit(-logits).sum(-1)
    found = unusual_lib.energy(logits, several=True)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


@pytest.mark.parametrize('count', [400, 12])
def test_mahalanobis_equals_scikit_learn(count, data, monkeypatch):
    """The nearest class mean in the metric of the Ledoit-Wolf covariance.

    Also of fewer images than features.
    """
    train, val, others = data
    train = {name: part[:count] for name, part in train.items()}
    data = train, val, others
    monkeypatch.setattr(unusual, '_DIRECTIONS', 20)
    found = fit('mahalanobis', data)
    means = np.stack(
        [train['features'][train['labels'] == c].mean(0) for c in (0, 1, 2)]
    )
    peer = covariance.LedoitWolf(assume_centered=True)
    peer.fit(train['features'] - means[train['labels']])
    for part in (val, others):
        squares = np.stack([peer.mahalanobis(part['features'] - m) for m in means])
        np.testing.assert_allclose(plain(found, part), squares.min(0) ** 0.5, rtol=1e-4)


def test_both(data):
    """The sum of the two scores, up to the limit of the sum."""
    _, val, others = data
    found = fit('both', data)
    parts = [fit(method, data) for method in ('energy', 'mahalanobis')]
    for part in (val, others):
        scores = [
            unusual.compute(one.score, part['features'], part['logits'])
            for one in (*parts, found)
        ]
        total = scores[0] + scores[1]
        line = np.polynomial.Polynomial.fit(total, scores[2], 1)
        np.testing.assert_allclose(line(total), scores[2], atol=1e-3)
        assert np.std(scores[0]) > 0.1 < np.std(scores[1])


def test_neighbor_equals_scikit_learn(data):
    train, val, _ = data
    found = fit('neighbor', data)
    assert found.neighbor == unusual.NEIGHBOR
    scaled = [
        x / np.linalg.norm(x, axis=-1, keepdims=True)
        for x in (train['features'], val['features'])
    ]
    peer = neighbors.NearestNeighbors(n_neighbors=found.neighbor).fit(scaled[0])
    wanted = peer.kneighbors(scaled[1])[0][:, -1]
    np.testing.assert_allclose(plain(found, val), wanted, rtol=1e-3)


@pytest.mark.parametrize('method', unusual_lib.METHODS)
def test_jax_computes_the_same(method, data):
    _, val, _ = data
    found = fit(method, data)
    given = np.float32(val['features']), np.float32(val['logits'])
    wanted = found.score(*given)
    assert wanted.std() > 0.1

    @jax.jit
    def compute(arrays, *given):
        return found.with_arrays(arrays).score(*given, xp=jnp)

    scores = compute(found.arrays(), *given)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, wanted, atol=2e-4)


@pytest.mark.parametrize('method', unusual_lib.METHODS)
def test_limit(method, data):
    """0 in the middle, 95% below 1, and other images above."""
    _, val, others = data
    found = fit(method, data, share=0.95)
    found.check(3)
    scores = unusual.compute(found.score, val['features'], val['logits'])
    assert np.median(scores) == pytest.approx(0, abs=1e-3)
    assert (scores > 1 + 1e-4).sum() == 14  # 301 * 0.95 rounded up is 286
    far = unusual.compute(found.score, others['features'], others['logits'])
    measured = unusual.measure(scores, far)
    assert measured['auroc'] > 0.9
    assert measured['flagged_others'] == (far > 1).mean() > 0.6
    wanted = metrics.roc_auc_score(np.repeat([0, 1], [300, 200]), [*scores, *far])
    assert measured['auroc'] == pytest.approx(wanted)
    rates = metrics.roc_curve(np.repeat([1, 0], [300, 200]), [*-scores, *-far])
    first = np.argmax(rates[1] >= 0.95)
    assert measured['fpr95'] == pytest.approx(rates[0][first], abs=0.01)


def test_measures_by_hand():
    """95 of 100 known images lie at or below 94; three of the six others do, too."""
    found = unusual.measure(np.arange(100.0), np.array([-1, 50, 94, 94.5, 95, 200]))
    assert found['fpr95'] == 0.5
    assert found['flagged_known'] == 0.98 and found['flagged_others'] == 5 / 6
    assert (found['known'], found['others']) == (100, 6)


def test_limit_holds_for_new_images():
    """At most 1 - share of new images are beyond, over 1,000 draws of few images."""
    random, beyond = np.random.default_rng(1), []
    given = {'features': np.ones((2, 1)), 'labels': np.zeros(2, int)}
    for _ in range(1000):
        logits = random.normal(size=(60, 2))
        found = unusual.fit(
            'energy',
            val_features=np.ones((40, 1)),
            val_logits=logits[:40],
            share=0.9,
            **given,
        )
        beyond.append((found.score(None, logits[40:]) > 1).mean())
    error = 4 * np.std(beyond) / 1000**0.5
    assert 0.1 - 1 / 41 - error <= np.mean(beyond) <= 0.1 + error
    assert error < 0.011


def test_several_labels(data):
    """One class mean, since labels are no classes."""
    train, val, others = data
    labels = np.stack([train['labels'] == n for n in range(3)], -1).astype(float)
    changed = train | {'labels': labels}
    for method in unusual_lib.METHODS:
        found = fit(method, (changed, val, others))
        assert found.several
        found.check(3)
    found = fit('mahalanobis', (changed, val, others))
    assert len(found.references) == 1


@pytest.mark.slow
@pytest.mark.parametrize('method', ('both', 'neighbor'))
def test_size_of_many_classes(method):
    """Arrays come back the same, and 1,024 features would stay below 10 MB."""
    random = np.random.default_rng(2)
    labels = np.arange(1500) % 1000
    features = np.float32(random.normal(size=(1500, 256)))
    train = {'features': features, 'labels': labels}
    val = {'features': features[:40], 'logits': np.zeros((40, 1000))}
    found = fit(method, (train, val, None))
    header, arrays = found.to_files()
    assert 4 * sum(array.nbytes for array in arrays.values()) < 10e6
    again = unusual_lib.Unusual.from_files(header, arrays)
    again.check(1000)
    given = features[:9], np.zeros((9, 1000))
    scores = [one.score(*given) for one in (found, again)]
    assert (scores[0] == scores[1]).all()


def test_all_alike():
    """Validation images of one score leave a limit above it."""
    same = {'features': np.ones((5, 4)), 'labels': np.zeros(5, int)}
    val = {'features': np.ones((5, 4)), 'logits': np.zeros((5, 2))}
    for method in unusual_lib.METHODS:
        found = fit(method, (same, val, None))
        found.check(2)
        assert np.isfinite(found.score(np.ones((1, 4)), np.zeros((1, 2)))).all()


@pytest.mark.parametrize(
    'change, message',
    [
        ({'method': 'guess'}, 'method is'),
        ({'share': 1.0}, 'share'),
        ({'limit': -1e9}, 'below limit'),
        ({'neighbor': 0}, 'references'),
        ({'mean': np.zeros(3, np.float32)}, 'mean'),
        ({'gains': np.zeros(3, np.float32)}, 'directions'),
    ],
)
def test_damaged(change, message, data):
    header, arrays = fit('mahalanobis', data).to_files()
    header = header | {k: v for k, v in change.items() if k in header}
    arrays = arrays | {k: v for k, v in change.items() if k in arrays}
    with pytest.raises(ValueError, match=message):
        unusual_lib.Unusual.from_files(header, arrays).check(3)


def test_sample():
    """Rare classes are among the chosen; more are chosen if there are many classes."""
    labels = np.repeat([0, 1], [990, 10])
    chosen = unusual.sample(labels, 1000, 100)
    assert len(chosen) == 100 and (labels[chosen] == 1).sum() == 10
    assert (np.diff(chosen) > 0).all()
    assert len(unusual.sample(np.arange(3000) % 50, 3000, 100)) == 500
    assert len(unusual.sample(None, 1000, 100)) == 100
    assert len(unusual.sample(labels, 1000, 5000)) == 1000
    assert (unusual.sample(labels, 1000, 100) == chosen).all()

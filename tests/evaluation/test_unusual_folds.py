"""The score of unusual images of an ensemble: its guarantee, and the members' part."""

import types

import numpy as np
import pytest

from flax_densenet.evaluation import unusual, unusual_folds
from flax_densenet.weights import unusual as unusual_lib
from flax_densenet.weights import unusual_members

SHARE, FOLD = 0.9, 90  # images in a fold


def member_of(limits=(0.0, 1.0), method='energy'):
    score = unusual_lib.Unusual(method, *limits, 0.95, 0, 10)
    decisions = types.SimpleNamespace(unusual=score)
    return types.SimpleNamespace(decisions=decisions, calibration=None)


def fit(plain, share=SHARE):
    """The score of one member for each fold of plain scores.

    They are energies of one class; each member had other limits before.
    """
    before = [member_of((n, 3.0 + n)) for n in range(len(plain))]
    members = [(f'fold-{n}', one) for n, one in enumerate(before, start=1)]
    scores = [(np.float32(one) - n) / 3 for n, one in enumerate(plain)]
    return unusual_folds.fit(members, scores, share)


def score(fitted, plain):
    """Of images with plain scores `[N, M]`."""
    empty = np.zeros((len(plain), 0))
    return fitted.score(empty, -np.float32(plain)[..., None])


def alike(random, count, members):
    """All members say the same of an image."""
    return np.repeat(random.standard_cauchy((count, 1)), members, 1)


def noisy(random, count, members):
    """They agree roughly."""
    return random.normal(size=(count, 1)) + random.normal(size=(count, members)) / 2


def least_favorable(random, count, members):
    """Members exceed their limits in majorities that are as small as can be."""
    majority = members // 2 + 1
    high = random.random(count) < 0.8 * (1 - SHARE) * members / majority
    chosen = random.random((count, members)).argsort(1) < majority
    return random.random((count, members)) + 9 * (high[:, None] & chosen)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('draw', 'members', 'low', 'high'),
    [
        (alike, 5, 0.98, 1),
        (noisy, 5, 0.75, 0.85),
        (noisy, 2, 0.5, 0.6),
        (least_favorable, 3, 1.08, 3 / 2),
        (least_favorable, 4, 0.9, 4 / 3),
    ],
)
def test_guarantee(draw, members, low, high):
    """The share of new images above the limit, in units of 1 - share.

    Each fold has one honest score for each of its images, that of its own member.
    """
    random, hits = np.random.default_rng(0), []
    for _ in range(1000):
        folds = [draw(random, FOLD, members)[:, n] for n in range(members)]
        found = score(fit(folds), draw(random, 40, members)) > 1
        hits.append(found.mean())
    error = 4 * np.std(hits) / 1000**0.5
    wanted = np.array([low, high]) * (1 - SHARE)
    assert wanted[0] - error <= np.mean(hits) <= wanted[1] + error


def test_the_middle_member_decides():
    """In units of its own held-out images, with the statistics that it had."""
    random = np.random.default_rng(1)
    plain = [place + 2 * random.normal(size=40) for place in range(4)]
    fitted = fit(plain, 0.95)
    for place, one in enumerate(fitted.members):
        limits = unusual.bounds(plain[place], 0.95)
        np.testing.assert_allclose((one.middle, one.limit), limits, rtol=1e-3)
        assert one.limit > limits[1]
        assert (one.share, one.val_count) == (0.95, 40)
    new = random.normal(size=(50, 4)) * 6
    limits = np.array([(one.middle, one.limit) for one in fitted.members])
    each = (new - limits[:, 0]) / (limits[:, 1] - limits[:, 0])
    found = score(fitted, new)
    np.testing.assert_allclose(found, np.sort(each, 1)[:, 1], rtol=1e-4, atol=1e-5)
    assert ((found > 1) == ((each > 1).sum(1) >= 3)).all() and (found > 1).any()
    # Held-out images in these units: the chosen share is below 1.
    before = member_of((2, 5)).decisions.unusual
    own = unusual_folds.rescale((plain[2] - 2) / 3, before, fitted.members[2])
    assert (own > 1).sum() == 1 and np.median(own) == pytest.approx(0, abs=1e-5)


def test_members_without_a_score(caplog):
    caplog.set_level('INFO')
    good = 'fold-1', member_of()
    none = types.SimpleNamespace(decisions=None, calibration=None)
    scores = [np.linspace(0, 1, 30)] * 2
    assert unusual_folds.fit([good, ('fold-2', none)], scores, 0.9) is None
    assert 'fold-2 has none; run calibrate on it' in caplog.text
    other = member_of(method='neighbor')
    assert unusual_folds.fit([good, ('fold-2', other)], scores, 0.9) is None
    assert 'different methods (energy, neighbor)' in caplog.text
    assert unusual_folds.fit([good, good], scores, 0.9) is not None
    assert 'median of 2 models; 90% of the 60 out-of-fold images' in caplog.text
    assert 'reliable' not in caplog.text
    unusual_folds.fit([good, good], scores, 0.99)
    assert '(reliable limits need at least 99 images in each fold)' in caplog.text


def test_files():
    """All members come back, and what is not a score is refused."""
    fitted = fit([np.linspace(0, 2, 30), np.linspace(1, 4, 30)])
    plain, arrays = fitted.to_files()
    again = unusual_members.from_files(plain, arrays)
    again.check(1)
    assert [one.limit for one in again.members] == [one.limit for one in fitted.members]
    with pytest.raises(ValueError, match='must be lists'):
        unusual_members.from_files({'members': 3}, {})
    with pytest.raises(ValueError, match='two or more members'):
        cut = {name: values[:1] for name, values in plain.items()}
        unusual_members.from_files(cut, arrays).check(1)
    plain['members'][0]['method'] = 'neighbor'
    arrays |= {'1.references': np.zeros((3, 2), np.float32)}
    with pytest.raises(ValueError, match='members differ in method'):
        unusual_members.from_files(plain, arrays).check(1)

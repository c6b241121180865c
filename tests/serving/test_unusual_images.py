"""A served model that scores unusual images and has sets of classes."""

import dataclasses

import numpy as np
import pytest

from flax_densenet.inference import predictor as predictor_lib
from flax_densenet.weights import conformal
from helpers import described
from helpers.decided import decide
from helpers.servers import NAMES, ask, running

pytest.importorskip('starlette')
pytest.importorskip('hypercorn')
pytest.importorskip('prometheus_client')
pytest.importorskip('python_multipart')


@pytest.fixture(scope='module')
def decided(trained, expected):
    _, pixels, probabilities, _ = expected
    features = predictor_lib.Predictor(trained, 4).compute(pixels)[1]
    made = decide(features, np.log(probabilities), 'mahalanobis', classes=len(NAMES))
    # Two of the four pictures are beyond the limit.
    scores = made.unusual.plain(features, None)
    low, high = np.sort(scores)[1:3]
    score = dataclasses.replace(
        made.unusual, middle=float(scores.min()) - 1, limit=float(low + high) / 2
    )
    sets = conformal.ConformalSets((4,), np.full(4, np.median(probabilities), 'f4'))
    made = dataclasses.replace(made, unusual=score, sets=sets)
    return dataclasses.replace(trained, decisions=made), score.score(features, None)


@pytest.mark.slow
def test_answers(decided, expected):
    trained, scores = decided
    files, _, probabilities, _ = expected
    sets = trained.decisions.sets.contains(probabilities, 0.8)
    assert sets.sum(-1).max() > 1 and sets.sum(-1).min() < len(NAMES)
    with running(trained) as port:
        for place, file in enumerate(files):
            answer = ask(port, '/predict?coverage=0.8', file)
            described.check(port, '/predict', answer)
            told = answer.json
            assert told['unusual'] == pytest.approx(scores[place], rel=1e-3, abs=1e-3)
            assert told['is_unusual'] == (scores[place] > 1)
            assert set(told['set']) == {
                name for name, is_in in zip(NAMES, sets[place], strict=True) if is_in
            }
            explained = ask(port, '/predict?explain=map', file).json
            assert explained['unusual'] == pytest.approx(told['unusual'], rel=1e-3)
            assert 'set' not in explained
        described.check(port, '/model', ask(port, '/model'))
        model = ask(port, '/model').json
        assert model['unusual']['method'] == 'mahalanobis'
        assert model['unusual']['usual_share'] == 0.95
        text = ask(port, '/').body.decode()
        assert 'do not look like its training images are marked' in text
        for given in ('2', '0', 'a', '0.0', '1e-1', '-0.5'):
            answer = ask(port, f'/predict?coverage={given}', files[0])
            assert answer.status == 400 and 'between 0 and 1' in answer.json['error']


def test_without_sets(port, expected):
    answer = ask(port, '/predict?coverage=0.9', expected[0][0])
    assert answer.status == 400 and 'has no sets of classes' in answer.json['error']
    assert ask(port, '/model').json['unusual'] is None

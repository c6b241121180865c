"""Operating points: the same scores in Python, evaluation and exported files."""

import jax
import numpy as np
import pytest

from flax_densenet.errors import UserError
from flax_densenet.evaluation import metrics
from flax_densenet.export import formats, stablehlo
from flax_densenet.inference import predictor
from flax_densenet.weights import metadata as metadata_lib
from flax_densenet.weights import operating_points, weight_file
from flax_densenet.weights import trained as trained_lib
from helpers.weight_files import state_dict, write_safetensors

POINTS = np.linspace(0.05, 0.9, 18).astype(np.float32)
POINTS[4] = np.nan


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    arrays = state_dict(num_classes=18, channels=1) | {'op_threshs': POINTS}
    return write_safetensors(tmp_path_factory.mktemp('points') / 'x', arrays)


@pytest.fixture(scope='module')
def pixels():
    return np.random.default_rng(0).integers(0, 256, (2, 224, 224, 1), np.uint8)


@pytest.fixture(scope='module')
def sigmoids(path, pixels):
    weights = weight_file.load(path)
    images = trained_lib.normalize(pixels, mean=(0.5,), std=(1 / 2048,))
    return jax.nn.sigmoid(jax.jit(weights.module.apply)(weights.variables, images))


def by_hand(sigmoids):
    scores = np.array(sigmoids)
    for place in np.ndindex(scores.shape):
        s, p = scores[place], POINTS[place[-1]]
        scores[place] = s / (2 * p) if s < p else 1 - (1 - s) / (2 * (1 - p))
        if np.isnan(p):
            scores[place] = 0.5
    return scores


@pytest.mark.slow
def test_scores_and_raw_sigmoids(path, pixels, sigmoids, caplog):
    model = predictor.load_trained(path)
    line = next(text for text in caplog.messages if 'operating points' in text)
    assert '--outputs=sigmoid' in line and 'always 0.5: 4' in line
    scores, expected = model.compute(pixels)[0], by_hand(sigmoids)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert np.abs(expected - sigmoids).max() > 0.2
    # Positive is what lies above its point; without a point nothing is.
    above = np.asarray(sigmoids) > np.where(np.isnan(POINTS), 2, POINTS)
    for row, there in zip(scores, above, strict=True):
        places = np.flatnonzero(there)
        assert model.positive_of(row) == tuple(model.class_names[n] for n in places)
    assert 0 < above.sum() < above.size
    caplog.clear()
    raw = predictor.load_trained(path, outputs='sigmoid')
    assert 'operating points' not in caplog.text
    np.testing.assert_allclose(raw.compute(pixels)[0], sigmoids, atol=1e-5)
    logits = predictor.load_trained(path, outputs='none').compute(pixels)[0]
    np.testing.assert_allclose(jax.nn.sigmoid(logits), sigmoids, atol=1e-5)


@pytest.mark.slow
def test_exported_files(path, pixels, sigmoids, tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    trained, expected = trained_lib.load_trained(path), by_hand(sigmoids)
    onnx = str(tmp_path / 'x.onnx')
    formats.save(onnx, trained, 'onnx')
    session = onnxruntime.InferenceSession(onnx, providers=['CPUExecutionProvider'])
    made = session.run(None, {'image': pixels})[0]
    np.testing.assert_allclose(made, expected, atol=2e-5)
    assert 'operating_points' in session.get_modelmeta().custom_metadata_map
    # Our own file keeps the points, and the choice of raw sigmoids.
    own = str(tmp_path / 'x.safetensors')
    formats.save(own, trained, 'safetensors')
    for outputs, wanted in ((None, expected), ('sigmoid', sigmoids)):
        model = predictor.load_trained(own, outputs=outputs)
        np.testing.assert_allclose(model.compute(pixels)[0], wanted, atol=1e-5)


@pytest.mark.slow
def test_stablehlo(path, pixels, sigmoids, tmp_path):
    pytest.importorskip('flatbuffers')
    made = str(tmp_path / 'x.stablehlo')
    stablehlo.save(made, trained_lib.load_trained(path))
    function, metadata = stablehlo.load(made)
    np.testing.assert_allclose(function(pixels), by_hand(sigmoids), atol=1e-5)
    assert len(metadata['operating_points']) == 18


def test_logits_of_scores():
    """Evaluation has logits, whose sigmoids are the scores; at the ends, too."""
    points = [None if np.isnan(p) else float(p) for p in POINTS]
    logits = np.random.default_rng(0).normal(0, 4, (200, 18))
    made = operating_points.scale_logits(logits, points)
    expected = operating_points.scale(metrics.sigmoid(logits), points)
    np.testing.assert_allclose(metrics.sigmoid(made), expected, atol=1e-12)
    ends = operating_points.scale_logits(np.array([[-800.0], [800.0]]), [0.2])
    np.testing.assert_allclose(ends, [[-800 - np.log(0.4)], [800 + np.log(1.6)]])


def test_points_that_do_not_fit(tmp_path, caplog):
    for points, line in (
        (np.float32([0.5, 0.5]), 'has 2 operating points for 18 outputs: they are not'),
        (np.full(18, 1.5, np.float32), 'operating points are not between 0 and 1'),
    ):
        arrays = state_dict(num_classes=18, channels=1) | {'op_threshs': points}
        trained = trained_lib.load_trained(write_safetensors(tmp_path / 'x', arrays))
        assert line in trained.notes['points']
        assert trained_lib.points_of(trained.metadata) is None
    metadata = {'operating_points': [0.5, 2.0]}
    with pytest.raises(UserError, match='operating_points is'):
        metadata_lib.check('x', _complete(tmp_path) | metadata)


def _complete(tmp_path):
    own = str(tmp_path / 'own.safetensors')
    trained = trained_lib.load_trained(
        write_safetensors(tmp_path / 'plain', state_dict()), choices=_names()
    )
    formats.save(own, trained, 'safetensors')
    return weight_file.load(own).metadata


def _names():
    from flax_densenet.weights import choices

    return choices.make('a,b,c,d,e')


def test_a_published_file_is_known_by_its_name(tmp_path):
    name = 'kaggle-densenet121-d121-tw-lr001-rot45-tr15-sc15-seed0-best.pt'
    arrays = state_dict(num_classes=18, channels=1)
    found = weight_file.load(write_safetensors(tmp_path / name, arrays))
    points = found.metadata['operating_points']
    assert [n for n, point in enumerate(points) if point] == [8, 16]
    found = weight_file.load(write_safetensors(tmp_path / 'other.pt', arrays))
    assert 'operating_points' not in found.metadata

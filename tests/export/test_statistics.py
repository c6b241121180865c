"""Scores of unusual images and sets of classes in files of calibrated models."""

import dataclasses

import jax
import numpy as np
import pytest

from flax_densenet.data import dataset
from flax_densenet.errors import UserError
from flax_densenet.export import formats, push, stablehlo
from flax_densenet.inference import predictor
from flax_densenet.weights import calibration, decisions
from flax_densenet.weights import trained as trained_lib
from helpers import runs
from helpers.decided import decide

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')


@pytest.fixture(scope='module')
def source():
    return dataset.load_source('digits', image_size=8)


@pytest.fixture(scope='module')
def images(source):
    return np.stack([source.test[n]['image'] for n in range(8)])


@pytest.fixture(scope='module')
def trained(source, images):
    """A model with a calibration, which changes logits much, a score and sets."""
    made = runs.tiny_trained(source)
    plain = predictor.Predictor(made, 8).programs(images)
    module, variables = made.module, jax.device_get(made.variables)
    logits = module.apply(variables, plain.features, method='classify')
    found = decide(plain.features, np.asarray(logits), 'both', classes=10)
    found = dataclasses.replace(
        found,
        model=decisions.fingerprint(made.variables),
        calibration=calibration.Calibration(('temperature',), (0.25,), (0.0,)),
    )
    return dataclasses.replace(made, decisions=found)


@pytest.fixture(scope='module')
def scores(trained, images):
    """Of the plain model; a calibrated one has the same."""
    found = dataclasses.replace(trained.decisions, calibration=None)
    plain = predictor.Predictor(dataclasses.replace(trained, decisions=found), 8)
    wanted = plain.programs(images).unusual
    assert np.ptp(wanted) > 0.1
    return wanted


@pytest.mark.slow
def test_calibration_does_not_change_scores(trained, images, scores):
    found = predictor.Predictor(trained, 8).programs(images)
    np.testing.assert_allclose(found.unusual, scores, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_onnx(trained, images, scores, tmp_path):
    path = str(tmp_path / 'x.onnx')
    formats.save(path, trained, 'onnx')
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    (found,) = session.run(['unusual'], {'image': images})
    np.testing.assert_allclose(found, scores, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_stablehlo(trained, images, scores, tmp_path):
    pytest.importorskip('flatbuffers')
    path = str(tmp_path / 'x.stablehlo')
    formats.save(path, trained, 'stablehlo')
    function, metadata = stablehlo.load(path)
    assert metadata['results'] == ['probabilities', 'unusual']
    np.testing.assert_allclose(function(images)[1], scores, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
def test_folder_of_the_hub(trained, images, scores, tmp_path):
    """All of it comes back, and push sends it."""
    folder = str(tmp_path / 'hub')
    formats.save(folder, trained, 'huggingface')
    assert decisions.STATISTICS_FILE in push.list_files(folder)
    again = trained_lib.load_trained(folder)
    wanted, found = trained.decisions, again.decisions
    for name in ('references', 'mean', 'directions', 'gains'):
        kept = getattr(found.unusual, name)
        assert kept.dtype == getattr(wanted.unusual, name).dtype
        assert (kept == getattr(wanted.unusual, name)).all()
    assert found.sets.counts == wanted.sets.counts
    assert (found.sets.thresholds(0.8) == wanted.sets.thresholds(0.8)).all()
    assert found.calibration.scale == (0.25,)
    results = predictor.Predictor(again, 8).programs(images)
    np.testing.assert_allclose(results.unusual, scores, rtol=1e-2, atol=1e-2)
    (tmp_path / 'hub' / decisions.STATISTICS_FILE).write_bytes(b'{}')
    with pytest.raises(UserError, match='statistics.safetensors'):
        trained_lib.load_trained(folder)
    formats.save(folder, trained.without_decisions(), 'huggingface')
    assert decisions.STATISTICS_FILE not in push.list_files(folder)


def test_files_of_weights_alone(trained, tmp_path):
    """They keep what has no arrays."""
    path = str(tmp_path / 'x.safetensors')
    formats.save(path, trained, 'safetensors')
    again = trained_lib.load_trained(path)
    assert again.decisions.unusual is None and again.decisions.sets is None
    assert again.decisions.calibration.scale == (0.25,)

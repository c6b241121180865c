"""Exported files compute calibrated outputs, in every format and from every side."""

import dataclasses
import json

import numpy as np
import pytest

from flax_densenet.data import dataset, labeled_images
from flax_densenet.evaluation import evaluate, metrics
from flax_densenet.export import formats, verify
from flax_densenet.inference import predictor
from flax_densenet.weights import calibration, decisions, thresholds
from flax_densenet.weights import trained as trained_lib
from helpers import runs
from helpers.marks import slow_after

pytest.importorskip('onnx')


@pytest.fixture(scope='module')
def source():
    return dataset.load_source('digits', image_size=8)


@pytest.fixture(scope='module')
def trained(source):
    """A calibrated model with a threshold, whose data lies in a private folder."""
    made = runs.tiny_trained(source)
    shares = metrics.softmax(logits_of(made, source) / 4)[:, 3]
    between = np.sort(shares)[3:5].mean()  # above it are half of the images
    found = decisions.Decisions(
        step=None,
        model=decisions.fingerprint(made.variables),
        classes=10,
        data='folder:/home/somebody/photos',
        part='val',
        count=50,
        calibration=calibration.Calibration(('temperature',), (0.25,), (0.0,)),
        thresholds=thresholds.Thresholds(
            'youden', (None,) * 3 + (between,) + (None,) * 6
        ),
    )
    return dataclasses.replace(made, decisions=found)


@pytest.fixture(scope='module')
def images(source):
    return np.stack([source.test[n]['image'] for n in range(8)])


def logits_of(trained, source):
    examples = labeled_images.Examples(
        source.test.reader, source.test.indices[:8], source.test.preparation
    )
    return evaluate.compute_outputs(trained, examples, batch_size=8).logits


@pytest.mark.slow
def test_predictions_are_calibrated(trained, images, source):
    raw = logits_of(trained, source)
    expected = metrics.softmax(raw / 4)
    assert np.abs(expected - metrics.softmax(raw)).max() > 0.05
    made = predictor.Predictor(trained, 8)
    np.testing.assert_allclose(made.compute(images)[0], expected, atol=1e-5)
    predictions, limit = made.predict(list(images)), made.thresholds[3]
    for row, one in zip(expected, predictions, strict=True):
        assert one.positive == (('3',) if row[3] > limit else ())
    assert len({one.positive for one in predictions}) == 2
    plain = predictor.Predictor(trained.without_decisions(), 8)
    assert plain.predict(images[0])[0].positive is None
    for inputs, wanted in (('images', expected), ('normalized', raw / 4)):
        found = verify.compute(trained, images, inputs)
        np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize('inputs', slow_after(1, ['images', 'normalized']))
def test_onnx(trained, images, source, tmp_path, inputs):
    onnxruntime = pytest.importorskip('onnxruntime')
    path = str(tmp_path / 'x.onnx')
    formats.save(path, trained, 'onnx', formats.Options(inputs))
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    nchw = inputs == 'normalized'
    given = verify.as_inputs(images, trained, inputs, nchw=nchw)
    found = session.run(None, {session.get_inputs()[0].name: given})[0]
    expected = verify.compute(trained, images, inputs)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about['thresholds']) == {'3': trained.thresholds[3]}
    assert json.loads(about['calibration'])['scale'] == [0.25]
    assert 'somebody' not in json.dumps(about)


@pytest.mark.slow
def test_safetensors_come_back_and_raw(trained, images, source, tmp_path):
    from safetensors import numpy as safetensors

    path = str(tmp_path / 'x.safetensors')
    formats.save(path, trained, 'safetensors')
    kernel = safetensors.load_file(path)['classifier.weight']
    own = np.asarray(trained.variables['params']['classifier']['kernel'])
    np.testing.assert_allclose(kernel.T, own / 4, rtol=1e-6)
    again = trained_lib.load_trained(path)
    assert again.decisions.where == '50 validation images of folder:photos'
    assert again.calibration.temperature == 4
    raw = logits_of(trained, source)
    for options, factor in (({}, 4), ({'raw': True}, 1)):
        model = predictor.load_trained(path, **options)
        expected = metrics.softmax(raw / factor)
        np.testing.assert_allclose(model.compute(images)[0], expected, atol=1e-5)
        assert (model.thresholds is None) == bool(options)
    # A second export is that of the first.
    twice = str(tmp_path / 'y.safetensors')
    formats.save(twice, again, 'safetensors')
    np.testing.assert_allclose(
        safetensors.load_file(twice)['classifier.weight'], kernel, rtol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize('inputs', ['images', 'normalized'])
def test_stablehlo(trained, images, tmp_path, inputs):
    pytest.importorskip('flatbuffers')
    from flax_densenet.export import stablehlo

    path = str(tmp_path / 'x.stablehlo')
    formats.save(path, trained, 'stablehlo', formats.Options(inputs))
    function, metadata = stablehlo.load(path)
    given = verify.as_inputs(images, trained, inputs, nchw=False)
    expected = verify.compute(trained, images, inputs)
    np.testing.assert_allclose(function(given), expected, atol=1e-4)
    assert metadata['decisions']['thresholds']['values'][3] == trained.thresholds[3]
    assert 'somebody' not in json.dumps(metadata)

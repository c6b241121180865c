"""16-bit images and DICOM files as uploads: answered as predict does."""

import dataclasses

import numpy as np
import pytest

from flax_densenet.inference import predictor as predictor_lib
from flax_densenet.serving import batcher as batcher_lib
from helpers import deep_images, dicoms
from helpers.servers import ask, from_data_url, make_trained, running


@pytest.fixture(scope='module')
def deep():
    trained = make_trained()
    data = {'window': [0, 4095], 'bit_depth': 12}
    metadata = trained.metadata | {'data': data}
    trained = dataclasses.replace(trained, metadata=metadata)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batcher_lib, 'BATCH_SIZE', 1)
        with running(trained) as port:
            yield trained, port


@pytest.mark.slow
def test_uploads(deep):
    trained, port = deep
    values = np.random.default_rng(0).integers(0, 4096, (24, 20)).astype(np.uint16)
    files = [deep_images.png(values[..., None]), dicoms.make(values)]
    files.append(dicoms.make(values, PhotometricInterpretation='MONOCHROME1'))
    expected = predictor_lib.Predictor(trained, 1).predict(files)
    np.testing.assert_allclose(
        expected[0].probabilities, expected[1].probabilities, atol=1e-6
    )
    assert np.abs(expected[2].probabilities - expected[0].probabilities).max() > 0.001
    for file, wanted in zip(files, expected, strict=True):
        answer = ask(port, '/predict?explain=1', file)
        assert answer.status == 200 and dicoms.PATIENT not in answer.body.decode()
        best = answer.json['predictions'][0]
        assert best['class'] == wanted.label
        assert best['probability'] == pytest.approx(wanted.probability, abs=1e-5)
        assert from_data_url(answer.json['overlay']).shape == (16, 16, 3)
    frames = dicoms.make(values, NumberOfFrames=4)
    answer = ask(port, '/predict', frames)
    assert answer.status == 415 and '4 frames (NumberOfFrames)' in answer.json['error']
    page = ask(port, '/').body.decode()
    assert '.dcm' in page and 'DICOM' in page
    assert '"bit_depth": 12' in page

"""Servers that tests of one process share."""

import numpy as np
import pytest

from flax_densenet.inference import predictor as predictor_lib
from flax_densenet.serving import batcher as batcher_lib
from helpers.servers import TOKEN, make_trained, picture, running


@pytest.fixture(scope='session')
def trained():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batcher_lib, 'BATCH_SIZE', 4)  # less to compile
        yield make_trained()


@pytest.fixture(scope='session')
def port(trained):
    with running(trained, methods=['gradcam,layercam', 'occlusion']) as port:
        yield port


@pytest.fixture(scope='session')
def expected(trained):
    """Of four pictures: their files, pixels, probabilities and map of a class."""
    predictor = predictor_lib.Predictor(trained, 4)
    files = [picture(seed) for seed in range(4)]
    pixels = np.stack([predictor.load(file) for file in files])
    probabilities, _ = predictor.compute(pixels)
    # Otherwise mixed-up answers would pass.
    assert np.ptp(probabilities, 0).max() > 0.02
    return files, pixels, probabilities, predictor.cams(pixels, [1] * 4)


@pytest.fixture(scope='session')
def strict_port(trained):
    limits = {'max_megabytes': 0.1, 'max_megapixels': 0.05, 'max_requests': 2}
    with running(trained, **limits, request_timeout_s=0.8) as port:
        yield port


@pytest.fixture(scope='session')
def proxied_port(trained):
    hosts = ('Hub.Example.org, *.lab.example', 'other.example:8443')
    with running(trained, hosts=hosts, root_path='user/one/') as port:
        yield port


@pytest.fixture(scope='session')
def guarded_port(trained):
    origins = ('https://app.example, HTTPS://*.Lab.example:443/',)
    with running(trained, origins=origins, token=TOKEN, log_requests=True) as port:
        yield port

"""The mean of probabilities in ONNX, against the same in JAX."""

import numpy as np
import pytest

from flax_densenet.export import onnx_graph, onnx_mean
from flax_densenet.models import ensemble

pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')


@pytest.mark.slow
@pytest.mark.parametrize('outputs', ['softmax', 'sigmoid', 'none'])
def test_logits_of_the_mean(outputs):
    """Also where the members are sure, and disagree."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 5, (3, 40, 4)).astype(np.float32)
    logits[:, 0] = [[30, 0, 0, -30], [-30, 0, 0, 30], [0, 30, 0, 0]]
    graph = onnx_graph.Graph()
    names = [f'x{n}' for n in range(3)]
    made = onnx_mean.mean_logits(graph, names, outputs)
    shape = np.float32, ('batch', 4)
    model = graph.model(dict.fromkeys(names, shape), {made: shape}, {})
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=['CPUExecutionProvider']
    )
    found = session.run(None, dict(zip(names, logits, strict=True)))[0]
    expected = np.asarray(ensemble.mean_logits(logits, outputs))
    assert np.abs(expected - logits.mean(0)).max() > 1 or outputs == 'none'
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

"""The score of unusual images in ONNX files, as the package computes it."""

import functools
import json

import jax
import numpy as np
import pytest

from flax_densenet import create_model, init_variables
from flax_densenet.export import onnx_int8, onnx_network
from flax_densenet.weights import trained as trained_lib
from flax_densenet.weights import unusual
from helpers.decided import decide

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')

NETWORKS = {
    'densenet': ('densenet121', dict(block_sizes=(1, 2), growth_rate=8)),
    'rdnet': (
        'rdnet_tiny',
        dict(
            block_sizes=(1, 1),
            growth_rates=(8, 8),
            halvings=(),
            squeeze_blocks=(1,),
            layer_scale=0,
        ),
    ),
}
WAYS = {'mean': [0.485, 0.456, 0.406], 'std': [0.229, 0.224, 0.225]}


def metadata_of(kind):
    names = {'class_names': list('abcde'), 'image_size': 32, 'data': {}}
    return {'model': {'variant': NETWORKS[kind][0]}, **names, **WAYS}


@functools.cache
def computed(kind, *, falling=False):
    """A network, images, and its features and logits of them."""
    variant, fields = NETWORKS[kind]
    module = create_model(variant, num_classes=5, **fields)
    variables = init_variables(module, 0)
    if falling:
        norm = variables['params']['norm5']
        norm['scale'] = norm['scale'] * np.resize([1, -1, 0, 1], norm['scale'].shape)
        norm['bias'] = norm['bias'] + np.resize([0, 0.3, 0.2], norm['bias'].shape)
    images = np.random.default_rng(3).integers(0, 256, (6, 5, 5, 3), np.uint8)
    images = images.repeat(7, 1).repeat(7, 2)[:, :32, :32]
    images[3:] //= 4

    @jax.jit
    def compute(variables, images):
        pixels = trained_lib.normalize(images, **WAYS)
        maps = module.apply(variables, pixels, method='features')
        return (
            module.apply(variables, maps, method='pool'),
            module.apply(variables, maps, method='head'),
        )

    return module, variables, images, *map(np.asarray, compute(variables, images))


def run(made, images):
    onnx.checker.check_model(made, full_check=True)
    options = {'providers': ['CPUExecutionProvider']}
    session = onnxruntime.InferenceSession(made.SerializeToString(), **options)
    names = [one.name for one in session.get_outputs()]
    assert names[1:] == ['unusual']
    found = session.run(None, {session.get_inputs()[0].name: images})
    return found[1], session.get_modelmeta().custom_metadata_map


@pytest.mark.slow
@pytest.mark.parametrize(
    'kind, method, several',
    [
        *(('densenet', method, False) for method in unusual.METHODS),
        ('densenet', 'energy', True),
        ('rdnet', 'mahalanobis', False),
    ],
)
def test_score(kind, method, several):
    module, variables, images, features, logits = computed(kind)
    made = decide(features, logits, method, several=several)
    wanted = made.unusual.score(features, logits)
    assert np.ptp(wanted) > 0.1
    for inputs, given in (
        ('images', images),
        ('normalized', np.asarray(trained_lib.normalize(images, **WAYS))),
    ):
        if inputs == 'normalized':
            given = given.transpose(0, 3, 1, 2)
        file = onnx_network.make(
            module, variables, metadata_of(kind), inputs=inputs, decisions=made
        )
        found, properties = run(file, given)
        np.testing.assert_allclose(found, wanted, atol=2e-3 * np.ptp(wanted) + 1e-3)
        table = json.loads(properties['set_thresholds'])
        assert np.allclose(table['0.8'], made.sets.thresholds(0.8), rtol=1e-5)
        assert len(table['0.8']) == (5 if several else 1)


@pytest.mark.slow
def test_neighbors_further_away():
    """The k-th nearest, not the nearest."""
    _, _, _, features, logits = computed('densenet')
    assert decide(features, logits, 'neighbor').unusual.neighbor > 1


@pytest.mark.parametrize(
    'precision, falling', [('float16', False), ('int8', False), ('int8', True)]
)
def test_smaller_files(precision, falling):
    """Close to the score; integers move it more.

    Falling ones are batch norms with negative factors, whose maps int8 has twice.
    """
    module, variables, images, features, logits = computed('densenet', falling=falling)
    made, metadata = decide(features, logits), metadata_of('densenet')
    wanted = made.unusual.score(features, logits)
    if precision == 'int8':
        file = onnx_int8.make(module, variables, metadata, [images], decisions=made)
    else:
        file = onnx_network.make(
            module, variables, metadata, precision=precision, decisions=made
        )
    found, _ = run(file, images)
    bound = 0.4 if precision == 'int8' else 0.02
    np.testing.assert_allclose(found, wanted, atol=bound * np.ptp(wanted))
    assert np.corrcoef(found, wanted)[0, 1] > 0.85
    assert np.abs(found - wanted).max() > 0


def test_files_without_a_score():
    """They have one output, as before."""
    module, variables, *_ = computed('densenet')
    made = onnx_network.make(module, variables, metadata_of('densenet'))
    assert [one.name for one in made.graph.output] == ['probabilities']
    assert 'set_thresholds' not in {one.key for one in made.metadata_props}

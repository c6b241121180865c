"""Ensembles: the mean of the members' probabilities, whichever way it is computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from flax_densenet import create_model, init_variables
from flax_densenet.inference import grad_cam
from flax_densenet.models import ensemble, folded, naming
from helpers import rdnets
from helpers.marks import exhaustive_after

ACTIVATIONS = {
    'softmax': functools.partial(special.softmax, axis=-1),
    'sigmoid': special.expit,
    'none': lambda x: x,
}
COUNT = 3


@functools.cache
def members(kind):
    """A small network, and variables of each member with outputs that differ."""
    module = rdnets.tiny(num_classes=3)
    if kind != 'rdnet':
        module = create_model('BC-L10k4', num_classes=3, block_sizes=(1, 1))
    made = []
    for seed in range(COUNT):
        variables = init_variables(module, seed)
        rng = np.random.default_rng(seed)
        classifier = variables['params']['classifier']
        classifier['kernel'] = rng.normal(0, 2, classifier['kernel'].shape).astype('f4')
        made.append(variables)
    return module, made


@functools.cache
def images(size=16):
    shape = 2, size, size, 3
    return np.random.default_rng(9).standard_normal(shape).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('kind', 'outputs'),
    [
        *exhaustive_after(1, [('densenet', outputs) for outputs in ACTIVATIONS]),
        # How outputs are averaged is not the networks' matter.
        pytest.param('rdnet', 'softmax', marks=pytest.mark.exhaustive),
    ],
)
def test_probabilities_are_averaged(kind, outputs):
    module, variables = members(kind)
    x = images(32 if kind == 'rdnet' else 16)
    made, stacked = (
        ensemble.Ensemble(module, COUNT, outputs),
        ensemble.stack(variables),
    )
    activate = ACTIVATIONS[outputs]
    single = [np.asarray(jax.jit(module.apply)(one, x)) for one in variables]
    expected = np.mean([activate(np.float64(one)) for one in single], 0)
    assert np.abs(activate(single[0]) - expected).max() > 0.05
    apply = jax.jit(functools.partial(made.apply, stacked))
    np.testing.assert_allclose(activate(apply(x)), expected, rtol=1e-4, atol=1e-6)
    arrays = folded.fold(made, stacked)
    found = jax.jit(functools.partial(folded.logits, made))(arrays, x)
    np.testing.assert_allclose(activate(found), expected, rtol=1e-4, atol=1e-6)
    if outputs != 'softmax':
        return
    # Features come before the outputs: side by side, as each member has them.
    maps = jax.jit(functools.partial(folded.features, made))(arrays, x)
    pooled = np.asarray(made.apply(arrays['head'], maps, method='pool'))
    one = jax.jit(functools.partial(module.apply, method='features'))(variables[1], x)
    one = np.asarray(module.apply(variables[1], one, method='pool'))
    width = one.shape[1]
    assert pooled.shape == (2, COUNT * width)
    np.testing.assert_allclose(pooled[:, width : 2 * width], one, rtol=1e-4, atol=1e-5)
    again = np.asarray(made.apply(stacked, pooled, method='classify'))
    np.testing.assert_allclose(activate(again), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_one_member_is_the_network():
    """Its logits too, so that maps of evidence are those of the network."""
    logits = jnp.array([[[3.0, -1.0, 0.5], [80.0, 0.0, -80.0]]])
    for outputs in ACTIVATIONS:
        found = ensemble.mean_logits(logits, outputs)
        np.testing.assert_allclose(found, logits[0], rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('outputs', exhaustive_after(1, ['softmax', 'sigmoid']))
def test_maps_are_the_mean_of_the_members(outputs):
    """Where all are sure: a softmax there has no gradient."""
    module, variables = members('densenet')
    variables = [variables[0]] * 2
    made = ensemble.Ensemble(module, 2, outputs)
    classes = np.array([0, 2], np.int32)
    _, maps = grad_cam.grad_cam(
        ensemble.stack(variables), images(), classes, module=made
    )
    _, expected = grad_cam.grad_cam(variables[0], images(), classes, module=module)
    assert expected.max() > 0.01
    np.testing.assert_allclose(maps, expected, rtol=1e-3, atol=1e-5)


def test_what_an_ensemble_is_called():
    module, _ = members('densenet')
    made = ensemble.Ensemble(module, 5, 'softmax')
    assert naming.describe(made, None).startswith('5 × DenseNet-BC (1, 1)')
    assert made.count_parameters() == 5 * module.count_parameters()
    assert made.clone(dtype='bfloat16').dtype == 'bfloat16'
    assert hash(made) == hash(ensemble.Ensemble(module, 5, 'softmax'))

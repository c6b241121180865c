"""The model against torchvision's, for the formula weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from flax_densenet import create_model, init_variables
from flax_densenet.train import optimizers
from helpers.paths import shared
from helpers.reference import formula_variables, from_torch_layout, torch_key


def load(name):
    return np.load(shared(f'reference/{name}.npz'))


def images(shape):
    return np.random.default_rng(2026).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ('name', 'size'),
    [
        ('densenet121', (224, 224)),
        pytest.param('densenet161', (224, 224), marks=pytest.mark.slow),
        pytest.param('densenet169', (224, 224), marks=pytest.mark.slow),
        pytest.param('densenet201', (224, 224), marks=pytest.mark.slow),
        ('densenet121_odd', (97, 131)),
    ],
)
def test_logits(name, size):
    reference = load(name)
    module = create_model(name.removesuffix('_odd'), num_classes=1000)
    variables = formula_variables(init_variables(module, 0))

    @jax.jit
    def run(variables, x):
        features = module.apply(variables, x, method='features')
        return features, module.apply(variables, features, method='head')

    features, logits = run(variables, images((2, *size, 3)))
    assert features.shape == tuple(reference['features_shape'])
    spread = reference['logits'].std()
    # Measured: at most 2.2e-6 of the spread.
    assert np.abs(logits - reference['logits']).max() < 1e-5 * spread
    mean = features.mean((1, 2))
    np.testing.assert_allclose(mean, reference['features_mean'], atol=1e-4)


@pytest.fixture
def double_precision():
    jax.config.update('jax_enable_x64', True)
    yield
    jax.config.update('jax_enable_x64', False)


@pytest.mark.slow
def test_training_step_in_double_precision(double_precision):
    reference = load('densenet121')
    # Without remat: half the code to compile, and the same mathematics.
    module = create_model(
        'densenet121', num_classes=1000, dtype='float64', remat='none'
    )
    variables = formula_variables(init_variables(module, 0))
    variables = jax.tree.map(lambda leaf: leaf.astype(np.float64), variables)
    x = jnp.asarray(images((4, 64, 64, 3)), jnp.float64)
    labels = jnp.array([3, 141, 592, 653])
    optimizer = optimizers.make_optimizer(
        1e-4, name='adam', momentum=0.0, weight_decay=0.0
    )

    def loss_of(params):
        logits, updated = module.apply(
            {**variables, 'params': params}, x, train=True, mutable=['batch_stats']
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updated['batch_stats']

    run = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    (loss, statistics), gradients = run(variables['params'])
    updates, _ = optimizer.update(gradients, optimizer.init(variables['params']))
    (loss_after, _), _ = run(optax.apply_updates(variables['params'], updates))

    assert float(loss) == pytest.approx(float(reference['train_loss']), rel=1e-12)
    flat = traverse_util.flatten_dict(gradients)
    found = {torch_key(path): gradient for path, gradient in flat.items()}
    keys = [str(key) for key in reference['train_grad_keys']]
    assert sorted(keys) == sorted(found)
    norms = [float(jnp.linalg.norm(found[key].ravel())) for key in keys]
    np.testing.assert_allclose(norms, reference['train_grad_norms'], rtol=1e-9)
    flat = traverse_util.flatten_dict(statistics)
    found |= {torch_key(path): value for path, value in flat.items()}
    compared = 0
    for name in reference.files:
        kind, _, key = name.partition('/')
        if kind in ('train_grad', 'train_stat'):
            expected = from_torch_layout(reference[name])
            # Kept in float32 there, so equal up to its rounding.
            np.testing.assert_allclose(found[key], expected, rtol=6.1e-8)
            compared += 1
    assert compared > 4
    expected = float(reference['adam_step_loss'])
    assert float(loss_after) == pytest.approx(expected, rel=1e-8)

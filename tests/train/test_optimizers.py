"""LAMB, decay of kernels alone and the one-cycle schedule, by hand; the older ones are
in test_step.py, all beside torch's in test_torch_training.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_densenet import UserError
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.distributed import zero
from flax_densenet.train import finetune, optimizers, step
from helpers.marks import slow_after

PARAMS = {
    'a': {'kernel': np.float32([[1.0, -2.0, 0.5], [0.25, 3.0, -1.0]])},
    'b': {'scale': np.float32([1.0, 2.0, 0.5]), 'bias': np.zeros(3, np.float32)},
}
GRADIENTS = jax.tree.map(lambda leaf: np.cos(7 * leaf), PARAMS)
FIELDS = dict(name='lamb', momentum=0.9, weight_decay=0.3, decay='all')
RATE = 0.1


def take(steps=3, make=None, shard_over=None, **fields):
    """The parameters after some steps of `GRADIENTS`."""
    fields = FIELDS | fields
    optimizer = optimizers.make_optimizer(RATE, **fields, shard_over=shard_over)
    optimizer = make(optimizer) if make else optimizer
    params, state = PARAMS, optimizer.init(PARAMS)
    if shard_over is not None:
        state = zero.place(jax.device_get(state), shard_over)
        params = mesh_lib.replicate(params, shard_over)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(GRADIENTS, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return jax.device_get(params)


def assert_close(one, other, rtol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), one, other
    )


def adam(gradient, number, epsilon):
    """Adam's direction after so many equal gradients, the moments corrected."""
    first = gradient * (1 - 0.9**number) / (1 - 0.9**number)
    second = gradient**2 * (1 - 0.999**number) / (1 - 0.999**number)
    return first / (np.sqrt(second) + epsilon)


def by_hand(name, decay, steps=3):
    """Equation and algorithm 2 of arXiv 1904.00962; AdamW without the ratio."""
    epsilon = 1e-6 if name == 'lamb' else 1e-8

    def of_leaf(param, gradient):
        param, gradient = param.astype(np.float64), gradient.astype(np.float64)
        decayed = decay == 'all' or param.ndim > 1
        for number in range(1, steps + 1):
            update = adam(gradient, number, epsilon) + 0.3 * decayed * param
            lengths = np.linalg.norm(param), np.linalg.norm(update)
            ratio = lengths[0] / lengths[1] if min(lengths) else 1.0
            if name != 'lamb' or not decayed:
                ratio = 1.0
            param = param - RATE * ratio * update
        return param

    return jax.tree.map(of_leaf, PARAMS, GRADIENTS)


@pytest.mark.parametrize('decay', optimizers.DECAYS)
@pytest.mark.parametrize('name', slow_after(1, ['adamw', 'lamb']))
def test_decoupled_decay(name, decay):
    expected = by_hand(name, decay)
    found = take(name=name, decay=decay)
    assert_close(found, expected)
    other = by_hand(name, 'kernels' if decay == 'all' else 'all')
    assert not np.allclose(found['b']['scale'], other['b']['scale'], rtol=1e-3)


@pytest.mark.slow
def test_lamb_is_optax_lamb():
    optimizer = optax.lamb(RATE, weight_decay=0.3)
    state, params = optimizer.init(PARAMS), PARAMS
    for _ in range(3):
        updates, state = jax.jit(optimizer.update)(GRADIENTS, state, params)
        params = optax.apply_updates(params, updates)
    assert_close(take(), params)


@pytest.mark.parametrize('name', slow_after(1, ['adam', 'sgd']))
def test_decay_in_the_gradient(name):
    """Of kernels alone: theirs as with decay, the others' as without."""
    every, none, kernels = (
        take(name=name, weight_decay=rate, decay=decay)
        for rate, decay in ((0.3, 'all'), (0.0, 'all'), (0.3, 'kernels'))
    )
    assert_close(kernels, {'a': every['a'], 'b': none['b']})
    assert not np.allclose(every['a']['kernel'], none['a']['kernel'], rtol=1e-4)
    assert not np.allclose(every['b']['scale'], none['b']['scale'], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('decay', optimizers.DECAYS)
def test_lamb_in_shards_and_at_shares_of_the_rate(decay):
    mesh = mesh_lib.make_mesh()
    assert mesh.size == 4
    assert_close(take(decay=decay, shard_over=mesh), take(decay=decay))
    # A share of the rate is a share of the first step, the ratio's too.
    rates = {'a': 0.5, 'b': 1.0}
    once = take(1, decay=decay)
    found = take(1, decay=decay, make=lambda one: finetune.make_optimizer(
        lambda first: one, rates))  # fmt: skip
    for name, rate in rates.items():
        expected = jax.tree.map(
            lambda p, q, rate=rate: p + rate * (q - p), PARAMS[name], once[name]
        )
        assert_close(found[name], expected)


@pytest.mark.slow
@pytest.mark.parametrize(('total', 'warmup'), [(100, 0), (100, 10), (7, 1), (2, 0)])
def test_one_cycle(total, warmup):
    """Equal to half cosines, highest at the warm-up's last step, lowest at the end."""
    schedule = optimizers.make_schedule(
        learning_rate=0.5,
        schedule='one_cycle',
        drop_at=(),
        warmup_epochs=warmup / 10,
        epochs=total / 10,
        steps_per_epoch=10.0,
    )
    found = np.array([schedule(count) for count in range(total)])
    peak = max((warmup or round(0.3 * total)) - 1, 1)
    count = np.arange(total)
    share = np.where(
        count < peak, count / peak, (count - peak) / max(total - 1 - peak, 1)
    )
    start = np.where(count < peak, 0.5 / 25, 0.5)
    end = np.where(count < peak, 0.5, 0.5 / 25e4)
    expected = end + (start - end) * (1 + np.cos(np.pi * share)) / 2
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert found.max() == pytest.approx(0.5) and found[0] == pytest.approx(0.02)


def test_cosine_after_a_warm_up_of_all_steps():
    """Of 5 steps 4.5 rise, rounded to 4 or to all; both are schedules."""
    fields = dict(learning_rate=0.5, schedule='cosine', drop_at=(), epochs=1)
    for share, rates in ((0.9, [0.1, 0.2, 0.3, 0.4, 0.5]), (0.98, None)):
        schedule = optimizers.make_schedule(
            **fields, warmup_epochs=share, steps_per_epoch=5.0
        )
        found = [float(schedule(count)) for count in range(5)]
        rates = rates or [n * 0.5 / 6 for n in range(1, 6)]
        np.testing.assert_allclose(found, rates, rtol=1e-5)


def test_the_first_state_is_the_optimizers_own():
    """Numbers that are not 0, with and without the parameters in them."""
    optimizer = optax.chain(
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.25),
        optax.contrib.schedule_free(optax.adam(0.1), 0.1),
    )
    variables = {'params': PARAMS, 'batch_stats': {}}
    found = step.new_state(variables, optimizer).opt_state
    expected = optimizer.init(PARAMS)
    assert found[0].hyperparams['learning_rate'] == 0.25
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert isinstance(one, np.ndarray) and one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_a_state_of_constants_needs_no_compilation(monkeypatch):
    optimizer = optax.MultiSteps(
        optax.flatten(optax.adam(0.5, mu_dtype=jnp.bfloat16)),
        every_k_schedule=2,
    ).gradient_transformation()
    expected = jax.device_get(optimizer.init(PARAMS))
    monkeypatch.setattr(step.jax, 'jit', None)
    found = step.new_state({'params': PARAMS, 'batch_stats': {}}, optimizer).opt_state
    assert any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(found))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert isinstance(one, np.ndarray) and one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'decay': 'norms'}, 'optimizer.decay=norms is not known; use all, kernels'),
        ({'weight_decay': -1.0}, 'optimizer.weight_decay=-1.0 must be 0 or above'),
        ({'weight_decay': float('nan')}, 'optimizer.weight_decay=nan'),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(UserError, match=message):
        optimizers.make_optimizer(jnp.float32(0.1), **FIELDS | fields)


SCHEDULE = dict(learning_rate=0.1, schedule='steps', drop_at=(0.5, 0.75), epochs=4)
SCHEDULE |= dict(warmup_epochs=0.0, steps_per_epoch=10.0)


@pytest.mark.parametrize(
    ('fields', 'line'),
    [
        (
            {'drop_at': (30, 60)},
            r'drop_at=\(30,60\) must be rising shares .* divide by',
        ),
        ({'drop_at': (30, 60), 'schedule': 'constant'}, 'must be rising shares'),
        (
            {'drop_at': (0.75, 0.5)},
            'must be rising shares of training, above 0 and bel',
        ),
        ({'drop_at': (0.5, 0.5)}, 'must be rising shares'),
        ({'drop_at': (0.0, 0.5)}, 'must be rising shares'),
        ({'drop_at': ('a',)}, 'must be rising shares'),
        (
            {'warmup_epochs': -1},
            'warmup_epochs=-1 must be 0 or above, and below train.e',
        ),
        ({'warmup_epochs': float('nan')}, 'warmup_epochs=nan must be 0 or above, and'),
    ],
)
def test_schedules_that_cannot_be(fields, line):
    with pytest.raises(UserError, match=line):
        optimizers.make_schedule(**SCHEDULE | fields)


def test_drops_without_effect_are_a_warning(caplog):
    """Only if they were set: a recipe has the default with any schedule."""
    optimizers.make_schedule(**SCHEDULE)
    optimizers.make_schedule(**SCHEDULE | {'schedule': 'cosine'})
    optimizers.make_schedule(**SCHEDULE | {'drop_at': (0.3, 0.6)})
    assert not caplog.messages
    optimizers.make_schedule(**SCHEDULE | {'drop_at': (0.3,), 'schedule': 'cosine'})
    assert caplog.messages == [
        'warning: optimizer.drop_at=(0.3,) has no effect with '
        'optimizer.schedule=cosine; to use it: optimizer.schedule=steps'
    ]


@pytest.mark.parametrize('momentum', [-0.1, 1.0, float('nan')])
def test_momentum_is_below_1(momentum):
    with pytest.raises(UserError, match='must be 0 or above, and below 1'):
        optimizers.make_optimizer(RATE, **FIELDS | {'momentum': momentum})

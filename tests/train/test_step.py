"""The training step: its figures, its optimizers, and one device against four."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_densenet import UserError, create_model, init_variables
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.train import optimizers, step
from helpers.steps import MEAN, STD, make_batch


def small(blocks=2, **fields):
    return create_model('BC-L10k4', num_classes=3, block_sizes=(1,) * blocks, **fields)


def make_state(module, optimizer, devices=None):
    mesh = mesh_lib.make_mesh(devices)
    variables = init_variables(module, 0)
    state = step.TrainState(
        step=np.zeros((), np.int32),
        params=variables['params'],
        batch_stats=variables['batch_stats'],
        opt_state=jax.tree.map(np.asarray, optimizer.init(variables['params'])),
        running=step.new_running(),
    )
    return mesh, mesh_lib.replicate(state, mesh)


def run(devices, steps=3, **fields):
    module = small(**fields)
    optimizer = optax.sgd(0.1)
    mesh, state = make_state(module, optimizer, devices)
    train_step = step.make_train_step(
        module, optimizer, step.StepOptions(mean=MEAN, std=STD)
    )
    compiled = None
    for seed in range(steps):
        batch = mesh_lib.to_global(make_batch(seed), mesh)
        if compiled is None:
            compiled = step.compile_train_step(train_step, state, batch, mesh)
        state, loss = compiled(state, batch)
    return jax.device_get(state), float(loss)


@pytest.mark.slow
def test_four_devices_are_one():
    """Statistics, gradients and figures are those of the global batch."""
    devices = jax.devices()
    assert len(devices) == 4
    (one, loss_one), (four, loss_four) = run(devices[:1]), run(devices)
    assert loss_four == pytest.approx(loss_one, rel=1e-4)
    for name in ('params', 'batch_stats'):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
            getattr(one, name),
            getattr(four, name),
        )
    assert one.running['count'].tolist() == four.running['count'].tolist() == [24, 0]
    # The statistics of a device's own rows would be others.
    rows = make_batch(0)
    module = small()
    variables = init_variables(module, 0)
    images = jnp.asarray(rows['image'], jnp.float32) / 255

    @jax.jit
    def mean_of(images):
        updated = module.apply(variables, images, train=True, mutable=['batch_stats'])
        return updated[1]['batch_stats']['norm5']['var']

    assert not np.allclose(mean_of(images), mean_of(images[:2]), rtol=1e-2)


def test_the_state_is_donated():
    module = small(blocks=1)
    optimizer = optax.adam(1e-3)
    mesh, state = make_state(module, optimizer)
    train_step = step.make_train_step(
        module, optimizer, step.StepOptions(mean=MEAN, std=STD)
    )
    batch = mesh_lib.to_global(make_batch(0), mesh)
    compiled = step.compile_train_step(train_step, state, batch, mesh)
    compiled(state, batch)
    kernel = state.params['conv0']['kernel']
    assert kernel.is_deleted()


def test_running_sums_count_each_example_in_its_epoch():
    running = step.new_running()
    seen = {}
    position = 0
    rng = np.random.default_rng(0)
    add, ones = jax.jit(step._add_to_running), np.ones(4, np.int32)
    for _ in range(12):  # batches of 4 over epochs of 10 examples
        epoch = np.int32((position + np.arange(4)) // 10)
        losses = rng.random(4).astype(np.float32)
        correct = rng.random(4) < 0.5
        for e, loss, ok in zip(epoch, losses, correct, strict=True):
            total = seen.setdefault(int(e), [0.0, 0, 0])
            seen[int(e)] = [total[0] + loss, total[1] + int(ok), total[2] + 1]
        running = jax.device_get(add(running, epoch, losses, correct, ones))
        position += 4
        current = int(running['epoch'])
        assert current == epoch[0]
        loss, correct_sum, count = seen[current]
        assert running['count'][0] == count
        assert running['correct'][0] == correct_sum
        assert running['loss'][0] == pytest.approx(loss, rel=1e-6)
        if position % 10 < 4 and position % 10:  # an epoch ended in this batch
            assert running['count'].tolist() == [10, position % 10]
    assert seen[3][2] == 10


@pytest.mark.parametrize(('count', 'batch'), [(10, 4), (12, 4), (1437, 32), (5, 5)])
def test_epoch_ends(count, batch):
    ends = [step.last_step_of_epoch(epoch, count, batch) for epoch in range(6)]
    assert ends[0] == 0
    for epoch, end in enumerate(ends):
        assert end * batch >= epoch * count > (end - 1) * batch


@pytest.mark.slow
def test_loss_is_what_it_says():
    """The first reported loss and gradient, by hand."""
    module = small(stem_features=4)
    penalty = 1e-2
    optimizer = optax.sgd(1.0)
    mesh, state = make_state(module, optimizer, jax.devices()[:1])
    params = jax.device_get(state.params)
    stats = jax.device_get(state.batch_stats)
    batch = make_batch(0)
    images = ((batch['image'] / 255.0 - MEAN) / STD).astype(np.float32)

    def loss_of(params, penalty):
        logits, _ = module.apply(
            {'params': params, 'batch_stats': stats},
            images,
            train=True,
            mutable=['batch_stats'],
        )
        picked = jax.nn.log_softmax(logits)[np.arange(8), batch['label']]
        kernels = [
            leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if path[-1].key == 'kernel' and path[0].key != 'classifier'
        ]
        assert len(kernels) == 6
        return -picked.mean() + penalty * sum((leaf**2).sum() for leaf in kernels)

    gradient = jax.jit(jax.grad(loss_of))(params, penalty)
    expected = jax.tree.map(lambda p, g: p - g, params, gradient)
    train_step = step.make_train_step(
        module, optimizer, step.StepOptions(mean=MEAN, std=STD, l2_penalty=penalty)
    )
    state, loss = jax.jit(train_step)(state, batch)
    assert float(loss) == pytest.approx(float(jax.jit(loss_of)(params, 0.0)), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        jax.device_get(state.params),
        expected,
    )
    assert int(state.step) == 1


SCHEDULE = dict(
    learning_rate=0.1,
    schedule='constant',
    drop_at=(0.5, 0.75),
    warmup_epochs=0.0,
    epochs=10,
    steps_per_epoch=10.0,
)


def test_schedules():
    def rates(**fields):
        schedule = optimizers.make_schedule(**SCHEDULE | fields)
        return np.array([schedule(count) for count in range(100)])

    np.testing.assert_allclose(rates(), 0.1)
    steps = rates(schedule='steps')
    np.testing.assert_allclose(steps[:50], 0.1)
    np.testing.assert_allclose(steps[51:75], 0.01, rtol=1e-5)
    np.testing.assert_allclose(steps[76:], 0.001, rtol=1e-5)
    cosine = rates(schedule='cosine')
    expected = 0.05 * (1 + np.cos(np.pi * np.arange(100) / 100))
    np.testing.assert_allclose(cosine, expected, atol=2e-8)
    warm = rates(schedule='cosine', warmup_epochs=2.0)
    assert (np.diff(warm[:21]) > 0).all() and (np.diff(warm[20:]) < 0).all()
    assert warm.max() == pytest.approx(0.1) and warm[0] > 0


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'schedule': 'linear'}, 'use constant, cosine, steps, one_cycle'),
        ({'learning_rate': 0.0}, 'optimizer.learning_rate=0.0'),
        ({'learning_rate': float('nan')}, 'optimizer.learning_rate=nan'),
        ({'warmup_epochs': 10.0}, 'below train.epochs=10'),
    ],
)
def test_bad_schedules(fields, message):
    with pytest.raises(UserError, match=message):
        optimizers.make_schedule(**SCHEDULE | fields)


def test_optimizers():
    params = {'w': jnp.array([1.0, -2.0])}
    gradient = {'w': jnp.array([0.5, 0.25])}

    def update(name, decay=0.0, momentum=0.9, steps=1):
        optimizer = optimizers.make_optimizer(
            0.1, name=name, momentum=momentum, weight_decay=decay
        )
        state, current = optimizer.init(params), params
        for _ in range(steps):
            updates, state = optimizer.update(gradient, state, current)
            current = optax.apply_updates(current, updates)
        return np.asarray(current['w'])

    np.testing.assert_allclose(update('adam'), [0.9, -2.1], rtol=1e-6)
    np.testing.assert_allclose(update('sgd', momentum=0.0), [0.95, -2.025])
    # Nesterov: g + 0.9 * (0.9 * v + g) with v = g from the first step.
    second = np.array([1, -2]) - 0.1 * np.array([0.5, 0.25]) * (1.9 + 1 + 0.9 * 1.9)
    np.testing.assert_allclose(update('sgd', steps=2), second, rtol=1e-6)
    # Decay is added to the gradient; decoupled in AdamW.
    np.testing.assert_allclose(
        update('sgd', decay=0.2, momentum=0.0), [0.93, -1.985], rtol=1e-6
    )
    np.testing.assert_allclose(update('adamw', decay=0.2), [0.88, -2.06], rtol=1e-6)
    with pytest.raises(UserError, match='use adam, adamw, sgd, lamb'):
        update('rmsprop')


@pytest.mark.slow
def test_dropout_changes_with_the_step():
    module = small(blocks=1, dropout_rate=0.5)
    optimizer = optax.sgd(0.0)
    _, state = make_state(module, optimizer, jax.devices()[:1])
    train_step = jax.jit(
        step.make_train_step(module, optimizer, step.StepOptions(mean=MEAN, std=STD))
    )
    losses = [
        float(train_step(state.replace(step=jnp.int32(number)), make_batch(0))[1])
        for number in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]

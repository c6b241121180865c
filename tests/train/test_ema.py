"""The averaged model: its values by hand, what it leaves alone, and what keeps it."""

import jax
import numpy as np
import optax
import pytest

from flax_densenet import UserError, create_model, init_variables
from flax_densenet.data import dataset
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.evaluation import evaluate
from flax_densenet.train import ema, fit, step
from flax_densenet.weights import trained
from helpers.marks import exhaustive_after
from helpers.runs import (
    Stopped,
    assert_equal_bits,
    final_arrays,
    read_records,
    reuse_steps,
    stop_after,
    tiny_config,
)
from helpers.steps import MEAN, STD, make_batch

DECAY = 0.3
COLLECTIONS = ('params', 'batch_stats')


def assert_close(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, other
    )


def raw(state, average):
    """The values of a state that the average is of."""
    return {
        collection: {name: getattr(state, collection)[name] for name in parts}
        for collection, parts in average.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize('devices', exhaustive_after(1, [4, 1]))
def test_by_hand(devices):
    """Four steps with a frozen stem, one of them not finite, which changes nothing."""
    module = create_model('BC-L10k4', num_classes=3, block_sizes=(1,), stem_features=4)
    variables, optimizer = init_variables(module, 0), optax.sgd(0.3)
    live = {name for stage in module.stages()[1:] for name in stage}
    first = ema.start(variables, live)
    assert set(first['params']) == {'denseblock1', 'norm5', 'classifier'}
    assert set(first['batch_stats']) == {'denseblock1', 'norm5'}
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    state = mesh_lib.replicate(
        step.new_state(variables, optimizer, average=first), mesh
    )
    train_step = step.make_train_step(
        module, optimizer, step.StepOptions(mean=MEAN, std=STD, frozen=1, ema=DECAY)
    )
    batch = mesh_lib.to_global(make_batch(0, size=8), mesh)
    compiled = step.compile_train_step(train_step, state, batch, mesh)
    expected = first
    for number in range(4):
        if number == 2:
            before = jax.device_get(state)
            bad = jax.tree.map(np.array, before)
            bad.params['classifier']['bias'][:] = np.nan
            found, loss = compiled(mesh_lib.replicate(bad, mesh), batch)
            assert np.isnan(loss)
            assert_equal_bits(jax.device_get(found.average), before.average)
            state = mesh_lib.replicate(before.replace(step=np.int32(3)), mesh)
            continue
        state, _ = compiled(state, mesh_lib.to_global(make_batch(number, size=8), mesh))
        here = jax.device_get(state)
        keep = min(DECAY, (1 + number) / (10 + number))
        expected = jax.tree.map(
            lambda old, new, keep=keep: keep * old + (1 - keep) * new,
            expected,
            raw(here, expected),
        )
        assert_close(here.average, expected)
    assert not np.allclose(
        here.average['batch_stats']['norm5']['mean'],
        here.batch_stats['norm5']['mean'],
        rtol=1e-3,
    )
    tested = ema.evaluated(here)
    assert_equal_bits(tested['params']['conv0'], variables['params']['conv0'])
    assert_equal_bits(tested['params']['norm5'], here.average['params']['norm5'])


def test_the_share_that_is_kept():
    """Little at first; in the long run the decay, as torch's `AveragedModel`."""
    zero, one = {'a': np.zeros(1, np.float32)}, {'a': np.ones(1, np.float32)}
    average = {'params': zero, 'batch_stats': zero}
    for taken, kept in ((0, 0.1), (8, 0.5), (10**6, 0.999)):
        found = ema.update(average, one, one, decay=0.999, step=jax.numpy.int32(taken))
        for collection in COLLECTIONS:
            value = 1 - float(found[collection]['a'][0])
            assert value == pytest.approx(kept, rel=1e-6)


def test_without_there_is_no_copy():
    module = create_model('BC-L10k4', num_classes=3, block_sizes=(1,))
    variables, optimizer = init_variables(module, 0), optax.sgd(0.1)
    state = step.new_state(variables, optimizer)
    items = ema.to_items(state)
    assert set(items) == {'model'}
    assert ema.from_items(**items)['average'] is None
    leaves = jax.tree.leaves(state)
    assert len(leaves) == len(jax.tree.leaves(variables)) + 5 + len(
        jax.tree.leaves(state.opt_state)
    )
    for a, b in zip(*map(jax.tree.leaves, (items['model'], variables)), strict=True):
        assert a is b


def test_items_go_there_and_back():
    tree = {'a': {'x': 1}, 'b': {'x': 2}, 'c': {'x': 3}}
    average = {'params': {'b': {'x': 20}, 'c': {'x': 30}}, 'batch_stats': {}}
    state = step.TrainState(0, tree, {'a': 4}, (), {}, average)
    items = ema.to_items(state)
    assert items['model']['params'] == {'a': {'x': 1}} | average['params']
    assert items['raw']['params'] == {'b': {'x': 2}, 'c': {'x': 3}}
    found = ema.from_items(**items)
    assert found == {'params': tree, 'batch_stats': {'a': 4}, 'average': average}


# Whatever could go wrong together, on four devices.
EVERYTHING = {
    'model.block_sizes': (1,),
    'model.drop_path_rate': 0.3,
    'model.kernel': 'xla',
    'data.batch_size': 96,
    'data.test_fraction': 0.7,
    'data.augment': 'shift_flip',
    'optimizer.name': 'lamb',
    'optimizer.decay': 'kernels',
    'optimizer.weight_decay': 0.02,
    'optimizer.learning_rate': 0.02,
    'optimizer.schedule': 'one_cycle',
    'optimizer.shard_state': True,
    'optimizer.layer_decay': 0.9,
    'train.accumulate_steps': 2,
    'train.loss': 'focal',
    'train.label_smoothing': 0.1,
    'train.ema': 0.6,
    'train.patience': 2,
    'train.epochs': 9,
}
TIMES = ('seconds', 'images_per_second', 'input_wait_share', 'memory_gib')


def records_of(workdir):
    dropped = (*TIMES, 'peak_memory_gib')
    return [
        {k: v for k, v in record.items() if k not in dropped}
        for record in read_records(workdir)
    ]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_resumed_run_with_everything_is_the_uninterrupted_one(
    tmp_path, monkeypatch, capsys
):
    """It stops early too: of 9 epochs the second is made the best, so 4 are enough."""
    reuse_steps(monkeypatch)
    config, measure = tiny_config(**EVERYTHING), fit._measure

    def script(work, state, record):
        accuracy = {2: 0.9}.get(record['epoch'], 0.1)
        return measure(work, state, record) | {'test_accuracy': accuracy}

    monkeypatch.setattr(fit, '_measure', script)
    early = 'stopped early after epoch 4: none is better than epoch 2 (train.patience=2'
    best = fit.fit(config, str(tmp_path / 'whole')).best
    assert best['epoch'] == 2 and early in capsys.readouterr().out
    with monkeypatch.context() as patch:
        stop_after(patch, 14)  # in the middle of epoch 3
        with pytest.raises(Stopped):
            fit.fit(config, str(tmp_path / 'parts'))
    assert fit.fit(config, str(tmp_path / 'parts')).best['epoch'] == 2
    out = capsys.readouterr().out
    assert 'resuming after epoch 2' in out and early in out
    (number, whole), (_, parts) = (
        final_arrays(tmp_path / name) for name in ('whole', 'parts')
    )
    assert number == 23  # of 539 images, 4 epochs
    assert_equal_bits(whole, parts)
    assert records_of(tmp_path / 'whole') == records_of(tmp_path / 'parts')
    # The raw values are others than those that are tested.
    kernels = [
        tree['params']['classifier']['kernel']
        for tree in (whole['model'], whole['train']['raw'])
    ]
    assert not np.allclose(*kernels, rtol=1e-3)
    # The same again trains nothing.
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        fit.fit(config, str(tmp_path / 'whole'))
    said = f'has {early}'.replace('patience=2', 'patience=2); nothing to train')
    assert said in capsys.readouterr().out
    _check_what_is_tested(tmp_path / 'whole')
    config['train']['ema'] = 0.0
    with pytest.raises(UserError, match='holds a run with train.ema=0.6, not 0.0; use'):
        fit.fit(config, str(tmp_path / 'whole'))


def _check_what_is_tested(workdir):
    """The latest record's loss is of the checkpoint's model, not of its raw values."""
    loaded = trained.load_trained(str(workdir), 'latest')
    record = records_of(workdir)[-1]
    source = dataset.load_source('digits', image_size=8, test_fraction=0.7)
    _, arrays = final_arrays(workdir)
    losses = [
        evaluate.evaluate(
            loaded.module,
            mesh_lib.replicate(variables, loaded.mesh),
            source.test,
            batch_size=48,
            mesh=loaded.mesh,
            mean=tuple(loaded.metadata['mean']),
            std=tuple(loaded.metadata['std']),
        )['loss']
        for variables in (jax.device_get(loaded.variables), arrays['train']['raw'])
    ]
    assert losses[0] == pytest.approx(record['test_loss'], rel=1e-5)
    assert losses[1] != pytest.approx(record['test_loss'], rel=1e-3)


HEAD = {
    'model.block_sizes': (1,),
    'data.test_fraction': 0.7,
    'data.batch_size': 100,
    'train.ema': 0.5,
    'train.epochs': 3,
}


@pytest.fixture(scope='module')
def first(tmp_path_factory):
    """The folder of a run to start from."""
    workdir = tmp_path_factory.mktemp('first')
    fit.fit(tiny_config(**HEAD | {'train.epochs': 1}), str(workdir))
    return workdir


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize(
    'fields',
    exhaustive_after(
        1, [{'train.head_warmup_epochs': 1}, {'train.freeze': 'backbone'}]
    ),
)
def test_average_of_a_head(fields, first, tmp_path, monkeypatch):
    """On features kept in memory, or for one epoch before all trains; resumed."""
    reuse_steps(monkeypatch)
    config = tiny_config(**HEAD | fields)
    config['init_from'] = str(first)
    fit.fit(config, str(tmp_path / 'whole'))
    with monkeypatch.context() as patch:
        stop_after(patch, 9)  # in epoch 2
        with pytest.raises(Stopped):
            fit.fit(config, str(tmp_path / 'parts'))
    fit.fit(config, str(tmp_path / 'parts'))
    _, whole = final_arrays(tmp_path / 'whole')
    assert_equal_bits(whole, final_arrays(tmp_path / 'parts')[1])
    frozen = 'train.freeze' in fields
    assert set(whole['train']['raw']['params']) == (
        {'classifier'} if frozen else set(whole['model']['params'])
    )
    stems = [
        tree['model']['params']['conv0']['kernel']
        for tree in (whole, final_arrays(first)[1])
    ]
    assert np.array_equal(*stems) == frozen


@pytest.mark.parametrize('decay', [1.0, -0.1, float('nan')])
def test_bad_decays(decay):
    with pytest.raises(UserError, match='train.ema=.* must be 0 .off. or a decay'):
        ema.check_decay(decay)

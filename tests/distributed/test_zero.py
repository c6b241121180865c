"""The optimizer's state in shards: checkpoints do not tell of it; runs go on."""

import json

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.distributed import zero
from flax_densenet.train import fit as fit_lib
from flax_densenet.train import lr_finder, optimizers, step
from helpers.runs import tiny_config

PARAMS = {
    'a': np.arange(6, dtype=np.float32).reshape(2, 3),
    'b': np.float32([7.0, -8.0, 9.0]),
}
SMALL = {'model.block_sizes': (1,)}
FIELDS = dict(name='adamw', momentum=0.9, weight_decay=0.1)


def take_steps(mesh, before=None, steps=2):
    """The parameters, and the state as a checkpoint has it."""
    shard_over = mesh if mesh.size > 1 else None
    optimizer = optimizers.make_optimizer(0.1, **FIELDS, shard_over=shard_over)
    first = step.new_state({'params': PARAMS, 'batch_stats': {}}, optimizer)
    opt_state = first.opt_state
    params = PARAMS
    if before is not None:
        params, state = before
        opt_state = zero.from_replicated(state, opt_state)
    opt_state = zero.place(opt_state, mesh)
    params = mesh_lib.replicate(params, mesh)

    @jax.jit
    def update(params, opt_state):
        gradients = jax.tree.map(lambda leaf: 0.1 * leaf + 1, params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(steps):
        params, opt_state = update(params, opt_state)
    return jax.device_get(params), zero.replicated(opt_state)


@pytest.mark.slow
def test_a_checkpoint_does_not_tell_of_the_devices():
    """9 values on 1, 2 and 4 devices; then on from each other's state."""
    results = {
        count: take_steps(mesh_lib.make_mesh(jax.devices()[:count]))
        for count in (1, 2, 4)
    }
    for found in results.values():
        assert jax.tree.structure(found) == jax.tree.structure(results[1])
        for a, b in zip(*map(jax.tree.leaves, (found, results[1])), strict=True):
            assert np.shape(a) == np.shape(b)
            np.testing.assert_allclose(a, b, rtol=1e-6)
        again = take_steps(mesh_lib.make_mesh(), found)
        once = take_steps(mesh_lib.make_mesh(jax.devices()[:1]), results[1])
        assert not np.allclose(again[0]['b'], found[0]['b'])
        for a, b in zip(*map(jax.tree.leaves, (again, once)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_without_shards_nothing_changes():
    optimizer = optimizers.make_optimizer(0.1, **FIELDS)
    state = optimizer.init(PARAMS)
    assert not zero.is_sharded(state)
    assert zero.replicated(state) is not None
    assert jax.tree.all(
        jax.tree.map(lambda a, b: a is b, state, zero.replicated(state))
    )
    mesh = mesh_lib.make_mesh()
    for target in jax.tree.leaves(zero.layout(state, mesh)):
        assert target.is_fully_replicated


def latest(workdir):
    found = checkpoint_reader.find_latest(str(workdir))
    folder = (workdir / 'checkpoints' / found.name).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        return {
            name: checkpointer.restore(folder / name) for name in ('model', 'train')
        }


def assert_close(one, other):
    """Two epochs of Adam: rounding grows to some 1e-5, other settings to 1e-2."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        assert np.shape(a) == np.shape(b)
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=3e-4)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_runs_go_on_with_other_devices_and_choices(tmp_path, monkeypatch):
    """In shards on four, then one device, then four without, then in shards again."""
    devices = jax.devices()

    def fit(workdir, epochs, count, shard_state):
        monkeypatch.setattr(jax, 'devices', lambda: devices[:count])
        fields = {'train.epochs': epochs, 'optimizer.shard_state': shard_state}
        fields |= {'model.kernel': 'xla', 'data.test_fraction': 0.7} | SMALL
        fit_lib.fit(tiny_config(**fields), str(workdir))

    fit(tmp_path / 'whole', 4, 4, False)
    for epochs, (count, shard) in enumerate([(4, 1), (1, 1), (4, 0), (4, 1)], start=1):
        fit(tmp_path / 'parts', epochs, count, bool(shard))
    one, other = (latest(tmp_path / name) for name in ('whole', 'parts'))
    assert_close(one, other)
    records = [
        (tmp_path / name / 'metrics.jsonl').read_text().splitlines()
        for name in ('whole', 'parts')
    ]
    for a, b in zip(*records, strict=True):
        a, b = json.loads(a), json.loads(b)
        assert a['train_loss'] == pytest.approx(b['train_loss'], rel=1e-3)
        assert a['train_count'] == b['train_count'] == 539


@pytest.mark.exhaustive
@pytest.mark.slow
def test_accumulated_steps_of_a_run(tmp_path, capsys):
    """fit, its dump of a bad step, and lr_find take them; features are cached too."""
    fields = {'train.epochs': 1, 'data.test_fraction': 0.7} | SMALL
    parts = {'train.accumulate_steps': 4, 'optimizer.shard_state': True}
    fit_lib.fit(tiny_config(**fields | parts), str(tmp_path / 'parts'))
    bad = {'optimizer.name': 'sgd', 'optimizer.learning_rate': 1e30}
    with pytest.raises(
        fit_lib.UserError, match='step 2, epoch 1: the loss or its grad'
    ):
        fit_lib.fit(tiny_config(**fields | parts | bad), str(tmp_path / 'bad'))
    dump = json.loads((tmp_path / 'bad' / 'nonfinite.json').read_text())
    arrays = np.load(tmp_path / 'bad' / 'nonfinite.npz')
    assert [row['label'] for row in dump['examples']] == arrays['label'].tolist()
    assert arrays['image'].shape == (128, 8, 8, 3)
    lr_finder.find(tiny_config(**fields | parts), str(tmp_path / 'find'), steps=40)
    probe = tiny_config(**fields | parts | {'train.freeze': 'backbone'})
    probe['init_from'] = str(tmp_path / 'parts')
    capsys.readouterr()
    fit_lib.fit(probe, str(tmp_path / 'probe'))
    assert 'the classifier trains on them' in capsys.readouterr().out
    frozen, found = latest(tmp_path / 'parts'), latest(tmp_path / 'probe')
    kernel = [tree['model']['params']['conv0']['kernel'] for tree in (frozen, found)]
    assert np.array_equal(*kernel)

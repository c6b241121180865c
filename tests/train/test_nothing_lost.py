"""What keeps a run from losing anything, part by part; whole runs are in `faults/`."""

import errno
import json
import os
import signal
import threading
import time
import types

import jax
import numpy as np
import optax
import pytest

from flax_densenet import UserError, create_model, errors, init_variables, settings
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.checkpoints import writer as checkpoint_writer
from flax_densenet.data import dataset, pipeline
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.system import atomic, lock, signals
from flax_densenet.train import (
    announce,
    fit,
    nonfinite,
    optimizers,
    phases,
    prepare,
    step,
)
from helpers.runs import (
    assert_equal_bits,
    change_settings,
    make_weights,
    read_records,
    tiny_config,
    write_images,
)


@pytest.mark.parametrize(
    'text', ['soon', '5', 'steps', '0 steps', '2.5 steps', '-1 minutes', '5 hours']
)
def test_checkpoint_every_has_two_forms(text):
    with pytest.raises(UserError, match='train.checkpoint_every=.*500 steps'):
        checkpoint_writer.parse_every(text)


def test_when_a_checkpoint_is_due():
    by_step = checkpoint_writer.parse_every('5 steps')
    assert [n for n in range(1, 12) if by_step.due_at(n)] == [5, 10]
    by_time = checkpoint_writer.parse_every('0.5 minutes')
    assert not by_time.due(29) and by_time.due(30) and not by_time.due_at(30)
    never = checkpoint_writer.parse_every(' ')
    assert not never.due(1e9) and not never.due_at(5) and not by_step.due(1e9)


def test_one_trains_in_a_folder(tmp_path):
    lock.check(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    message = f'is in use: process {os.getpid()} on .* trains there'
    with lock.hold(str(tmp_path)):
        with pytest.raises(UserError, match=message), lock.hold(str(tmp_path)):
            pass
        with pytest.raises(UserError, match=message):
            lock.check(str(tmp_path))
    with lock.hold(str(tmp_path)):
        pass


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / 'x.json'
    path.write_text('old')
    with pytest.raises(KeyError), atomic.replacing(path) as file:
        file.write('half of the n')
        raise KeyError
    assert path.read_text() == 'old'
    with atomic.replacing(path) as file:
        file.write('new')
    assert path.read_text() == 'new'
    assert os.listdir(tmp_path) == ['x.json']


def test_what_the_machine_did_is_one_line():
    full = OSError(errno.ENOSPC, 'No space left on device', 'run/metrics.jsonl')
    assert errors.explain_system_error(full).startswith(
        'run/metrics.jsonl: No space left on dev'
    )
    memory = RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.')
    for error in (memory, MemoryError()):
        assert 'data.batch_size' in errors.explain_system_error(error)
        assert (
            'model.remat=block or model.dtype=bfloat16'
            in errors.explain_system_error(error)
        )
    for error in (RuntimeError('a bug'), OSError('a bug'), ValueError('out of memory')):
        assert errors.explain_system_error(error) is None


def test_signals_ask_and_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    mask, count = signal.pthread_sigmask(signal.SIG_BLOCK, []), threading.active_count()
    with (
        pytest.raises(
            signals.Stopped, match='stopped by SIGTERM: training so far is'
        ) as raised,
        signals.stop_gently() as stop,
        stop.busy(),
    ):
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        end = time.monotonic() + 60
        while not stop.asked:
            assert time.monotonic() < end
    assert raised.value.exit_status == 143
    assert isinstance(raised.value, KeyboardInterrupt)
    # Where nothing would be lost it leaves without being asked.
    with pytest.raises(signals.Stopped), signals.stop_gently():
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(100):
            time.sleep(0.01)
    now = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert now == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    assert threading.active_count() == count


def test_saving_is_tried_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint_writer, 'PAUSES_SECONDS', (0.0, 0.0))
    good, calls = checkpoint_writer._save, []
    arrays = {'model': {'a': np.ones(3)}, 'train': {'b': np.ones(2)}}

    def fail(times):
        def save(*args):
            calls.append(1)
            if len(calls) <= times:
                raise OSError(errno.EROFS, 'Read-only file system', 'x')
            good(*args)

        calls.clear()
        monkeypatch.setattr(checkpoint_writer, '_save', save)

    def save(saver, number):
        which = checkpoint_reader.Checkpoint(number, finished=False)
        saver.save(which, **arrays, metadata={}, records=[])

    with checkpoint_writer.open_saver(str(tmp_path)) as saver:
        fail(2)
        save(saver, 1)
        saver.wait()
        assert capsys.readouterr().out.count('saving step 1 failed (x: Read-only') == 2
        fail(3)
        save(saver, 2)
        with pytest.raises(UserError, match='step 2 cannot be saved .x: Read-only'):
            saver.wait()
    assert checkpoint_reader.find_latest(str(tmp_path)).step == 1
    with pytest.raises(UserError, match='no finished epoch yet, only step 1'):
        checkpoint_reader.find_step(str(tmp_path), 'best')


MEAN = STD = (0.5, 0.5, 0.5)


@pytest.fixture(scope='module')
def steps():
    """A compiled step with a clipped gradient, its state, and a batch."""
    module = create_model('BC-L10k4', num_classes=10, block_sizes=(1, 1))
    optimizer = optimizers.make_optimizer(
        lambda count: 1.0, name='sgd', momentum=0.0, weight_decay=0.0
    )
    train_step = step.make_train_step(
        module, optimizer, step.StepOptions(mean=MEAN, std=STD, gradient_clip=0.01)
    )
    mesh = mesh_lib.make_mesh(jax.devices()[:1])
    state = mesh_lib.replicate(
        step.new_state(init_variables(module, 0), optimizer), mesh
    )
    examples = dataset.load_source('digits', image_size=8).train
    batch = next(pipeline.train_batches(examples, batch_size=16, seed=0))
    batch = mesh_lib.to_global(batch, mesh)
    compiled = step.compile_train_step(train_step, state, batch, mesh)
    return compiled, jax.device_get(state), batch, mesh


@pytest.mark.slow
def test_a_bad_step_changes_nothing(steps):
    compiled, first, batch, mesh = steps
    bad = jax.tree.map(np.array, first)
    bad.params['classifier']['bias'][0] = np.nan
    after, loss = compiled(mesh_lib.replicate(bad, mesh), batch)
    assert not np.isfinite(loss)
    assert after.step == 1 and after.running['count'].sum() == 0
    for name in ('params', 'batch_stats', 'opt_state'):
        assert_equal_bits(getattr(after, name), getattr(bad, name))
    after, loss = compiled(mesh_lib.replicate(first, mesh), batch)
    assert np.isfinite(loss) and after.running['count'].sum() == 16
    moved = jax.tree.map(lambda a, b: a - b, after.params, first.params)
    length = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(moved)))
    assert length == pytest.approx(0.01, rel=1e-3)  # the clip times the rate of 1


def make_bad(monkeypatch, bad_steps):
    """Some steps of the next run report what a bad one reports."""
    compile_step = phases.training_run.compile_step

    def with_bad_steps(*args):
        compiled = compile_step(*args)

        def take(state, batch):
            number = int(jax.device_get(state.step)) + 1
            state, loss = compiled(state, batch)
            return state, jax.device_put(
                np.float32('nan') if number in bad_steps else loss
            )

        return take

    monkeypatch.setattr(phases.training_run, 'compile_step', with_bad_steps)


@pytest.mark.slow
def test_stop_and_skip(tmp_path, monkeypatch, capsys):
    fields = {'train.epochs': 1, 'data.batch_size': 64, 'model.block_sizes': (1,)}
    with monkeypatch.context() as patch:
        make_bad(patch, {3, 4, 8})
        with pytest.raises(UserError, match='step 3, epoch 1: .*train.on_nonfinite=sk'):
            fit.fit(tiny_config(**fields), str(tmp_path / 'stop'))
        fields['train.on_nonfinite'] = 'skip'
        fit.fit(tiny_config(**fields), str(tmp_path / 'skip'))
    assert read_records(tmp_path / 'skip')[0]['skipped_steps'] == 3
    with monkeypatch.context() as patch:
        make_bad(patch, set(range(5, 30)))
        with pytest.raises(UserError, match='step 15, .* for the 11th step'):
            fit.fit(tiny_config(**fields), str(tmp_path / 'many'))
    dump = json.loads((tmp_path / 'stop' / 'nonfinite.json').read_text())
    assert dump['step'] == 3 and np.isfinite(dump['loss']) and dump['gradient_norm'] > 0
    arrays = np.load(tmp_path / 'stop' / 'nonfinite.npz', allow_pickle=False)
    examples = dataset.load_source('digits', image_size=8).train
    assert len(dump['examples']) == 64
    for row, example in enumerate(dump['examples']):
        there = examples[example['position']]
        assert there['label'] == example['label'] == arrays['label'][row]
        assert (there['image'] == arrays['image'][row]).all()
        assert example['name'] == examples.name(example['position'])
    layer = dump['layers']['conv0/kernel']
    assert layer['parameters']['nonfinite'] == layer['gradients']['nonfinite'] == 0
    assert layer['parameters']['min'] < 0 < layer['parameters']['max']
    assert 'batch norm' in dump['layers']['norm5/mean']


@pytest.mark.slow
def test_the_rate_of_a_bad_step_is_told(monkeypatch):
    """Schedules compute on the device, which the loop else forbids."""
    monkeypatch.setattr(nonfinite, 'save_dump', lambda *_: None)
    run = types.SimpleNamespace(
        settings=settings.from_config({}),
        workdir='run',
        schedule=optax.cosine_onecycle_schedule(100, 1e-2),
    )
    guard = nonfinite.NonFiniteGuard(run, 1, 10)
    bad = pytest.raises(UserError, match=r'step 5, .*learning_rate=0\.000')
    with jax.transfer_guard('disallow'), bad:
        guard.see(5, np.nan, None)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_probe_on_cached_features_that_overflows(tmp_path):
    """Ends with the line and the dump of any other run; the batch is of features."""
    photos = write_images(tmp_path / 'photos', {'ants': 20, 'bees': 20, 'cats': 20})
    fields = {
        'data.source': f'folder:{photos}',
        'data.batch_size': 8,
        'optimizer.learning_rate': 3e38,
        'train.epochs': 6,
        'train.freeze': 'backbone',
        'model.block_sizes': None,
    }
    config = tiny_config(**fields) | {
        'init_from': make_weights(tmp_path / 'w.safetensors')
    }
    workdir = tmp_path / 'run'
    with pytest.raises(UserError, match=r'step \d+, .*not finite; .*nonfinite.json'):
        fit.fit(config, str(workdir))
    dump = json.loads((workdir / 'nonfinite.json').read_text())
    assert len(dump['examples']) == 8
    for example in dump['examples']:
        assert example['name'].startswith(str(photos))
    with np.load(workdir / 'nonfinite.npz', allow_pickle=False) as arrays:
        assert arrays['features'].shape[:3] == (8, 1, 1)
        assert sorted(arrays['position']) == sorted(
            example['position'] for example in dump['examples']
        )


def test_batches_of_one_are_said(tmp_path, capsys):
    run = prepare.prepare(
        tiny_config(**{'data.image_size': 2, 'data.batch_size': 4}), str(tmp_path)
    )
    change_settings(run, **{'data.batch_size': 1})
    announce.announce(run)
    assert 'the last batch norms see one value' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        ({'train.on_nonfinite': 'go'}, 'train.on_nonfinite=go is not known; use stop'),
        ({'optimizer.gradient_clip': -1.0}, 'optimizer.gradient_clip=-1 must be'),
        ({'train.checkpoint_every': 'often'}, 'train.checkpoint_every=often'),
    ],
)
def test_bad_fields(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        fit.fit(tiny_config(**overrides), str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()

"""fit: what it prints and saves, and that stopping it changes nothing."""

import json
import os
import pathlib
import re

import jax
import numpy as np
import pytest

from flax_densenet import UserError
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.data import dataset
from flax_densenet.evaluation import evaluate
from flax_densenet.train import epoch_lines, fit
from flax_densenet.weights import trained as trained_lib
from helpers.paths import ROOT
from helpers.runs import (
    HARD,
    Stopped,
    assert_equal_bits,
    final_arrays,
    read_records,
    reuse_steps,
    stop_after,
    tiny_config,
    write_images,
)

# Those of `digits_run`.
FOUR_EPOCHS = {
    'optimizer.learning_rate': 1e-2,
    'train.epochs': 4,
    'train.report': True,
}
LINE = re.compile(
    r'Epoch: [ \d]\d\. Train_acc: \d+\.\d%, Train_loss: \d+\.\d{3}, '
    r'Test_acc: \d+\.\d%, Test_loss: \d+\.\d{3}, Lr: \d\.\d\dE-\d\d'
)


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch, capsys):
    reuse_steps(monkeypatch)
    config = tiny_config(**HARD)
    fit.fit(config, str(tmp_path / 'whole'))
    whole_lines = [x for x in capsys.readouterr().out.splitlines() if 'Epoch' in x]
    count = len(dataset.load_source('digits', test_fraction=0.7).train)
    assert count == 539  # 5.39 batches an epoch: epochs end inside of batches

    lines = []
    for steps in (14, 8):  # in the middle of epoch 3, then of epoch 4
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            with pytest.raises(Stopped):
                fit.fit(config, str(tmp_path / 'parts'))
        lines += capsys.readouterr().out.splitlines()
    fit.fit(config, str(tmp_path / 'parts'))
    lines += capsys.readouterr().out.splitlines()
    # The figures of the epochs too, those that began before a stop included.
    assert [line for line in lines if 'Epoch' in line] == whole_lines
    assert [line for line in lines if 'resuming after epoch' in line] == [
        f'resuming after epoch {epoch} in {tmp_path}/parts' for epoch in (2, 3)
    ]

    (step, arrays), (other_step, other) = (
        final_arrays(tmp_path / name) for name in ('whole', 'parts')
    )
    assert step == other_step == 27
    assert_equal_bits(arrays, other)
    raw = arrays['train']['raw']['params']['classifier']['kernel']
    assert not np.allclose(raw, arrays['model']['params']['classifier']['kernel'])
    records = [read_records(tmp_path / name) for name in ('whole', 'parts')]
    timings = (
        *('seconds', 'images_per_second', 'input_wait_share'),
        *('peak_memory_gib', 'memory_gib'),
    )
    for record in [*records[0], *records[1]]:
        assert record['train_count'] == 539
        for name in timings:
            assert record.pop(name) >= 0
    assert records[0] == records[1]

    # Another seed gives other arrays: the comparison above can fail.
    config['train'] |= {'seed': 1, 'epochs': 1}
    fit.fit(config, str(tmp_path / 'other'))
    assert not np.array_equal(
        final_arrays(tmp_path / 'other')[1]['model']['params']['conv0']['kernel'],
        arrays['model']['params']['conv0']['kernel'],
    )


@pytest.fixture(scope='module')
def trained(digits_run):
    workdir = pathlib.Path(digits_run.workdir)
    return workdir, tiny_config(**FOUR_EPOCHS), digits_run.best


def test_what_a_run_leaves(trained, capsys):
    workdir, config, best = trained
    records = read_records(workdir)
    assert [record['epoch'] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert LINE.fullmatch(epoch_lines.format_epoch(record))
    assert best == max(records, key=lambda r: (r['test_accuracy'], -r['test_loss']))
    assert best['test_accuracy'] > 0.5  # it learns
    saved = json.loads((workdir / 'config.json').read_text())
    open_ = ('channels', 'bit_depth')  # found or filled in
    for section, fields in json.loads(json.dumps(config)).items():
        for name, value in fields.items() if isinstance(fields, dict) else ():
            assert value is None or value == saved[section][name] or name in open_
    assert saved['data']['mean'] == [0.485, 0.456, 0.406]  # filled in
    assert saved['data']['channels'] == 3
    for name in ('curves.png', 'samples.png'):
        assert (workdir / name).read_bytes()[:4] == b'\x89PNG'
    steps = {int(path.name) for path in (workdir / 'checkpoints').iterdir()}
    assert steps == {best['step'], *(record['step'] for record in records[-2:])}
    assert not any(workdir.glob('events*'))  # of train.tensorboard=False
    # The same command again finds nothing to do.
    again = fit.fit(config, str(workdir))
    assert again.best == best and again.records == records and not again.trained
    assert 'has its 4 epochs; nothing to train' in capsys.readouterr().out


def test_the_line_is_exact():
    record = {
        'epoch': 1,
        'train_accuracy': 0.714,
        'train_loss': 0.9031,
        'test_accuracy': 0.9333,
        'test_loss': 0.27,
        'learning_rate': 1e-4,
    }
    assert epoch_lines.format_epoch(record) == (
        'Epoch:  1. Train_acc: 71.4%, Train_loss: 0.903, Test_acc: 93.3%, '
        'Test_loss: 0.270, Lr: 1.00E-04'
    )


def test_the_best_checkpoint_evaluates_to_what_was_saved(trained):
    workdir, _, best = trained
    loaded = trained_lib.load_trained(str(workdir), 'best')
    assert loaded.step == best['step']
    assert loaded.metrics['test_accuracy'] == best['test_accuracy']
    source = dataset.load_source('digits', image_size=8)
    for mesh_size in (4, 1):
        mesh = fit.mesh.make_mesh(jax.devices()[:mesh_size])
        loaded = trained_lib.load_trained(str(workdir), 'best', mesh=mesh)
        metrics = evaluate.evaluate(
            loaded.module,
            loaded.variables,
            source.test,
            batch_size=128,
            mesh=mesh,
            mean=tuple(loaded.metadata['mean']),
            std=tuple(loaded.metadata['std']),
        )
        assert metrics['count'] == 360
        assert metrics['accuracy'] == best['test_accuracy']
        assert metrics['loss'] == pytest.approx(best['test_loss'], rel=1e-5)


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        ({'model.growth_rate': 6}, 'holds a run with model.growth_rate=None, not 6'),
        ({'model.variant': 'BC-L16k4'}, 'model.variant=BC-L10k4, not BC-L16k4'),
        ({'data.batch_size': 64}, 'data.batch_size=128, not 64'),
    ],
)
def test_a_workdir_of_another_run(trained, overrides, message):
    workdir, _, _ = trained
    config = tiny_config(**FOUR_EPOCHS | overrides)
    before = sorted(path.name for path in workdir.rglob('*'))
    with pytest.raises(UserError, match=message):
        fit.fit(config, str(workdir))
    assert sorted(path.name for path in workdir.rglob('*')) == before


def test_a_workdir_of_other_classes(trained, tmp_path):
    workdir, _, _ = trained
    photos = write_images(tmp_path / 'photos', {'ants': 80, 'bees': 80})
    config = tiny_config(**{'data.source': f'folder:{photos}'})
    with pytest.raises(UserError, match=r'run on 10 classes \(0, 1, .*\(ants, bees\)'):
        fit.fit(config, str(workdir))


@pytest.mark.slow
def test_init_from_a_run(trained, tmp_path, capsys):
    workdir, _, _ = trained
    config = tiny_config(**{'optimizer.learning_rate': 1e-9, 'train.epochs': 1})
    config['init_from'] = str(workdir)
    fit.fit(config, str(tmp_path / 'same'))
    first, again = (
        trained_lib.load_trained(str(path), 'latest' if path == workdir else 'best')
        for path in (workdir, tmp_path / 'same')
    )
    # Twelve steps of Adam at this rate, each rounded; statistics go on meanwhile.
    for a, b in zip(
        *(jax.tree.leaves(t.variables['params']) for t in (first, again)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=5e-8)
    photos = write_images(tmp_path / 'photos', {'ants': 80, 'bees': 80})
    config['data']['source'] = f'folder:{photos}'
    fit.fit(config, str(tmp_path / 'other'))
    assert 'it has 10 classes, not 2: the classifier starts new' in (
        capsys.readouterr().out
    )
    config['model']['growth_rate'] = 6
    with pytest.raises(
        UserError, match='with growth_rate=4; .* leave model.growth_rate out'
    ):
        fit.fit(config, str(tmp_path / 'wrong'))
    config['init_from'] = str(tmp_path / 'nowhere')
    with pytest.raises(
        UserError, match='init_from=.*nowhere: there is no such file or'
    ):
        fit.fit(config, str(tmp_path / 'nothing'))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_bad_images_are_listed(tmp_path, capsys):
    photos = write_images(tmp_path / 'photos', {'ants': 80, 'bees': 81})
    (photos / 'bees' / '007.jpg').write_bytes(b'')
    fields = {'data.source': f'folder:{photos}', 'train.epochs': 1}
    with pytest.raises(UserError, match=r'bees/007.jpg is not an image'):
        fit.fit(tiny_config(**fields), str(tmp_path / 'run'))
    fit.fit(tiny_config(**fields, **{'data.bad_images': 'skip'}), str(tmp_path / 'run'))
    assert 'skipped 1 bad images' in capsys.readouterr().out
    listed = (tmp_path / 'run' / 'skipped_images.txt').read_text()
    assert listed.startswith(f'{photos}/bees/007.jpg is not an image')


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        ({'data.batch_size': 98}, '98 does not divide over 4 devices; use 96 or 100'),
        ({'data.batch_size': 3}, 'does not divide over 4 devices; use 4'),
        ({'data.image_size': 1}, 'images of 1x1 are too small'),
        ({'data.std': (1.0, 0.0, 1.0)}, 'data.std'),
        ({'data.mean': (1.0,)}, 'needs a number for each of 3 channels'),
        ({'data.mean': (114, 103, 99)}, r'data.mean=\(0.4471,0.4039,0.3882\)'),
        ({'data.batch_size': 0}, 'data.batch_size=0 must be at least 1'),
        ({'optimizer.drop_at': (30, 60)}, 'drop_at=.* must be rising shares'),
        ({'data.threads': 0}, 'data.threads=0'),
        ({'train.epochs': 0}, 'train.epochs=0'),
        ({'optimizer.name': 'lion'}, 'optimizer.name=lion'),
        ({'model.variant': 'resnet50'}, 'model.variant=resnet50'),
    ],
)
def test_bad_fields_stop_before_anything_is_written(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        fit.fit(tiny_config(**overrides), str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_a_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').write_text('x')
    with pytest.raises(UserError, match='--workdir=.* cannot be written'):
        fit.fit(tiny_config(), str(tmp_path / 'file' / 'run'))


@pytest.mark.slow
def test_a_loss_that_is_not_finite(tmp_path):
    config = tiny_config(**{'optimizer.name': 'sgd', 'optimizer.learning_rate': 1e30})
    with pytest.raises(UserError, match='step 2, epoch 1: the loss or its grad'):
        fit.fit(config, str(tmp_path))
    assert not checkpoint_reader.has_checkpoint(str(tmp_path))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_processes_give_the_stream_of_threads(tmp_path):
    """In a program of its own: worker processes import its main module again."""
    import subprocess
    import sys

    script = tmp_path / 'script.py'
    script.write_text(
        'import sys\n'
        'from absl import flags\n'
        'from flax_densenet.data import dataset, pipeline\n'
        'if __name__ == "__main__":\n'
        '    flags.FLAGS(sys.argv[:1])\n'
        '    source = dataset.load_source("digits", image_size=8)\n'
        '    streams = []\n'
        '    for workers in (0, 2):\n'
        '        stream = pipeline.train_batches(source.train, batch_size=16, seed=1,\n'
        '            start=3, augment="shift_flip", workers=workers)\n'
        '        streams.append([next(stream) for _ in range(5)])\n'
        '        stream.close()\n'
        '    for one, two in zip(*streams, strict=True):\n'
        '        for key in one:\n'
        '            assert one[key].tobytes() == two[key].tobytes(), key\n'
        '    print("equal")\n'
    )
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    assert done.stdout == 'equal\n', done.stderr

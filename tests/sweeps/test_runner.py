"""Sweeps: what the flags mean, what is kept when, and what a table says."""

import copy
import functools
import json
import os
import pathlib
import sys
import types

import pytest

from configs import base
from flax_densenet.cli import options as cli_options
from flax_densenet.cli import sweep as sweep_command
from flax_densenet.errors import UserError
from flax_densenet.sweeps import one_run, optuna_study
from flax_densenet.sweeps import page as sweep_page
from flax_densenet.sweeps import plan as sweep_plan
from flax_densenet.sweeps import record as sweep_record
from flax_densenet.sweeps import runner as sweep_runner
from flax_densenet.sweeps import table as sweep_table
from flax_densenet.system import lock
from flax_densenet.train import fit as fit_lib
from helpers.marks import slow_after

RATE = 'optimizer.learning_rate'


class Objective:
    """In place of `fit.fit`: figures that follow from the fields alone.

    Attributes:
      trained: epochs by folder, and how often each was taken.
      events: names of what was called, up to `dies_at` of them.
    """

    def __init__(self, figure, part='test'):
        self.figure, self.part, self.trained = figure, part, {}
        self.events, self.dies_at = [], None

    def happens(self, name):
        self.events.append(name)
        if len(self.events) == self.dies_at:
            raise KeyboardInterrupt(name)

    def fit(self, settings, folder, *, stop=None, ends_after, save_samples):
        path = pathlib.Path(folder, 'metrics.jsonl')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        done = len(path.read_text().splitlines())
        train, rate = settings.train, settings.schedule.learning_rate
        for epoch in range(done + 1, train.epochs + 1):
            figure = self.figure(rate, train.seed, epoch)
            record = {'epoch': epoch, 'seconds': 60}
            record |= {f'{self.part}_accuracy': figure, f'{self.part}_loss': 1 - figure}
            self.happens('epoch')
            with path.open('a') as file:
                file.write(json.dumps(record) + '\n')
            self.trained[folder] = self.trained.get(folder, 0) + 1
            if ends_after(record):
                break
        return types.SimpleNamespace(report_options=dict, send_files=lambda: None)


@functools.cache
def _migrations():
    """Those of Optuna's tables, which are imported anew for each storage."""
    from alembic import config, script
    from optuna.storages import _rdb

    options = config.Config()
    folder = pathlib.Path(_rdb.__file__).parent / 'alembic'
    options.set_main_option('script_location', str(folder))
    return script.ScriptDirectory.from_config(options)


@pytest.fixture
def objective(monkeypatch):
    """A sweep's runs are `Objective`s; everything else is as it is."""
    from alembic import script

    made = _migrations()
    monkeypatch.setattr(script.ScriptDirectory, 'from_config', lambda _: made)

    def use(figure, part='test'):
        made = Objective(figure, part)
        monkeypatch.setattr(fit_lib, 'fit', made.fit)
        monkeypatch.setattr(one_run.finished, 'write', lambda folder: None)
        prepared = types.SimpleNamespace(source=None)
        monkeypatch.setattr(sweep_plan.prepare, 'prepare', lambda *_, **__: prepared)
        monkeypatch.setattr(sweep_runner.jax, 'clear_caches', lambda: None)
        monkeypatch.setattr(sweep_runner.gc, 'collect', lambda: None)
        # Tested below; five megabytes each time.
        monkeypatch.setattr(
            sweep_page, 'save', lambda workdir, kept: sweep_table.make_rows(kept)
        )
        return made

    return use


def config_of(options):
    config = base.get_config()
    config.update_from_flattened_dict(dict(options))
    return config


@functools.cache
def override(options, fields):
    """Some 20 ms, which a sweep asks for many times."""
    return sweep_command.override(config_of(options), dict(fields))


def start(workdir, *flags, epochs=3, **options):
    chosen = {name: options.pop(name) for name in [*options] if '.' in name}
    chosen = tuple({'train.epochs': epochs, **chosen}.items())
    return sweep_runner.run(
        cli_options.to_dict(config_of(chosen)),
        str(workdir),
        list(flags),
        override=lambda fields: copy.deepcopy(override(chosen, tuple(fields.items()))),
        **options,
    )


def by_rate(rate, seed, epoch):
    return rate * epoch + 0.01 * seed


def table(rows):
    return [
        (row.setting.fields, row.state, row.mean, row.spread, row.best, row.count)
        for row in rows
    ]


@pytest.mark.slow
def test_a_grid_with_seeds(objective, tmp_path, capsys):
    made = objective(by_rate)
    flags = f'{RATE}=0.1,0.3,0.2', 'train.seed=0,1,2'
    rows = start(tmp_path / 's', *flags)
    assert [row.setting.fields[RATE] for row in rows] == ['0.3', '0.2', '0.1']
    first = rows[0]
    assert first.mean == pytest.approx(0.91)
    assert first.spread == pytest.approx(0.01)
    assert (first.best, first.best_seed, first.count) == (pytest.approx(0.92), '2', 3)
    assert first.folder == 'trials/002'
    assert set(made.trained.values()) == {3} and len(made.trained) == 9
    out = capsys.readouterr().out
    assert f'best: {RATE}=0.3: test accuracy 91.0% ± 1.0% over 3 seeds' in out
    # The same command again trains nothing, and says the same.
    again = objective(by_rate)
    assert table(start(tmp_path / 's', *flags)) == table(rows)
    assert again.trained == {}


@pytest.mark.slow
def test_validation_chooses(objective, monkeypatch, tmp_path, capsys):
    """The test result is that of the chosen setting; the record keeps it."""
    objective(by_rate, 'val')
    monkeypatch.setattr(one_run.finished, 'write', lambda _: {'accuracy': 0.5})
    rows = start(tmp_path / 's', f'{RATE}=0.1,0.3')
    out = capsys.readouterr().out
    assert f'best: {RATE}=0.3: validation accuracy 90.0% over 1 seed' in out
    assert 'chosen on the validation images' in out
    unused = 'which were not used for any choice'
    assert f'on the test images, {unused}, its accuracy is 50.0%' in out
    assert [row.test for row in rows] == [0.5, 0.5]
    kept = sweep_record.load(str(tmp_path / 's'))
    assert kept.part == 'val' and kept.figure == 'validation accuracy'
    sweep_table.save(str(tmp_path), kept, rows)
    assert ',val_loss,' in (tmp_path / 'sweep.csv').read_text()


@pytest.mark.slow
def test_seeds_alone(objective, tmp_path):
    objective(by_rate)
    (row,) = start(tmp_path / 's', 'train.seed=0,2', **{RATE: 0.1})
    assert (row.count, row.setting.fields) == (2, {})
    assert row.mean == pytest.approx(0.31)


@pytest.mark.slow
def test_a_grid_grows(objective, tmp_path):
    objective(by_rate)
    start(tmp_path / 's', f'{RATE}=0.1,0.3')
    made = objective(by_rate)
    rows = start(tmp_path / 's', f'{RATE}=0.3,0.2,0.1', 'train.seed=1,0')
    assert table(rows) == table(
        start(tmp_path / 'new', f'{RATE}=0.3,0.2,0.1', 'train.seed=1,0')
    )
    of_s = [name for name in made.trained if name.startswith(str(tmp_path / 's'))]
    assert sorted(os.path.relpath(name, tmp_path / 's') for name in of_s) == [
        'trials/001/seed1',
        'trials/002/seed1',
        'trials/003/seed0',
        'trials/003/seed1',
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ('flags', 'options', 'message'),
    [
        ([f'{RATE}=0.1'], {}, f'with {RATE}=0.3, which is left out; values can only'),
        ([f'{RATE}=0.1,0.3', 'train.seed=1'], {}, 'with train.seed=0, which is left'),
        ([f'{RATE}=0.1,0.3'], {'optimizer.momentum': 0.5}, 'momentum=0.9, not 0.5'),
        (['optimizer.momentum=0.1'], {}, f'over {RATE}, not optimizer.momentum'),
        ([f'{RATE}=0.1,0.3'], {'prune': 'median'}, 'with another --prune'),
        ([f'{RATE}=0.1,0.3'], {'trials': 1}, 'with another --trials'),
    ],
)
def test_another_sweep_of_the_same_folder(objective, tmp_path, flags, options, message):
    objective(by_rate)
    workdir = tmp_path / 's'
    start(workdir, f'{RATE}=0.1,0.3', epochs=1)
    before = (workdir / 'sweep.json').read_bytes()
    with pytest.raises(UserError) as error:
        start(workdir, *flags, epochs=1, **options)
    assert f'--workdir={workdir} holds a sweep' in str(error.value)
    assert message in str(error.value)
    assert (workdir / 'sweep.json').read_bytes() == before


def peaked(rate, seed, epoch):
    """Best at a rate of 0.01."""
    return 1 / (1 + abs(rate - 0.01)) + 0.01 * epoch - 0.001 * seed


SPACE = f'{RATE}=1e-4..1', 'optimizer.name=adam,sgd', 'train.seed=0,1'


@pytest.mark.slow
def test_a_search(objective, tmp_path):
    """It grows by trials to what it would have been, and by nothing else."""
    objective(peaked)
    axes = SPACE[:2]
    rows = start(tmp_path / 's', *axes, trials=4, epochs=1)
    assert len(rows) == 4
    more = start(tmp_path / 's', *axes, trials=12, epochs=1)
    new = start(tmp_path / 'new', *axes, trials=12, epochs=1)
    assert table(more) == table(new)
    assert {row.folder for row in rows} <= {row.folder for row in more}
    kept = sweep_record.load(str(tmp_path / 's'))
    assert list(kept.importances)[0] == RATE
    assert sum(kept.importances.values()) == pytest.approx(1)
    # What the command repeats is what was trained.
    assert all(len(s.fields[RATE].strip('0.e-')) <= 4 for s in kept.settings)
    with pytest.raises(UserError, match='that searches among other values .*0.001'):
        start(tmp_path / 's', f'{RATE}=1e-3..1', *axes[1:], trials=12, epochs=1)
    with pytest.raises(UserError, match='of 12 trials, more than --trials=3'):
        start(tmp_path / 's', *axes, trials=3, epochs=1)


@pytest.mark.slow
def test_a_search_of_few_choices_ends(objective, tmp_path, capsys, monkeypatch):
    objective(by_rate)
    monkeypatch.setattr(sweep_runner, '_REPEATS', 5)
    rows = start(tmp_path / 's', f'{RATE}=0.1,0.2', trials=3)
    assert len(rows) == 2
    assert 'the search ends with 2 settings: 5 suggestions' in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize('prune', slow_after(1, ['median', 'halving']))
def test_pruning(objective, tmp_path, prune):
    """What falls behind ends early, and is not trained with the other seed."""
    made = objective(by_rate)
    good = ','.join(f'0.{place}' for place in range(50, 56))
    rows = start(
        tmp_path / 's',
        f'{RATE}={good},0.1',
        'train.seed=0,1',
        prune=prune,
        epochs=9,
    )
    last = rows[-1]
    assert last.setting.fields == {RATE: '0.1'}
    epochs = {'median': 3, 'halving': 1}[prune]
    assert last.state == f'pruned at epoch {epochs}' and last.count == 1
    assert made.trained[f'{tmp_path}/s/trials/007/seed0'] == epochs
    assert f'{tmp_path}/s/trials/007/seed1' not in made.trained
    # Those that rise last are never behind.
    assert {row.state for row in rows[:1]} == {'done'}


@pytest.mark.slow
def test_no_pruning_after_the_last_epoch(objective, tmp_path):
    """Nor of later seeds, whose epochs nobody is told."""
    objective(by_rate)
    good = ','.join(f'0.{place}' for place in range(50, 56))
    flags = f'{RATE}={good},0.1', 'train.seed=0,1'
    rows = start(tmp_path / 's', *flags, prune='median', epochs=2)
    assert {(row.state, row.count) for row in rows} == {('done', 2)}


@pytest.mark.slow
def test_interrupted_anywhere(objective, monkeypatch, tmp_path):
    """Ended at each call in turn, it comes to the table of one that never was."""
    options = dict(trials=8, prune='median', epochs=3)
    objective(peaked)
    whole = start(tmp_path / 'whole', *SPACE, **options)
    made = objective(peaked)
    for kind, name in (
        (optuna_study.Tuner, 'ask'),
        (optuna_study.Tuner, 'report'),
        (optuna_study.Tuner, 'finish'),
        (sweep_record.SweepRecord, 'save'),
    ):
        monkeypatch.setattr(kind, name, _dying(made, getattr(kind, name)))
    for dies_at in range(1, 100, 3):
        made.events, made.dies_at = [], dies_at
        try:
            rows = start(tmp_path / 's', *SPACE, **options)
            break
        except KeyboardInterrupt:
            pass
    assert dies_at > 10
    assert table(rows) == table(whole)
    assert any(row.setting.state == 'pruned' for row in rows)


def _dying(made, call):
    """Dies before it, and the next time after it."""

    def wrapped(*args, **kwargs):
        made.happens(call.__name__)
        found = call(*args, **kwargs)
        made.happens(call.__name__)
        return found

    return wrapped


@pytest.mark.slow
def test_failures(objective, tmp_path, capsys):
    """A setting that fails is told of, and the others are trained."""

    def figure(rate, seed, epoch):
        if rate == 0.3 and seed == 1:
            raise UserError('the loss is not finite')
        if rate == 0.2:
            raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory')
        return rate

    made = objective(figure)
    flags = f'{RATE}=0.3,0.2,0.1', 'train.seed=0,1,2'
    rows = start(tmp_path / 's', *flags)
    said = [(row.setting.fields[RATE], row.state, row.count) for row in rows]
    assert said == [('0.1', 'done', 3), ('0.3', 'failed', 1), ('0.2', 'failed', 0)]
    assert rows[1].setting.why == 'the loss is not finite'
    out = capsys.readouterr().out
    assert 'trial 001 failed: the loss is not finite' in out
    assert '2 failed; --retry_failed trains them again' in out
    assert 'out of memory' in out and 'goes on from' not in out
    made = objective(by_rate)
    start(tmp_path / 's', *flags)
    assert made.trained == {}
    rows = start(tmp_path / 's', *flags, retry=True)
    assert [row.state for row in rows] == ['done'] * 3
    assert f'{tmp_path}/s/trials/001/seed0' not in made.trained


@pytest.mark.slow
def test_all_fail(objective, tmp_path):
    def figure(*_):
        raise UserError('no')

    objective(figure)
    with pytest.raises(UserError, match='all 2 settings failed, the first with: no'):
        start(tmp_path / 's', f'{RATE}=0.1,0.2')


@pytest.mark.parametrize('error', [OSError(28, 'No space left'), RuntimeError('bug')])
def test_what_ends_all(objective, tmp_path, error):
    """What the other settings would meet too ends the sweep, which can go on."""

    def figure(*_):
        if isinstance(error, OSError):
            raise UserError('saving failed') from error
        raise error

    objective(figure)
    with pytest.raises(UserError if isinstance(error, OSError) else RuntimeError):
        start(tmp_path / 's', f'{RATE}=0.1,0.2')
    made = objective(by_rate)
    assert [row.state for row in start(tmp_path / 's', f'{RATE}=0.1,0.2')] == [
        'done',
        'done',
    ]
    assert len(made.trained) == 2


def test_places(objective, tmp_path, monkeypatch):
    """A folder in use, of a run, with files that are not ours; without Optuna."""
    objective(by_rate)
    flag = f'{RATE}=0.1,0.2'
    used = pytest.raises(UserError, match='is in use: process')
    with lock.hold(str(tmp_path / 's')), used:
        start(tmp_path / 's', flag)
    (tmp_path / 's' / 'metrics.jsonl').touch()
    with pytest.raises(UserError, match='holds a run; a sweep needs a folder of its'):
        start(tmp_path / 's', flag)
    start(tmp_path / 'b', flag)
    (tmp_path / 'b' / optuna_study.FILE).unlink()
    with pytest.raises(UserError, match='sweep.db cannot be used .it lacks trial 0'):
        start(tmp_path / 'b', flag)
    (tmp_path / 'b' / optuna_study.FILE).write_bytes(b'x' * 5000)
    with pytest.raises(UserError, match='sweep.db cannot be used .file is not a data'):
        start(tmp_path / 'b', flag)
    monkeypatch.setitem(sys.modules, 'optuna', None)
    with pytest.raises(UserError, match=r"pip install 'flax_densenet\[sweep\]'"):
        start(tmp_path / 'c', flag)
    assert not (tmp_path / 'c').exists()

"""Sweeps of real runs: data read once, runs that end early or are killed."""

import csv
import functools
import signal
import subprocess
import sys
import time

import pytest

from configs import base
from flax_densenet.checkpoints import run_folder
from flax_densenet.cli import options as cli_options
from flax_densenet.cli import sweep as sweep_command
from flax_densenet.data import dataset
from flax_densenet.report import page
from flax_densenet.sweeps import plan as sweep_plan
from flax_densenet.sweeps import table as sweep_table
from flax_densenet.train import fit as fit_lib
from helpers.paths import ROOT
from helpers.runs import tiny_config

RATE = 'optimizer.learning_rate'


def test_data_is_looked_through_once(monkeypatch):
    looked, load = [], dataset.from_settings
    monkeypatch.setattr(
        dataset, 'from_settings', lambda *groups: looked.append(0) or load(*groups)
    )
    config = base.get_config()
    config.update_from_flattened_dict(
        {'model.variant': 'BC-L10k4', 'data.image_size': 8}
    )
    for flags, count in (
        ([f'{RATE}=1e-4,1e-3', 'data.batch_size=32,64'], 1),
        (['data.image_size=8,12', 'data.augment=none,flip'], 2),
    ):
        looked.clear()
        override = functools.partial(sweep_command.override, config)
        sweep_plan.Plan(
            cli_options.to_dict(config), flags, override, None, 'none'
        ).check()
        assert len(looked) == count


TINY = {'model.block_sizes': (1, 1)}  # as others, which compiled it


@pytest.mark.slow
def test_a_run_that_ends_early(tmp_path):
    """`ends_after` is told each epoch; the same call goes on from there."""
    told = []
    config = tiny_config(**TINY)

    def ends(record):
        told.append(record['epoch'])
        return True

    assert fit_lib.fit(config, str(tmp_path), ends_after=ends).best['epoch'] == 1
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert (told, len(lines)) == ([1], 1)
    fit_lib.fit(config, str(tmp_path), ends_after=ends)
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert (told, len(lines)) == ([1, 2], 2)


FLAGS = [
    '--mode=sweep',
    '--config.model.variant=BC-L10k4',
    '--config.model.block_sizes=(1,)',
    '--config.data.image_size=8',
    '--config.data.batch_size=128',
    '--config.train.epochs=2',
    f'--sweep={RATE}=3e-3,1e-2',
    '--sweep=train.seed=0,1',
]


def command(workdir):
    launcher = [sys.executable, str(ROOT / 'launch.py')]
    return [*launcher, *FLAGS, f'--workdir={workdir}']


def results(workdir):
    with open(workdir / sweep_table.FILE, newline='') as file:
        return [row | {'seconds': ''} for row in csv.DictReader(file)]


@pytest.mark.exhaustive
def test_killed(tmp_path):
    """Killed and interrupted, the same command comes to the same table and weights."""
    done = subprocess.run(command(tmp_path / 'whole'), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f'{RATE}' not in done.stderr and 'Traceback' not in done.stderr
    whole = results(tmp_path / 'whole')
    assert [row['seeds'] for row in whole] == ['2', '2']
    workdir = tmp_path / 's'
    marks = ('001/seed1/checkpoints', signal.SIGKILL), ('002/seed0', signal.SIGINT)
    for mark, signum in marks:
        with subprocess.Popen(
            command(workdir), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as running:
            deadline = time.monotonic() + 600
            while not (workdir / 'trials' / mark).exists():
                assert time.monotonic() < deadline and running.poll() is None
                time.sleep(0.02)
            running.send_signal(signum)
            err = running.communicate(timeout=60)[1].decode()
        assert running.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[signum], (
            err
        )
        if signum == signal.SIGINT:
            assert 'run the same command to resume' in err
            assert 'Traceback' not in err
    done = subprocess.run(command(workdir), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert results(workdir) == whole
    for name in ('001/seed1', '002/seed0'):
        one, other = (
            run_folder.load_run(str(folder / 'trials' / name)).records
            for folder in (tmp_path / 'whole', workdir)
        )
        assert [r['test_loss'] for r in one] == [r['test_loss'] for r in other]
        assert len(one) == 2
        assert not (workdir / 'trials' / name / page.REPORT_FILE).exists()

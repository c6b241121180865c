"""Runs that are killed or stopped end with the bits of one that was not."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from faults.trainings import EPOCHS, FULL, ROOT, STEPS, TINY, XLA_FLAGS, forks, whole  # noqa: F401
from flax_densenet.checkpoints import reader as checkpoint_reader
from helpers.runs import assert_equal_bits, final_arrays, read_records

pytestmark = pytest.mark.faults

TIMINGS = ('seconds', 'images_per_second', 'input_wait_share', 'memory_gib')
TIMINGS += ('peak_memory_gib',)


def assert_same_run(one, other):
    (step, arrays), (other_step, other_arrays) = final_arrays(one), final_arrays(other)
    assert step == other_step == STEPS
    assert_equal_bits(arrays, other_arrays)
    records = [read_records(path) for path in (one, other)]
    for record in [*records[0], *records[1]]:
        for name in TIMINGS:
            record.pop(name)
    assert records[0] == records[1]
    assert len(records[0]) == EPOCHS


def is_saving(workdir):
    folder = workdir / 'checkpoints'
    return folder.exists() and any(
        name.startswith('tmp-') for name in os.listdir(folder)
    )


def steps_saved(workdir):
    """Of the newest complete checkpoint."""
    found = checkpoint_reader.find_all(str(workdir))
    return found[-1].step if found else 0


def kill_somewhere(training, workdir, draw, in_save):
    """Kills so many steps after the start, and some milliseconds."""
    training.has_begun()  # or there is nothing left to do
    goal = steps_saved(workdir) + draw.randint(0, 9 if FULL else 6)
    end = None
    while training.is_alive():
        now = time.monotonic()
        if end is None and steps_saved(workdir) >= goal:
            end = now + draw.uniform(0, 0.05)
        if end is not None and now >= end and (not in_save or is_saving(workdir)):
            training.kill(signal.SIGKILL)
            break
        time.sleep(0.0005)


def test_kills(forks, whole, tmp_path):
    """At seeded moments from the first step on; a run that ends is compared."""
    draw, kills, saving, runs = random.Random(7), 50 if FULL else 3, 0, 0
    left = kills
    while left:
        workdir, resumed, status = tmp_path / f'run{runs}', [], None
        while status != 0:
            training = forks.start(workdir)
            if left:
                kill_somewhere(training, workdir, draw, in_save=left % 2)
            status = training.wait()
            resumed += re.findall(r'resuming \w+ epoch \d(.*) in /', training.text)
            if status:
                assert status == -signal.SIGKILL, training.text
                left -= 1
                saving += is_saving(workdir)
        print(f'run {runs}: {len(resumed)} times resumed: {resumed}')
        assert_same_run(whole, workdir)
        assert resumed
        assert not is_saving(workdir)
        runs += 1
    print(f'{kills} kills, {saving} of them in a save, {runs} runs')
    assert saving


@pytest.mark.parametrize(
    ('signum', 'status', 'every'),
    [(signal.SIGTERM, 143, ''), (signal.SIGINT, 130, '0.001 minutes')],
)
def test_signals(forks, whole, tmp_path, signum, status, every):
    """The run saves in the middle of an epoch, and goes on from there."""
    training = forks.start(tmp_path / 'run', **{'train.checkpoint_every': every})
    # Drawn beside the first step; before it there would be nothing to save.
    training.wait_for((tmp_path / 'run' / 'samples.png').exists)
    if every:
        training.wait_for(lambda: steps_saved(tmp_path / 'run'))
    training.kill(signum)
    assert training.wait() == status, training.text
    last = training.text.splitlines()[-1]
    name = signal.Signals(signum).name
    found = re.fullmatch(
        rf'stopped by {name}: step (\d+), in epoch \d, is saved; run the same '
        r'command to resume',
        last,
    )
    assert found, training.text
    assert (tmp_path / 'run' / 'checkpoints' / f'mid-{found[1]}').is_dir()
    done, text = forks.run(tmp_path / 'run')
    assert done == 0 and f'after step {found[1]}, in' in text, text
    assert_same_run(whole, tmp_path / 'run')


def test_a_signal_in_evaluation(forks, whole, tmp_path, monkeypatch):
    """An epoch whose steps are taken is measured by the next start."""
    script = (
        'import os, signal, sys; sys.argv[0] = "launch.py"\n'
        'import launch\n'
        'from flax_densenet.data import pipeline\n'
        'make = pipeline.eval_batches\n'
        'def stop(*args, **kwargs):\n'
        '    os.kill(os.getpid(), signal.SIGTERM)\n'
        '    return make(*args, **kwargs)\n'
        'pipeline.eval_batches = stop\n'
        'sys.exit(launch.main(sys.argv))\n'
    )
    args = [f'--config.{name}={value}' for name, value in TINY.items()]
    done = subprocess.run(
        [sys.executable, '-c', script, *args, f'--workdir={tmp_path}/run'],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {'XLA_FLAGS': XLA_FLAGS},
    )
    assert done.returncode == 143, done.stderr
    assert 'stopped by SIGTERM: step 6, in epoch 1, is saved' in done.stderr
    assert 'Epoch' not in done.stdout
    assert forks.run(tmp_path / 'run')[0] == 0
    assert_same_run(whole, tmp_path / 'run')


def test_a_second_signal_leaves_at_once(forks, whole, tmp_path):
    """Decoding processes go with it; what was saved stays whole."""
    fields = {'data.workers': 1, 'train.epochs': 500, 'train.checkpoint_every': ''}
    training = forks.start(tmp_path / 'run', **fields)
    training.wait_for('Epoch:  1')
    children = training.children()
    assert children
    training.kill(signal.SIGSTOP)  # both are there when it goes on
    training.kill(signal.SIGINT)
    training.kill(signal.SIGTERM)
    training.kill(signal.SIGCONT)
    assert training.wait() in (130, 143)
    assert 'is saved' not in training.text
    end = time.monotonic() + 120
    while any(os.path.exists(f'/proc/{child}') for child in children):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert forks.run(tmp_path / 'run')[0] == 0
    assert_same_run(whole, tmp_path / 'run')


@pytest.mark.parametrize('signum', [signal.SIGINT, signal.SIGKILL])
def test_no_process_is_left(forks, tmp_path, signum):
    fields = {'data.workers': 1, 'train.epochs': 500}
    training = forks.start(tmp_path / 'run', **fields)
    training.wait_for('Epoch:  1')
    children = training.children()
    assert children
    for number in [training.number, *children] if signum == signal.SIGINT else ():
        os.kill(number, signum)  # as a terminal does
    if signum == signal.SIGKILL:
        training.kill(signum)
    status = training.wait()
    assert status == (130 if signum == signal.SIGINT else -signum), training.text
    assert ('is saved' in training.text) == (signum == signal.SIGINT)
    end = time.monotonic() + 300
    while left := [child for child in children if os.path.exists(f'/proc/{child}')]:
        assert time.monotonic() < end, left
        time.sleep(0.1)


def test_the_second_training_of_a_folder_is_refused(forks, tmp_path):
    training = forks.start(tmp_path / 'run', **{'train.epochs': 500})
    training.wait_for('Epoch:  1')
    status, text = forks.run(tmp_path / 'run', **{'train.epochs': 500})
    assert status == 2
    assert f'is in use: process {training.number} on ' in text
    status, text = forks.run(tmp_path / 'run', '--mode=eval', tiny={})  # is free
    assert status == 0 and 'Test_acc' in text, text
    training.kill(signal.SIGKILL)
    training.wait()
    training = forks.start(tmp_path / 'run', **{'train.epochs': 500})
    training.wait_for('resuming')  # a crash leaves no lock
    training.kill(signal.SIGKILL)
    training.wait()

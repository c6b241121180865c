"""Full and read-only disks, folders that go, bytes that flip."""

import contextlib
import os
import random
import shutil
import subprocess
import sys

import pytest

from faults.trainings import EPOCHS, FULL, STEPS, TINY, forks, whole  # noqa: F401
from flax_densenet import UserError
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.checkpoints import writer as checkpoint_writer
from flax_densenet.train import fit
from flax_densenet.weights import trained
from helpers.marks import exhaustive_after
from helpers.runs import final_arrays, read_records, tiny_config

pytestmark = pytest.mark.faults


@contextlib.contextmanager
def mounted(path, *options):
    """A small file system of its own at a folder; the test is skipped where it may not.

    As root a folder without write permission can be written all the same.
    """
    path.mkdir()
    done = subprocess.run(
        ['mount', '-t', 'tmpfs', *options, 'tmpfs', str(path)], capture_output=True
    )
    if done.returncode:
        pytest.skip('mount is not allowed here')
    try:
        yield path
    finally:
        subprocess.run(['umount', '-l', str(path)], check=True)


def fill(folder):
    """Writes a file until nothing more can be written."""
    with (
        contextlib.suppress(OSError),
        open(folder / 'filling', 'wb', buffering=0) as file,
    ):
        while True:
            file.write(bytes(4096))


def fields_of(tiny):
    return tiny_config(**tiny)


def test_a_disk_that_fills_up(forks, whole, tmp_path, monkeypatch):
    """The run ends with one line and its last checkpoint, and goes on with room."""
    with mounted(tmp_path / 'disk', '-o', 'size=6m') as disk:
        training = forks.start(disk / 'run', **{'train.epochs': 500})
        training.wait_for('Epoch:  1')
        fill(disk)
        status = training.wait()
        lines = training.text.splitlines()
        assert status == 2, training.text
        assert lines[-1].startswith('error: '), training.text
        assert 'No space left' in lines[-1] and 'resume from the last' in lines[-1]
        assert sum('again in' in line for line in lines) == 3
        assert 'Traceback' not in training.text
        latest = checkpoint_reader.find_latest(str(disk / 'run'))
        assert (
            checkpoint_reader.check(
                checkpoint_reader.folder_of(str(disk / 'run'), latest)
            )
            == ''
        )
        (disk / 'filling').unlink()
        training = forks.start(disk / 'run', **{'train.epochs': 500})
        training.wait_for(f'after step {latest.step},' if not latest.finished else 'on')
        training.wait_for('Epoch: ')
        training.kill(9)
        training.wait()


SAVES = """
import sys, types
import numpy as np
from flax_densenet import UserError
from flax_densenet.checkpoints import reader, writer
writer.PAUSES_SECONDS = ()
writer.shutil.disk_usage = lambda folder: types.SimpleNamespace(free=1 << 40)
arrays = {f'{number}': np.random.rand(1000).astype('f4') for number in range(200)}
for folder in sys.argv[1:]:
    try:
        with writer.open_saver(folder) as saver:
            saver.save(reader.Checkpoint(1, False), model=arrays, train=arrays,
                       metadata={}, records=[])
        print('saved')
    except UserError as error:
        print(error)
"""


def test_a_disk_that_fills_up_within_a_save(tmp_path):
    """Wherever that is, no thread of a library prints a traceback beside the line."""
    with contextlib.ExitStack() as stack:
        disks = [
            stack.enter_context(mounted(tmp_path / f'{size}k', '-o', f'size={size}k'))
            for size in range(100, 2600, 40 if FULL else 300)
        ]
        command = [sys.executable, '-c', SAVES, *map(str, disks)]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == ''
    lines = done.stdout.splitlines()
    assert len(lines) == len(disks)
    assert lines[-1] == 'saved'
    assert all('cannot be saved (' in line or line == 'saved' for line in lines)
    assert sum('No space left' in line for line in lines) >= len(lines) // 2


def test_a_disk_that_is_emptied_again(forks, tmp_path):
    with mounted(tmp_path / 'disk', '-o', 'size=6m') as disk:
        training = forks.start(disk / 'run', **{'train.epochs': 500})
        training.wait_for('Epoch:  1')
        fill(disk)
        training.wait_for('again in 1 s')
        (disk / 'filling').unlink()
        epoch = training.text.count('Epoch:')
        training.wait_for(lambda: training.text.count('Epoch:') > epoch + 1)
        training.kill(15)
        assert training.wait() == 143, training.text


def test_a_disk_that_is_read_only(forks, whole, tmp_path):
    """What is there can be used, and training says that it cannot go on."""
    with mounted(tmp_path / 'disk', '-o', 'size=6m') as disk:
        shutil.copytree(whole, disk / 'run')
        remount = ['mount', '-o', 'remount,ro', str(disk)]
        subprocess.run(remount, check=True)
        loaded = trained.load_trained(str(disk / 'run'), 'best')
        assert loaded.metrics['test_accuracy'] > 0
        status, text = forks.run(disk / 'run')
        assert status == 2 and 'cannot be written (Read-only' in text
        assert len(text.splitlines()) == 1


def test_a_folder_that_vanishes(forks, tmp_path):
    """The next checkpoint makes it again."""
    training = forks.start(tmp_path / 'run', **{'train.epochs': 500})
    training.wait_for('Epoch:  1')
    os.rename(tmp_path / 'run', tmp_path / 'away')
    training.wait_for(lambda: checkpoint_reader.has_checkpoint(str(tmp_path / 'run')))
    training.kill(15)
    assert training.wait() == 143, training.text
    training = forks.start(tmp_path / 'run', **{'train.epochs': 500})
    training.wait_for('resuming')
    training.kill(9)
    training.wait()


def flip(path, draw):
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(content))


def test_a_flipped_byte(whole, tmp_path):
    """In every file of the newest checkpoint in turn: it is found and not used."""
    draw = random.Random(3)
    newest = checkpoint_reader.folder_of(
        str(whole), checkpoint_reader.find_latest(str(whole))
    )
    names = [
        os.path.relpath(os.path.join(at, name), newest)
        for at, _, found in os.walk(newest)
        for name in found
        if os.path.getsize(os.path.join(at, name))
    ]
    assert len(names) > 15
    times = 20 if FULL else 1
    for name in names if FULL else draw.sample(names, 8):
        for _ in range(times):
            folder = tmp_path / 'copy'
            shutil.copytree(newest, folder)
            assert checkpoint_reader.check(str(folder)) == ''
            flip(folder / name, draw)
            reason = checkpoint_reader.check(str(folder))
            # A hash that changed cannot tell itself from its file.
            assert name in reason or (
                reason and name == checkpoint_reader.CHECKSUMS_FILE
            )
            shutil.rmtree(folder)


@pytest.mark.parametrize(
    'damage', exhaustive_after(2, ['flip', 'remove', 'cut', 'metrics'])
)
def test_a_bad_checkpoint_is_left_out(whole, tmp_path, damage, capsys):
    """The run goes on from the newest good one, to where it would have come."""
    workdir = tmp_path / 'run'
    shutil.copytree(whole, workdir)
    newest = workdir / 'checkpoints' / f'{STEPS}'
    if damage == 'flip':
        flip(newest / 'model' / 'manifest.ocdbt', random.Random(1))
    elif damage == 'cut':
        (newest / 'metadata' / 'metadata').write_text('{"numb')
    elif damage == 'remove':
        shutil.rmtree(newest / 'train')
    else:
        (newest / 'metrics' / 'metrics').write_text(
            '{"test_accuracy": 2.0, "test_loss": 0.0}'
        )
    if damage == 'metrics':  # the best of the good ones
        assert checkpoint_reader.find_step(str(workdir), 'best') != STEPS
    fit.fit(fields_of(TINY), str(workdir))
    out = capsys.readouterr().out
    assert f'warning: bad checkpoint {newest}: ' in out
    assert f'resuming in epoch {EPOCHS}, after step {STEPS - 1},' in out
    assert (workdir / 'checkpoints' / f'bad-{STEPS}').is_dir()
    assert checkpoint_reader.check(str(newest)) == ''
    assert final_arrays(workdir)[0] == STEPS
    assert [record['epoch'] for record in read_records(workdir)] == [
        *range(1, EPOCHS + 1)
    ]


def test_none_is_whole(whole, tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(whole, workdir)
    for folder in (workdir / 'checkpoints').iterdir():
        flip(folder / 'train' / 'manifest.ocdbt', random.Random(1))
    for call in (
        lambda: fit.fit(fields_of(TINY), str(workdir)),
        lambda: trained.load_trained(str(workdir)),
    ):
        with pytest.raises(UserError, match='none of its checkpoints is intact'):
            call()


def test_saving_in_spite_of_old_parts(tmp_path):
    folder = tmp_path / 'checkpoints'
    (folder / 'tmp-4' / 'model').mkdir(parents=True)
    (folder / '60.orbax-checkpoint-tmp').mkdir()
    with checkpoint_writer.open_saver(str(tmp_path)):
        assert list(folder.iterdir()) == []

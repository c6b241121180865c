"""Several processes on this machine, as on several hosts: gloo between CPUs."""

import csv
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from flax_densenet import UserError
from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.distributed import native_errors
from flax_densenet.distributed import processes as processes_lib
from flax_densenet.train import fit
from helpers.marks import exhaustive_after
from helpers.paths import ROOT
from helpers.process_groups import Processes
from helpers.runs import (
    HARD,
    assert_equal_bits,
    final_arrays,
    read_records,
    tiny_config,
    write_images,
)

TINY = HARD | {
    'model.variant': 'BC-L10k4',
    'model.block_sizes': (1,),
    'data.image_size': 8,
    'optimizer.name': 'sgd',
    'optimizer.learning_rate': 0.05,
    'train.tensorboard': False,
    'train.report': False,
}
# Relative to the largest parameter of an array; see test_elastic.
BOUND = 2e-5


def start(folder, count, workdir, *flags, of_process=None, **fields):
    return Processes(
        folder,
        count,
        f'--workdir={workdir}',
        # On a busy machine, a process may get no time for ten seconds.
        '--heartbeat_timeout_seconds=30',
        *flags,
        of_process=of_process,
        **(TINY | fields),
    )


def step_saved(workdir):
    found = checkpoint_reader.find_all(str(workdir))
    return found[-1].step if found else 0


def largest_difference(one, other):
    """Over the arrays, in units of the largest number of each."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    return max(
        np.abs(np.asarray(a, float) - b).max() / max(np.abs(a).max(), 1e-3)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('h:1', 2, None), 'go together'),
        ((None, 2, 0), 'go together'),
        (('h:1', None, None), 'go together'),
        (('h', 2, 1), '--coordinator=h must be HOST:PORT'),
        (('h:99999', 2, 1), 'must be HOST:PORT'),
        (('h:1', 0, 0), '--num_processes=0 must be at least 1'),
        (('h:1', 2, 2), '--process_id=2 must be from 0 to 1, as --num_processes=2'),
        (('h:1', 2, -1), '--process_id=-1 must be from 0 to 1'),
    ],
)
def test_flags(arguments, message, monkeypatch):
    monkeypatch.delenv('JAX_COORDINATOR_ADDRESS', raising=False)
    with pytest.raises(UserError, match=message):
        processes_lib.check(*arguments)


def test_the_coordinator_of_the_environment(monkeypatch):
    assert processes_lib.check(None, None, None) is None
    monkeypatch.setenv('JAX_COORDINATOR_ADDRESS', 'h:1')
    assert processes_lib.check(None, None, None) == 'h:1'
    assert processes_lib.check(None, 2, 1) == 'h:1'
    assert processes_lib.check('g:1', 2, 1) == 'g:1'


def test_a_taken_port():
    with socket.socket() as taken:
        taken.bind(('', 0))
        taken.listen()
        address = f'127.0.0.1:{taken.getsockname()[1]}'
        with pytest.raises(UserError, match='port cannot be used .*choose another'):
            processes_lib.check(address, 2, 0)
        assert (
            processes_lib.check(address, 2, 1) == address
        )  # of another machine's port


def test_alone_there_is_nothing_to_wait_for():
    assert (processes_lib.is_first(), processes_lib.count(), processes_lib.index()) == (
        True,
        1,
        0,
    )
    processes_lib.barrier('here')
    assert processes_lib.broadcast('x', lambda: 5) == 5
    assert processes_lib.gather('x', 5) == [5]


@pytest.mark.parametrize(
    ('said', 'line'),
    [
        ('Failed to add port to server: No address', 'port is in use'),
        ('INVALID_ARGUMENT: Unexpected task registered with task=3', '--process_id'),
        ('DEADLINE_EXCEEDED\n\nRPC: /x.CoordinationService/RegisterTask', 'not all'),
        ('unhealthy (stopped sending heartbeats):\n1\n2\nThe tasks', 'process 1, 2 st'),
        ('UNAVAILABLE: Failed to send RPC', 'process 0 has ended'),
    ],
)
def test_what_cpp_says_is_one_line(said, line):
    found = native_errors.explain(said)
    assert line in found and '\n' not in found


ABORTS = """
import os, sys
sys.path.insert(0, sys.argv[1])
from flax_densenet.distributed import native_errors
native_errors.redirect()
print('to stdout')
print('to stderr', file=sys.stderr)
os.write(1, b'[Gloo] Rank ')
os.write(1, b'0 is connected to 1 peer ranks.')
os.write(1, b'\\n')
os.write(2, b'W1125 a.cc:1] a warning\\n')
if len(sys.argv) > 2:
    os.write(2, b'F1125 client.h:86] Terminating process because the JAX distributed '
        b'service detected fatal errors. UNAVAILABLE\\n')
    for _ in range(50):
        os.write(2, b'    @  0x1234 frame()\\n')
os.abort()
"""


@pytest.mark.parametrize('fatal', [True, False])
def test_an_abort_of_the_cluster_is_one_line_and_2(fatal):
    """Every other message and abort stays what it is."""
    done = subprocess.run(
        [sys.executable, '-c', ABORTS, ROOT, *['fatal'] * fatal],
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = done.stderr.splitlines()
    assert sorted(lines[:2]) == ['W1125 a.cc:1] a warning', 'to stderr']
    if fatal:
        assert done.returncode == 2
        assert done.stdout == 'to stdout\n'
        assert len(lines) == 3
        assert lines[2].startswith(
            'error: process 0 has ended, or the network to it is down; '
        )
    else:
        assert done.returncode == -signal.SIGABRT
        assert len(lines) == 2


@pytest.mark.slow
def test_no_cluster(tmp_path):
    """Also: nobody comes."""
    with (
        Processes(tmp_path, 1, '--process_id=', '--num_processes=') as lost,
        start(
            tmp_path / 'x',
            1,
            tmp_path,
            '--num_processes=2',
            '--initialization_timeout=1',
        ) as alone,
    ):
        assert (lost.wait(), alone.wait()) == ([2], [2])
        assert lost.error(0).count('\n') == alone.error(0).count('\n') == 1
        assert alone.error(0).startswith('error: not all processes joined within')


def stop_one(folder, count, workdir, every):
    """All processes stop if one is; returns the last step that they saved."""
    with start(folder, count, workdir, **every) as several:
        several.wait_for(lambda: step_saved(workdir) >= 4)
        several.kill(count - 1, signal.SIGTERM)  # one alone
        assert several.wait() == [143] * count
        first = step_saved(workdir)
        line = (
            rf'stopped by SIGTERM: (step {first}, in epoch \d,|epoch \d) is saved; '
            r'run the same command to resume\n'
        )
        assert re.fullmatch(line, several.error(0))
        assert {several.error(n) for n in range(1, count - 1)} <= {''}
        assert {several.out(n) for n in range(1, count)} == {''}
    return first


@pytest.mark.slow
@pytest.mark.parametrize('count', exhaustive_after(1, [0, 2, 4]))
def test_elastic(count, tmp_path):
    """Several processes, then 2, then 1, stopped and killed: the run of one process.

    With a count of 0, the run begins with two.

    Each example has the same place, augmentation and dropout in the same step. Sums
    over devices have another order, so float32 differs in its last digits (6e-8), which
    27 steps make some more of. With SGD, since Adam makes steps of full length of
    gradients that are nothing but rounding.
    """
    workdir, every = tmp_path / 'run', {'train.checkpoint_every': '2 steps'}
    first = stop_one(tmp_path / 'first', count, workdir, every) if count else 0
    with start(tmp_path / '2', 2, workdir, **every) as two:
        two.wait_for(lambda: step_saved(workdir) >= first + 4)
        two.kill(1)
        assert two.wait(180) == [2, -signal.SIGKILL]
        error = two.error(0)
        assert re.match(r'error: process 1 (\(.*\) )?stopped responding', error)
        assert 'resume from the last checkpoint' in error and error.count('\n') == 1
        if first:
            resumed = f'after step {first},' in two.out(0)
            assert resumed or 'after epoch' in two.out(0)
    second = step_saved(workdir)
    assert first + 4 <= second < 27
    with start(tmp_path / '1', 1, workdir, **every) as one:
        assert one.wait() == [0], one.error(0)
    whole = tmp_path / 'whole'
    fit.fit(tiny_config(**TINY), str(whole))
    (step, arrays), (other_step, others) = final_arrays(whole), final_arrays(workdir)
    assert step == other_step == 27
    assert 0 < largest_difference(arrays, others) < BOUND
    for mine, its in zip(read_records(whole), read_records(workdir), strict=True):
        assert its['train_count'] == mine['train_count'] == 539
        for name in ('train_loss', 'test_loss'):
            assert its[name] == pytest.approx(mine[name], rel=1e-4)


COUNTS = """
import json, os, sys
import launch
from flax_densenet.data import labeled_images
names = open(os.environ['COUNTS'] + sys.argv[4][-1], 'w')
get = labeled_images.Examples.__getitem__
def count(self, position):
    print(self.name(int(position)), file=names, flush=True)
    return get(self, position)
labeled_images.Examples.__getitem__ = count
sys.exit(launch.main(sys.argv))
"""


@pytest.mark.exhaustive
@pytest.mark.slow
def test_two_equal_runs_and_what_each_process_reads(tmp_path, monkeypatch):
    photos = write_images(tmp_path / 'photos', {'a': 15, 'b': 14}, size=(12, 12))
    program = tmp_path / 'counts.py'
    program.write_text(COUNTS)
    options = TINY | {
        'data.source': f'folder:{photos}',
        'data.test_fraction': 0.3,
        'data.batch_size': 8,
        'train.epochs': 2,
        # Which would read images again at the end.
        'train.calibrate': False,
        'train.unusual': 'off',
    }
    arrays, read = [], []
    for run in ('a', 'b'):
        monkeypatch.setenv('COUNTS', f'{tmp_path}/{run}')
        workdir = f'--workdir={tmp_path}/{run}-run'
        with Processes(
            tmp_path / run, 2, workdir, program=program, **options
        ) as processes:
            assert processes.wait() == [0, 0], processes.error(0)
        arrays.append(final_arrays(pathlib.Path(f'{tmp_path}/{run}-run'))[1])
        read.append([(tmp_path / f'{run}{n}').read_text().split() for n in (0, 1)])
    assert_equal_bits(*arrays)
    records = read_records(tmp_path / 'a-run')
    assert [record['train_count'] for record in records] == [20, 20]
    # Of 20 images to train on each is read twice, of 9 to test on, filled up to 16,
    # each process reads its half, twice; a few more for the shapes and the picture.
    for number in (0, 1):
        assert 2 * (10 + 8) <= len(read[0][number]) <= 2 * (10 + 8) + 40


@pytest.mark.exhaustive
def test_one_that_fails_or_hangs_ends_the_others(tmp_path):
    workdirs = [tmp_path / name for name in ('killed', 'hangs', 'error', 'other')]
    many = {'train.epochs': 300}
    with (
        start(tmp_path / 'k', 2, workdirs[0], **many) as killed,
        start(tmp_path / 'h', 2, workdirs[1], **many) as hangs,
        start(
            tmp_path / 'e',
            2,
            workdirs[2],
            of_process={1: ['--config.data.source=folder:/nowhere']},
        ) as error,
        start(
            tmp_path / 'o', 2, workdirs[3], of_process={1: ['--config.train.seed=5']}
        ) as other,
    ):
        assert other.wait() == [2, 2]
        said = r'train.seed is 5 on process 1 \(.*\) and 0 on process 0'
        assert re.match(f'error: {said}', other.error(1))
        assert error.wait() == [2, 2]
        said = 'data.source=folder:/nowhere'
        assert error.error(1).startswith(f'error: {said}')
        assert re.match(rf'error: ended with process 1 \(.*\): {said}', error.error(0))
        assert [error.error(n).count('\n') for n in (0, 1)] == [1, 1]
        killed.wait_for(lambda: step_saved(workdirs[0]))
        hangs.wait_for(lambda: step_saved(workdirs[1]))
        killed.kill(0)
        hangs.kill(1, signal.SIGSTOP)
        assert killed.wait(180) == [-signal.SIGKILL, 2]
        line = (
            'error: process 0 has ended, or the network to it is down; start all '
            'processes'
        )
        assert killed.error(1).startswith(line) and killed.error(1).count('\n') == 1
        assert hangs.processes[0].wait(180) == 2
        assert re.match(r'error: process 1 .*stopped responding', hangs.error(0))
        assert hangs.error(0).count('\n') == 1
    for workdir in workdirs[:2]:
        latest = checkpoint_reader.find_all(str(workdir))[-1]
        assert (
            checkpoint_reader.check(checkpoint_reader.folder_of(str(workdir), latest))
            == ''
        )


@pytest.mark.exhaustive
def test_every_image_counts_once(tmp_path):
    """Predictions and evaluation by three processes are those of one."""
    workdir = tmp_path / 'run'
    photos = write_images(tmp_path / 'photos', {'a': 17, 'b': 16}, size=(12, 12))
    (photos / 'b' / '003.jpg').write_bytes(b'no image')
    options = TINY | {'data.source': f'folder:{photos}', 'data.batch_size': 12}
    options |= {'train.epochs': 1, 'data.bad_images': 'skip', 'data.test_fraction': 0.5}
    fit.fit(tiny_config(**options), str(workdir))
    found = {}
    for count in (3, 1):
        out = tmp_path / f'{count}.csv'
        predicting = Processes(
            tmp_path / f'p{count}',
            count,
            *('--mode=predict', f'--workdir={workdir}', f'--files={photos}'),
            *(f'--out={out}', f'--features={tmp_path}/{count}.npz'),
            **{'data.batch_size': 4},
        )
        evaluating = Processes(
            tmp_path / f'e{count}', count, '--mode=eval', f'--workdir={workdir}'
        )
        with predicting, evaluating:
            assert predicting.wait() == [1] * count, predicting.error(0)
            assert evaluating.wait() == [0] * count, evaluating.error(0)
            assert '\n1 of 33 files could not be read' in predicting.error(0)
            assert [predicting.error(n) for n in range(1, count)] == [''] * (count - 1)
        with out.open(newline='') as file:
            rows = list(csv.reader(file))
        with (workdir / 'predictions.csv').open(newline='') as file:
            rows += csv.reader(file)
        figures = json.loads((workdir / 'eval.json').read_text())
        found[count] = rows, figures, np.load(tmp_path / f'{count}.npz')
    (rows, figures, features), (others, its, their) = found[3], found[1]
    assert figures['count'] == its['count'] == 16
    assert figures['accuracy'] == its['accuracy']
    assert [row[0] for row in rows] == [row[0] for row in others]
    for row, other in zip(rows, others, strict=True):
        for one, two in zip(row, other, strict=True):
            if re.fullmatch(r'[\d.e-]+', one):
                assert float(one) == pytest.approx(float(two), abs=1e-5)
            else:
                assert one == two
    assert features['paths'].tolist() == their['paths'].tolist()
    np.testing.assert_allclose(features['features'], their['features'], atol=1e-5)

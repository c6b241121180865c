"""Each choice of the step on eight devices is a step on one that means the same.

In double precision, so that the bound is one on what is computed, not on rounding: two
runs that differ in their statistics are some 1e-2 apart (`test_choices_differ`).
"""

import json
import os

import numpy as np
import pytest

from benchmarks import exchange
from helpers import forks
from helpers.device_runs import RUNS

pytestmark = pytest.mark.slow

BOUND = 1e-12
SAME_ROWS = ('one', 'eight', 'groups of 8', 'own rows', 'parts of 8 in shards')
PAIRS = [
    ('groups in a device', 'groups of 2'),
    ('dropout on eight', 'dropout on one'),
    ('frozen on three', 'frozen on one'),
]
# `make test-exhaustive` runs these.
OTHER_PAIRS = [
    ('two', 'one'),
    ('four', 'one'),
    ('parts of own rows', 'groups of 2'),
    ('groups of two devices', 'groups of 16'),
    ('shards on three', 'one of 48'),
    ('parts of labels', 'labels'),
    ('parts of frozen', 'frozen on one'),
]


def start(out, names):
    """The runs of these names in a program of its own, with eight devices."""
    flags = os.environ['XLA_FLAGS'].replace('device_count=4', 'device_count=8')
    done = forks.run(
        'import sys; from helpers import device_runs; device_runs.main(*sys.argv[1:])',
        *(out, *names),
        environment={'XLA_FLAGS': flags, 'JAX_ENABLE_X64': '1'},
    )
    assert done.returncode == 0, done.stderr
    arrays, found = np.load(f'{out}.npz'), {name: {} for name in names}
    for key, array in arrays.items():
        name, _, rest = key.partition('/')
        found[name][rest] = array
    return found, json.loads((out.parent / f'{out.name}.json').read_text())


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    names = {name for pair in PAIRS for name in pair}
    names |= {*SAME_ROWS, 'bad part', 'eight again'}
    return start(tmp_path_factory.mktemp('devices') / 'runs', sorted(names))


@pytest.fixture(scope='module')
def others(tmp_path_factory):
    names = {name for pair in OTHER_PAIRS for name in pair}
    return start(tmp_path_factory.mktemp('devices') / 'others', sorted(names))


def _split(arrays):
    """The running sums apart from the rest."""
    sums = {key: value for key, value in arrays.items() if key.startswith('running/')}
    return {key: arrays[key] for key in arrays.keys() - sums.keys()}, sums


def distance(one, other):
    assert one.keys() == other.keys() and len(one) > 15
    return max(np.abs(one[key] - other[key].astype(float)).max() for key in one)


def assert_same(found, pairs):
    arrays, infos = found
    for name, other in pairs:
        (one, sums), (two, others) = map(_split, (arrays[name], arrays[other]))
        assert distance(one, two) < BOUND, (name, other)
        for key, value in sums.items():  # in float32
            np.testing.assert_allclose(value, others[key], rtol=1e-6)
        assert infos[name]['loss'] == pytest.approx(infos[other]['loss'], abs=BOUND)


def test_eight_devices_are_one(runs):
    assert_same(runs, [('eight', 'one')])


def test_equal_runs_are_equal_bit_for_bit(runs):
    arrays, _ = runs
    for key, array in arrays['eight'].items():
        assert array.tobytes() == arrays['eight again'][key].tobytes()


def test_own_rows_are_groups_of_their_number(runs):
    assert_same(runs, [('own rows', 'groups of 8')])


def test_accumulated_steps_are_groups_of_their_rows(runs):
    """With class weights, penalty and clipping; the optimizer in shards."""
    assert_same(runs, [('parts of 8 in shards', 'groups of 8')])


def test_choices_differ(runs):
    """Else what is above would say nothing."""
    arrays, _ = runs
    assert distance(arrays['one'], arrays['groups of 8']) > 1e-3


def test_running_sums_are_those_of_all_rows(runs):
    for name in SAME_ROWS:
        arrays = runs[0][name]
        # The first of three batches of 64 moves the sums to the next epoch and so on.
        assert arrays['running/count'].sum() == 3 * 64, name
        assert arrays['running/loss'].sum() == pytest.approx(
            64 * sum(runs[1][name]['loss']), rel=1e-5
        )


def test_own_rows_exchange_nothing_in_the_forward_pass(runs):
    _, infos = runs
    everywhere, own = (infos[name]['exchange'] for name in ('eight', 'own rows'))
    size = infos['eight']['bytes']
    # Three figures for each channel, as they are born; their two gradients.
    assert everywhere['operations'] > 10
    assert everywhere['forward'] > 0 and everywhere['backward'] > size['params']
    # One for gradients and the running averages, and those of the epoch's figures.
    assert own['operations'] <= 4
    assert own['forward'] == size['batch_stats']
    assert own['backward'] == size['params']
    assert own['other'] < 100


def test_what_loops_exchange_is_counted_each_time(runs):
    whole, parts = (
        runs[1][name]['exchange'] for name in ('eight', 'parts of 8 in shards')
    )
    for direction in ('forward', 'backward'):
        assert parts[direction] == 8 * whole[direction]
    names = ['step/transpose(f)/a/b', 'step/transpose(f)/a/c', 'step/d']
    assert exchange._expand('step/(transpose(f)/(a/(b:c)):d)') == names


def test_the_optimizer_in_shards(runs):
    _, infos = runs
    whole, shards = (
        infos[name]['optimizer_bytes'] for name in ('eight', 'parts of 8 in shards')
    )
    parameters = infos['eight']['bytes']['params']
    assert whole == [2 * parameters + 4] * 8
    # Two values for each parameter, filled up to eight equal parts, and the counter.
    assert shards == [2 * -(-parameters // 64) * 8 + 4] * 8
    exchanged = infos['parts of 8 in shards']['exchange']
    assert exchanged['all-gather'] == -(-parameters // 64) * 64
    # One gather of all updates, beside what eight parts exchange.
    one = infos['eight']['exchange']['operations']
    assert exchanged['operations'] <= 8 * one + 1


def test_memory_of_accumulated_steps(runs):
    """Of what a device holds for eight rows, about an eighth, beside the gradients."""
    _, infos = runs
    whole, parts = (
        infos[name]['temporary'] for name in ('eight', 'parts of 8 in shards')
    )
    assert parts < whole / 4


def test_choices(runs):
    assert_same(runs, PAIRS)


@pytest.mark.exhaustive
def test_every_choice(others):
    assert_same(others, OTHER_PAIRS)
    names = {name for pair in PAIRS + OTHER_PAIRS for name in pair}
    assert set(RUNS) == names | {*SAME_ROWS, 'bad part'}
    assert others[1]['parts of frozen']['kept'] == ['denseblock1', 'transition1']


def test_frozen_statistics_keep_their_bits(runs):
    for name in ('frozen on three', 'frozen on one'):
        assert runs[1][name]['kept'] == ['denseblock1', 'transition1']
    assert runs[1]['groups of 2']['kept'] == []


def test_a_bad_part_skips_the_step(runs):
    """One row of the third of four parts; nothing moves, nothing is counted."""
    arrays, infos = runs
    assert np.isnan(infos['bad part']['loss']).all()
    assert infos['bad part']['kept'] == ['denseblock1', 'norm5']
    assert arrays['bad part']['running/count'].sum() == 0

"""`benchmarks.gpu`: the same code as on a GPU, small, and what it is made of."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import gpu, gpu_report, hlo_bytes
from flax_densenet import create_model
from helpers.paths import ROOT


@pytest.mark.exhaustive
@pytest.mark.slow
def test_small(tmp_path, monkeypatch, capfd):
    """One way and one set of flags that XLA does not know; no file of a run changes."""
    monkeypatch.setenv('PEERS', '/nowhere/python')
    monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')
    monkeypatch.setitem(gpu.FLAGS, 'unknown', '--xla_gpu_no_such_flag=1')
    monkeypatch.setitem(gpu.SMALL, 'small', gpu.SMALL['small'] | {'block_sizes': (1,)})
    before = (ROOT / 'docs' / 'benchmarks_gpu.md').read_text()
    results = tmp_path / 'results.jsonl'
    gpu.main(
        [
            *('--small', '--only=flags', '--best=buffer', '--flags=none,unknown'),
            *('--rounds=2', f'--results={results}'),
        ]
    )
    said = capfd.readouterr().out.splitlines()
    assert any('no Python with torch' in line for line in said)
    figures = json.loads(said[-1])
    assert figures['best_way'] == 'buffer' and figures['images_per_second'] > 0
    assert figures['gpu_train_vs_torch_compile'] is None
    failed = [line for line in gpu_report.read(results) if 'failed' in line]
    assert [line['failed'] for line in failed] == ['unknown']
    assert 'no_such_flag' in failed[0]['reason']
    assert 'unknown failed' in '\n'.join(said)
    assert (ROOT / 'docs' / 'benchmarks_gpu.md').read_text() == before


@pytest.mark.slow
def test_flags_are_known():
    """XLA ends a process at an unknown flag; those of a GPU are parsed on a CPU too."""
    flags = ' '.join(gpu.FLAGS.values())
    done = subprocess.run(
        [sys.executable, '-c', 'import jax; jax.devices()'],
        env=os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('known', [True, False])
@pytest.mark.parametrize('fits', [32, 1000, 1312, 5000])
def test_largest(known, fits):
    tried = []

    def attempt(batch):
        assert batch % 32 == 0 and batch not in tried
        tried.append(batch)
        # Memory is not quite proportional to the batch.
        return None if batch > fits else (batch + 20) / (fits + 20) * known

    low, high = gpu.largest(attempt, 256, 32, 1 << 14, lambda: 1)
    assert (low, high) == (fits // 32 * 32, fits // 32 * 32 + 32)
    assert len(tried) < 14


def test_largest_stops_when_the_time_is_up():
    left = iter([1, 1, 0])
    assert gpu.largest(lambda batch: 0, 4, 4, 99, lambda: next(left)) == (8, None)


def line(contender, values, part='ways', task='train', group=0, **facts):
    shared = {'part': part, 'task': task, 'group': group, 'contender': contender}
    facts = {'device': 'H', 'mb_per_image': 400, 'least_mb': 150} | facts
    rows = {'images_per_second': values, 'peak_gib': [1.0]}
    return [
        shared | {'figure': name, 'values': row, 'facts': facts}
        for name, row in rows.items()
    ]


def test_medians_and_table():
    lines = [
        *line('torch_compile', [1000.0, 2000.0]),
        *line('concat', [1500.0, 3000.0]),
        *line('torch_compile', [1000.0, 1000.0], group=1),
        *line('fused', [2000.0, 2000.0], group=1),
        {'part': 'ways', 'task': 'train', 'group': 0, 'contender': 'copy'}
        | {'figure': 'gb_per_second', 'values': [2000.0], 'facts': {'device': 'H'}},
        {'part': 'batch', 'contender': 'ours', 'largest': 640, 'too_large': 672},
        {'part': 'profile', 'way': 'fused', 'operations': [[1.5, 2, 'conv']]},
    ]
    found = gpu_report.medians(lines)
    # By the ratio in its own rounds, though concat had the quicker minutes.
    assert found['best_way'] == 'fused'
    assert found['gpu_train_vs_torch_compile'] == 2
    assert found['bandwidth_share'] == 0.4  # 2000 x 400 MB of 2000 GB
    assert found['bandwidth_share_of_least'] == 0.15
    assert found['largest_batch'] == 640 and found['torch_largest_batch'] is None
    table = gpu_report.table(lines)
    assert '| fused | 2000.0 (2000.0 to 2000.0) | 2.00 |' in table
    assert '| ours | 640 | 672 |' in table and '| 1.50 | 2 | conv |' in table


def test_merge():
    old = [
        *line('torch_compile', [1.0], group=0),
        *line('concat', [1.0], group=0),
        *line('torch_compile', [1.0], group=1),
        *line('fused', [1.0], group=1),
        {'part': 'batch', 'contender': 'ours', 'largest': 1, 'too_large': 2},
    ]
    new = [*line('torch_compile', [2.0], group=2), *line('fused', [3.0], group=2)]
    found = gpu_report.merge(old, 'ways', new)
    assert found == [*old[:4], old[-1], *new]


def test_least_bytes():
    """By hand, for one block of one layer on 8x8 pixels without a stem's stride."""
    model = create_model(
        'BC-L10k4', num_classes=2, block_sizes=(1,), stem_features=8, growth_rate=4
    )
    values = 64 * (4 * 8 + 6 * 16 + 2 * 4) + 64 * 3 * 12
    assert hlo_bytes.least(model, 8) == 2 * values
    imagenet = create_model('densenet121', num_classes=1000)
    assert 140e6 < hlo_bytes.least(imagenet, 224) < 170e6


HLO = """\
HloModule m

%fused_update (p0: bf16[64,256], p1: bf16[64,32]) -> bf16[64,256] {
  %p0 = bf16[64,256]{1,0} parameter(0)
  %p1 = bf16[64,32]{1,0} parameter(1)
  %zero = s32[] constant(0)
  ROOT %u = bf16[64,256]{1,0} dynamic-update-slice(%p0, %p1, %zero, %zero)
}

%fused_slice (p2: bf16[64,256]) -> f32[64,16] {
  %p2 = bf16[64,256]{1,0} parameter(0)
  %s = bf16[64,16]{1,0} slice(%p2), slice={[0:64], [0:16]}
  ROOT %c = f32[64,16]{1,0} convert(%s)
}

ENTRY %main (a: bf16[64,256], b: bf16[64,32], w: bf16[96,128]) -> f32[64,16] {
  %a = bf16[64,256]{1,0} parameter(0)
  %b = bf16[64,32]{1,0} parameter(1)
  %w = bf16[96,128]{1,0} parameter(2)
  %update.1 = bf16[64,256]{1,0} fusion(%a, %b), kind=kLoop, calls=%fused_update
  %k = bf16[64,128]{1,0} custom-call(%a, %w), custom_call_target="__gpu$xla.gpu.triton"
  ROOT %slice.2 = f32[64,16]{1,0} fusion(%update.1), kind=kLoop, calls=%fused_slice
}
"""


def test_counted_bytes():
    """In place: the update alone; a slice: the slice; a kernel: what it touches."""
    pixels = 64
    assert hlo_bytes.count(HLO) == {
        'update': pixels * 32 * 2 * 2,
        '__gpu$xla.gpu.triton': (pixels * (96 + 128) + 96 * 128) * 2,
        'slice': pixels * 16 * (2 + 4),
    }

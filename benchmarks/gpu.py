"""DenseNet-121 on one GPU, compared with torch: bfloat16, batch 256, 224x224, Adam.

  make bench-gpu                                  all parts
  python -m benchmarks.gpu --only=ways,flags      some of them
  python -m benchmarks.gpu --small                the same code on a CPU, tiny

Parts: `ways` (implementations of the block, see `gpu_ways`), `flags` (of XLA, for the
best implementation), `torch` (all contenders of torch, and plain Linen, in training and
inference), `batch` (the largest batch that fits) and `profile` (where the time of a
step goes). New measurements replace the old lines of the same kind in the results, so
parts can be run one by one; the table is made from all of them.

Contenders are processes that take turns. Not all of them fit into the memory of the
GPU, since JAX keeps what it has allocated. Those of torch return their cached memory
after each turn and stay for an entire part. Ours start in groups of `GROUP`, prepare at
the same time while nothing is measured, take turns with those of torch, and end. Each
of ours therefore shares its rounds with torch, and ratios are computed for each round.
If a contender fails, the reason is reported.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
import time

from benchmarks import gpu_report, gpu_turns
from benchmarks.gpu_contender import Spec

ROOT = pathlib.Path(__file__).parents[1]
GROUP = 3
PARTS = ('ways', 'flags', 'torch', 'batch', 'profile')
# name -> fields of Spec; without `way` the package as it is.
WAYS = {
    'concat': dict(),
    'concat none': dict(fields={'remat': 'none'}),
    'pallas': dict(way='pallas'),
    'fused': dict(way='fused'),
    'fused gather': dict(way='fused', pool='gather'),
    'buffer': dict(way='buffer'),
    'forward': dict(way='forward'),
    'pieces': dict(way='pieces'),
    'pieces none': dict(way='pieces', fields={'remat': 'none'}),
    'conv1x1': dict(way='conv1x1'),
    'nchw': dict(way='nchw'),
}
# XLA in JAX 0.10 to 0.12 supports all of them; it exits if a flag is unknown.
FLAGS = {
    'none': '',
    'latency hiding': '--xla_gpu_enable_latency_hiding_scheduler=true',
    'no command buffers': '--xla_gpu_enable_command_buffer=',
    'all command buffers': (
        '--xla_gpu_enable_command_buffer='
        'FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION'
        ' --xla_gpu_graph_min_graph_size=1'
    ),
    'autotune 0': '--xla_gpu_autotune_level=0',
    'all tilings': '--xla_gpu_exhaustive_tiling_search=true',
    'cudnn gemm': '--xla_gpu_cudnn_gemm_fusion_level=3',
    'no triton gemm': '--xla_gpu_enable_triton_gemm=false',
    'conv nhwc': '--xla_gpu_force_conv_nhwc=true',
    'conv nchw': '--xla_gpu_force_conv_nchw=true',
}
SMALL = dict(
    batch=4,
    size=32,
    classes=10,
    steps=1,
    small=dict(block_sizes=(2, 1, 1, 1), growth_rate=8, stem_features=16),
)


class Run:
    """Settings of a run, and what was found so far.

    Attributes:
      base: the workload, a Spec without kind.
      lines: of the results file.
    """

    def __init__(self, options):
        self.rounds = options.rounds or (2 if options.small else 5)
        self.small, self.torch_max = options.small, options.torch_max
        self.end = time.monotonic() + 60 * options.minutes
        self.base = Spec('', **SMALL) if self.small else Spec('')
        self.ways = {name: WAYS[name] for name in options.ways or WAYS}
        self.flags = {name: FLAGS[name] for name in options.flags or FLAGS}
        self.results = pathlib.Path(options.results or _results(self.small))
        self.lines = gpu_report.read(self.results)
        self.best = options.best or gpu_report.best_way(self.lines) or 'concat'
        self.best_flags = gpu_report.best_flags(self.lines) or 'none'
        self.ours = os.environ.get('OURS', sys.executable)
        peers = os.environ.get('PEERS', str(ROOT / '.venv-peers' / 'bin' / 'python'))
        self.peers = peers if _runs(peers) else None
        self.logs = tempfile.mkdtemp(prefix='bench-gpu-')

    def spec(self, kind, **fields):
        return dataclasses.replace(self.base, kind=kind, **fields)

    def best_spec(self, **fields):
        return self.spec('ours', **(WAYS[self.best] | fields))

    def left(self):
        return self.end - time.monotonic()


def _results(small):
    if small:
        return pathlib.Path(tempfile.mkdtemp(prefix='bench-gpu-')) / 'small.jsonl'
    return ROOT / 'benchmarks' / 'results_gpu.jsonl'


def _runs(python):
    return os.system(f'"{python}" -c "import torch" >/dev/null 2>&1') == 0


def _torch_kinds(run, *names):
    """The contenders of torch that can run here; prints which cannot."""
    if run.peers is None:
        print('no Python with torch: set PEERS; its contenders are left out')
        return []
    if run.small:
        print('on the CPU torch runs as it is, torch.compile is left out')
        return ['torch']
    return list(names)


def _compare(run, part, ours, torch, flags=None, task='train'):
    """Runs ours in groups, torch's in all of them; returns lines of results."""
    group, lines = gpu_turns.Group(run), []
    kinds = _torch_kinds(run, *torch)
    group.start({kind: run.spec(kind, task=task) for kind in kinds})
    names = list(ours)
    for first in range(0, len(names), GROUP):
        when = time.time()  # ratios are taken within a group
        chosen = names[first : first + GROUP]
        group.start({name: ours[name] for name in chosen}, flags)
        found = group.measure(run.rounds)
        for name, figures in found.items():
            facts = figures.pop('facts')[-1]
            for figure, values in figures.items():
                lines.append(
                    {'part': part, 'task': task, 'group': when, 'contender': name}
                    | {'figure': figure, 'values': values, 'facts': facts}
                )
        group.close(*chosen)
    group.close()
    for name, reason in group.failed.items():
        lines.append({'part': part, 'task': task, 'failed': name, 'reason': reason})
    return lines


def ways(run):
    ours = {name: run.spec('ours', **fields) for name, fields in run.ways.items()}
    ours = {'copy': run.spec('copy')} | ours
    return _compare(run, 'ways', ours, ['torch_compile'])


def flags(run):
    ours = {name: run.best_spec() for name in run.flags}
    lines = _compare(run, 'flags', ours, ['torch_compile'], run.flags)
    return [line | {'way': run.best} for line in lines]


def torch(run):
    kinds = ('torch', 'torch_compile', *(('torch_max',) if run.torch_max else ()))
    lines = _compare(
        run,
        'torch',
        {'ours': run.best_spec(), 'linen': run.spec('linen')},
        kinds,
        {'ours': FLAGS[run.best_flags]},
    )
    infer = {
        way or 'concat': run.spec('ours', task='infer', way=way)
        for way in ('', 'buffer', 'pallas', 'fused')
    }
    return lines + _compare(run, 'torch', infer, kinds, task='infer')


def largest(attempt, start, step, most, left):
    """The largest batch that fits: `(largest, smallest that does not, or None)`.

    The first success says how much memory an image takes, and so where to look; from
    there on bisection. Batches are multiples of `step`.

    Args:
      attempt: batch -> share of the memory taken, 0 where unknown; None: does not fit.
      left: seconds that are left; it stops, with a wider gap, when there are none.
    """
    low, high, batch = 0, None, start
    while batch > low and left() > 0:
        share = attempt(batch)
        if share is None:
            high = batch
        else:
            low = batch
        if high is None:
            guess = 0.97 * low / share if share else 2 * low
            batch = min(most, max(low + step, int(guess) // step * step))
        else:
            batch = (low + high) // 2 // step * step
    return low, high


def batch(run):
    """Finds the largest batch; each attempt is a separate process."""
    lines = []
    specs = {'ours': run.best_spec()}
    for kind in _torch_kinds(run, 'torch_compile', 'torch'):
        specs[kind] = run.spec(kind)
    share = run.left() / len(specs)
    for name, spec in specs.items():
        end = time.monotonic() + share

        def attempt(size, name=name, spec=spec):
            group = gpu_turns.Group(run)
            group.start(
                {name: dataclasses.replace(spec, batch=size, steps=2)},
                {'ours': FLAGS[run.best_flags]},
            )
            found = group.measure(1).get(name)
            group.close()
            line = {'part': 'batch', 'contender': name, 'batch': size}
            if not found:
                reason = group.failed.get(name, '')
                lines.append(line | {'reason': reason})
                if not gpu_turns.OUT_OF_MEMORY.search(reason):
                    raise RuntimeError(f'batch {size}: {reason}')
                return None
            memory = found['facts'][0].get('memory_gib')
            lines.append(
                line
                | {'images_per_second': found['images_per_second'][0]}
                | {'peak_gib': found['peak_gib'][0], 'memory_gib': memory}
            )
            return found['peak_gib'][0] / memory if memory else 0

        step, most = (2, 8) if run.small else (32, 1 << 14)
        try:
            low, high = largest(
                attempt, spec.batch, step, most, lambda end=end: end - time.monotonic()
            )
        except RuntimeError as error:
            lines.append({'part': 'batch', 'failed': name, 'reason': str(error)})
            continue
        lines.append(
            {'part': 'batch', 'contender': name, 'largest': low, 'too_large': high}
        )
    return lines


def profile(run):
    """Profiles without command buffers, which hide operations from the profiler."""
    group = gpu_turns.Group(run)
    flags = f'{FLAGS[run.best_flags]} {FLAGS["no command buffers"]}'
    group.start({'profile': run.best_spec(task='profile')}, {'profile': flags})
    found = group.measure(1)
    group.close()
    if not found:
        reason = group.failed.get('profile')
        return [{'part': 'profile', 'failed': 'profile', 'reason': reason}]
    operations = found['profile']['found'][0]
    return [{'part': 'profile', 'way': run.best, 'operations': operations}]


def _options(arguments):
    def names(text):
        return text.split(',')

    parser = argparse.ArgumentParser(prog='python -m benchmarks.gpu')
    parser.add_argument('--only', type=names, default=list(PARTS), help=str(PARTS))
    parser.add_argument('--small', action='store_true', help='tiny, on a CPU')
    parser.add_argument('--ways', type=names, help=f'some of {list(WAYS)}')
    parser.add_argument('--flags', type=names, help=f'some of {list(FLAGS)}')
    parser.add_argument('--best', help='the way of all parts but ways')
    parser.add_argument('--rounds', type=int)
    parser.add_argument(
        '--torch-max',
        action='store_true',
        help="torch.compile's longest search too: minutes more",
    )
    parser.add_argument('--minutes', type=float, default=9.0, help='at most, in all')
    parser.add_argument('--results', help='file of results, to be read and written')
    return parser.parse_args(arguments)


def main(arguments=None):
    options = _options(arguments)
    run = Run(options)
    parts = dict(ways=ways, flags=flags, torch=torch, batch=batch, profile=profile)
    for part in options.only:
        found = parts[part](run)
        run.lines = gpu_report.merge(run.lines, part, found)
        if part == 'ways' and not options.best:
            run.best = gpu_report.best_way(run.lines) or run.best
        run.best_flags = gpu_report.best_flags(run.lines) or 'none'
        gpu_report.write(run.results, run.lines)
        print(f'{part}: done', file=sys.stderr, flush=True)
    table = gpu_report.table(run.lines)
    if run.small:
        print(table)
    else:
        gpu_report.write_table(ROOT / 'docs' / 'benchmarks_gpu.md', table)
    print(json.dumps(gpu_report.medians(run.lines)))


if __name__ == '__main__':
    main()

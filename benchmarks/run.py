"""The full comparison of DenseNet-121 and BC-L100k12 with torch, Keras, plain Linen.

  make bench
  .venv/bin/python -m benchmarks.run TASK ...   # of TASKS, or start; printed alone

It writes benchmarks/results.jsonl (one line per metric) and the table in
docs/benchmarks.md. The last line that it prints is a JSON object with the medians.
"""

import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

from benchmarks import sidebyside

ROOT = pathlib.Path(__file__).parents[1]
PEERS = str(ROOT / '.venv-peers' / 'bin' / 'python')
ROUNDS = int(os.environ.get('ROUNDS', 7))
# task -> contenders that take turns
TASKS = {
    'train': (
        *('ours', 'torch', 'torch_contiguous', 'linen', 'keras'),
        *('ours_bf16', 'torch_bf16'),
    ),
    'infer': (
        *('ours', 'torch', 'torch_contiguous', 'linen', 'keras'),
        *('ours_bf16', 'torch_bf16'),
    ),
    'cifar': ('ours', 'torch', 'linen'),
    'cifar_plain': ('ours', 'torch', 'linen'),
    'rdnet': ('ours', 'torch', 'ours_bf16', 'torch_bf16'),
    'rdnet_infer': ('ours', 'torch', 'ours_bf16', 'torch_bf16'),
}
# Of `ours`; of a peer in bfloat16 those of `ours_bf16`, where it takes part.
RATIOS = {  # name -> task, figure, peer
    'train_bf16_vs_torch_bf16': ('train', 'images_per_second', 'torch_bf16'),
    'memory_bf16_vs_torch_bf16': ('train', 'peak_gib', 'torch_bf16'),
    'inference_bf16_vs_torch_bf16': ('infer', 'images_per_second', 'torch_bf16'),
    'train_vs_torch': ('train', 'images_per_second', 'torch'),
    'train_vs_linen': ('train', 'images_per_second', 'linen'),
    'train_vs_keras': ('train', 'images_per_second', 'keras'),
    'memory_vs_torch': ('train', 'peak_gib', 'torch'),
    'memory_vs_linen': ('train', 'peak_gib', 'linen'),
    'inference_vs_torch': ('infer', 'images_per_second', 'torch'),
    'inference_vs_linen': ('infer', 'images_per_second', 'linen'),
    'cifar_train_vs_torch': ('cifar', 'images_per_second', 'torch'),
    'cifar_plain_train_vs_torch': ('cifar_plain', 'images_per_second', 'torch'),
    'rdnet_train_vs_torch': ('rdnet', 'images_per_second', 'torch'),
    'rdnet_train_vs_torch_bf16': ('rdnet', 'images_per_second', 'torch_bf16'),
    'rdnet_inference_vs_torch': ('rdnet_infer', 'images_per_second', 'torch'),
    'rdnet_inference_vs_torch_bf16': (
        *('rdnet_infer', 'images_per_second', 'torch_bf16'),
    ),
}


def _command(name, task):
    python = sys.executable if name in ('ours', 'ours_bf16', 'linen') else PEERS
    return [python, '-m', 'benchmarks.contenders', name, task]


def measure_task(task):
    """`{contender: {metric: [rounds]}}`; all stay in memory, one runs at a time."""
    contenders = {
        name: sidebyside.Contender(_command(name, task), KERAS_BACKEND='jax')
        for name in TASKS[task]
    }
    found = sidebyside.alternate(contenders, ROUNDS)
    for contender in contenders.values():
        contender.close()
    return found


def measure_start(rounds=3):
    """Seconds from the command to the end of the first step, DenseNet-121 at 224x224.

    The command is `launch.py` with a folder of photographs. A cold start has empty
    caches and also compiles the C++ kernel; a warm start runs the command again.
    `{cold_start_s, warm_start_s, linen_cold_start_s, linen_warm_start_s: [rounds]}`
    """
    found = {}
    for number in range(rounds):
        order = ('', 'linen') if number % 2 == 0 else ('linen', '')
        for contender in order:
            with tempfile.TemporaryDirectory() as folder:
                _write_photographs(f'{folder}/photos')
                for name in ('cold_start_s', 'warm_start_s'):
                    seconds = _start(folder, name, contender)
                    key = f'{contender}_{name}'.lstrip('_')
                    found.setdefault(key, []).append(seconds)
    return found


def _start(folder, workdir, contender):
    environment = dict(os.environ)
    environment.pop('JAX_COMPILATION_CACHE_DIR', None)
    start = time.perf_counter()
    subprocess.run(
        [
            *(sys.executable, '-m', 'benchmarks.start'),
            *(f'{folder}/photos', f'{folder}/{workdir}', contender or 'ours'),
        ],
        env=environment | {'XDG_CACHE_HOME': folder},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - start


def _start_ratios(found):
    """Ours by plain Linen's; below 1 where we start sooner."""
    return {
        f'{name}_start_vs_linen': sidebyside.ratio(
            found[f'{name}_start_s'], found[f'linen_{name}_start_s']
        )
        for name in ('cold', 'warm')
    }


def _write_photographs(folder, classes=2, count=100):
    """Writes JPEGs of noise, as large as photographs from a web page."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        os.makedirs(f'{folder}/{label}')
        for number in range(count):
            pixels = rng.integers(0, 256, (60, 80, 3), np.uint8)
            image = Image.fromarray(pixels).resize((640, 480))
            image.save(f'{folder}/{label}/{number}.jpg')


def measure_depth():
    """Time and memory of one block of 6 to 48 layers; see `depth`."""
    done = subprocess.run(
        [sys.executable, '-m', 'benchmarks.depth'], check=True, stdout=subprocess.PIPE
    )
    return json.loads(done.stdout)


def main(tasks):
    """Measures everything and writes files; with tasks, only prints their results."""
    lines, tables = [], {}
    for task in [task for task in tasks or TASKS if task != 'start']:
        tables[task] = found = measure_task(task)
        for name, figures in found.items():
            for figure, values in figures.items():
                summary = sidebyside.summarize(values)
                lines.append({'task': task, 'contender': name, 'figure': figure})
                lines[-1] |= summary | {'values': values}
        print(f'{task}: done', file=sys.stderr, flush=True)
    ratios = {
        name: _ratio(tables[task], figure, peer)
        for name, (task, figure, peer) in RATIOS.items()
        if task in tables
    }
    if not tasks or 'start' in tasks:
        started = measure_start()
        ratios |= _start_ratios(started)
        ratios |= {name: sidebyside.summarize(v) for name, v in started.items()}
    medians = {name: round(found['median'], 3) for name, found in ratios.items()}
    if tasks:
        lines += [{'ratio': name} | summary for name, summary in ratios.items()]
        print(*map(json.dumps, lines), json.dumps(medians), sep='\n')
        return
    depth = measure_depth()
    lines += [{'ratio': name} | summary for name, summary in ratios.items()]
    lines.append({'depth': depth})
    results = ROOT / 'benchmarks' / 'results.jsonl'
    results.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    _write_table(tables, ratios, depth)
    print(json.dumps(medians))


def _ratio(found, figure, peer):
    ours = 'ours_bf16' if peer.endswith('bf16') and 'ours_bf16' in found else 'ours'
    return sidebyside.ratio(found[ours][figure], found[peer][figure])


def _machine():
    model = next(
        line.split(':')[1].strip()
        for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines()
        if line.startswith('model name')
    )
    versions = subprocess.run(
        [
            PEERS,
            '-c',
            'import torch, keras, jax; '
            'print("torch", torch.__version__, "Keras", keras.__version__, "on JAX", '
            'jax.__version__)',
        ],
        env=os.environ | {'KERAS_BACKEND': 'jax'},
        capture_output=True,
        text=True,
    ).stdout.strip()
    import jax

    return (
        f'{os.cpu_count()} cores of {model}, Python {platform.python_version()}, JAX '
        f'{jax.__version__}; peers: Python 3.11, {versions}'
    )


def _write_table(tables, ratios, depth):
    """Replaces the text between the marks in docs/benchmarks.md."""
    titles = {
        'train': 'Training step, DenseNet-121, batch 16, 224x224, Adam',
        'infer': 'Inference, DenseNet-121, batch 16, 224x224',
        'cifar': 'Training step, BC-L100k12, batch 64, 32x32, float32, Adam',
        'cifar_plain': (
            'Training step, L40k12 with dropout, batch 64, 32x32, float32, Adam'
        ),
        'rdnet': 'Training step, RDNet-T, batch 8, 224x224, Adam',
        'rdnet_infer': 'Inference, RDNet-T, batch 8, 224x224',
    }
    out = [f'{_machine()}; `make bench`, {ROUNDS} alternating rounds.', '']
    for task, found in tables.items():
        out += [
            f'### {titles[task]}',
            '',
            '| | images/s: median (lowest to highest) | peak resident memory, GiB |',
            '|---|---|---|',
        ]
        for name, figures in found.items():
            speed = sidebyside.summarize(figures['images_per_second'])
            out.append(
                f'| {name} | {speed["median"]:.2f} ({speed["lowest"]:.2f} to '
                f'{speed["highest"]:.2f}) | {max(figures["peak_gib"]):.2f} |'
            )
        out.append('')
    out += ['### Ratios, round by round', '', '| | median (lowest to highest) |']
    out.append('|---|---|')
    for name, value in ratios.items():
        out.append(
            f'| `{name}` | {value["median"]:.2f} ({value["lowest"]:.2f} to '
            f'{value["highest"]:.2f}) |'
        )
    out += ['', '### One block, 6 to 48 layers', '']
    out += ['| layers | ' + ' | '.join(str(n) for n in depth['layers']) + ' |']
    out += ['|---|' + '---|' * len(depth['layers'])]
    for name in ('ours', 'linen'):
        for figure, unit in (('seconds', 's'), ('temporary_mib', 'MiB')):
            values = ' | '.join(f'{v:.3g}' for v in depth[name][figure])
            exponent = depth[name][figure + '_exponent']
            out.append(f'| {name}, {unit} (exponent {exponent:.2f}) | {values} |')
    path = ROOT / 'docs' / 'benchmarks.md'
    begin, end = '<!-- table: begin -->\n', '<!-- table: end -->'
    text = path.read_text()
    head, rest = text.split(begin)
    path.write_text(head + begin + '\n'.join(out) + '\n' + end + rest.split(end)[1])


if __name__ == '__main__':
    main(sys.argv[1:])

"""Inference compared with other programs: DenseNet-121, 224x224, two threads.

  python -m benchmarks.inference --batch=16 --batch=1 --rounds=7

Contenders are processes that take turns (`sidebyside`); ratios are computed for each
round. *ours* is what `Predictor` runs, from uint8 images to probabilities in host
memory, so it includes normalization and softmax. The others get normalized floats in
their own memory and return logits. *openvino* runs our ONNX file. Names that end in
`bf16` compute in bfloat16, all others in float32. The processor time per image is also
measured, since it depends less on other programs. It prints a table, and a line of JSON
at the end. Messages during preparation go to stderr (torch.compile takes minutes the
first time).
"""

import argparse
import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

from benchmarks import sidebyside

ROOT = pathlib.Path(__file__).parents[1]
PEERS = os.environ.get('PEERS', str(ROOT / '.venv-peers' / 'bin' / 'python'))
SIZE, THREADS = 224, 2
# Images of a turn.
TURN = {1: 48, 16: 96}


def make_ours(batch, precision='float32'):
    """What `Predictor` runs, from the host and back to it."""
    from flax_densenet.system import process

    process.keep_memory()  # as launch.py does
    from benchmarks import prediction

    predictor = prediction.make_predictor(batch, precision)
    shape = (batch, SIZE, SIZE, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return lambda: predictor.compute(images)


def make_ours_bf16(batch):
    return make_ours(batch, 'bfloat16')


def _torch(batch, wrap=lambda model: model, bfloat16=False):
    import torch

    from benchmarks import torch_models

    torch.set_num_threads(THREADS)
    model = torch_models.import_torchvision().models.densenet121(weights=None).eval()
    model = wrap(model.to(memory_format=torch.channels_last))
    images = torch.randn(batch, 3, SIZE, SIZE)
    images = images.to(memory_format=torch.channels_last)

    def step():
        with (
            torch.inference_mode(),
            torch.autocast('cpu', torch.bfloat16, enabled=bfloat16),
        ):
            model(images)

    return step


def _torch_bf16(batch):
    return _torch(batch, bfloat16=True)


def _openvino(batch, hint='f32'):
    """Our ONNX file; bf16 is OpenVINO's own choice on processors that have it."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'ours.onnx')
        script = f'from benchmarks import onnx; onnx.make_float32({path!r})'
        subprocess.run([_ours_python(), '-c', script], check=True, cwd=ROOT)
        options = {'INFERENCE_PRECISION_HINT': hint, 'INFERENCE_NUM_THREADS': THREADS}
        compiled = openvino.Core().compile_model(path, 'CPU', options)
    shape = (batch, 3, SIZE, SIZE)
    images = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return lambda: compiled(images)


def _openvino_bf16(batch):
    return _openvino(batch, 'bf16')


def _ours_python():
    """The Python with JAX 0.12, which differs from that of the peers."""
    return os.environ.get('OURS', sys.executable)


def _torch_compile(batch):
    import torch

    return _torch(batch, torch.compile)


def _torch_frozen(batch):
    """torch.compile with constant weights: batch norm folded, weights packed."""
    import torch
    from torch._inductor import config

    config.freezing = True
    return _torch(batch, torch.compile)


@dataclasses.dataclass(frozen=True)
class Contender:
    """A contender.

    Attributes:
      make: a function from the batch size to a function that computes one batch.
      python: the Python that runs it.
    """

    make: Callable[[int], Callable[[], object]]
    python: str = PEERS


CONTENDERS = {
    'ours': Contender(make_ours, sys.executable),
    'ours_bf16': Contender(make_ours_bf16, sys.executable),
    'torch': Contender(_torch),
    'torch_bf16': Contender(_torch_bf16),
    'openvino': Contender(_openvino),
    'openvino_bf16': Contender(_openvino_bf16),
    'torch_compile': Contender(_torch_compile),
    'torch_frozen': Contender(_torch_frozen),
}


def _serve(name, batch):
    """A contender's process."""
    if hasattr(os, 'sched_setaffinity'):  # two threads, also where there are more cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    step = CONTENDERS[name].make(batch)
    for _ in range(2):  # compiles, and touches all memory
        step()
    count = -(-TURN.get(batch, 96) // batch)

    def measure():
        start, before = time.perf_counter(), _processor_seconds()
        for _ in range(count):
            step()
        seconds = time.perf_counter() - start
        used = _processor_seconds() - before
        return {
            'images_per_second': count * batch / seconds,
            'processor_ms': used * 1e3 / (count * batch),
        }

    sidebyside.serve(measure)


def _processor_seconds():
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def measure(names, batch: int, rounds: int):
    """`{name: {'images_per_second' or 'processor_ms': [of each round]}}`."""
    command = ['-m', 'benchmarks.inference', f'--batch={batch}', '--serve']
    contenders = {
        name: sidebyside.Contender(
            [CONTENDERS[name].python, *command, name],
            OMP_NUM_THREADS=str(THREADS),
            OURS=sys.executable,
        )
        for name in names
    }
    found = sidebyside.alternate(contenders, rounds)
    for contender in contenders.values():
        contender.close()
    return found


def _format(summary, digits):
    return '{median:.{d}f} ({lowest:.{d}f} to {highest:.{d}f})'.format(
        **summary, d=digits
    )


def _report(batch, found):
    """Prints a table; returns its medians by name."""
    print(f'batch {batch}: images/s, processor ms/image, and ours / it, round by round')
    medians = {}
    for name, metrics in found.items():
        values = metrics['images_per_second']
        line = f'  {name:<14}{_format(sidebyside.summarize(values), 2)}'
        line += f'   {_format(sidebyside.summarize(metrics["processor_ms"]), 1)}'
        ours = 'ours_bf16' if name.endswith('bf16') else 'ours'
        if name != ours and ours in found:
            ratio = sidebyside.ratio(found[ours]['images_per_second'], values)
            line += f'   {_format(ratio, 3)}'
            medians[f'batch{batch}_{ours}_vs_{name}'] = round(ratio['median'], 3)
        medians[f'batch{batch}_{name}'] = round(np.median(values), 2)
        print(line, flush=True)
    return medians


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--batch', type=int, action='append')
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--only', nargs='*', choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument('--serve', choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    batches = options.batch or [16, 1]
    if options.serve:
        return _serve(options.serve, batches[0])
    medians = {}
    for batch in batches:
        found = measure(options.only, batch, options.rounds)
        medians |= _report(batch, found)
    print(json.dumps(medians))
    return None


if __name__ == '__main__':
    main()

"""Where the time of a training step goes: jax.profiler, added up by operation.

  .venv/bin/python -m benchmarks.profile_step [FIELD=VALUE ...]

profiles DenseNet-121, batch 16, 224x224, with fields of the model such as fast=False or
kernel=xla.
"""

import collections
import glob
import gzip
import json
import re
import sys
import tempfile

from benchmarks import contenders
from flax_densenet import cpu_kernels

cpu_kernels.keep_memory()
import jax  # noqa: E402

STEPS = 4


def main(fields, most=20):
    compiled, state, rows = contenders.make_ours('train', **fields)
    # The handler's name stands in the compiled program only.
    names = dict(
        re.findall(
            r'%?(\S+) = .*custom_call_target="(flax_densenet_\w+)"', compiled.as_text()
        )
    )
    for _ in range(2):
        state, _ = compiled(state, rows)
    jax.block_until_ready(state)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS):
                state, _ = compiled(state, rows)
                jax.block_until_ready(state)
        (trace,) = glob.glob(f'{folder}/**/*.trace.json.gz', recursive=True)
        with gzip.open(trace) as file:
            events = json.load(file)['traceEvents']
    times, counts = collections.Counter(), collections.Counter()
    for event in events:
        operation = event.get('args', {}).get('hlo_op')
        if event.get('ph') == 'X' and operation:
            name = names.get(operation, re.sub(r'[.\d]+$', '', operation))
            times[name] += event['dur'] / 1e3 / STEPS
            counts[name] += 1 / STEPS
    print(f'{sum(times.values()):9.1f} ms in all, a step')
    for name, milliseconds in times.most_common(most):
        print(f'{milliseconds:9.1f} ms {counts[name]:6.0f} x {name}')


if __name__ == '__main__':
    pairs = (argument.split('=', 1) for argument in sys.argv[1:])
    literal = {'True': True, 'False': False}
    main({name: literal.get(value, value) for name, value in pairs})

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
from flax_densenet.system import process

process.keep_memory()
import jax  # noqa: E402

STEPS = 4


def by_operation(step, count, names):
    """Profiles `count` calls of `step`: `[(milliseconds, calls, name)]` of one call.

    Args:
      step: returns when its work is done.
      names: better names of operations of the compiled program.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(count):
                step()
        (trace,) = glob.glob(f'{folder}/**/*.trace.json.gz', recursive=True)
        with gzip.open(trace) as file:
            events = json.load(file)['traceEvents']
    devices = {
        event['pid']
        for event in events
        if event.get('name') == 'process_name' and 'GPU' in event['args']['name']
    }
    times, calls = collections.Counter(), collections.Counter()
    for event in events:
        operation = event.get('args', {}).get('hlo_op')
        if devices and event.get('pid') not in devices:
            operation = None  # the host's side of the same work
        if event.get('ph') == 'X' and operation:
            name = names.get(operation, re.sub(r'[.\d]+$', '', operation))
            times[name] += event['dur'] / 1e3 / count
            calls[name] += 1 / count
    return [(ms, calls[name], name) for name, ms in times.most_common()]


def main(fields, most=20):
    compiled, state, rows = contenders.make_ours('train', **fields)
    # The handler's name stands in the compiled program only.
    names = dict(
        re.findall(
            r'%?(\S+) = .*custom_call_target="(flax_densenet_\w+)"', compiled.as_text()
        )
    )

    def step():
        nonlocal state
        state, _ = compiled(state, rows)
        jax.block_until_ready(state)

    step()
    step()
    found = by_operation(step, STEPS, names)
    print(f'{sum(ms for ms, _, _ in found):9.1f} ms in all, a step')
    for milliseconds, calls, name in found[:most]:
        print(f'{milliseconds:9.1f} ms {calls:6.0f} x {name}')


if __name__ == '__main__':
    pairs = (argument.split('=', 1) for argument in sys.argv[1:])
    literal = {'True': True, 'False': False}
    main({name: literal.get(value, value) for name, value in pairs})

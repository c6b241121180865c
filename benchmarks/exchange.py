"""Bytes that devices exchange in a training step, read from the compiled program.

    python -m benchmarks.exchange --variant=densenet121 --devices=8

compiles the step for fake CPU devices, for batch norm over all rows and over the rows
of each device, with and without a sharded optimizer state, and prints the bytes of
each. Nothing is run, and the bytes do not depend on the batch size or the image size.
"""

import argparse
import collections
import json
import os
import re

from benchmarks import hlo_bytes

COLLECTIVES = (
    'all-reduce',
    'all-gather',
    'reduce-scatter',
    'all-to-all',
    'collective-permute',
)


def make_step(
    variant: str,
    *,
    devices: int,
    batch: int,
    image_size: int,
    accumulate_steps: int = 1,
    shard_state: bool = False,
    optimizer: str = 'adam',
    **fields,
):
    """Compiles a training step from shapes only.

    Args:
      batch: number of rows over all devices.
      **fields: fields of the model; `batch_norm_group=-1` for the rows of each device.

    Returns:
      The compiled step, and the bytes of the parameters and of the batch statistics.
    """
    import jax
    import numpy as np

    from flax_densenet import create_model
    from flax_densenet.distributed import mesh as mesh_lib
    from flax_densenet.distributed import zero
    from flax_densenet.models import ghost_batch_norm, initialization
    from flax_densenet.train import optimizers, step

    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    group = ghost_batch_norm.resolve(
        fields.pop('batch_norm_group', 0),
        rows=batch,
        devices=devices,
        accumulate_steps=accumulate_steps,
    )
    module = create_model(variant, num_classes=1000, batch_norm_group=group, **fields)
    update = optimizers.make_optimizer(
        1e-3,
        name=optimizer,
        momentum=0.9,
        weight_decay=0.0,
        shard_over=mesh if shard_state else None,
    )
    shapes = initialization.variable_shapes(module)
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    state = step.new_state(variables, update)
    whole = jax.tree.map(lambda _: mesh_lib.replicated(mesh), state)
    layout = whole.replace(opt_state=zero.layout(state.opt_state, mesh))
    rows, by_rows = (batch,), mesh_lib.split_rows(mesh)
    if accumulate_steps > 1:
        rows = (accumulate_steps, batch // accumulate_steps)
        by_rows = mesh_lib.split_micro_batches(mesh)

    def shape_of(leaf, at):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at)

    images = {
        'image': np.empty((*rows, image_size, image_size, 3), np.uint8),
        'label': np.empty(rows, np.int32),
        'epoch': np.empty(rows, np.int32),
    }
    compiled = step.compile_train_step(
        step.make_train_step(
            module,
            update,
            step.StepOptions(
                mean=(0.5,) * 3, std=(0.25,) * 3, accumulate_steps=accumulate_steps
            ),
        ),
        jax.tree.map(shape_of, state, layout),
        jax.tree.map(lambda leaf: shape_of(leaf, by_rows), images),
        mesh,
    )
    sizes = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(variables[name]))
        for name in ('params', 'batch_stats')
    )
    return compiled, *sizes


def count(text: str) -> dict[str, float]:
    """Counts what a compiled program exchanges in one call.

    Args:
      text: `compiled.as_text()`, the program of one device.

    Returns:
      `operations`, their number; the bytes of their arrays in the `forward` pass, the
      `backward` pass and `other` parts (update, metrics), according to the operation
      names in JAX; and the bytes by kind of operation: `all-reduce`, `all-gather` and
      so on. An operation in a loop counts once per iteration.
    """
    parts, found = hlo_bytes.computations(text), collections.Counter()

    def walk(name, times):
        shapes = {line[0]: line[1] for line in parts[name]}
        for _, shape, opcode, operands, rest in parts[name]:
            kind = opcode.removesuffix('-start')
            if kind in COLLECTIVES:
                found['operations'] += times
                sent = [shapes[one] for one in operands]
                if kind == 'all-gather':
                    sent = [shape]
                for direction, size in zip(
                    _directions(rest, len(sent)), sent, strict=True
                ):
                    found[direction] += times * hlo_bytes.bytes_of(size)
                    found[kind] += times * hlo_bytes.bytes_of(size)
            rounds = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
            for called in re.findall(r'(?:body|calls|to_apply)=%([\w.-]+)', rest):
                walk(called, times * int(rounds[1]) if rounds else times)
            # Only one branch runs; the branch that skips a step exchanges nothing.
            branches = re.search(r'branch_computations=\{(.*?)\}', rest)
            for called in re.findall(r'%([\w.-]+)', branches[1] if branches else ''):
                walk(called, times)

    walk(None, 1)
    return dict(found)


def _directions(rest, number):
    """For each array of an operation: forward, backward or other."""
    found = re.search(r'op_name="([^"]*)"', rest)
    names = _expand(found[1]) if found else ['']
    if len(names) != number:
        names = names[:1] * number
    for name in names:
        if 'transpose(' in name:
            yield 'backward'
        else:
            yield 'forward' if 'jvp(' in name else 'other'


def _expand(text):
    """The names of operations that XLA merged.

    >>> _expand('step/transpose(f)/(a/(b:c):d)')
    ['step/transpose(f)/a/b', 'step/transpose(f)/a/c', 'step/transpose(f)/d']
    """
    depth, parts = 0, ['']
    for letter in text:
        depth += (letter == '(') - (letter == ')')
        if letter == ':' and not depth:
            parts.append('')
        else:
            parts[-1] += letter
    names = []
    for part in parts:
        group = re.search(r'(?:^|/)\(', part)
        if group and part.endswith(')'):
            inner = _expand(part[group.end() : -1])
            names += [part[: group.end() - 1] + name for name in inner]
        else:
            names.append(part)
    return names


def measure(variant: str, **fields) -> dict[str, float]:
    """Measures what a step exchanges; for the arguments see `make_step`.

    Returns:
      `operations`, their number; MB (10^6 bytes) of `gradients`, of batch `statistics`
      in the forward pass (including the running ones), of `statistics_backward`, of
      `updates` (gathered with a sharded optimizer) and of `all`; and `sent`, the MB
      that each device sends in a ring: nearly twice the array in an all-reduce, nearly
      the entire array in a gather.
    """
    devices, parts = fields['devices'], fields.get('accumulate_steps', 1)
    compiled, parameters, _ = make_step(variant, **fields)
    found = collections.Counter(count(compiled.as_text()))
    total = sum(found[kind] for kind in COLLECTIVES)
    share = (devices - 1) / devices
    result = {
        'gradients': parts * parameters,
        'statistics': found['forward'],
        'statistics_backward': found['backward'] - parts * parameters,
        'updates': found['all-gather'],
        'all': total,
        'sent': share * (total + found['all-reduce']),
    }
    result = {name: round(value / 1e6, 3) for name, value in result.items()}
    return {'operations': found['operations']} | result


def table(rows: list[dict]) -> str:
    """Formats rows of numbers as a Markdown table."""
    names = list(rows[0])
    lines = [names, ['---'] * len(names), *([row[n] for n in names] for row in rows)]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)


def main(argv=None):
    """Prints a table, or with --json one line for each choice."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--variant', default='densenet121')
    parser.add_argument('--devices', type=int, default=8)
    parser.add_argument('--batch', type=int, default=0, help='0: four for each device')
    parser.add_argument('--image_size', type=int, default=64)
    parser.add_argument('--accumulate_steps', type=int, default=1)
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--json', action='store_true')
    flags = parser.parse_args(argv)
    os.environ['JAX_PLATFORMS'] = 'cpu'
    # The exchanges are determined before code generation, so optimization can be off.
    os.environ['XLA_FLAGS'] = (
        f'--xla_force_host_platform_device_count={flags.devices}'
        ' --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
    )
    rows = []
    for group in (0, -1):
        for shard in (False, True):
            choice = {'batch_norm_group': group, 'shard_state': shard}
            found = measure(
                flags.variant,
                devices=flags.devices,
                batch=flags.batch or 4 * flags.devices * flags.accumulate_steps,
                image_size=flags.image_size,
                accumulate_steps=flags.accumulate_steps,
                dtype=flags.dtype,
                **choice,
            )
            rows.append(choice | found)
            if flags.json:
                print(json.dumps({'variant': flags.variant} | rows[-1]), flush=True)
    if not flags.json:
        print(table(rows))


if __name__ == '__main__':
    main()

"""Training steps on some of eight fake devices, in double precision.

`main(OUT, NAME, ...)` does the named runs in `RUNS`, and writes their states to OUT.npz
and other facts to OUT.json. It needs a separate process, since the number of fake
devices and double precision apply to an entire process.
"""

import json
import os

import jax
import numpy as np

from benchmarks import exchange
from flax_densenet import create_model, init_variables
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.distributed import zero
from flax_densenet.models import ghost_batch_norm
from flax_densenet.train import finetune, optimizers, step

ROWS, STEPS = 64, 3
SMALL = dict(block_sizes=(1,), stem_features=4)
_BOTH = dict(accumulate_steps=2, batch_norm_group=8)
_FROZEN = dict(frozen=2, rows=48, block_sizes=(1, 1))
# Name: number of devices, and the differences from a step on all rows at once.
RUNS = {
    'one': dict(devices=1),
    'two': dict(devices=2),
    'four': dict(devices=4),
    'eight': dict(devices=8),
    # Of rows of a device, 8, and of micro-batches of one row on each.
    'groups of 8': dict(devices=1, batch_norm_group=8),
    'own rows': dict(devices=8, batch_norm_group=-1),
    'parts of 8 in shards': dict(devices=8, accumulate_steps=8, shard_state=True),
    'groups of 2': dict(devices=1, batch_norm_group=2),
    'groups in a device': dict(devices=8, batch_norm_group=2),
    'parts of own rows': dict(devices=8, accumulate_steps=4, batch_norm_group=-1),
    'groups of 16': dict(devices=1, batch_norm_group=16),
    'groups of two devices': dict(devices=8, batch_norm_group=16),
    'one of 48': dict(devices=1, rows=48),
    'shards on three': dict(devices=3, shard_state=True, rows=48),
    'dropout on one': dict(devices=1, dropout_rate=0.3, **_BOTH),
    'dropout on eight': dict(devices=8, dropout_rate=0.3, **_BOTH),
    'labels': dict(devices=1, labels=True, batch_norm_group=16),
    'parts of labels': dict(devices=8, labels=True, accumulate_steps=4),
    # Three groups: an average of three equal values need not be that value.
    'frozen on one': dict(devices=1, batch_norm_group=16, **_FROZEN),
    'frozen on three': dict(devices=3, batch_norm_group=-1, **_FROZEN),
    'parts of frozen': dict(devices=1, accumulate_steps=3, **_FROZEN),
    'bad part': dict(devices=8, accumulate_steps=4, bad=True),
}


def make_batch(number, *, rows=ROWS, labels=False, bad=False):
    """Images of about 16x16 pixels, with classes or with labels (some unknown)."""
    rng = np.random.default_rng(number)
    batch = {
        'image': rng.integers(0, 256, (rows, 16, 16, 3), np.uint8),
        'label': rng.integers(0, 3, rows).astype(np.int32),
        'epoch': (np.arange(rows) > rows // 3).astype(np.int32),
    }
    if labels:
        known = rng.random((rows, 3)) < 0.6
        values = np.where(known, rng.integers(0, 2, (rows, 3)), np.nan)
        batch['label'] = values.astype(np.float32)
    if bad:  # a class with a weight of NaN, in the third of four parts
        batch['label'] %= 2
        batch['label'][2 * rows // 4] = 2
    return batch


def take(
    *,
    devices,
    accumulate_steps=1,
    shard_state=False,
    batch_norm_group=0,
    rows=ROWS,
    labels=False,
    bad=False,
    frozen=0,
    **fields,
):
    """The arrays of the state after some steps, and facts about the program."""
    mesh = mesh_lib.make_mesh(jax.devices()[:devices])
    group = ghost_batch_norm.resolve(
        batch_norm_group,
        rows=rows,
        devices=devices,
        accumulate_steps=accumulate_steps,
    )
    fields = dict(dtype='float64', kernel='xla', batch_norm_group=group) | fields
    module = create_model('BC-L10k4', num_classes=3, **SMALL | fields)
    rates = finetune.make_rates(module, freeze='denseblock1' if frozen else 'none')
    optimizer = finetune.make_optimizer(
        lambda first: optimizers.make_optimizer(
            1e-2,
            name='adam',
            momentum=0.9,
            weight_decay=1e-3,
            shard_over=mesh if shard_state else None,
        ),
        rates,
    )
    variables, rng = init_variables(module, 0), np.random.default_rng(0)
    variables['batch_stats'] = before = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.random(leaf.shape), variables['batch_stats']
    )
    state = step.new_state(variables, optimizer, multi_label=labels)
    opt_state = zero.place(state.opt_state, mesh)
    state = mesh_lib.replicate(state.replace(opt_state=()), mesh)
    state = state.replace(opt_state=opt_state)
    train_step = step.make_train_step(
        module,
        optimizer,
        step.StepOptions(
            mean=(0.5, 0.4, 0.3),
            std=(0.2, 0.25, 0.3),
            l2_penalty=1e-3,
            gradient_clip=0.5,
            class_weights=None if labels else [1.0, 2.0, np.nan if bad else 0.5],
            accumulate_steps=accumulate_steps,
            frozen=frozen,
        ),
    )
    compiled, losses = None, []
    for number in range(STEPS):
        batch = make_batch(number, rows=rows, labels=labels, bad=bad)
        batch = mesh_lib.to_global(batch, mesh, accumulate_steps)
        if compiled is None:
            compiled = step.compile_train_step(train_step, state, batch, mesh)
        state, loss = compiled(state, batch)
        losses.append(float(loss))
    info = _describe(compiled, state, losses, before, mesh)
    state = state.replace(opt_state=zero.replicated(state.opt_state))
    names = 'params', 'batch_stats', 'opt_state', 'running'
    return jax.device_get({name: getattr(state, name) for name in names}), info


def _describe(compiled, state, losses, before, mesh):
    """Facts about the program and its arrays; `before`: the initial statistics."""
    text = compiled.as_text()
    return {
        'loss': losses,
        'temporary': compiled.memory_analysis().temp_size_in_bytes,
        'exchange': exchange.count(text),
        'bytes': {
            name: sum(leaf.nbytes for leaf in jax.tree.leaves(getattr(state, name)))
            for name in ('params', 'batch_stats')
        },
        'kept': [
            name
            for name in before
            if all(
                np.array_equal(*pair)
                for pair in zip(
                    jax.tree.leaves(before[name]),
                    jax.tree.leaves(jax.device_get(state.batch_stats[name])),
                    strict=True,
                )
            )
        ],
        'optimizer_bytes': [
            sum(
                shard.data.nbytes
                for leaf in jax.tree.leaves(state.opt_state)
                for shard in leaf.addressable_shards
                if shard.device == device
            )
            for device in mesh.devices.flat
        ],
    }


def main(out, *names):
    """Writes the arrays under NAME/KIND/..."""
    assert os.environ['JAX_ENABLE_X64'] == '1'
    arrays, infos = {}, {}
    for name in names:
        trees, infos[name] = take(**RUNS[name.removesuffix(' again')])
        for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
            key = jax.tree_util.keystr(path, simple=True, separator='/')
            arrays[f'{name}/{key}'] = leaf
    np.savez(out + '.npz', **arrays)
    with open(out + '.json', 'w') as file:
        json.dump(infos, file)

"""The cost of saving within epochs: step time of DenseNet-121 with and without it.

  python -m benchmarks.saves --size=64 --batch=16 --steps=30 --every=5

Blocks with and without saves take turns, so that a machine that slows down does so for
both. Prints medians, their ratio with the spread over the pairs of blocks, and how long
a save holds up the loop and takes in all.
"""

import argparse
import tempfile
import time

import jax
import numpy as np

from flax_densenet.checkpoints import reader as checkpoint_reader
from flax_densenet.checkpoints import writer as checkpoint_writer
from flax_densenet.distributed import mesh as mesh_lib
from flax_densenet.kernels import cpu as cpu_kernels
from flax_densenet.models import factory, initialization
from flax_densenet.train import loop, optimizers, step


def _prepare(size, batch):
    module = factory.create_model('densenet121', num_classes=10)
    optimizer = optimizers.make_optimizer(
        lambda count: 1e-4, name='adam', momentum=0.9, weight_decay=0.0
    )
    mesh = mesh_lib.make_mesh()
    variables = initialization.init_variables(module, seed=0)
    state = mesh_lib.replicate(step.new_state(variables, optimizer), mesh)
    draw = np.random.default_rng(0)
    rows = {
        'image': draw.integers(0, 256, (batch, size, size, 3), np.uint8),
        'label': draw.integers(0, 10, batch, np.int32),
        'epoch': np.zeros(batch, np.int32),
    }
    rows = mesh_lib.to_global(rows, mesh)
    train_step = step.make_train_step(
        module, optimizer, step.StepOptions(mean=(0.5,) * 3, std=(1,) * 3)
    )
    return step.compile_train_step(train_step, state, rows, mesh), state, rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (('size', 64), ('batch', 16), ('steps', 30), ('every', 10)):
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--turns', type=int, default=5)
    options = parser.parse_args()
    cpu_kernels.load()
    compiled, state, rows = _prepare(options.size, options.batch)
    state, loss = compiled(state, rows)
    times, held = {False: [], True: []}, []
    with (
        tempfile.TemporaryDirectory() as folder,
        checkpoint_writer.open_saver(folder) as saver,
    ):
        for turn in range(2 * options.turns):
            saves = bool(turn % 2)
            start = time.perf_counter()
            for number in range(1, options.steps + 1):
                state, loss = compiled(state, rows)
                jax.block_until_ready(loss)
                if saves and number % options.every == 0:
                    asked = time.perf_counter()
                    saver.save(
                        checkpoint_reader.Checkpoint(
                            turn * 1000 + number, finished=False
                        ),
                        **loop.checkpoint_items(state),
                        metadata={},
                        records=[],
                    )
                    held.append(time.perf_counter() - asked)
            saver.wait()  # a block pays for all of its saves
            times[saves].append((time.perf_counter() - start) / options.steps)
        saver.save(
            checkpoint_reader.Checkpoint(10**6, finished=False),
            **loop.checkpoint_items(state),
            metadata={},
            records=[],
        )
        start = time.perf_counter()
        saver.wait()
        alone = time.perf_counter() - start
        start = time.perf_counter()
        newest = checkpoint_reader.Checkpoint(10**6, finished=False)
        assert not checkpoint_reader.check(checkpoint_reader.folder_of(folder, newest))
        check = time.perf_counter() - start
    without, with_saves = (np.array(times[key]) * 1e3 for key in (False, True))
    ratios = with_saves / without
    print(
        f'step: {np.median(without):.0f} ms; saving each {options.every} steps '
        f'{np.median(with_saves):.0f} ms; ratio {np.median(ratios):.3f} '
        f'({ratios.min():.3f} to {ratios.max():.3f}); a save holds the loop up for '
        f'{np.median(held) * 1e3:.0f} ms and takes {alone:.2f} s beside it; its check '
        f'takes {check:.2f} s'
    )


if __name__ == '__main__':
    main()

"""`launch.py` up to the end of its first training step; timed from outside by `run`.

  python -m benchmarks.start FOLDER WORKDIR [ours | linen]

DenseNet-121, batch 16, 224x224, on the photographs of FOLDER/CLASS; `linen` is the
program with model.fast=False.
"""

import os
import sys

import jax

import launch
from flax_densenet.train import step


def _end_after_first_step(compile_train_step):
    def compile_and_wrap(*args):
        compiled = compile_train_step(*args)

        def first_step(state, batch):
            jax.block_until_ready(compiled(state, batch))
            os._exit(0)

        return first_step

    return compile_and_wrap


if __name__ == '__main__':
    step.compile_train_step = _end_after_first_step(step.compile_train_step)
    arguments = [
        '--config=configs/densenet121.py',
        f'--config.data.source=folder:{sys.argv[1]}',
        f'--workdir={sys.argv[2]}',
        '--config.data.image_size=224',
        '--config.data.batch_size=16',
        f'--config.model.fast={sys.argv[3:] != ["linen"]}',
    ]
    sys.exit(launch.main([sys.argv[0], *arguments]))

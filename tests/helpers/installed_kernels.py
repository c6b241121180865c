"""Compares the kernels of an installation with XLA; run it with its Python.

`python -I installed_kernels.py` prints whether the kernels come from the wheel and for
which instruction set, or why there are none, and the difference of their gradients from
those of XLA in float32.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import flax_densenet
from flax_densenet.kernels import cpu


def gradients(kernel, dtype):
    module = flax_densenet.create_model(
        'densenet121',
        num_classes=3,
        growth_rate=32,
        block_sizes=(2,),
        stem_features=16,
        kernel=kernel,
        dtype=dtype,
    )
    variables = flax_densenet.init_variables(module, 0)
    images = np.random.default_rng(0).normal(size=(2, 61, 45, 3)).astype(np.float32)

    def loss(params):
        logits, _ = module.apply(
            {**variables, 'params': params}, images, train=True, mutable=['batch_stats']
        )
        return jnp.square(logits.astype(jnp.float32) - jnp.arange(3.0)).sum()

    return jax.jit(jax.value_and_grad(loss))(variables['params'])


def distance(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    parts = [(jnp.square(a - b).sum(), jnp.square(b).sum()) for a, b in pairs]
    return float(np.sqrt(sum(a for a, _ in parts) / sum(b for _, b in parts)))


def main():
    package = pathlib.Path(flax_densenet.__file__).parent
    exact = gradients('xla', 'float32')
    for dtype in ('float32', 'bfloat16'):
        if reason := cpu.load(dtype):
            print(f'{dtype}: none: {reason}')
            continue
        files = {pathlib.Path(library._name) for library in cpu._LIBRARIES.values()}
        of_wheel = all(file.is_relative_to(package) for file in files)
        folders = sorted({file.parent.name for file in files})
        off = distance(gradients('native', dtype), exact)
        where = f'of the wheel ({", ".join(folders)})' if of_wheel else 'compiled here'
        print(f'{dtype}: {where}, off by {off:.2g}')


if __name__ == '__main__':
    main()

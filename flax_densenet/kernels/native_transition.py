"""A transition in training in bfloat16, in C++: `cpu_bf16_transition.cc`.

As in the dense block, features and operands of products are bfloat16, while statistics,
parameters and their gradients are float32. For several devices, see `spread`.
"""

import functools

import jax
import jax.numpy as jnp

from flax_densenet.kernels import cpu as cpu_kernels
from flax_densenet.kernels import spread


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def transition(x, mean, var, scale, bias, weights, epsilon):
    """Batch norm, ReLU, 2x2 mean, 1x1 convolution.

    Args:
      x: bfloat16 `[N, H, W, C]`.
      mean, var, scale, bias: float32 `[C]`. All have gradients.
      weights: float32 `[C, F]`.
      epsilon: added to the variance.

    Returns:
      bfloat16 `[N, H // 2, W // 2, F]`.
    """

    def of_own_rows(x, *rest):
        rows, height, width, _ = x.shape
        shape = (rows, height // 2, width // 2, weights.shape[1])
        return cpu_kernels.call(
            'TransitionForwardBfloat16',
            [jax.ShapeDtypeStruct(shape, jnp.bfloat16)],
            *(x, *rest),
            epsilon=epsilon,
        )

    by_rows = spread.by_rows(of_own_rows, [0], [0, *[None] * 5], x.shape[0])
    return by_rows(x, mean, var, scale, bias, weights)[0]


def _backward(epsilon, saved, gradient):
    results = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in saved]
    return tuple(
        spread.call(
            'TransitionBackwardBfloat16',
            results,
            (*saved, gradient),
            [0, *[None] * 5, 0],
            [0, *[None] * 5],
            rows=saved[0].shape[0],
            epsilon=epsilon,
        )
    )


transition.defvjp(lambda *args: (transition(*args), args[:6]), _backward)

"""The dense block in training in C++, in bfloat16 on one CPU device.

Like `native_block`. Features and what is kept for the backward pass are bfloat16;
statistics, parameters and their gradients float32.
"""

import functools

import jax
import jax.numpy as jnp

from flax_densenet.kernels import cpu as cpu_kernels

_CHUNK = 32  # channels of a chunk


def _half(*dimensions):
    return jax.ShapeDtypeStruct(dimensions, jnp.bfloat16)


def _wide(*dimensions):
    return jax.ShapeDtypeStruct(dimensions, jnp.float32)


def _flat(layers):
    return [array for layer in layers for array in layer]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def train(x, layers, epsilon):
    """`native_block.train` of bfloat16 `[N, H, W, C]`."""
    return _train_forward(x, layers, epsilon)[0]


def _train_forward(x, layers, epsilon):
    *places, channels = x.shape
    _, _, bottleneck, growth = layers[0][5].shape
    count, width = len(layers), channels + len(layers) * growth
    pixels, chunks = x.size // channels, -(-bottleneck // _CHUNK)
    features, mean, var, hidden, mean2, var2 = cpu_kernels.call(
        'DenseBlockForwardTrainBfloat16',
        [
            _half(*places, width),
            _wide(width),
            _wide(width),
            _half(count, chunks, pixels, _CHUNK),
            _wide(count, bottleneck),
            _wide(count, bottleneck),
        ],
        x,
        *_flat(layers),
        epsilon=epsilon,
    )
    saved = (features, mean, var, hidden, mean2, var2)
    return (features, mean, var, mean2, var2), (saved, layers)


def _train_backward(epsilon, residuals, gradients):
    saved, layers = residuals
    # Statistics inside the layers are only used for running averages, so they have no
    # gradient.
    features_gradient, mean_gradient, var_gradient, _, _ = gradients
    features, _, _, hidden, _, _ = saved
    channels = layers[0][0].shape[0]
    results = cpu_kernels.call(
        'DenseBlockBackwardBfloat16',
        [
            _half(*features.shape[:3], channels),
            _wide(*features.shape),
            _half(*hidden.shape[1:]),
            *[_wide(*array.shape) for array in _flat(layers)],
        ],
        *saved,
        features_gradient,
        mean_gradient,
        var_gradient,
        *_flat(layers),
        epsilon=epsilon,
    )
    flat = results[3:]
    return results[0], [tuple(flat[i : i + 6]) for i in range(0, len(flat), 6)]


train.defvjp(_train_forward, _train_backward)

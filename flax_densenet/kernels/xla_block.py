"""The dense block in pure JAX, for every device and precision: `kernel='xla'`."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        'scale1', 'bias1', 'kernel1', 'scale2', 'bias2', 'kernel2', 'mean1', 'var1',
        'mean2', 'var2',
    ],
    meta_fields=[],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class Layer:
    """Variables of one dense layer; without bottleneck, fields ending in 2 are None.

    Attributes:
      scale1, bias1, mean1, var1: variables of norm1, `[C]`.
      kernel1: `[1, 1, C, M]`, or `[3, 3, C, G]` without bottleneck.
      scale2, bias2, mean2, var2: variables of norm2, `[M]`.
      kernel2: `[3, 3, M, G]`.
    """

    scale1: Any
    bias1: Any
    kernel1: Any
    mean1: Any
    var1: Any
    scale2: Any = None
    bias2: Any = None
    kernel2: Any = None
    mean2: Any = None
    var2: Any = None


def statistics(x):
    """Mean and biased variance of each channel of `[N, H, W, C]`, in float32 or wider.

    It uses two passes: the mean deviation from a first estimate of the mean corrects
    both results. A single pass would lose the variance of a channel with a large mean.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    middle = lax.stop_gradient(x.mean((0, 1, 2)))
    deviation = x - _row(middle)
    rest = deviation.mean((0, 1, 2))
    return middle + rest, jnp.square(deviation).mean((0, 1, 2)) - jnp.square(rest)


def _row(vector):
    return vector.reshape(1, 1, 1, -1)


def normalize_relu(x, mean, var, scale, bias, epsilon, dtype):
    """relu((x - mean) / sqrt(var + epsilon) * scale + bias), `[N, H, W, C]`."""
    a = scale * lax.rsqrt(var + epsilon)
    y = (x.astype(mean.dtype) - _row(mean)) * _row(a) + _row(bias)
    return jax.nn.relu(y).astype(dtype)


@jax.custom_vjp
def product(x, kernel):
    """1x1 convolution: `[N, H, W, C]`, `[C, M]` -> `[N, H, W, M]`.

    The weight gradient is computed as (g^T x)^T. This reaches 131 to 166 GFLOP/s on two
    CPU cores, while the gradient of a convolution reaches 13 to 55.
    """
    return lax.dot_general(x, kernel, (((3,), (0,)), ((), ())))


def _product_backward(saved, g):
    x, kernel = saved
    dx = lax.dot_general(g, kernel, (((3,), (1,)), ((), ())))
    over = ((0, 1, 2), (0, 1, 2))
    return dx, lax.dot_general(g, x, (over, ((), ()))).T


product.defvjp(lambda x, kernel: (product(x, kernel), (x, kernel)), _product_backward)


def conv3x3(x, kernel):
    """3x3 convolution, stride 1: `[N, H, W, C]`, `[3, 3, C, G]` -> `[N, H, W, G]`."""
    return lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def train(
    x, layers, *, epsilon, dtype, remat, dropout_rate, keys, path_rates, path_keys
):
    """A dense block in training; for arguments see `dense_block.block_train`."""
    hidden = _hidden
    if remat:
        # Without prevent_cse, XLA merges the two computations and saves no memory: a
        # step of DenseNet-121 (batch 16) then takes 3,092 instead of 1,928 MB.
        hidden = jax.checkpoint(_hidden, static_argnums=(4, 5), prevent_cse=True)
    mean, var = statistics(x)
    inner = []
    for index, layer in enumerate(layers):
        y = hidden(x, mean, var, layer, epsilon, dtype)
        if layer.kernel2 is not None:
            inner.append(statistics(y))
            y = normalize_relu(y, *inner[-1], layer.scale2, layer.bias2, epsilon, dtype)
            y = conv3x3(y, layer.kernel2.astype(dtype))
        else:
            inner.append(None)
        if dropout_rate:
            y = drop_out(y, keys[index], dropout_rate)
        if path_rates[index]:
            y = drop_path(y, path_keys[index], path_rates[index])
        new_mean, new_var = statistics(y)
        x = jnp.concatenate([x, y], -1)
        mean = jnp.concatenate([mean, new_mean])
        var = jnp.concatenate([var, new_var])
    return x, (mean, var), inner


def _hidden(x, mean, var, layer, epsilon, dtype):
    y = normalize_relu(x, mean, var, layer.scale1, layer.bias1, epsilon, dtype)
    kernel = layer.kernel1.astype(dtype)
    if layer.kernel2 is None:
        return conv3x3(y, kernel)
    return product(y, kernel[0, 0])


def evaluate(x, layers, epsilon, dtype):
    """A dense block with running statistics, `[N, H, W, C0 + L * G]`."""
    for layer in layers:
        y = _hidden(x, layer.mean1, layer.var1, layer, epsilon, dtype)
        if layer.kernel2 is not None:
            y = normalize_relu(
                y, layer.mean2, layer.var2, layer.scale2, layer.bias2, epsilon, dtype
            )
            y = conv3x3(y, layer.kernel2.astype(dtype))
        x = jnp.concatenate([x, y], -1)
    return x


def stem(x, mean, var, scale, bias, epsilon, padding, dtype):
    """Like `dense_block.stem`, with given statistics."""
    y = normalize_relu(x, mean, var, scale, bias, epsilon, dtype)
    return lax.reduce_window(
        y,
        np.array(-np.inf, y.dtype),  # must be a constant to have a gradient
        lax.max,
        (1, 3, 3, 1),
        (1, 2, 2, 1),
        ((0, 0), *padding, (0, 0)),
    )


def drop_out(x, key, rate):
    """Dropout: sets a fraction `rate` of the values to 0 and scales up the others."""
    return _drop(x, key, rate, x.shape)


def drop_path(x, key, rate):
    """Stochastic depth: drops all values of an image of `[N, H, W, C]` together."""
    return _drop(x, key, rate, (x.shape[0], 1, 1, 1))


def _drop(x, key, rate, shape):
    return jnp.where(kept(key, shape, rate), x / (1 - rate), jnp.zeros_like(x))


def kept(key, shape, rate):
    """A random mask that keeps a fraction of 1 - `rate`."""
    # Always in float32, so that the choice does not depend on the precision.
    return jax.random.uniform(key, shape, jnp.float32) >= rate

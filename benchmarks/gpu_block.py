"""A dense block as one differentiable function over one preallocated buffer.

Autodiff of a block keeps every state of the growing features, so a buffer that is
written in place would be copied at each layer. Here, the forward pass keeps only the
finished buffer (the input of a layer is a prefix of it and never changes), and the
backward pass is written by hand: it goes through the layers from the last to the first
and adds to one gradient buffer in place. It keeps features, 1x1 outputs and statistics.

The convolutions, each with the batch norm before it, are `Parts`: in XLA (defined
here), or the kernels in `gpu_kernels` and `gpu_conv`. They can be mixed.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flax_densenet.kernels import xla_block


def normalized(x, norm, kernel):
    """relu(norm1(x)) of the first C channels, `[P, C]`, for the kernel `[C, M]`."""
    mean, factor, bias = norm
    # XLA fuses the slice into the operation that reads it, so nothing is copied.
    x = x[:, : kernel.shape[0]].astype(jnp.float32)
    y = jnp.maximum((x - mean[None]) * factor[None] + bias[None], 0)
    return y.astype(kernel.dtype)


def _xla_forward(x, norm, kernel):
    y = lax.dot(normalized(x, norm, kernel), kernel)
    return y, xla_block.statistics(y[None, None])


def _xla_backward(x, g, total, norm, kernel):
    mean, factor, bias = norm
    channels = kernel.shape[0]
    deviation = x[:, :channels].astype(jnp.float32) - mean[None]
    y = deviation * factor[None] + bias[None]
    d = lax.dot_general(g, kernel, (((1,), (1,)), ((), ())))
    d = jnp.where(y > 0, d.astype(jnp.float32), 0)
    y = jnp.maximum(y, 0).astype(g.dtype)
    dw = lax.dot_general(
        y, g, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    added = total[:, :channels].astype(jnp.float32) + d * factor[None]
    total = lax.dynamic_update_slice(total, added.astype(total.dtype), (0, 0))
    return total, dw, d.sum(0), (d * deviation).sum(0)


def _xla_conv(buffer, at, y, norm, kernel, shape):
    y = normalized(y, norm, kernel[0, 0]).reshape(*shape, -1)
    y = xla_block.conv3x3(y, kernel)
    found = xla_block.statistics(y)
    y = y.reshape(buffer.shape[0], -1)
    return lax.dynamic_update_slice(buffer, y, (0, at)), found


def _xla_conv_backward(y, g, norm, kernel, shape):
    mean, factor, bias = norm
    deviation = y.astype(jnp.float32) - mean[None]
    z = deviation * factor[None] + bias[None]
    rectified = jnp.maximum(z, 0).astype(y.dtype).reshape(*shape, -1)
    _, back = jax.vjp(xla_block.conv3x3, rectified, kernel)
    d, dw = back(g.reshape(*shape, -1))
    d = jnp.where(z > 0, d.reshape(y.shape).astype(jnp.float32), 0)
    return d.astype(y.dtype), dw, d.sum(0), (d * deviation).sum(0)


@dataclasses.dataclass(frozen=True)
class Parts:
    """The functions for the two convolutions of a layer, with the norms before them.

    Attributes:
      product, product_backward: see `gpu_kernels`.
      conv, conv_backward: see `gpu_conv`.
    """

    product: Any = _xla_forward
    product_backward: Any = _xla_backward
    conv: Any = _xla_conv
    conv_backward: Any = _xla_conv_backward


def affine(mean, var, scale, bias, epsilon):
    """Batch norm as (mean, factor, bias): (x - mean) * factor + bias."""
    return mean, scale * lax.rsqrt(var + epsilon), bias


def _norm1(layer, mean, var, epsilon):
    channels = layer[2].shape[2]
    return affine(mean[:channels], var[:channels], *layer[:2], epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def block(x, layers, epsilon, parts):
    """A dense block in training.

    Args:
      x: `[N, H, W, C0]`, in the dtype of the computation.
      layers: for each (scale1, bias1, kernel1, scale2, bias2, kernel2).
      parts: a `Parts`.

    Returns:
      As `dense_block.block_train`.
    """
    return _forward(x, layers, epsilon, parts)[0]


def _forward(x, layers, epsilon, parts):
    shape, pixels, channels = x.shape, x.size // x.shape[3], x.shape[3]
    growth = layers[0][5].shape[3]
    rest = len(layers) * growth
    buffer = jnp.pad(x.reshape(pixels, channels), ((0, 0), (0, rest)))
    mean, var = xla_block.statistics(x)
    hidden, inner = [], []
    for layer in layers:
        norm = _norm1(layer, mean, var, epsilon)
        y, found = parts.product(buffer, norm, layer[2][0, 0].astype(x.dtype))
        hidden.append(y)
        inner.append(found)
        norm = affine(*found, *layer[3:5], epsilon)
        kernel = layer[5].astype(x.dtype)
        buffer, new = parts.conv(buffer, channels, y, norm, kernel, shape[:3])
        mean = jnp.concatenate([mean, new[0]])
        var = jnp.concatenate([var, new[1]])
        channels += growth
    results = buffer.reshape(*shape[:3], channels), (mean, var), inner
    return results, (buffer, mean, var, hidden, inner, layers)


def _through_norm(var, scale, epsilon, sums, with_x):
    """Gradients of mean, var, scale and bias from the sums of d and d * (x - mean)."""
    root = lax.rsqrt(var + epsilon)
    return -root * scale * sums, -0.5 * root**3 * scale * with_x, root * with_x, sums


def _spread(gradient, x, mean, d_mean, d_var):
    """Adds to the gradient `[P, C]` of x what comes back through its statistics."""
    more = d_mean[None] + 2 * (x.astype(jnp.float32) - mean[None]) * d_var[None]
    return (gradient.astype(jnp.float32) + more / x.shape[0]).astype(x.dtype)


def _backward(epsilon, parts, saved, gradients):
    buffer, mean, var, hidden, inner, layers = saved
    features, (d_mean, d_var), d_inner = gradients
    shape = features.shape
    # Without a barrier, XLA would use arrays of the forward pass for the prefixes of
    # the buffer, and keep all of them.
    buffer, features = lax.optimization_barrier((buffer, features))
    total = features.reshape(buffer.shape)
    growth = layers[0][5].shape[3]
    results = []
    for index in reversed(range(len(layers))):
        layer, y, found = layers[index], hidden[index], inner[index]
        channels = layer[2].shape[2]
        new = slice(channels, channels + growth)
        # All later layers have added to the gradient of the new channels.
        g = _spread(total[:, new], buffer[:, new], mean[new], d_mean[new], d_var[new])
        norm = affine(*found, *layer[3:5], epsilon)
        kernel = layer[5].astype(y.dtype)
        d, dw2, sums, with_y = parts.conv_backward(y, g, norm, kernel, shape[:3])
        d_mean2, d_var2, *back2 = _through_norm(
            found[1], layer[3], epsilon, sums, with_y
        )
        d_mean2, d_var2 = d_mean2 + d_inner[index][0], d_var2 + d_inner[index][1]
        g = d.astype(jnp.float32) * norm[1][None]
        g = _spread(g, y, found[0], d_mean2, d_var2)
        norm = _norm1(layer, mean, var, epsilon)
        kernel = layer[2][0, 0].astype(y.dtype)
        total, dw1, sums, with_x = parts.product_backward(
            buffer, g, total, norm, kernel
        )
        d_mean1, d_var1, *back1 = _through_norm(
            var[:channels], layer[0], epsilon, sums, with_x
        )
        d_mean = d_mean.at[:channels].add(d_mean1)
        d_var = d_var.at[:channels].add(d_var1)
        dw1, dw2 = dw1[None, None].astype(layer[2].dtype), dw2.astype(layer[5].dtype)
        results.append((*back1, dw1, *back2, dw2))
    old = slice(0, layers[0][2].shape[2])
    dx = _spread(total[:, old], buffer[:, old], mean[old], d_mean[old], d_var[old])
    return dx.reshape(*shape[:3], -1), results[::-1]


block.defvjp(_forward, _backward)

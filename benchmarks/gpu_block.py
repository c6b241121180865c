"""A dense block as one differentiable function over one preallocated buffer.

Autodiff of a block keeps every state of the growing features, so a buffer that is
written in place would be copied at each layer. Here the forward pass keeps the finished
buffer alone (a layer's input is a prefix of it, never changed later) and the backward
pass is written by hand: it goes through the layers from the last to the first and adds
into one gradient buffer in place. What is kept: features, the 1x1 outputs, statistics.

The 1x1 product with its batch norm is a pair of functions, by XLA (`XLA`) or by the
kernels of `gpu_kernels` (`PALLAS`); they may be mixed.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import gpu_kernels
from flax_densenet import dense_block


def normalised(x, norm, kernel):
    """relu(norm1(x)) of the first C channels, `[P, C]`, for the kernel `[C, M]`."""
    mean, factor, bias = norm
    # XLA fuses the slice into what reads it, so no copy is made.
    x = x[:, : kernel.shape[0]].astype(jnp.float32)
    y = jnp.maximum((x - mean[None]) * factor[None] + bias[None], 0)
    return y.astype(kernel.dtype)


def _xla_forward(x, norm, kernel):
    y = lax.dot(normalised(x, norm, kernel), kernel)
    return y, dense_block.statistics(y[None, None])


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


XLA = (_xla_forward, _xla_backward)
PALLAS = (gpu_kernels.forward, gpu_kernels.backward)


def _norm1(layer, mean, var, epsilon):
    """(mean, factor, bias) of the layer's first batch norm."""
    scale, bias, kernel = layer[:3]
    channels = kernel.shape[2]
    factor = scale * lax.rsqrt(var[:channels] + epsilon)
    return mean[:channels], factor, bias


def _tail(y, mean, var, scale, bias, kernel, *, shape, epsilon):
    """The rest of a layer: norm2, ReLU, 3x3; `[P, M]` to `[N, H, W, G]`."""
    y = y.reshape(*shape[:3], -1)
    z = dense_block.normalise_relu(y, mean, var, scale, bias, epsilon, y.dtype)
    return dense_block._conv3x3(z, kernel.astype(y.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def block(x, layers, epsilon, products):
    """A dense block in training.

    Args:
      x: `[N, H, W, C0]`, in the dtype of the computation.
      layers: for each (scale1, bias1, kernel1, scale2, bias2, kernel2).
      products: (forward, backward) of `gpu_kernels`, or such as they are.

    Returns:
      As `dense_block.block_train`.
    """
    return _forward(x, layers, epsilon, products)[0]


def _forward(x, layers, epsilon, products):
    shape, pixels, channels = x.shape, x.size // x.shape[3], x.shape[3]
    growth = layers[0][5].shape[3]
    rest = len(layers) * growth
    buffer = jnp.pad(x.reshape(pixels, channels), ((0, 0), (0, rest)))
    mean, var = dense_block.statistics(x)
    hidden, inner = [], []
    for layer in layers:
        norm = _norm1(layer, mean, var, epsilon)
        y, found = products[0](buffer, norm, layer[2][0, 0].astype(x.dtype))
        hidden.append(y)
        inner.append(found)
        y = _tail(y, *found, *layer[3:], shape=shape, epsilon=epsilon)
        new_mean, new_var = dense_block.statistics(y)
        mean = jnp.concatenate([mean, new_mean])
        var = jnp.concatenate([var, new_var])
        y = y.reshape(pixels, growth)
        buffer = lax.dynamic_update_slice(buffer, y, (0, channels))
        channels += growth
    results = buffer.reshape(*shape[:3], channels), (mean, var), inner
    return results, (buffer, mean, var, hidden, inner, layers)


def _spread(gradient, x, mean, d_mean, d_var):
    """Adds to the gradient `[P, C]` of x what comes back through its statistics."""
    more = d_mean[None] + 2 * (x.astype(jnp.float32) - mean[None]) * d_var[None]
    return (gradient.astype(jnp.float32) + more / x.shape[0]).astype(gradient.dtype)


def _backward(epsilon, products, saved, gradients):
    buffer, mean, var, hidden, inner, layers = saved
    features, (d_mean, d_var), d_inner = gradients
    shape = features.shape
    # Without a barrier XLA would take the forward pass's arrays for the prefixes of
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
        tail = functools.partial(_tail, shape=shape, epsilon=epsilon)
        g, d_mean2, d_var2, *last = jax.vjp(tail, y, *found, *layer[3:])[1](
            g.reshape(*shape[:3], growth)
        )
        d_mean2, d_var2 = d_mean2 + d_inner[index][0], d_var2 + d_inner[index][1]
        g = _spread(g, y, found[0], d_mean2, d_var2)
        norm = _norm1(layer, mean, var, epsilon)
        kernel = layer[2][0, 0].astype(y.dtype)
        total, dw, sums, with_x = products[1](buffer, g, total, norm, kernel)
        scale, root = layer[0], lax.rsqrt(var[:channels] + epsilon)
        d_mean = d_mean.at[:channels].add(-norm[1] * sums)
        d_var = d_var.at[:channels].add(-0.5 * root**3 * scale * with_x)
        dw = dw.reshape(layer[2].shape).astype(layer[2].dtype)
        results.append((root * with_x, sums, dw, *last))
    old = slice(0, layers[0][2].shape[2])
    dx = _spread(total[:, old], buffer[:, old], mean[old], d_mean[old], d_var[old])
    return dx.reshape(*shape[:3], -1), results[::-1]


block.defvjp(_forward, _backward)

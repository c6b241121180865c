"""Implementations of the dense block for a GPU, with the same results as `dense_block`.

A way is a pair (block_train, block_eval) with the signatures of the functions in
`dense_block`. `install` replaces those functions, so that training, inference and tests
run the package itself with this way.

  concat    the package itself: concatenation, 1x1 as a product
  conv1x1   the same, 1x1 as a convolution
  nchw      the same, 3x3 with channels first
  pieces    no growing array: normalized pieces are joined for each product
  buffer    one preallocated buffer, written in place, backward by hand (`gpu_block`)
  forward   the same; the 1x1 in the forward pass by a Pallas kernel
  pallas    the same; the 1x1 by Pallas kernels both ways
  fused     the same; the 3x3 too
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import gpu_block, gpu_conv, gpu_kernels
from flax_densenet.kernels import dense_block, native_block, xla_block
from flax_densenet.kernels.xla_block import normalize_relu, statistics


def _conv1x1(x, kernel):
    return lax.conv_general_dilated(
        x,
        kernel[None, None],
        (1, 1),
        'VALID',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )


def _conv3x3_nchw(x, kernel):
    y = lax.conv_general_dilated(
        x.transpose(0, 3, 1, 2),
        kernel.transpose(3, 2, 0, 1),
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=('NCHW', 'OIHW', 'NCHW'),
    )
    return y.transpose(0, 2, 3, 1)


def _train(
    x,
    layers,
    *,
    epsilon,
    dtype,
    kernel='xla',
    remat=True,
    dropout_rate=0.0,
    keys=None,
    path_rates=None,
    path_keys=None,
    product=xla_block.product,
    conv3x3=xla_block.conv3x3,
    join=True,
):
    """`dense_block.block_train` with XLA and autodiff, and other convolutions.

    Args:
      product, conv3x3: functions for the two convolutions.
      join: whether to concatenate the features after each layer, or to keep pieces that
        are joined when they are normalized.
    """
    _refuse(layers, dropout_rate, path_rates)

    def hidden(pieces, mean, var, layer):
        parts, at = [], 0
        for piece in pieces:
            own = slice(at, at + piece.shape[-1])
            at = own.stop
            parts.append(
                normalize_relu(
                    piece,
                    mean[own],
                    var[own],
                    layer.scale1[own],
                    layer.bias1[own],
                    epsilon,
                    dtype,
                )
            )
        y = parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)
        return product(y, layer.kernel1.astype(dtype)[0, 0])

    if remat:
        hidden = jax.checkpoint(hidden, prevent_cse=True)
    pieces, (mean, var), inner = [x], statistics(x), []
    for layer in layers:
        y = hidden(pieces, mean, var, layer)
        inner.append(statistics(y))
        y = normalize_relu(y, *inner[-1], layer.scale2, layer.bias2, epsilon, dtype)
        y = conv3x3(y, layer.kernel2.astype(dtype))
        new_mean, new_var = statistics(y)
        pieces.append(y)
        if join:
            pieces = [jnp.concatenate(pieces, -1)]
        mean = jnp.concatenate([mean, new_mean])
        var = jnp.concatenate([var, new_var])
    return jnp.concatenate(pieces, -1), (mean, var), inner


def _refuse(layers, dropout_rate, path_rates):
    if layers[0].kernel2 is None or dropout_rate or any(path_rates or ()):
        raise NotImplementedError('for layers with a bottleneck, all of them kept')


def _block_train(
    x, layers, *, epsilon, dtype, kernel='xla', remat=True, dropout_rate=0.0,
    keys=None, path_rates=None, path_keys=None, parts,
):  # fmt: skip
    """`gpu_block.block`, which always recomputes activations."""
    _refuse(layers, dropout_rate, path_rates)
    trained = [native_block.parameters(layer) for layer in layers]
    return gpu_block.block(x.astype(dtype), trained, epsilon, parts)


def _eval(x, layers, *, epsilon, dtype, kernel='xla'):
    return xla_block.evaluate(x, layers, epsilon, dtype)


def _buffer_eval(x, layers, *, epsilon, dtype, kernel='xla', parts):
    """One buffer, written in place; a Pallas product also does norm2 and its ReLU."""
    shape, pixels, channels = x.shape, x.size // x.shape[3], x.shape[3]
    growth = layers[0].kernel2.shape[3]
    buffer = x.astype(dtype).reshape(pixels, channels)
    buffer = jnp.pad(buffer, ((0, 0), (0, len(layers) * growth)))
    for layer in layers:
        norm1 = gpu_block.affine(
            layer.mean1, layer.var1, layer.scale1, layer.bias1, epsilon
        )
        norm2 = mean, factor, bias = gpu_block.affine(
            layer.mean2, layer.var2, layer.scale2, layer.bias2, epsilon
        )
        kernel1 = layer.kernel1.astype(dtype)[0, 0]
        kernel2 = layer.kernel2.astype(dtype)
        if parts.conv is gpu_conv.forward:
            y, _ = parts.product(buffer, norm1, kernel1)
            buffer, _ = parts.conv(buffer, channels, y, norm2, kernel2, shape[:3])
        else:
            if parts.product is gpu_kernels.forward:
                activate = (factor, bias - mean * factor)
                y = gpu_kernels.forward(buffer, norm1, kernel1, activate=activate)
            else:
                y = lax.dot(gpu_block.normalized(buffer, norm1, kernel1), kernel1)
                y = gpu_block.normalized(y, norm2, kernel2[0, 0])
            y = xla_block.conv3x3(y.reshape(*shape[:3], -1), kernel2)
            y = y.reshape(pixels, growth)
            buffer = lax.dynamic_update_slice(buffer, y, (0, channels))
        channels += growth
    return buffer.reshape(*shape[:3], channels)


def _way(**parts):
    return functools.partial(_train, **parts), _eval


def _buffer_way(**parts):
    parts = gpu_block.Parts(**parts)
    return (
        functools.partial(_block_train, parts=parts),
        functools.partial(_buffer_eval, parts=parts),
    )


_PRODUCT = dict(product=gpu_kernels.forward, product_backward=gpu_kernels.backward)
_CONV = dict(conv=gpu_conv.forward, conv_backward=gpu_conv.backward)
WAYS = {
    'concat': _way(),
    'conv1x1': _way(product=_conv1x1),
    'nchw': _way(conv3x3=_conv3x3_nchw),
    'pieces': _way(join=False),
    'buffer': _buffer_way(),
    'forward': _buffer_way(product=gpu_kernels.forward),
    'pallas': _buffer_way(**_PRODUCT),
    'fused': _buffer_way(**_PRODUCT, **_CONV),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x, padding):
    """3x3 max pooling with stride 2, `[N, H, W, C]`, with a gradient without scatter.

    In XLA the gradient of pooling is a scatter, which uses atomic operations on a GPU.
    Here each window stores the position of its maximum, 0 to 8, and each pixel reads
    the positions of its windows.
    """
    return _max_pool_forward(x, padding)[0]


def _max_pool_forward(x, padding):
    height, width = (x.shape[axis + 1] + sum(padding[axis]) for axis in (0, 1))
    sizes = ((height - 3) // 2 + 1, (width - 3) // 2 + 1)
    low = jnp.array(-jnp.inf, x.dtype)
    padded = lax.pad(x, low, ((0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)))
    most, place = None, None
    for number in range(9):
        row, column = divmod(number, 3)
        value = padded[
            :,
            row : row + 2 * sizes[0] - 1 : 2,
            column : column + 2 * sizes[1] - 1 : 2,
        ]
        if most is None:
            most, place = value, jnp.zeros(value.shape, jnp.uint8)
        else:
            # The first of equal values, as in XLA.
            place = jnp.where(value > most, jnp.uint8(number), place)
            most = jnp.maximum(most, value)
    return most, (place, jnp.zeros((0, *x.shape[1:3]), x.dtype))


def _max_pool_backward(padding, saved, g):
    place, like = saved
    total = 0
    for number in range(9):
        config = [(0, 0, 0)]
        for start, n, out, (low, _) in zip(
            divmod(number, 3), like.shape[1:], g.shape[1:3], padding, strict=True
        ):
            before = start - low
            config.append((before, n - before - (2 * out - 1), 1))
        part = jnp.where(place == number, g, 0).astype(jnp.float32)
        total += lax.pad(part, jnp.float32(0), (*config, (0, 0, 0)))
    return (total.astype(g.dtype),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def _stem_without_scatter(x, mean, var, scale, bias, epsilon, padding, dtype):
    y = normalize_relu(x, mean, var, scale, bias, epsilon, dtype)
    return max_pool(y, tuple(map(tuple, padding)))


POOLS = {'scatter': xla_block.stem, 'gather': _stem_without_scatter}


def install(way: str, pool: str = 'scatter'):
    """Replaces functions of `dense_block` by a way and a pooling for the stem."""
    dense_block.block_train, dense_block.block_eval = WAYS[way]
    xla_block.stem = POOLS[pool]

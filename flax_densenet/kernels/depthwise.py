"""Depthwise convolution: each channel has its own kernel.

The implementation in XLA is slow on CPUs. Here, the rows of the kernel are applied one
after another, each as a sum of shifted images that XLA fuses into one pass. With a 7x7
kernel on two CPU cores, the forward pass and both gradients are about 7 times as fast
as the convolution of XLA on `[4, 56, 56, 128]`, and even faster on smaller maps with
more channels.

>>> import jax.numpy as jnp
>>> depthwise(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2)))[0, :, :, 0].tolist()[0]
[4.0, 6.0, 6.0, 4.0]
"""

import jax
import jax.numpy as jnp
from jax import lax


def depthwise(x, kernel):
    """Convolves images `[N, H, W, C]` with kernels `[K, K, 1, C]`, K odd.

    The image is padded with K // 2 zeros on each side, so the shape is kept.
    """
    if jax.default_backend() == 'cpu':
        return _by_rows(x, kernel)
    return _convolution(x, kernel)


def _convolution(x, kernel):
    return lax.conv_general_dilated(
        x,
        kernel,
        (1, 1),
        'SAME',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=x.shape[-1],
    )


@jax.custom_vjp
def _by_rows(x, kernel):
    padded, reach = _pad(x, kernel.shape[0])
    wide = kernel.astype(padded.dtype)

    def add_row(row, total):
        shifted = lax.dynamic_slice_in_dim(padded, row, x.shape[1], 1)
        weights = lax.dynamic_index_in_dim(wide, row, 0, keepdims=False)
        return total + sum(
            shifted[:, :, column : column + x.shape[2]] * weights[column].reshape(reach)
            for column in range(kernel.shape[1])
        )

    total = jnp.zeros(x.shape, padded.dtype)
    return lax.fori_loop(0, kernel.shape[0], add_row, total).astype(x.dtype)


def _pad(x, size):
    """The padded image, in float32 or wider, and the shape of a weight."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    margin = (size // 2, size // 2)
    return jnp.pad(wide, ((0, 0), margin, margin, (0, 0))), (1, 1, 1, x.shape[-1])


def _forward(x, kernel):
    return _by_rows(x, kernel), (x, kernel)


def _backward(saved, gradient):
    x, kernel = saved
    size = kernel.shape[0]
    padded, _ = _pad(x, size)
    wide = gradient.astype(padded.dtype)

    def of_place(_, place):
        start = (0, place // size, place % size, 0)
        shifted = lax.dynamic_slice(padded, start, x.shape)
        return None, (shifted * wide).sum((0, 1, 2))

    # One at a time: as fast as seven at a time, and faster to compile.
    _, of_kernel = lax.scan(of_place, None, jnp.arange(size**2))
    of_kernel = of_kernel.reshape(kernel.shape).astype(kernel.dtype)
    return _by_rows(gradient, kernel[::-1, ::-1]), of_kernel


_by_rows.defvjp(_forward, _backward)

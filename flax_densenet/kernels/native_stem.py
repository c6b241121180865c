"""The stem with its 7x7 convolution in bfloat16, in C++: `cpu_bf16_stem.cc`.

Images and operands of products are bfloat16, while statistics, parameters and their
gradients are float32. XLA computes the gradient of images, which training does not
need. For several devices, see `spread`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from flax_densenet.kernels import cpu as cpu_kernels
from flax_densenet.kernels import packed_inference, spread, xla_block

_CHUNK = 32  # channels in a chunk, and most values in a row of the window
_WINDOW = 7


def takes(channels: int) -> bool:
    """Whether the kernel takes images with so many channels."""
    return _WINDOW * channels <= _CHUNK


def _pads(sizes, window, padding):
    """((top, bottom), (left, right)) with a stride of 2, as `DenseNet.padding`."""
    if padding == 'torch':
        return ((window // 2, window // 2),) * 2
    return tuple(lax.padtype_to_pads(sizes, (window,) * 2, (2, 2), 'SAME'))


def _sizes(x, padding):
    """(height, width) of the result, and the attributes of the calls."""
    return packed_inference.stem_sizes(
        x,
        _pads(x.shape[1:3], _WINDOW, padding),
        lambda sizes: _pads(sizes, 3, padding),
    )


def count_pixels(x, padding: str) -> int:
    """The number of pixels of the convolution's output for images x."""
    sizes = _sizes(x, padding)[1]
    return x.shape[0] * sizes['height'] * sizes['width']


def _by_xla(x, kernel, scale, bias, mean, var, epsilon, padding):
    """The stem in float32; `mean` is None for the statistics of the batch."""
    y = lax.conv_general_dilated(
        x.astype(jnp.float32),
        kernel,
        (2, 2),
        _pads(x.shape[1:3], _WINDOW, padding),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    if mean is None:
        mean, var = xla_block.statistics(y)
    pads = _pads(y.shape[1:3], 3, padding)
    y = xla_block.stem(y, mean, var, scale, bias, epsilon, pads, jnp.float32)
    return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def train(x, kernel, scale, bias, epsilon, padding):
    """7x7 convolution with stride 2, batch norm, ReLU, 3x3 max pooling with stride 2.

    Args:
      x: bfloat16 images `[N, H, W, C]`, see `takes`.
      kernel: float32 `[7, 7, C, F]`.
      scale, bias: float32 `[F]`.
      epsilon: added to the variance.
      padding: `torch` or `same`, see `DenseNet`.

    Returns:
      bfloat16 `[N, H', W', F]`, and the mean and var of the convolution's output.
    """
    return _train_forward(x, kernel, scale, bias, epsilon, padding)[0]


def _train_forward(x, kernel, scale, bias, epsilon, padding):
    (height, width), sizes = _sizes(x, padding)
    rows, features = x.shape[0], kernel.shape[3]
    chunks = -(-features // _CHUNK)
    inner = (chunks, rows, sizes['height'], sizes['width'], _CHUNK)
    which = (chunks, rows, height, width, _CHUNK)
    y, mean, var, *kept = spread.call(
        'StemForwardTrainBfloat16',
        [
            jax.ShapeDtypeStruct((rows, height, width, features), jnp.bfloat16),
            *[jax.ShapeDtypeStruct((features,), jnp.float32)] * 2,
            jax.ShapeDtypeStruct(inner, jnp.bfloat16),
            jax.ShapeDtypeStruct(which, jnp.uint8),
        ],
        (x, kernel, scale, bias),
        [0, None, None, None],
        [0, None, None, 1, 1],
        rows=rows,
        epsilon=epsilon,
        **sizes,
    )
    return (y, mean, var), (x, kernel, scale, bias, mean, var, *kept)


def _train_backward(epsilon, padding, saved, gradients):
    # The statistics only update the running averages.
    x, kernel, scale, bias, mean, var, inner, which = saved
    of_parameters = spread.call(
        'StemBackwardBfloat16',
        [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in (kernel, scale, bias)],
        (x, scale, bias, mean, var, inner, which, gradients[0]),
        [0, None, None, None, None, 1, 1, 0],
        [None, None, None],
        rows=x.shape[0],
        epsilon=epsilon,
        **_sizes(x, padding)[1],
    )
    return _of_images(saved[:4], gradients[0], epsilon, padding), *of_parameters


def _of_images(arguments, gradient, epsilon, padding):
    """The images' gradient; nothing of it is computed where it is not used."""
    x, *parameters = arguments

    def by_xla(x):
        return _by_xla(x, *parameters, None, None, epsilon, padding)

    return jax.vjp(by_xla, x)[1](gradient)[0]


train.defvjp(_train_forward, _train_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def evaluate(x, kernel, scale, bias, mean, var, epsilon, padding):
    """Like `train`, with given statistics; returns only the `[N, H', W', F]`."""

    def of_own_rows(x, *rest):
        (height, width), sizes = _sizes(x, padding)
        shape = (x.shape[0], height, width, kernel.shape[3])
        return cpu_kernels.call(
            'StemForwardEvalBfloat16',
            [jax.ShapeDtypeStruct(shape, jnp.bfloat16)],
            *(x, *rest),
            epsilon=epsilon,
            **sizes,
        )

    by_rows = spread.by_rows(of_own_rows, [0], [0, *[None] * 5], x.shape[0])
    return by_rows(x, kernel, scale, bias, mean, var)[0]


def _evaluate_backward(epsilon, padding, saved, gradient):
    # Rare (explanations of predictions), so XLA computes it.
    def by_xla(*arguments):
        return _by_xla(*arguments, epsilon, padding)

    return jax.vjp(by_xla, *saved)[1](gradient)


evaluate.defvjp(lambda *args: (evaluate(*args), args[:6]), _evaluate_backward)

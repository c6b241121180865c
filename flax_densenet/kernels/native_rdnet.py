"""The layers and transitions of RDNet in C++, on CPUs.

A layer (depthwise 7x7, layer norm, 1x1, GELU, 1x1) is one call in each direction, and
so is a transition (layer norm, convolution of patches that do not overlap). They are
computed in float32 or, with AMX or AVX512-BF16, in bfloat16 with float32 sums,
parameters and gradients of parameters. See `cpu_rdnet.h`.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np

from flax_densenet.errors import UserError
from flax_densenet.kernels import cpu as cpu_kernels
from flax_densenet.kernels import packed_bfloat16, spread

_LOGGER = logging.getLogger(__name__)
_CHUNK = 32  # channels of a chunk


def use_native(kernel: str, dtype, *, gradients: bool) -> bool:
    """Whether the C++ kernels compute the layers.

    Args:
      kernel: one of `dense_block.KERNELS`.
      dtype: dtype of the features.
      gradients: whether the gradients of parameters cover the rows of all devices.

    Raises:
      UserError: `kernel='native'`, but the kernels cannot be used.
    """
    if kernel == 'xla':
        return False
    reason = _why_not(jnp.dtype(dtype), known=kernel == 'auto')
    if reason is None:
        reason = cpu_kernels.load('float32', 'rdnet')
        if reason is None and spread.is_shared():
            reason = cpu_kernels.load()  # which numbers the calls
        if reason and kernel == 'auto':
            _log_once(
                f'RDNet runs without its CPU kernels: {reason}; training and '
                'prediction are slower'
                + ('; install g++ or set CXX' if 'compiler' in reason else '')
            )
    if reason is None and gradients and spread.is_shared() and jax.process_count() > 1:
        reason = 'the rows are spread over several processes'
    if reason and kernel == 'native':
        raise UserError(f'model.kernel=native cannot be used: {reason}; use auto')
    return reason is None


def _why_not(dtype, *, known):
    if jax.default_backend() != 'cpu':
        return 'it is for CPUs'
    if known and not spread.is_known():
        return 'the batch may be spread over several devices'
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f'it computes in float32 and bfloat16, not {dtype}'
    return None


@functools.cache
def _log_once(text):
    _LOGGER.warning(text)


def compute_dtype(dtype):
    """The dtype in which the kernels compute: float32 if bfloat16 is not faster."""
    if dtype != jnp.bfloat16:
        return jnp.dtype(dtype)
    reason = cpu_kernels.why_bfloat16_is_slow('rdnet')
    if reason is None:
        return jnp.dtype(jnp.bfloat16)
    _log_once(f'model.dtype=bfloat16: {reason}, so RDNet computes in float32')
    return jnp.dtype(jnp.float32)


def pack(kernel: np.ndarray, dtype) -> np.ndarray:
    """Packs a kernel as `RDNetPack` does, for `layer` and `transition`.

    Args:
      kernel: `[height, width, C, F]`.
      dtype: float32 or bfloat16.
    """
    kernel = np.asarray(kernel, np.float32).reshape(-1, *kernel.shape[2:])
    padding = [(0, 0), *((0, -size % _CHUNK) for size in kernel.shape[1:])]
    kernel = np.pad(kernel, padding)
    matrix = kernel.reshape(-1, kernel.shape[2])
    if dtype == jnp.bfloat16:
        return packed_bfloat16.tiles(matrix)
    return matrix.reshape(len(matrix), -1, _CHUNK).transpose(1, 0, 2).ravel()


def _suffix(dtype):
    return 'Bfloat16' if dtype == jnp.bfloat16 else ''


def _shape(*dimensions, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dimensions, dtype)


def _padded(size):
    return -(-size // _CHUNK) * _CHUNK


def _pack_here(kernel, dtype):
    """Packs a kernel `[taps, C, F]` in a program."""
    taps, channels, features = kernel.shape
    size = taps * _padded(channels) * _padded(features)
    shape = _shape(size, dtype=dtype)
    return cpu_kernels.call(f'RDNetPack{_suffix(dtype)}', [shape], kernel)[0]


def _taps(kernel):
    return kernel.reshape(-1, *kernel.shape[2:])


def layer(x, parameters, epsilon: float, packed=None):
    """The new features of a layer, before its gate and its scale: `[N, H, W, G]`.

    Args:
      x: float32 or bfloat16 `[N, H, W, C]`.
      parameters: kernel and bias of the depthwise convolution, scale and bias of the
        layer norm, kernel and bias of both 1x1s; float32.
      epsilon: added to variances.
      packed: the kernels of the 1x1s from `pack`, for inference without gradients.
    """
    wide = x.astype(compute_dtype(x.dtype))
    *first, kernel1, bias1, kernel2, bias2 = parameters
    parameters = (*first, _taps(kernel1), bias1, _taps(kernel2), bias2)
    if packed is not None:
        y = _layer_forward(wide, parameters, packed, epsilon, keep=False)[0]
    else:
        y = _layer(wide, parameters, epsilon)
    return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _layer(x, parameters, epsilon):
    return _layer_forward(x, parameters, None, epsilon, keep=False)[0]


def _layer_forward(x, parameters, packed, epsilon, *, keep):
    """y, and for the backward pass what `LayerForward` in `cpu_rdnet_layer.h` keeps."""
    *front, kernel1, bias1, kernel2, bias2 = parameters
    dtype, hidden, growth = x.dtype, bias1.size, bias2.size

    def of_own_rows(x, *arrays):
        places = x.shape[:3] if keep else (0, 0, 0)
        kept = keep and dtype == jnp.float32
        return cpu_kernels.call(
            f'RDNetLayerForward{_suffix(dtype)}',
            [
                _shape(*x.shape[:3], growth, dtype=dtype),
                _shape(*places, x.shape[3], dtype=dtype),
                _shape(*places),
                _shape(*(places if kept else (0, 0, 0)), hidden, dtype=dtype),
            ],
            x,
            *arrays,
            epsilon=epsilon,
        )

    first, second = packed or (_pack_here(kernel1, dtype), _pack_here(kernel2, dtype))
    arrays = (*front, first, bias1, second, bias2)
    axes = [0, 0 if keep else None, 0 if keep else None]
    axes.append(0 if keep and dtype == jnp.float32 else None)
    by_rows = spread.by_rows(of_own_rows, axes, [0, *[None] * 8], x.shape[0])
    return by_rows(x, *arrays)


def _layer_saving(x, parameters, epsilon):
    y, *saved = _layer_forward(x, parameters, None, epsilon, keep=True)
    return y, (x, *saved, parameters)


def _layer_backward(epsilon, residuals, gradient):
    x, normalized, deviation, hidden, parameters = residuals
    depthwise_kernel, _, scale, bias, kernel1, bias1, kernel2, _ = parameters
    arrays = (depthwise_kernel, scale, bias, kernel1, bias1, kernel2)
    rows = [0, 0, 0, 0 if hidden.size else None, 0]
    results = spread.call(
        f'RDNetLayerBackward{_suffix(x.dtype)}',
        [
            _shape(*x.shape, dtype=x.dtype),
            _shape(*x.shape, dtype=x.dtype),
            *(_shape(*array.shape) for array in parameters),
        ],
        (x, normalized, deviation, hidden, gradient, *arrays),
        [*rows, *[None] * len(arrays)],
        [0, 0, *[None] * len(parameters)],
        rows=x.shape[0],
    )
    return results[0], tuple(results[2:])


_layer.defvjp(_layer_saving, _layer_backward)


def transition(x, parameters, epsilon: float, packed=None):
    """Layer norm and a convolution of patches: `[N, H // size, W // size, F]`.

    Args:
      x: float32 or bfloat16 `[N, H, W, C]`.
      parameters: scale and bias of the layer norm, kernel `[size, size, C, F]` and bias
        of the convolution; float32.
      epsilon: added to variances.
      packed: the kernel from `pack`, for inference without gradients.
    """
    wide, (scale, bias, kernel, conv_bias) = (
        x.astype(compute_dtype(x.dtype)),
        parameters,
    )
    size, parameters = kernel.shape[0], (scale, bias, _taps(kernel), conv_bias)
    if packed is not None:
        y = _transition_forward(wide, parameters, packed, epsilon, size)
    else:
        y = _transition(wide, parameters, epsilon, size)
    return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _transition(x, parameters, epsilon, size):
    return _transition_forward(x, parameters, None, epsilon, size)


def _transition_forward(x, parameters, packed, epsilon, size):
    scale, bias, kernel, conv_bias = parameters
    dtype = x.dtype
    packed = _pack_here(kernel, dtype) if packed is None else packed

    def of_own_rows(x, *arrays):
        rows, height, width, _ = x.shape
        shape = (rows, height // size, width // size, conv_bias.size)
        return cpu_kernels.call(
            f'RDNetTransitionForward{_suffix(dtype)}',
            [_shape(*shape, dtype=dtype)],
            x,
            *arrays,
            epsilon=epsilon,
            size=size,
        )

    by_rows = spread.by_rows(of_own_rows, [0], [0, *[None] * 4], x.shape[0])
    return by_rows(x, scale, bias, packed, conv_bias)[0]


def _transition_backward(epsilon, size, residuals, gradient):
    x, parameters = residuals
    scale, bias, kernel, _ = parameters
    results = spread.call(
        f'RDNetTransitionBackward{_suffix(x.dtype)}',
        [
            _shape(*x.shape, dtype=x.dtype),
            *(_shape(*array.shape) for array in parameters),
        ],
        (x, gradient, scale, bias, kernel),
        [0, 0, None, None, None],
        [0, *[None] * len(parameters)],
        rows=x.shape[0],
        epsilon=epsilon,
        size=size,
    )
    return results[0], tuple(results[1:])


_transition.defvjp(
    lambda x, parameters, epsilon, size: (
        _transition_forward(x, parameters, None, epsilon, size),
        (x, parameters),
    ),
    _transition_backward,
)

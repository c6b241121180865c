"""The fast dense block: pure functions with the same results as the plain layers.

A dense layer is `conv3x3(relu(norm2(conv1x1(relu(norm1(x))))))`, concatenated to `x`. A
plain implementation spends most of its time reading the growing `x`. Four observations
avoid most of that:

1. Batch statistics are computed once. Channel c of `x` has the same batch mean and
   variance in every later layer; only the scale and the bias of the layer differ. They
   are computed together with the channel, and their gradients, summed over the layers,
   are applied once:

       norm1 of layer l:  (x - mean) * a_l + bias_l,   a_l = scale_l / sqrt(var + eps)
       d mean = -sum_l a_l * sum(d_l)
       d var  = -1/2 (var + eps)^(-3/2) sum_l scale_l * sum(d_l * (x - mean))
       d x   +=  d mean / n  +  d var * 2 (x - mean) / n

   where d_l is the gradient after norm1 of layer l. The mean is subtracted before the
   multiplication, so that a mean far from zero costs no precision.
2. Memory is linear in the depth: a block keeps its output, the statistics, and the 1x1
   output of each layer. `relu(norm1(x))`, with a quadratic total size, is recomputed.
3. A 1x1 convolution is a matrix product, which is fast forward and backward.
4. Average pooling and a 1x1 convolution commute, so a transition pools first.

There are two implementations: `native_block` (C++ on CPUs) and `xla_block`
(JAX only, everywhere). For inference with a trained model, see `models.folded`.
"""

import functools
import logging

import jax
import jax.numpy as jnp

from flax_densenet.errors import UserError
from flax_densenet.kernels import cpu as cpu_kernels
from flax_densenet.kernels import (
    native_block,
    native_stem,
    native_transition,
    spread,
    xla_block,
)

_LOGGER = logging.getLogger(__name__)

KERNELS = ('auto', 'native', 'xla')


def use_native(
    kernel: str,
    x,
    layers=None,
    *,
    load: str = 'float32',
    all_rows: bool = False,
) -> bool:
    """Whether the C++ kernel computes a block or, without `layers`, the stem.

    Args:
      kernel: one of `KERNELS`.
      x: the input; only its dtype matters.
      layers: sequence of `Layer`.
      load: the required kernels, `float32` or `bfloat16`.
      all_rows: whether batch statistics over the rows of all devices are computed.

    Raises:
      UserError: `kernel='native'`, but the kernel cannot be used.
    """
    if kernel == 'xla':
        return False
    reason = native_block.why_not(x, known=kernel == 'auto')
    if reason is None and layers is not None:
        reason = native_block.why_not_block(layers)
    if reason is None:
        reason = cpu_kernels.load(load)
        if reason and kernel == 'auto':
            _log_once(
                f'the dense block runs without its CPU kernel: {reason}; training and '
                'prediction are about three times slower'
                + ('; install g++ or set CXX' if 'compiler' in reason else '')
            )
    if reason is None and all_rows and spread.is_shared() and jax.process_count() > 1:
        reason = 'the batch statistics cover several processes'
        if jax.process_index() == 0:
            _log_once(
                f'the dense block runs without its CPU kernel: {reason}; training is '
                'about three times slower; model.batch_norm_group=-1 (statistics of '
                "each device's own rows) changes that"
            )
    if reason and kernel == 'native':
        raise UserError(f'model.kernel=native cannot be used: {reason}; use auto')
    return reason is None


@functools.cache
def _log_once(text):
    _LOGGER.warning(text)


def block_train(
    x,
    layers,
    *,
    epsilon,
    dtype,
    kernel='auto',
    remat=True,
    dropout_rate=0.0,
    keys=None,
    path_rates=None,
    path_keys=None,
):
    """A dense block in training.

    Args:
      x: `[N, H, W, C0]`.
      layers: sequence of `Layer`; its running statistics are not used.
      epsilon: added to variances.
      dtype: dtype of the activations.
      kernel: one of `KERNELS`.
      remat: recompute `relu(norm1(x))` in the backward pass instead of keeping it. The
        native kernel always does.
      dropout_rate: fraction of the values to drop after each 3x3 convolution.
      keys: a random key for each layer, needed if `dropout_rate` is above 0.
      path_rates: for each layer, the fraction of images for which its maps are dropped.
      path_keys: a random key for each layer with a rate above 0.

    Returns:
      Features `[N, H, W, C0 + L * G]`; their batch (mean, var); and for each layer the
      batch (mean, var) of the input of norm2, or None without bottleneck.
    """
    layers = tuple(layers)
    path_rates = path_rates or (0.0,) * len(layers)
    if use_native(kernel, x, layers, all_rows=True):
        trained = [native_block.parameters(layer) for layer in layers]
        drop = native_block.drops(x, layers, dropout_rate, keys, path_rates, path_keys)
        wide = _in_float32(x)
        features, mean, var, mean2, var2 = native_block.train(
            _widen(x) if wide else x, trained, drop, epsilon, float(dropout_rate)
        )
        inner = [None] * len(layers)
        if layers[0].kernel2 is not None:
            inner = list(zip(mean2, var2, strict=True))
        return features.astype(x.dtype), (mean, var), inner
    return xla_block.train(
        x,
        layers,
        epsilon=epsilon,
        dtype=dtype,
        remat=remat,
        dropout_rate=dropout_rate,
        keys=keys,
        path_rates=path_rates,
        path_keys=path_keys,
    )


def _in_float32(x):
    """Whether a bfloat16 block computes in float32, because that is faster."""
    if x.dtype != jnp.bfloat16:
        return False
    reason = cpu_kernels.why_bfloat16_is_slow()
    if reason:
        _log_once(
            f'model.dtype=bfloat16: {reason}, so the dense blocks compute in float32'
        )
    return reason is not None


def _in_bfloat16(x):
    """Whether the stem and transitions, whose input is x, are native in bfloat16.

    Their gradients depend on all rows, which must be in this process.
    """
    local = jax.process_count() == 1 or not spread.is_shared()
    return local and x.dtype == jnp.bfloat16 and not _in_float32(x)


def _widen(x):
    return x.astype(jnp.float32)


def block_eval(x, layers, *, epsilon, dtype, kernel='auto'):
    """A dense block in evaluation, with running statistics: `[N, H, W, C0 + L * G]`."""
    layers = tuple(layers)
    if use_native(kernel, x, layers):
        return native_block.evaluate(_widen(x), layers, epsilon).astype(x.dtype)
    return xla_block.evaluate(x, layers, epsilon, dtype)


def stem(x, norm, *, epsilon, dtype, padding, kernel='auto'):
    """The stem after its convolution: batch norm, ReLU, 3x3 max pooling with stride 2.

    Args:
      x: `[N, H, W, C]`.
      norm: (mean, var, scale, bias), each `[C]`. In training, mean and var are None,
        and the statistics of the batch are used.
      padding: ((top, bottom), (left, right)) of the pooling.

    Returns:
      `[N, H', W', C]`, and the batch (mean, var), or None if they were given.
    """
    mean, var, scale, bias = norm
    if use_native(kernel, x, all_rows=mean is None):
        wide = _widen(x)
        if mean is not None:
            y = native_block.stem_eval(wide, *norm, epsilon, padding)
            return y.astype(x.dtype), None
        y, mean, var = native_block.stem_train(wide, scale, bias, epsilon, padding)
        return y.astype(x.dtype), (mean, var)
    statistics = None
    if mean is None:
        mean, var = statistics = xla_block.statistics(x)
    y = xla_block.stem(x, mean, var, scale, bias, epsilon, padding, dtype)
    return y, statistics


def has_whole_stem(x, kernel, train: bool) -> bool:
    """Whether `whole_stem` computes the stem with a 7x7 convolution.

    Args:
      x: the images, with the dtype of the activations.
      kernel: one of `KERNELS`.
    """
    if x.dtype != jnp.bfloat16 or not native_stem.takes(x.shape[-1]):
        return False
    return use_native(kernel, x, all_rows=train) and _in_bfloat16(x)


def whole_stem(x, weights, norm, *, epsilon, padding):
    """The stem with its 7x7 convolution, in C++ and bfloat16.

    Args:
      x: images `[N, H, W, C]`, for which `has_whole_stem`.
      weights: `[7, 7, C, F]`.
      norm: as for `stem`.
      padding: `torch` or `same`.

    Returns:
      As `stem`, and the number of values in each of the statistics.
    """
    mean, var, scale, bias = norm
    count = native_stem.count_pixels(x, padding)
    if mean is not None:
        arguments = (x, weights, scale, bias, mean, var)
        return native_stem.evaluate(*arguments, epsilon, padding), None, count
    y, *statistics = native_stem.train(x, weights, scale, bias, epsilon, padding)
    return y, statistics, count


def transition(x, norm, weights, *, epsilon, dtype, kernel='auto'):
    """Batch norm, ReLU, 2x2 mean, 1x1 convolution: `[N, H // 2, W // 2, F]`.

    Args:
      x: `[N, H, W, C]`.
      norm: (mean, var, scale, bias), each `[C]`.
      weights: `[1, 1, C, F]`.
      epsilon: added to the variance.
      dtype: dtype of the activations.
      kernel: one of `KERNELS`. The C++ kernel is for bfloat16; if the blocks are native
        but in float32, XLA computes in float32, which is faster on CPUs.
    """
    if dtype == jnp.bfloat16 and use_native(kernel, x):
        if _in_bfloat16(x):
            return native_transition.transition(x, *norm, weights[0, 0], epsilon)
        wide = transition(x, norm, weights, epsilon=epsilon, dtype=jnp.float32)
        return wide.astype(dtype)
    y = xla_block.normalize_relu(x, *norm, epsilon, dtype)
    height, width = (n // 2 * 2 for n in y.shape[1:3])
    y = y[:, :height, :width]
    shape = (y.shape[0], height // 2, 2, width // 2, 2, y.shape[3])
    return xla_block.product(y.reshape(shape).mean((2, 4)), weights.astype(dtype)[0, 0])

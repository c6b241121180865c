"""The fast dense block: pure functions with the results of the plain layers.

A dense layer is `conv3x3(relu(norm2(conv1x1(relu(norm1(x))))))`, joined to `x`. A
plain implementation spends its time reading the growing `x`. Four facts save most of
it:

1. Batch statistics are born once. Channel c of `x` has the same batch mean and
   variance in every later layer; only that layer's scale and bias differ. They are
   taken when the channel is made, and their gradients, added up over the layers, are
   applied once:

       norm1 of layer l:  (x - mean) * a_l + bias_l,   a_l = scale_l / sqrt(var + eps)
       d mean = -sum_l a_l * sum(d_l)
       d var  = -1/2 (var + eps)^(-3/2) sum_l scale_l * sum(d_l * (x - mean))
       d x   +=  d mean / n  +  d var * 2 (x - mean) / n

   where d_l is the gradient behind norm1 of layer l. The mean is taken off before the
   multiplication, so a mean far from zero costs no digits.
2. Memory is linear in the depth: a block keeps its output, the statistics, and each
   layer's 1x1 output; `relu(norm1(x))`, of quadratic size, is computed again.
3. A 1x1 convolution is a matrix product, in a form that is fast in all directions.
4. Average pooling and a 1x1 convolution commute, so a transition pools first.

There are two implementations: `kernel='native'` is one call per block and direction
into `cpu_kernels.cc`, for float32 on one CPU device; `kernel='xla'` is JAX alone, for
everything else. Inference alone, of a model that trains no more, has `folded`.
"""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_densenet.errors import UserError
from flax_densenet.kernels import cpu as cpu_kernels

KERNELS = ('auto', 'native', 'xla')


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
    """Variables of one dense layer; without bottleneck the `2` fields are None.

    Attributes:
      scale1, bias1, mean1, var1: of norm1, [C].
      kernel1: [1, 1, C, M], or [3, 3, C, G] without bottleneck.
      scale2, bias2, mean2, var2: of norm2, [M].
      kernel2: [3, 3, M, G].
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

    Two passes: deviations from a first mean, whose own mean then mends both figures.
    In one pass the variance of a channel with a large mean would be lost.
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

    The weight gradient is formed as (g^T x)^T: on two CPU cores 131 to 166 GFLOP/s
    where the gradient of a convolution reaches 13 to 55.
    """
    return lax.dot_general(x, kernel, (((3,), (0,)), ((), ())))


def _product_backward(saved, g):
    x, kernel = saved
    dx = lax.dot_general(g, kernel, (((3,), (1,)), ((), ())))
    over = ((0, 1, 2), (0, 1, 2))
    return dx, lax.dot_general(g, x, (over, ((), ()))).T


product.defvjp(lambda x, kernel: (product(x, kernel), (x, kernel)), _product_backward)


def _conv3x3(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def use_native(kernel: str, x, layers=None, *, dropout: bool = False) -> bool:
    """Whether a block, or without `layers` the stem, runs in `cpu_kernels.cc`.

    Raises:
      UserError: `kernel='native'` where it cannot be.
    """
    if kernel == 'xla':
        return False
    reason = _not_native(x, one_device=kernel == 'auto')
    if reason is None and layers is not None:
        reason = _not_native_block(layers, dropout)
    if reason is None:
        reason = cpu_kernels.load()
        if reason and kernel == 'auto':
            _log_once(f'the dense block runs without its CPU kernel: {reason}')
    if reason and kernel == 'native':
        raise UserError(f'model.kernel=native cannot be used: {reason}; use auto')
    return reason is None


@functools.cache
def _log_once(text):
    print(text, file=sys.stderr, flush=True)


def _not_native(x, *, one_device):
    if jax.default_backend() != 'cpu':
        return 'it is for CPUs'
    if one_device and jax.device_count() > 1:
        return 'the batch is spread over several devices'
    if x.dtype != jnp.float32:
        return f'it computes in float32, not {x.dtype}'
    return None


def _not_native_block(layers, dropout):
    if layers[0].kernel2 is None:
        return 'it is for layers with a bottleneck'
    if dropout:
        return 'it has no dropout and no stochastic depth'
    if max(layers[0].kernel2.shape[2:]) > 256:
        return 'its widest layer is 256'
    return None


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
      layers: sequence of `Layer`; running statistics are not read.
      remat: compute `relu(norm1(x))` again in the backward pass instead of keeping it;
        the native kernel always does.
      keys: a random key for each layer, needed where `dropout_rate` is above 0.
      path_rates: for each layer the share of images that its maps are left out of.
      path_keys: a random key for each layer, needed where its rate is above 0.

    Returns:
      Features `[N, H, W, C0 + L * G]`; their batch (mean, var); for each layer the
      batch (mean, var) of norm2's input, or None without bottleneck.
    """
    layers = tuple(layers)
    path_rates = path_rates or (0.0,) * len(layers)
    dropout = max(dropout_rate, *path_rates) > 0
    if use_native(kernel, x, layers, dropout=dropout):
        trained = [_parameters(layer) for layer in layers]
        features, mean, var, mean2, var2 = _native_train(x, trained, epsilon)
        return features, (mean, var), list(zip(mean2, var2, strict=True))
    hidden = _hidden
    if remat:
        # Without prevent_cse XLA merges the two computations and saves nothing: 3,092
        # MB of temporary memory for a step of the 121 (batch 16) instead of 1,928.
        hidden = jax.checkpoint(_hidden, static_argnums=(4, 5), prevent_cse=True)
    mean, var = statistics(x)
    inner = []
    for index, layer in enumerate(layers):
        y = hidden(x, mean, var, layer, epsilon, dtype)
        if layer.kernel2 is not None:
            inner.append(statistics(y))
            y = normalize_relu(y, *inner[-1], layer.scale2, layer.bias2, epsilon, dtype)
            y = _conv3x3(y, layer.kernel2.astype(dtype))
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


def drop_out(x, key, rate):
    """Sets a share `rate` of the values to 0 and divides the others by what is left."""
    return _drop(x, key, rate, x.shape)


def drop_path(x, key, rate):
    """The same with all values of an image, `[N, H, W, C]`: stochastic depth."""
    return _drop(x, key, rate, (x.shape[0], 1, 1, 1))


def _drop(x, key, rate, shape):
    # In float32 always, so that the choice does not depend on the precision.
    keep = jax.random.uniform(key, shape, jnp.float32) >= rate
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def _hidden(x, mean, var, layer, epsilon, dtype):
    y = normalize_relu(x, mean, var, layer.scale1, layer.bias1, epsilon, dtype)
    kernel = layer.kernel1.astype(dtype)
    if layer.kernel2 is None:
        return _conv3x3(y, kernel)
    return product(y, kernel[0, 0])


def block_eval(x, layers, *, epsilon, dtype, kernel='auto'):
    """A dense block in evaluation, with running statistics: `[N, H, W, C0 + L * G]`."""
    layers = tuple(layers)
    if use_native(kernel, x, layers, dropout=False):
        return _native_eval(x, layers, epsilon)
    return _xla_eval(x, layers, epsilon, dtype)


def _xla_eval(x, layers, epsilon, dtype):
    for layer in layers:
        y = _hidden(x, layer.mean1, layer.var1, layer, epsilon, dtype)
        if layer.kernel2 is not None:
            y = normalize_relu(
                y, layer.mean2, layer.var2, layer.scale2, layer.bias2, epsilon, dtype
            )
            y = _conv3x3(y, layer.kernel2.astype(dtype))
        x = jnp.concatenate([x, y], -1)
    return x


def _parameters(layer):
    """In the order in which the native kernel takes and returns them."""
    return (
        layer.scale1,
        layer.bias1,
        layer.kernel1,
        layer.scale2,
        layer.bias2,
        layer.kernel2,
    )


def _shape(*dimensions):
    return jax.ShapeDtypeStruct(dimensions, jnp.float32)


def _flat(layers):
    return [array for layer in layers for array in layer]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _native_train(x, layers, epsilon):
    return _native_forward(x, layers, epsilon)[0]


def _native_forward(x, layers, epsilon):
    *places, channels = x.shape
    _, _, bottleneck, growth = layers[0][5].shape
    count, width = len(layers), channels + len(layers) * growth
    pixels = x.size // channels
    features, mean, var, hidden, mean2, var2 = cpu_kernels.call(
        'DenseBlockForwardTrain',
        [
            _shape(*places, width),
            _shape(width),
            _shape(width),
            _shape(count, pixels, bottleneck),
            _shape(count, bottleneck),
            _shape(count, bottleneck),
        ],
        x,
        *_flat(layers),
        epsilon=epsilon,
    )
    saved = (features, mean, var, hidden, mean2, var2)
    return (features, mean, var, mean2, var2), (saved, layers)


def _native_backward(epsilon, residuals, gradients):
    saved, layers = residuals
    # Statistics inside of the layers go to running averages only, so no gradient
    # comes back for them.
    features_gradient, mean_gradient, var_gradient, _, _ = gradients
    features, _, _, hidden, _, _ = saved
    channels = layers[0][0].shape[0]
    results = cpu_kernels.call(
        'DenseBlockBackward',
        [
            _shape(*features.shape[:3], channels),
            _shape(*features.shape),
            _shape(*hidden.shape[1:]),
            *[_shape(*array.shape) for array in _flat(layers)],
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


_native_train.defvjp(_native_forward, _native_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _native_eval(x, layers, epsilon):
    *places, channels = x.shape
    growth = layers[0].kernel2.shape[3]
    arguments = [
        (*_parameters(layer), layer.mean1, layer.var1, layer.mean2, layer.var2)
        for layer in layers
    ]
    (features,) = cpu_kernels.call(
        'DenseBlockForwardEval',
        [_shape(*places, channels + len(layers) * growth)],
        x,
        *_flat(arguments),
        epsilon=epsilon,
    )
    return features


def _native_eval_backward(epsilon, saved, gradient):
    # Rare (explanations of a prediction), so XLA computes it.
    xla = functools.partial(_xla_eval, epsilon=epsilon, dtype=jnp.float32)
    return jax.vjp(xla, *saved)[1](gradient)


_native_eval.defvjp(
    lambda x, layers, epsilon: (_native_eval(x, layers, epsilon), (x, layers)),
    _native_eval_backward,
)


def stem(x, norm, *, epsilon, dtype, padding, kernel='auto'):
    """Batch norm, ReLU, 3x3 max pooling of stride 2, behind the stem's convolution.

    Args:
      x: `[N, H, W, C]`.
      norm: (mean, var, scale, bias), each `[C]`; None for mean and var takes the
        batch's, as in training.
      padding: ((top, bottom), (left, right)) of the pooling.

    Returns:
      `[N, H', W', C]`, and the batch (mean, var), or None where they were given.
    """
    mean, var, scale, bias = norm
    if use_native(kernel, x):
        if mean is not None:
            return _native_stem_eval(x, *norm, epsilon, padding), None
        y, mean, var = _native_stem(x, scale, bias, epsilon, padding)
        return y, (mean, var)
    found = None
    if mean is None:
        mean, var = found = statistics(x)
    return _xla_stem(x, mean, var, scale, bias, epsilon, padding, dtype), found


def _xla_stem(x, mean, var, scale, bias, epsilon, padding, dtype):
    y = normalize_relu(x, mean, var, scale, bias, epsilon, dtype)
    return lax.reduce_window(
        y,
        np.array(-np.inf, y.dtype),  # a constant, else it has no gradient
        lax.max,
        (1, 3, 3, 1),
        (1, 2, 2, 1),
        ((0, 0), *padding, (0, 0)),
    )


def _stem_options(x, padding):
    """Shape of the pooled map, and attributes of the native calls."""
    sizes = [
        (n + sum(pad) - 3) // 2 + 1
        for n, pad in zip(x.shape[1:3], padding, strict=True)
    ]
    low = {'low_h': padding[0][0], 'low_w': padding[1][0]}
    return (x.shape[0], *sizes, x.shape[3]), low


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _native_stem(x, scale, bias, epsilon, padding):
    return _native_stem_forward(x, scale, bias, epsilon, padding)[0]


def _native_stem_forward(x, scale, bias, epsilon, padding):
    pooled, options = _stem_options(x, padding)
    y, which, mean, var = cpu_kernels.call(
        'StemForwardTrain',
        [
            _shape(*pooled),
            jax.ShapeDtypeStruct(pooled, jnp.uint8),
            _shape(x.shape[3]),
            _shape(x.shape[3]),
        ],
        x,
        scale,
        bias,
        epsilon=epsilon,
        **options,
    )
    return (y, mean, var), (x, scale, bias, mean, var, which)


def _native_stem_backward(epsilon, padding, saved, gradients):
    # The statistics go to running averages only.
    x, scale, bias, *_ = saved
    return tuple(
        cpu_kernels.call(
            'StemBackwardTrain',
            [_shape(*array.shape) for array in (x, scale, bias)],
            *saved,
            gradients[0],
            epsilon=epsilon,
            **_stem_options(x, padding)[1],
        )
    )


_native_stem.defvjp(_native_stem_forward, _native_stem_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _native_stem_eval(x, mean, var, scale, bias, epsilon, padding):
    pooled, options = _stem_options(x, padding)
    (y,) = cpu_kernels.call(
        'StemForwardEval',
        [_shape(*pooled)],
        x,
        scale,
        bias,
        mean,
        var,
        epsilon=epsilon,
        **options,
    )
    return y


def _native_stem_eval_backward(epsilon, padding, saved, gradient):
    def xla(*arrays):
        return _xla_stem(*arrays, epsilon, padding, jnp.float32)

    return jax.vjp(xla, *saved)[1](gradient)


_native_stem_eval.defvjp(
    lambda *args: (_native_stem_eval(*args), args[:5]), _native_stem_eval_backward
)


def transition(x, norm, kernel, *, epsilon, dtype):
    """Batch norm, ReLU, 2x2 mean, 1x1 convolution: `[N, H, W, C]` to a quarter.

    Args:
      norm: (mean, var, scale, bias), each `[C]`.
      kernel: `[1, 1, C, F]`.
    """
    y = normalize_relu(x, *norm, epsilon, dtype)
    height, width = (n // 2 * 2 for n in y.shape[1:3])
    y = y[:, :height, :width]
    shape = (y.shape[0], height // 2, 2, width // 2, 2, y.shape[3])
    return product(y.reshape(shape).mean((2, 4)), kernel.astype(dtype)[0, 0])

"""The dense block in C++, for float32 on one CPU device: `kernel='native'`.

One call into `cpu_kernels.cc` for each block and direction.
"""

import functools

import jax
import jax.numpy as jnp

from flax_densenet.kernels import cpu as cpu_kernels
from flax_densenet.kernels import xla_block


def why_not(x, *, one_device: bool) -> str | None:
    """Why the kernels cannot compute on `x` here, or None if they can."""
    if jax.default_backend() != 'cpu':
        return 'it is for CPUs'
    if one_device and jax.device_count() > 1:
        return 'the batch is spread over several devices'
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f'it computes in float32 and bfloat16, not {x.dtype}'
    return None


def why_not_block(layers, dropout: bool) -> str | None:
    """Why the kernels cannot compute a block of these layers, or None."""
    if layers[0].kernel2 is None:
        return 'it is for layers with a bottleneck'
    if dropout:
        return 'it has no dropout and no stochastic depth'
    if max(layers[0].kernel2.shape[2:]) > 256:
        return 'its widest layer is 256'
    return None


def parameters(layer):
    """Parameters of a `Layer` in the order of the kernel's arguments and results."""
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
def train(x, layers, epsilon):
    return _train_forward(x, layers, epsilon)[0]


def _train_forward(x, layers, epsilon):
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


def _train_backward(epsilon, residuals, gradients):
    saved, layers = residuals
    # Statistics inside the layers are only used for running averages, so they have no
    # gradient.
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


train.defvjp(_train_forward, _train_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def evaluate(x, layers, epsilon):
    *places, channels = x.shape
    growth = layers[0].kernel2.shape[3]
    arguments = [
        (*parameters(layer), layer.mean1, layer.var1, layer.mean2, layer.var2)
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


def _evaluate_backward(epsilon, saved, gradient):
    # Rare (explanations of predictions), so XLA computes it.
    xla = functools.partial(xla_block.evaluate, epsilon=epsilon, dtype=jnp.float32)
    return jax.vjp(xla, *saved)[1](gradient)


evaluate.defvjp(
    lambda x, layers, epsilon: (evaluate(x, layers, epsilon), (x, layers)),
    _evaluate_backward,
)


def _stem_options(x, padding):
    """Shape of the pooled map, and attributes of the calls."""
    sizes = [
        (n + sum(pad) - 3) // 2 + 1
        for n, pad in zip(x.shape[1:3], padding, strict=True)
    ]
    low = {'low_h': padding[0][0], 'low_w': padding[1][0]}
    return (x.shape[0], *sizes, x.shape[3]), low


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def stem_train(x, scale, bias, epsilon, padding):
    return _stem_train_forward(x, scale, bias, epsilon, padding)[0]


def _stem_train_forward(x, scale, bias, epsilon, padding):
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


def _stem_train_backward(epsilon, padding, saved, gradients):
    # The statistics are only used for running averages.
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


stem_train.defvjp(_stem_train_forward, _stem_train_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def stem_eval(x, mean, var, scale, bias, epsilon, padding):
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


def _stem_eval_backward(epsilon, padding, saved, gradient):
    def xla(*arrays):
        return xla_block.stem(*arrays, epsilon, padding, jnp.float32)

    return jax.vjp(xla, *saved)[1](gradient)


stem_eval.defvjp(lambda *args: (stem_eval(*args), args[:5]), _stem_eval_backward)

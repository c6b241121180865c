"""The dense block in C++, on CPUs: `kernel='native'`.

Each block and direction is one call into `cpu_float32_*.cc` or `cpu_bf16_training.cc`.
In bfloat16, features and the values kept for the backward pass are bfloat16, while
statistics, parameters and their gradients are float32. For several devices, see
`spread`.
"""

import functools

import jax
import jax.numpy as jnp

from flax_densenet.kernels import cpu as cpu_kernels
from flax_densenet.kernels import spread, xla_block

_CHUNK = 32  # channels in a chunk in bfloat16


def why_not(x, *, known: bool) -> str | None:
    """Why the kernels cannot compute on `x` here, or None if they can.

    Args:
      known: whether it must be known which devices share the rows, see `spread`.
    """
    if jax.default_backend() != 'cpu':
        return 'it is for CPUs'
    if known and not spread.is_known():
        return 'the batch may be spread over several devices'
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f'it computes in float32 and bfloat16, not {x.dtype}'
    return None


def why_not_block(layers) -> str | None:
    """Why the kernels cannot compute a block of these layers, or None."""
    first = layers[0]
    if first.kernel2 is None and first.kernel1.shape[3] > 28:  # 9 * 28 = 252
        return 'without bottleneck it supports a growth rate of at most 28'
    if first.kernel2 is not None and max(first.kernel2.shape[2:]) > 256:
        return 'it supports layers of at most 256 channels'
    return None


def parameters(layer):
    """Parameters of a `Layer`, in the order of the kernel's arguments and results."""
    front = (layer.scale1, layer.bias1, layer.kernel1)
    if layer.kernel2 is None:
        return front
    return (*front, layer.scale2, layer.bias2, layer.kernel2)


def keep_mask(keys, shape, rate):
    """The dropout mask of `xla_block.drop_out`: uint8 `[L, *shape]`, 1 to keep.

    XLA takes as long for the random bits as the kernel takes for the entire block.

    Args:
      keys: a random key for each layer.
    """
    threefry = all(str(jax.random.key_impl(key)) == 'threefry2x32' for key in keys)
    if not threefry or not jax.config.jax_threefry_partitionable:
        kept = [xla_block.kept(key, shape, rate) for key in keys]
        return jnp.stack(kept).astype(jnp.uint8)
    data = jnp.stack([jax.random.key_data(key) for key in keys])
    rows, *rest = shape
    devices = spread.devices(rows)
    result = [jax.ShapeDtypeStruct((len(keys), rows // devices, *rest), jnp.uint8)]
    of_own_rows = functools.partial(cpu_kernels.call, 'DropoutKeep', result, rate=rate)
    places = jnp.arange(devices, dtype=jnp.uint32)
    return spread.by_rows(of_own_rows, [1], [None, 0], rows)(data, places)[0]


def drops(x, layers, dropout_rate, keys, path_rates, path_keys):
    """Dropout and stochastic depth of a block: `(mask, images)` for `train`.

    The arguments are those of `dense_block.block_train`.

    Returns:
      uint8 `[L, N, H, W, G]` from `keep_mask`, and float32 `[L, N]`, a factor for the
      new maps of each image. Both are empty if nothing is dropped.
    """
    count, places = len(layers), x.shape[:3]
    growth = parameters(layers[0])[-1].shape[3]
    mask = jnp.zeros((0,), jnp.uint8)
    if dropout_rate:
        mask = keep_mask(keys, (*places, growth), dropout_rate)
    images = jnp.zeros((0,), jnp.float32)
    if any(path_rates):
        ones = jnp.ones((x.shape[0], 1, 1, 1), jnp.float32)
        images = [
            xla_block.drop_path(ones, path_keys[index], path_rates[index]).reshape(-1)
            if path_rates[index]
            else ones.reshape(-1)
            for index in range(count)
        ]
        images = jnp.stack(images)
    return mask, images


def _axes_of(drop):
    """The axes of the rows in `drop`, see `spread`."""
    return [1 if array.size else None for array in drop]


def _axis_of_pixels(dtype):
    """The axis of the pixels in stacked arrays of `_hidden_shape`."""
    return 2 if dtype == jnp.bfloat16 else 1


def _shape(*dimensions, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dimensions, dtype)


def _flat(layers):
    return [array for layer in layers for array in layer]


def _suffix(dtype):
    return 'Bfloat16' if dtype == jnp.bfloat16 else ''


def _hidden_shape(pixels, width, dtype):
    """The shape of the bottleneck of a layer; in bfloat16, in chunks of channels."""
    if dtype == jnp.bfloat16:
        return -(-width // _CHUNK), pixels, _CHUNK
    return pixels, width


def _rooms(features):
    """Shapes of the room for the features' gradient, and in bfloat16 for features."""
    if features.dtype != jnp.bfloat16:
        return [_shape(*features.shape)]
    channels = features.shape[3]
    chunks = _hidden_shape(features.size // channels, channels, jnp.bfloat16)
    return [_shape(*chunks, dtype=jnp.bfloat16), _shape(*chunks)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def train(x, layers, drop, epsilon, rate):
    """A dense block in training.

    Args:
      x: float32 or bfloat16 `[N, H, W, C]`.
      layers: `parameters` of each layer.
      drop: from `drops`.
      epsilon: added to variances.
      rate: dropout rate.

    Returns:
      Features, with the dtype of x; their mean and var; mean and var of the bottleneck
      of each layer, `[L, M]`, with M = 0 if there is none.
    """
    return _train_forward(x, layers, drop, epsilon, rate)[0]


def _train_forward(x, layers, drop, epsilon, rate):
    *places, channels = x.shape
    growth = layers[0][-1].shape[3]
    bottleneck = layers[0][-1].shape[2] if len(layers[0]) == 6 else 0
    count, width = len(layers), channels + len(layers) * growth
    pixels = x.size // channels
    rows, flat = x.shape[0], _flat(layers)
    features, mean, var, hidden, mean2, var2 = spread.call(
        f'DenseBlockForwardTrain{_suffix(x.dtype)}',
        [
            _shape(*places, width, dtype=x.dtype),
            _shape(width),
            _shape(width),
            _shape(count, *_hidden_shape(pixels, bottleneck, x.dtype), dtype=x.dtype),
            _shape(count, bottleneck),
            _shape(count, bottleneck),
        ],
        (x, *drop, *flat),
        [0, *_axes_of(drop), *[None] * len(flat)],
        [0, None, None, _axis_of_pixels(x.dtype), None, None],
        rows=rows,
        epsilon=epsilon,
        rate=rate,
    )
    saved = (features, mean, var, hidden, mean2, var2, *drop)
    return (features, mean, var, mean2, var2), (saved, layers)


def _train_backward(epsilon, rate, residuals, gradients):
    saved, layers = residuals
    # Statistics inside the layers only update the running averages, so they have no
    # gradient.
    features_gradient, mean_gradient, var_gradient, _, _ = gradients
    features, hidden = saved[0], saved[3]
    dtype, channels = features.dtype, layers[0][0].shape[0]
    room = hidden.shape[1:]
    if not hidden.size:
        growth, pixels = layers[0][-1].shape[3], features.size // features.shape[3]
        room = _hidden_shape(pixels, growth, dtype)
    parameters, pixels = _flat(layers), _axis_of_pixels(dtype)
    hidden_axis = pixels if hidden.size else None
    rooms = _rooms(features)
    results = spread.call(
        f'DenseBlockBackward{_suffix(dtype)}',
        [
            _shape(*features.shape[:3], channels, dtype=dtype),
            *rooms,
            _shape(*room, dtype=dtype),
            *[_shape(*array.shape) for array in parameters],
        ],
        (*saved, features_gradient, mean_gradient, var_gradient, *parameters),
        [
            *(0, None, None, hidden_axis, None, None, *_axes_of(saved[6:])),
            *(0, None, None, *[None] * len(parameters)),
        ],
        [0, *[pixels - 1] * (len(rooms) + 1), *[None] * len(parameters)],
        rows=features.shape[0],
        epsilon=epsilon,
        rate=rate,
    )
    flat, each = results[len(rooms) + 2 :], len(layers[0])
    of_layers = [tuple(flat[i : i + each]) for i in range(0, len(flat), each)]
    return results[0], of_layers, None


train.defvjp(_train_forward, _train_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def evaluate(x, layers, epsilon):
    channels, arguments = x.shape[3], []
    for layer in layers:
        running = (layer.mean1, layer.var1)
        if layer.kernel2 is not None:
            running += (layer.mean2, layer.var2)
        arguments.append((*parameters(layer), *running))
    growth = parameters(layers[0])[-1].shape[3]
    flat = _flat(arguments)

    def of_own_rows(x, *flat):
        shape = _shape(*x.shape[:3], channels + len(layers) * growth)
        return cpu_kernels.call(
            'DenseBlockForwardEval', [shape], x, *flat, epsilon=epsilon
        )

    by_rows = spread.by_rows(of_own_rows, [0], [0, *[None] * len(flat)], x.shape[0])
    return by_rows(x, *flat)[0]


def _evaluate_backward(epsilon, saved, gradient):
    # Rare (explanations of predictions), so XLA computes it.
    xla = functools.partial(xla_block.evaluate, epsilon=epsilon, dtype=jnp.float32)
    return jax.vjp(xla, *saved)[1](gradient)


evaluate.defvjp(
    lambda x, layers, epsilon: (evaluate(x, layers, epsilon), (x, layers)),
    _evaluate_backward,
)


def _stem_options(x, padding):
    """The shape of the pooled map, and the attributes of the calls."""
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
    y, which, mean, var = spread.call(
        'StemForwardTrain',
        [
            _shape(*pooled),
            jax.ShapeDtypeStruct(pooled, jnp.uint8),
            _shape(x.shape[3]),
            _shape(x.shape[3]),
        ],
        (x, scale, bias),
        [0, None, None],
        [0, 0, None, None],
        rows=x.shape[0],
        epsilon=epsilon,
        **options,
    )
    return (y, mean, var), (x, scale, bias, mean, var, which)


def _stem_train_backward(epsilon, padding, saved, gradients):
    # The statistics only update the running averages.
    x, scale, bias, *_ = saved
    return tuple(
        spread.call(
            'StemBackwardTrain',
            [_shape(*array.shape) for array in (x, scale, bias)],
            (*saved, gradients[0]),
            [0, None, None, None, None, 0, 0],
            [0, None, None],
            rows=x.shape[0],
            epsilon=epsilon,
            **_stem_options(x, padding)[1],
        )
    )


stem_train.defvjp(_stem_train_forward, _stem_train_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def stem_eval(x, mean, var, scale, bias, epsilon, padding):
    def of_own_rows(x, *norm):
        pooled, options = _stem_options(x, padding)
        return cpu_kernels.call(
            'StemForwardEval', [_shape(*pooled)], x, *norm, epsilon=epsilon, **options
        )

    by_rows = spread.by_rows(of_own_rows, [0], [0, *[None] * 4], x.shape[0])
    return by_rows(x, scale, bias, mean, var)[0]


def _stem_eval_backward(epsilon, padding, saved, gradient):
    def xla(*arrays):
        return xla_block.stem(*arrays, epsilon, padding, jnp.float32)

    return jax.vjp(xla, *saved)[1](gradient)


stem_eval.defvjp(lambda *args: (stem_eval(*args), args[:5]), _stem_eval_backward)

"""Creates initial parameters and batch norm statistics."""

import functools
import math
import numbers
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from flax_densenet.errors import UserError
from flax_densenet.models import factory, layers, network


def variable_shapes(model: network.Network, *, channels: int = 3):
    """Shapes and dtypes of `{'params', 'batch_stats'}`; compiles nothing.

    `batch_stats` is empty for a network without batch norm.

    Args:
      channels: number of image channels.
    """
    # Fields may be lists, as in JSON, which cannot be keys of the cache.
    hashable = {k: tuple(v) for k, v in model.fields().items() if isinstance(v, list)}
    # Tracing 121 random initializers would take half of the time.
    model = model.clone(initializer=None, **hashable)
    shapes = _trace_shapes(model, channels)
    return jax.tree.map(lambda leaf: leaf, shapes)  # new dicts for the caller


@functools.lru_cache(maxsize=16)
def _trace_shapes(model, channels):
    """Cached, since models are loaded, initialized and counted with the same shapes."""
    side = model.smallest_image_size()
    image = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    # The key is created inside; otherwise a program for it would be compiled.
    init = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)
    return with_statistics(init)


def with_statistics(variables: dict[str, Any]) -> dict[str, Any]:
    """The variables with `batch_stats`, which is empty without batch norm."""
    return {'params': variables['params'], 'batch_stats': {}} | variables


def init_variables(
    model: network.Network, seed: int, *, channels: int = 3
) -> dict[str, Any]:
    """Creates `{'params', 'batch_stats'}` from a seed, without compiling the network.

    `model.init` compiles or runs every layer, which takes 13 to 32 s for DenseNet-121
    on two CPU cores. This function only traces it for the shapes, and draws each kernel
    with numpy, from a generator keyed by the seed and the path of the variable. The
    values of a layer therefore do not depend on other layers, the device or the version
    of JAX.

    Args:
      model: a network from `create_model`.
      seed: an integer of at most 64 bits.
      channels: number of image channels, 3 for color, 1 for gray.

    Returns:
      `{'params': ..., 'batch_stats': ...}`: numpy arrays, float32, or float64 with
      `dtype='float64'`; `batch_stats` is empty without batch norm.

    Raises:
      UserError: an argument is of another type.
    """
    if not isinstance(model, network.Network):
        kind = type(model).__name__
        raise UserError(f'model: an object of type {kind}; give that of create_model')
    for name, value in (('seed', seed), ('channels', channels)):
        if not isinstance(value, numbers.Integral):
            raise UserError(f'{name}={value!r} must be a whole number')
    shapes, fields = variable_shapes(model, channels=channels), model.fields()

    def draw(path, leaf):
        if path[-1] == 'kernel':
            rule = factory.INITIALIZERS[model.initializer]
            if 'classifier' in path:
                rule = layers.CLASSIFIER_INITIALIZER
            key = [seed, zlib.crc32('/'.join(path).encode())]
            generator = np.random.Generator(np.random.Philox(key=key))
            return _draw_kernel(generator, rule, leaf.shape).astype(leaf.dtype)
        values = {'scale': 1, 'var': 1, 'gamma': fields.get('layer_scale')}
        return np.full(leaf.shape, values.get(path[-1], 0), leaf.dtype)

    flat = traverse_util.flatten_dict(shapes)
    drawn = {path: draw(path, leaf) for path, leaf in flat.items()}
    return with_statistics(traverse_util.unflatten_dict(drawn))


def _draw_kernel(generator, rule, shape):
    scale, fan, distribution = rule
    area = math.prod(shape[:-2])
    fans = {'fan_in': area * shape[-2], 'fan_out': area * shape[-1]}
    fans['fan_avg'] = (fans['fan_in'] + fans['fan_out']) / 2
    std = math.sqrt(scale / fans[fan])
    if distribution == 'uniform':
        return generator.uniform(-math.sqrt(3) * std, math.sqrt(3) * std, shape)
    values = generator.standard_normal(shape, np.float32)
    if distribution == 'truncated_normal':
        while (outside := np.abs(values) > 2).any():
            values[outside] = generator.standard_normal(outside.sum(), np.float32)
        values /= 0.87962566103423978  # std of a normal distribution truncated at 2 std
    return values * np.float32(std)

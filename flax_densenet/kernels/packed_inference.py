"""Packs the arrays of the native kernels for inference in float32, and calls them.

The weights of a block form one vector in the order in which `cpu_float32_forward.cc`
reads them. Calls then need no packing, and a program has a few arguments instead of six
hundred. One call computes a block and the transition after it, and writes only the
result.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_densenet.kernels import cpu as cpu_kernels
from flax_densenet.kernels import spread

_LINE = 16  # floats per cache line; each array starts at one


class _Packer:
    def __init__(self):
        self._columns, self._lanes = cpu_kernels.panel()
        self._parts = []

    def add(self, array):
        array = np.ravel(array)
        self._parts += [array, np.zeros(-array.size % _LINE, np.float32)]

    def add_norm(self, norm):
        for name in ('mean', 'a', 'bias'):
            self.add(norm[name])

    def add_kernel(self, kernel):
        """Packs a matrix `[rows, columns]` in panels of `_columns` columns."""
        if missing := -kernel.shape[1] % self._lanes:
            kernel = np.pad(kernel, ((0, 0), (0, missing)))
        starts = range(0, kernel.shape[1], self._columns)
        self._parts += [kernel[:, n : n + self._columns].ravel() for n in starts]
        self._parts.append(np.zeros(-kernel.size % _LINE, np.float32))

    def join(self):
        return np.concatenate(self._parts)


def pack_block(layers, tail: dict[str, Any]) -> np.ndarray:
    """Packs the weights of `block` into one vector. Needs `cpu.load`.

    Args:
      layers: from `folded.fold`, with bottleneck, numpy float32.
      tail: `mean`, `a` and `bias` of the norm after the block, and the `kernel` of a
        transition.
    """
    packer = _Packer()
    for layer in layers:
        packer.add_norm(layer['norm1'])
        packer.add_kernel(layer['conv1']['kernel'][0, 0])
        packer.add(layer['conv1']['bias'])
        kernel = layer['conv2']['kernel']
        for tap in kernel.reshape(9, *kernel.shape[2:]):
            packer.add_kernel(tap)
    packer.add_norm(tail)
    if 'kernel' in tail:
        packer.add_kernel(tail['kernel'][0, 0])
    return packer.join()


def block(x, packed, *, layers: int, bottleneck: int, growth: int, features: int):
    """A dense block, and the transition or norm after it.

    Args:
      x: float32 `[N, H, W, C]`.
      packed: from `pack_block`.
      layers: number of layers.
      bottleneck: channels inside a layer.
      growth: channels that a layer adds.
      features: output channels of the transition; 0 for the last block, which has no
        transition.

    Returns:
      `[N, H // 2, W // 2, features]`; for the last block the normalized features
      `[N, H, W, C + layers * growth]`.
    """

    def of_own_rows(x, packed):
        shape = block_shape(x, layers * growth, features)
        return cpu_kernels.call(
            'DenseBlockForwardPacked',
            [jax.ShapeDtypeStruct(shape, jnp.float32)],
            x,
            packed,
            layers=layers,
            bottleneck=bottleneck,
            growth=growth,
            features=features,
        )

    return spread.by_rows(of_own_rows, [0], [0, None], x.shape[0])(x, packed)[0]


def block_shape(x, added: int, features: int) -> tuple[int, ...]:
    """The shape of the result of `block`."""
    count, height, width, channels = x.shape
    if features:
        return count, height // 2, width // 2, features
    return count, height, width, channels + added


def pack_stem(conv: dict[str, Any]) -> np.ndarray:
    """Packs the weights of `stem`, a folded 7x7 `kernel` and its `bias`."""
    packer, kernel = _Packer(), conv['kernel']
    packer.add_kernel(kernel.reshape(-1, kernel.shape[-1]))
    packer.add(conv['bias'])
    return packer.join()


def stem_sizes(x, padding, pool_padding) -> tuple[tuple[int, int], dict[str, int]]:
    """The (height, width) of the result of the stem, and the attributes of its call.

    Args:
      x: the images `[N, H, W, C]`.
      padding: ((top, bottom), (left, right)) of the convolution.
      pool_padding: a function from the (height, width) of the convolution's output to
        the padding of the pooling.
    """

    def sizes_of(sizes, padding, window):
        pairs = zip(sizes, padding, strict=True)
        return [(n + sum(pad) - window) // 2 + 1 for n, pad in pairs]

    height, width = sizes_of(x.shape[1:3], padding, 7)
    pool_padding = pool_padding((height, width))
    attributes = {
        'height': height,
        'width': width,
        'low_h': padding[0][0],
        'low_w': padding[1][0],
        'pool_low_h': pool_padding[0][0],
        'pool_low_w': pool_padding[1][0],
    }
    return tuple(sizes_of((height, width), pool_padding, 3)), attributes


def stem(x, packed, *, features: int, size: tuple[int, int], **sizes: int):
    """7x7 convolution with stride 2, 3x3 max pooling with stride 2, bias, ReLU.

    Args:
      x: float32 `[N, H, W, C]`, where C is 1 or 3.
      packed: from `pack_stem`.
      features: output channels.
      size, sizes: from `stem_sizes`.

    Returns:
      `[N, *size, features]`.
    """

    def of_own_rows(x, packed):
        shape = (x.shape[0], *size, features)
        result = [jax.ShapeDtypeStruct(shape, jnp.float32)]
        return cpu_kernels.call('StemForwardPacked', result, x, packed, **sizes)

    x, rows = x.astype(jnp.float32), x.shape[0]
    return spread.by_rows(of_own_rows, [0], [0, None], rows)(x, packed)[0]

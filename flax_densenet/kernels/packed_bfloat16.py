"""Packs the arrays of the native kernels for inference in bfloat16, and calls them.

Like `packed_inference`, but with two vectors for each block: float32 for the norms and
biases, bfloat16 for the weights. A matrix is stored in tiles of 32 rows and 16 columns.
Each tile is stored as 16 rows of 16 pairs, the operand of the processor's dot products.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_densenet.kernels import cpu as cpu_kernels
from flax_densenet.kernels import packed_inference, spread

_DEPTH, _COLUMNS = 32, 16  # rows and columns of a tile


def _fill(array, multiple, axis):
    """Pads with zeros to a multiple."""
    missing = [(0, 0)] * array.ndim
    missing[axis] = (0, -array.shape[axis] % multiple)
    return np.pad(array, missing)


def tiles(kernel: np.ndarray) -> np.ndarray:
    """Packs matrices `[..., rows, columns]`, one after another, into a vector of tiles.

    Each matrix is padded with zeros to complete tiles. Two adjacent columns of tiles
    form a panel; a panel stores its tiles row by row.
    """
    kernel = _fill(_fill(kernel, _DEPTH, -2), _COLUMNS, -1)
    columns = kernel.shape[-1]
    pairs = kernel.reshape(-1, _DEPTH // 2, 2, columns // _COLUMNS, _COLUMNS)
    by_tile = pairs.transpose(0, 3, 1, 4, 2)  # step, tile, pair of rows, column, row
    panels = [by_tile[:, n : n + 2].ravel() for n in range(0, by_tile.shape[1], 2)]
    return np.concatenate(panels).astype(jnp.bfloat16)


class _Packer:
    def __init__(self):
        self._vectors, self._weights = [], []

    def add(self, array):
        self._vectors.append(_fill(np.ravel(array), _DEPTH, 0))

    def add_norm(self, norm):
        """Adds a norm as x * a + b."""
        self.add(norm['a'])
        mean = norm['mean'].astype(np.float64)
        self.add((norm['bias'] - mean * norm['a']).astype(np.float32))

    def add_kernel(self, kernel):
        self._weights.append(tiles(kernel))

    def join(self):
        weights = self._weights or [np.zeros(0, jnp.bfloat16)]
        return {
            'vectors': np.concatenate(self._vectors),
            'weights': np.concatenate(weights),
        }


def pack_block(layers, tail: dict[str, Any]) -> dict[str, np.ndarray]:
    """Packs the weights of `block`.

    Args:
      layers: from `folded.fold`, with bottleneck, numpy float32.
      tail: `mean`, `a` and `bias` of the norm after the block, and the `kernel` of a
        transition.
    """
    packer = _Packer()
    for layer in layers:
        packer.add_norm(layer['norm1'])
        packer.add(layer['conv1']['bias'])
        # The columns of the 1x1 are the rows of the matrices of the 3x3.
        packer.add_kernel(_fill(layer['conv1']['kernel'][0, 0], _DEPTH, 1))
        packer.add_kernel(layer['conv2']['kernel'])
    packer.add_norm(tail)
    if 'kernel' in tail:
        packer.add_kernel(tail['kernel'][0, 0])
    return packer.join()


def block(x, packed, *, layers: int, bottleneck: int, growth: int, features: int):
    """Like `packed_inference.block`, in bfloat16."""

    def of_own_rows(x, vectors, weights):
        shape = packed_inference.block_shape(x, layers * growth, features)
        return cpu_kernels.call(
            'DenseBlockForwardPackedBfloat16',
            [jax.ShapeDtypeStruct(shape, jnp.bfloat16)],
            x,
            vectors,
            weights,
            layers=layers,
            bottleneck=bottleneck,
            growth=growth,
            features=features,
        )

    by_rows = spread.by_rows(of_own_rows, [0], [0, None, None], x.shape[0])
    return by_rows(x.astype(jnp.bfloat16), packed['vectors'], packed['weights'])[0]


def pack_stem(conv: dict[str, Any]) -> dict[str, np.ndarray]:
    """Packs the weights of `stem`: a folded 7x7 `kernel` (1 or 3 channels), `bias`."""
    packer, kernel = _Packer(), conv['kernel']
    packer.add(conv['bias'])
    # A row of the window is one step.
    packer.add_kernel(kernel.reshape(7, -1, kernel.shape[-1]))
    return packer.join()


def stem(x, packed, *, features: int, size: tuple[int, int], **sizes: int):
    """Like `packed_inference.stem`, from float32 to bfloat16."""

    def of_own_rows(x, vectors, weights):
        result = [jax.ShapeDtypeStruct((x.shape[0], *size, features), jnp.bfloat16)]
        return cpu_kernels.call(
            'StemForwardPackedBfloat16', result, x, vectors, weights, **sizes
        )

    by_rows = spread.by_rows(of_own_rows, [0], [0, None, None], x.shape[0])
    return by_rows(x.astype(jnp.float32), packed['vectors'], packed['weights'])[0]

"""Pallas kernels for a GPU: `relu(norm1(x))` times the 1x1 kernel, one pass each way.

As separate operations that layer reads the C channels of `x`, writes them normalized,
reads them for the product, and reads its output for batch norm's statistics; backward
it is about ten passes over C channels. `forward` reads x once and takes the statistics
of what it writes; `backward` reads x once, and reads and writes the gradient of x once.
Both get the block's whole buffer `[P, width]` and touch its first C channels, so
nothing is concatenated, sliced or copied.

Lowered by Triton on a GPU, interpreted elsewhere (slowly, for tests).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Powers of two, as Triton wants them.

    Attributes:
      pixels, channels, features: of one product; `features` is the most, a layer with
        fewer takes the next power of two.
      programs: at which the backward pass stops to split the pixels further: each
        split writes a weight gradient of its own, to be added up (2 for each of an
        H100's 132 processors).
    """

    pixels: int = 128
    channels: int = 64
    features: int = 128
    warps: int = 8
    stages: int = 3
    programs: int = 264


FORWARD = Tiles()
# The weight gradient, [channels, features] in float32, stays in registers.
BACKWARD = Tiles(pixels=64)


def interpret():
    return jax.default_backend() != 'gpu'


def power_of_two(number, most):
    return max(16, min(most, 1 << (number - 1).bit_length()))


def _span(index, size, end):
    """Slice number `index` of `size`, and its mask within `end`; None: all within."""
    start = index * size
    return pl.ds(start, size), None if end % size == 0 else (
        start + lax.iota(jnp.int32, size) < end
    )


def _both(rows, columns):
    """Mask of a tile from the masks of its two sides."""
    if rows is None and columns is None:
        return None
    if rows is None:
        return columns[None, :]
    if columns is None:
        return rows[:, None]
    return rows[:, None] & columns[None, :]


def _load(ref, where, mask, shape):
    if mask is None:
        return plgpu.load(ref.at[where])
    # 0 beyond the end, so that what is there adds nothing to a product.
    return plgpu.load(ref.at[where], mask=jnp.broadcast_to(mask, shape), other=0)


def _store(ref, where, value, mask):
    if mask is not None:
        mask = jnp.broadcast_to(mask, value.shape)
    plgpu.store(ref.at[where], value, mask=mask)


def _dot(a, b):
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)


def _forward_kernel(*refs, shape, tiles, activate):
    """refs: x, (mean, factor, bias) of norm1, kernel; outputs y, means, squares.

    With `activate`: (factor, bias) for the output before them, no statistics.
    """
    pixels, channels, features = shape
    x_ref, *norm_refs, w_ref = refs[:5]
    rows, row_mask = _span(pl.program_id(0), tiles.pixels, pixels)
    columns, column_mask = _span(pl.program_id(1), tiles.features, features)

    def add(index, total):
        inner, inner_mask = _span(index, tiles.channels, channels)
        block = (tiles.pixels, tiles.channels)
        x = _load(x_ref, (rows, inner), _both(row_mask, inner_mask), block)
        mean, factor, bias = (
            _load(ref, inner, inner_mask, block[1:])[None, :] for ref in norm_refs
        )
        y = jnp.maximum((x.astype(jnp.float32) - mean) * factor + bias, 0)
        block = (tiles.channels, tiles.features)
        w = _load(w_ref, (inner, columns), _both(inner_mask, column_mask), block)
        return total + _dot(y.astype(w.dtype), w)

    total = lax.fori_loop(
        0,
        pl.cdiv(channels, tiles.channels),
        add,
        jnp.zeros((tiles.pixels, tiles.features), jnp.float32),
    )
    mask = _both(row_mask, column_mask)
    if activate:
        factor, bias = (
            _load(ref, columns, column_mask, (tiles.features,))[None, :]
            for ref in refs[5:7]
        )
        y = jnp.maximum(total * factor + bias, 0).astype(refs[7].dtype)
        return _store(refs[7], (rows, columns), y, mask)
    y_ref, mean_ref, square_ref = refs[5:]
    y = total.astype(y_ref.dtype)
    _store(y_ref, (rows, columns), y, mask)
    store_statistics(mean_ref, square_ref, y, pixels, row_mask, columns, column_mask)
    return None


def store_statistics(mean_ref, square_ref, y, pixels, row_mask, columns, column_mask):
    """Of a tile: the mean of each channel, and the sum of squares about it.

    Of the rounded values, as the plain layers take them. Deviations are from this
    tile's mean, so a mean far from zero costs no digits.
    """
    y, size = y.astype(jnp.float32), y.shape[0]
    count = jnp.minimum(size, pixels - pl.program_id(0) * size)
    if row_mask is not None:
        y = jnp.where(row_mask[:, None], y, 0)
    mean = y.sum(0) / count.astype(jnp.float32)
    deviation = y - mean[None, :]
    if row_mask is not None:
        deviation = jnp.where(row_mask[:, None], deviation, 0)
    where = (pl.program_id(0), columns)
    _store(mean_ref, where, mean, column_mask)
    _store(square_ref, where, (deviation * deviation).sum(0), column_mask)


def join_statistics(means, squares, pixels, size):
    """(mean, biased variance) of all, from those of tiles of `size` (Chan et al.)."""
    count = means.shape[0]
    # The last tile may be smaller.
    weight = jnp.full((count, 1), size, jnp.float32)
    weight = weight.at[-1].set(pixels - (count - 1) * size) / pixels
    mean = (means * weight).sum(0)
    between = (jnp.square(means - mean[None, :]) * weight).sum(0)
    return mean, squares.sum(0) / pixels + between


def _whole(array):
    return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)


def call(kernel, inputs, outputs, grid, tiles, name, **options):
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[_whole(array) for array in inputs],
        out_specs=[_whole(array) for array in outputs],
        out_shape=outputs,
        interpret=interpret(),
        compiler_params=plgpu.CompilerParams(
            num_warps=tiles.warps, num_stages=tiles.stages
        ),
        name=name,
        **options,
    )(*inputs)


def forward(x, norm, kernel, *, activate=None, tiles=FORWARD):
    """relu(norm1(x)) times the kernel, and the statistics of the result.

    Args:
      x: `[P, width]`; the first C channels are read.
      norm: (mean, factor, bias), each `[C]`: relu((x - mean) * factor + bias).
      kernel: `[C, M]`, of x's dtype.
      activate: (factor, bias), each `[M]`: returns relu(y * factor + bias) instead,
        which is norm2 and its ReLU in evaluation.

    Returns:
      `[P, M]`, of x's dtype, and its (mean, biased variance); with `activate` no pair.
    """
    (pixels, _), (channels, features) = x.shape, kernel.shape
    tiles = dataclasses.replace(tiles, features=power_of_two(features, tiles.features))
    count = pl.cdiv(pixels, tiles.pixels)
    outputs = [jax.ShapeDtypeStruct((pixels, features), x.dtype)]
    if activate is None:
        parts = jax.ShapeDtypeStruct((count, features), jnp.float32)
        outputs += [parts, parts]
    y, *parts = call(
        functools.partial(
            _forward_kernel,
            shape=(pixels, channels, features),
            tiles=tiles,
            activate=activate is not None,
        ),
        [x, *norm, kernel, *(activate or ())],
        outputs,
        (count, pl.cdiv(features, tiles.features)),
        tiles,
        'norm_relu_product',
    )
    if activate is not None:
        return y
    return y, join_statistics(*parts, pixels, tiles.pixels)


def _backward_kernel(*refs, shape, tiles, per_split):
    """refs: x, g, total, (mean, factor, bias), kernel; total, dw, sums, products."""
    pixels, channels, features = shape
    x_ref, g_ref, total_ref, *norm_refs, w_ref = refs[:7]
    out_ref, dw_ref, sum_ref, product_ref = refs[7:]
    split = pl.program_id(1)
    columns, column_mask = _span(pl.program_id(0), tiles.channels, channels)
    # A start that is known to be 0 may not reach beyond the end, masked or not.
    every, every_mask = _span(split * 0, tiles.features, features)
    block = (tiles.channels, tiles.features)
    w_mask = _both(column_mask, every_mask)
    w = _load(w_ref, (columns, every), w_mask, block)
    mean, factor, bias = (
        _load(ref, columns, column_mask, (tiles.channels,))[None, :]
        for ref in norm_refs
    )

    def add(index, sums):
        dw, sum_d, sum_product = sums
        number = split * per_split + index
        rows, row_mask = _span(number, tiles.pixels, pixels)
        if pl.cdiv(pixels, tiles.pixels) % per_split:
            # The last split goes beyond the end.
            row_mask = number * tiles.pixels + lax.iota(jnp.int32, tiles.pixels)
            row_mask = row_mask < pixels
        mask = _both(row_mask, column_mask)
        block = (tiles.pixels, tiles.channels)
        x = _load(x_ref, (rows, columns), mask, block)
        g_mask = _both(row_mask, every_mask)
        g = _load(g_ref, (rows, every), g_mask, (tiles.pixels, tiles.features))
        deviation = x.astype(jnp.float32) - mean
        y = deviation * factor + bias
        # g is 0 beyond the end, and so is d.
        d = jnp.where(y > 0, _dot(g, w.T), 0)
        y = jnp.maximum(y, 0).astype(g.dtype)
        total = _load(total_ref, (rows, columns), mask, block)
        total = (total.astype(jnp.float32) + d * factor).astype(total.dtype)
        _store(out_ref, (rows, columns), total, mask)
        return (
            dw + _dot(y.T, g),
            sum_d + d.sum(0),
            sum_product + (d * deviation).sum(0),
        )

    zeros = jnp.zeros((tiles.channels,), jnp.float32)
    dw, sum_d, sum_product = lax.fori_loop(
        0, per_split, add, (jnp.zeros(block, jnp.float32), zeros, zeros)
    )
    _store(dw_ref, (split, columns, every), dw, w_mask)
    _store(sum_ref, (split, columns), sum_d, column_mask)
    _store(product_ref, (split, columns), sum_product, column_mask)


def backward(x, g, total, norm, kernel, *, tiles=BACKWARD):
    """The way back through relu(norm1(x)) times the kernel, statistics held fixed.

    Args:
      x: `[P, width]`; the first C channels are read.
      g: gradient of the result, `[P, M]`.
      total: gradient of x so far, `[P, width]`; given up: its first C channels are
        added to where it lies.
      norm, kernel: as `forward` had them.

    Returns:
      (total, gradient of the kernel `[C, M]`, sums of d, sums of d * (x - mean)),
      where d, `[P, C]`, is the gradient behind norm1; all but `total` in float32.
    """
    (pixels, _), (channels, features) = x.shape, kernel.shape
    tiles = dataclasses.replace(tiles, features=power_of_two(features, 1 << 30))
    tiles = _fit_registers(tiles)
    across = pl.cdiv(channels, tiles.channels)
    count = pl.cdiv(pixels, tiles.pixels)
    per_split = pl.cdiv(count, max(1, min(count, tiles.programs // across)))
    splits = pl.cdiv(count, per_split)
    sums = jax.ShapeDtypeStruct((splits, channels), jnp.float32)
    outputs = [
        jax.ShapeDtypeStruct(total.shape, total.dtype),
        jax.ShapeDtypeStruct((splits, channels, features), jnp.float32),
        sums,
        sums,
    ]
    total, *parts = call(
        functools.partial(
            _backward_kernel,
            shape=(pixels, channels, features),
            tiles=tiles,
            per_split=per_split,
        ),
        [x, g, total, *norm, kernel],
        outputs,
        # Channels first: programs that run together read the same g, from the cache.
        (across, splits),
        tiles,
        'norm_relu_product_backward',
        input_output_aliases={2: 0},
    )
    return total, *(part.sum(0) for part in parts)


def _fit_registers(tiles):
    """Fewer channels at a time where the layer is wider than 128 features."""
    channels = max(16, tiles.channels * 128 // max(tiles.features, 128))
    return dataclasses.replace(tiles, channels=channels)

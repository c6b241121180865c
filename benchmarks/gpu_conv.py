"""Pallas kernels for a GPU: `relu(norm2(y))` and the 3x3 kernel, one pass each way.

cuDNN's convolution takes its input normalized, so XLA writes and reads the M channels
once more in each direction, and another pass takes statistics and puts the result into
the block's buffer. Here the forward kernel reads y, writes the new channels where they
belong and takes their statistics; the backward kernel reads y and the gradient of the
new channels, and gives gradients of the kernel and of what is behind norm2.

A tile is a run of pixels, `[N * H * W]`; the nine neighbors of each are read from the
cache. As sums of nine products it is an implicit matrix product on the tensor cores.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from benchmarks import gpu_kernels
from benchmarks.gpu_kernels import Tiles, _both, _dot, _load, _span, _store

FORWARD = Tiles(warps=4)
# Nine gradients, [channels, G] in float32 each, stay in registers. Its nine loads are
# not overlapped with the round before: they would not fit in shared memory.
BACKWARD = Tiles(channels=64, stages=1)


def _neighbors(start, count, offset, shape):
    """Indices of the pixels at (row, column) `offset`, and where these are inside."""
    images, height, width = shape
    pixel = start + lax.iota(jnp.int32, count)
    # lax: nothing is negative here, and // and % would ask.
    row = lax.rem(lax.div(pixel, width), height) + offset[0]
    column = lax.rem(pixel, width) + offset[1]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    end = images * height * width
    inside &= pixel < end
    index = pixel + offset[0] * width + offset[1]
    return jnp.clip(index, 0, end - 1), inside


def _gather(ref, rows, columns, size, mask):
    """A tile `[rows, size]`, 0 where the mask is not set."""
    columns = columns * size + lax.iota(jnp.int32, size)
    shape = (rows.shape[0], size)
    where = (
        jnp.broadcast_to(rows[:, None], shape),
        jnp.broadcast_to(columns[None, :], shape),
    )
    return _load(ref, where, mask, shape)


def _taps():
    return [(number, divmod(number, 3)) for number in range(9)]


def _forward_kernel(*refs, shape, middle, growth, at, tiles):
    """refs: y, buffer, (mean, factor, bias), kernel; buffer, means, squares."""
    y_ref, _, *norm_refs, w_ref = refs[:6]
    out_ref, mean_ref, square_ref = refs[6:]
    pixels = shape[0] * shape[1] * shape[2]
    start = pl.program_id(0) * tiles.pixels
    rows, row_mask = _span(pl.program_id(0), tiles.pixels, pixels)
    new, new_mask = _span(pl.program_id(0) * 0, tiles.features, growth)

    def add(step, total):
        # One loop over channels and taps, the compiler overlaps its loads; unrolled
        # taps would all want their place in shared memory at the same time.
        index, tap = lax.div(step, 9), lax.rem(step, 9)
        inner, inner_mask = _span(index, tiles.channels, middle)
        mean, factor, bias = (
            _load(ref, inner, inner_mask, (tiles.channels,))[None, :]
            for ref in norm_refs
        )
        offset = (lax.div(tap, 3) - 1, lax.rem(tap, 3) - 1)
        where, inside = _neighbors(start, tiles.pixels, offset, shape)
        y = _gather(y_ref, where, index, tiles.channels, _both(inside, inner_mask))
        y = jnp.maximum((y.astype(jnp.float32) - mean) * factor + bias, 0)
        # What is outside of the image is 0 behind the ReLU.
        y = jnp.where(inside[:, None], y, 0).astype(w_ref.dtype)
        columns = index * tiles.channels + lax.iota(jnp.int32, tiles.channels)
        columns = tap * middle + jnp.minimum(columns, middle - 1)
        mask = _both(inner_mask, new_mask)
        return total + _dot(y, _gather(w_ref, columns, 0, tiles.features, mask))

    total = lax.fori_loop(
        0,
        9 * pl.cdiv(middle, tiles.channels),
        add,
        jnp.zeros((tiles.pixels, tiles.features), jnp.float32),
    )
    y = total.astype(out_ref.dtype)
    mask = _both(row_mask, new_mask)
    _store(out_ref, (rows, pl.ds(at + start * 0, tiles.features)), y, mask)
    gpu_kernels.store_statistics(
        mean_ref, square_ref, y, pixels, row_mask, new, new_mask
    )


def forward(buffer, at, y, norm, kernel, shape, *, tiles=FORWARD):
    """New channels of the block, put into its buffer, and their statistics.

    Args:
      buffer: `[P, width]`, given up.
      at: first of the new channels.
      y: `[P, M]`, the 1x1 output.
      norm: (mean, factor, bias) of norm2, each `[M]`.
      kernel: `[3, 3, M, G]`, of y's dtype.
      shape: (N, H, W).

    Returns:
      buffer, and (mean, biased variance) of the new channels.
    """
    pixels, middle = y.shape
    growth = kernel.shape[3]
    tiles = dataclasses.replace(
        tiles, features=gpu_kernels.power_of_two(growth, 1 << 30)
    )
    count = pl.cdiv(pixels, tiles.pixels)
    parts = jax.ShapeDtypeStruct((count, growth), jnp.float32)
    buffer, means, squares = gpu_kernels.call(
        functools.partial(
            _forward_kernel,
            shape=shape,
            middle=middle,
            growth=growth,
            at=at,
            tiles=tiles,
        ),
        [y, buffer, *norm, kernel.reshape(9 * middle, growth)],
        [jax.ShapeDtypeStruct(buffer.shape, buffer.dtype), parts, parts],
        (count,),
        tiles,
        'norm_relu_conv',
        input_output_aliases={1: 0},
    )
    return buffer, gpu_kernels.join_statistics(means, squares, pixels, tiles.pixels)


def _backward_kernel(*refs, shape, middle, growth, tiles, per_split):
    """refs: y, g, (mean, factor, bias), kernel; d, dw, sums of d, of d * (y - mean)."""
    y_ref, g_ref, *norm_refs, w_ref = refs[:6]
    d_ref, dw_ref, sum_ref, product_ref = refs[6:]
    pixels = shape[0] * shape[1] * shape[2]
    split = pl.program_id(1)
    columns, column_mask = _span(pl.program_id(0), tiles.channels, middle)
    channel = pl.program_id(0) * tiles.channels
    channel = channel + lax.iota(jnp.int32, tiles.channels)
    new, new_mask = _span(split * 0, tiles.features, growth)
    mean, factor, bias = (
        _load(ref, columns, column_mask, (tiles.channels,))[None, :]
        for ref in norm_refs
    )
    block = (tiles.channels, tiles.features)

    def add(index, sums):
        *dw, sum_d, sum_product = sums
        number = split * per_split + index
        start = number * tiles.pixels
        rows = pl.ds(start, tiles.pixels)
        row_mask = start + lax.iota(jnp.int32, tiles.pixels) < pixels
        mask = _both(row_mask, column_mask)
        y = _load(y_ref, (rows, columns), mask, (tiles.pixels, tiles.channels))
        deviation = y.astype(jnp.float32) - mean
        z = deviation * factor + bias
        positive = z > 0
        z = jnp.maximum(z, 0).astype(y.dtype)
        d = jnp.zeros((tiles.pixels, tiles.channels), jnp.float32)
        for tap, (row, column) in _taps():
            # The window that has this pixel at the tap lies in the other direction.
            where, inside = _neighbors(
                start, tiles.pixels, (1 - row, 1 - column), shape
            )
            g = _gather(g_ref, where, 0, tiles.features, _both(inside, new_mask))
            w = _gather(
                w_ref,
                tap * middle + jnp.minimum(channel, middle - 1),
                0,
                tiles.features,
                _both(column_mask, new_mask),
            )
            d = d + _dot(g, w.T)
            dw[tap] = dw[tap] + _dot(z.T, g)
        d = jnp.where(positive, d, 0)
        _store(d_ref, (rows, columns), d.astype(d_ref.dtype), mask)
        return (*dw, sum_d + d.sum(0), sum_product + (d * deviation).sum(0))

    zeros = jnp.zeros((tiles.channels,), jnp.float32)
    first = (*[jnp.zeros(block, jnp.float32)] * 9, zeros, zeros)
    *dw, sum_d, sum_product = lax.fori_loop(0, per_split, add, first)
    for tap, part in enumerate(dw):
        _store(
            dw_ref,
            (split, split * 0 + tap, columns, new),
            part,
            _both(column_mask, new_mask),
        )
    _store(sum_ref, (split, columns), sum_d, column_mask)
    _store(product_ref, (split, columns), sum_product, column_mask)


def backward(y, g, norm, kernel, shape, *, tiles=BACKWARD):
    """The way back through relu(norm2(y)) and the convolution, statistics held fixed.

    Args:
      g: gradient of the new channels, `[P, G]`.
      y, norm, kernel, shape: as `forward` had them.

    Returns:
      (d `[P, M]`: the gradient behind norm2, gradient of the kernel, sums of d, sums
      of d * (y - mean)); all but d in float32.
    """
    pixels, middle = y.shape
    growth = kernel.shape[3]
    features = gpu_kernels.power_of_two(growth, 1 << 30)
    # Fewer channels at a time where more new ones are made.
    channels = max(16, tiles.channels * 32 // max(features, 32))
    tiles = dataclasses.replace(tiles, features=features, channels=channels)
    across = pl.cdiv(middle, tiles.channels)
    count = pl.cdiv(pixels, tiles.pixels)
    per_split = pl.cdiv(count, max(1, min(count, tiles.programs // across)))
    splits = pl.cdiv(count, per_split)
    sums = jax.ShapeDtypeStruct((splits, middle), jnp.float32)
    d, dw, sum_d, sum_product = gpu_kernels.call(
        functools.partial(
            _backward_kernel,
            shape=shape,
            middle=middle,
            growth=growth,
            tiles=tiles,
            per_split=per_split,
        ),
        [y, g, *norm, kernel.reshape(9 * middle, growth)],
        [
            jax.ShapeDtypeStruct(y.shape, y.dtype),
            jax.ShapeDtypeStruct((splits, 9, middle, growth), jnp.float32),
            sums,
            sums,
        ],
        (across, splits),
        tiles,
        'norm_relu_conv_backward',
    )
    return d, dw.sum(0).reshape(kernel.shape), sum_d.sum(0), sum_product.sum(0)

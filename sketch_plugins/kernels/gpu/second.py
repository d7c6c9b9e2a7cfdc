"""Second moments: each function reads, blends and (with ``STORE``) writes the estimate of a tile, and returns it.

``matrix`` is the number of the tile's matrix in a batch (experts), if each tile has rows of one matrix, otherwise 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sketch_plugins.kernels.gpu.common import RANGE, TABLE2, address, buckets_of, extent, noise
from sketch_plugins.kernels.gpu.table import (
    AXES,
    COLUMNS,
    COUNT,
    DECAY2,
    GAIN2,
    HASHES,
    NEW,
    SECOND_A,
    SECOND_B,
    TILES,
    WIDTH,
)
from sketch_plugins.stores import log8 as definition

# The number of bits that are cut off, and a mask of them.
CUT, LOWER = tl.constexpr(definition.CUT), tl.constexpr((1 << definition.CUT) - 1)
LARGEST, INFINITE = tl.constexpr(definition.LARGEST), tl.constexpr(definition.INFINITE)
QUIET = tl.constexpr(definition.QUIET)


@triton.jit
def dense(
    t, s, square, rows, place, exists, cols, mask, tile, matrix,
    STORE: tl.constexpr, S_TYPE: tl.constexpr, MODE: tl.constexpr, DEPTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One float32 for each element."""
    base = address(t, SECOND_A, tl.float32, ALIGN)
    at = base + rows[:, None] * extent(t, COLUMNS, ALIGN) + cols[None, :]
    v = tl.load(at, mask=mask, other=0.0)
    v = tl.load(s + DECAY2) * v + tl.load(s + GAIN2) * square
    if STORE:
        tl.store(at, v, mask=mask)
    return v


@triton.jit
def log8(
    t, s, square, rows, place, exists, cols, mask, tile, matrix,
    STORE: tl.constexpr, S_TYPE: tl.constexpr, MODE: tl.constexpr, DEPTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The upper bits of a float32, and one exponent for each block of a row. A tile's columns are one block."""
    columns = extent(t, COLUMNS, ALIGN)
    index = rows[:, None] * columns + cols[None, :]
    codes = address(t, SECOND_A, tl.uint8, ALIGN) + index
    tops = tl.load(t + SECOND_B).to(tl.pointer_type(tl.int16)) + rows * tl.load(t + TILES) + tile
    code = tl.load(codes, mask=mask, other=0).to(tl.int32)
    top = tl.load(tops, mask=exists, other=0).to(tl.int32)
    v = tl.where(code == 0, 0, tl.maximum(code + top[:, None] - 255, 0) << CUT).to(tl.float32, bitcast=True)
    v = tl.load(s + DECAY2) * v + tl.load(s + GAIN2) * square
    if STORE:
        bits = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # a NaN may have a sign
        random = (noise(t, s, index, TABLE2) & LOWER).to(tl.int32)
        rounded = tl.where(bits < INFINITE, tl.minimum(bits + random, LARGEST), bits)
        k = tl.where(mask, tl.minimum(rounded, QUIET) >> CUT, 0)
        top = tl.maximum(tl.max(k, 1), 255)
        code = tl.where(k == 0, 0, tl.maximum(k - top[:, None] + 255, 1))
        tl.store(codes, code.to(tl.uint8), mask=mask)
        tl.store(tops, top.to(tl.int16), mask=exists)
    return v


@triton.jit
def count_min(
    t, s, square, rows, place, exists, cols, mask, tile, matrix,
    STORE: tl.constexpr, S_TYPE: tl.constexpr, MODE: tl.constexpr, DEPTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The minimum over the tables, which `fold` has written before."""
    columns, width = tl.load(t + COLUMNS), tl.load(t + WIDTH)
    hashes = tl.load(t + HASHES).to(tl.pointer_type(tl.int64))
    table = tl.load(t + SECOND_A).to(tl.pointer_type(S_TYPE))
    least = tl.zeros_like(square)
    for j in tl.static_range(DEPTH):
        bucket = buckets_of(t, rows, hashes + 4 * j)
        at = table + (j * width + bucket)[:, None] * columns + cols[None, :]
        v = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if j == 0:
            least = v
        else:
            least = tl.where((v < least) | (v != v), v, least)
    return least


@triton.jit
def row_count_min(
    t, s, square, rows, place, exists, cols, mask, tile, matrix,
    STORE: tl.constexpr, S_TYPE: tl.constexpr, MODE: tl.constexpr, DEPTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The profile's minimum times the row's exact scale."""
    scale = tl.load(tl.load(t + SECOND_B).to(tl.pointer_type(tl.float32)) + rows, mask=exists, other=0.0)
    v = count_min(t, s, square, rows, place, exists, cols, mask, tile, matrix, STORE, S_TYPE, MODE, DEPTH, ALIGN)
    return v * scale[:, None]


@triton.jit
def _slices(axis, cols, K: tl.constexpr, DEPTH: tl.constexpr):
    """The slice of axis ``K`` that each column belongs to. In a matrix it is the column itself."""
    index = cols
    if DEPTH > 2:
        index = cols // tl.load(axis + 2)
        if K > 1:
            index = index % tl.load(axis + 1)
    return index


@triton.jit
def _collect(t, values, place, exists, cols, mask, matrix, DEPTH: tl.constexpr):
    """Raise the maxima of this step. ``place`` is the position among the touched rows, or the row's number.

    Each matrix of a batch has maxima of its own for its columns, one matrix after the other.
    """
    # Integer maxima of the bits of numbers >= 0: the order of the atomics does not matter, and NaN is the largest.
    new = tl.load(t + tl.load(t + NEW)).to(tl.pointer_type(tl.int32))
    inner = cols < tl.load(t + COLUMNS)
    bits = tl.where(mask, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    by_column = tl.max(bits, 0)
    tl.atomic_max(new + place, tl.max(bits, 1), mask=exists, sem="relaxed")
    new += tl.load(t + COUNT) + matrix * tl.load(t + COLUMNS)
    axis = t + tl.load(t + AXES)
    for k in tl.static_range(1, DEPTH):
        tl.atomic_max(new + _slices(axis, cols, k, DEPTH), by_column, mask=inner, sem="relaxed")
        new += tl.load(axis + 1)
        axis += 3


@triton.jit
def cover_estimate(
    t, s, square, rows, place, exists, cols, mask, tile, matrix,
    STORE: tl.constexpr, S_TYPE: tl.constexpr, MODE: tl.constexpr, DEPTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The minimum over ``DEPTH`` axes, rows first; for touched rows, the row's cover. SM3-I reads nothing else."""
    rows_cover = tl.load(tl.load(t + SECOND_A).to(tl.pointer_type(tl.float32)) + rows, mask=exists, other=0.0)
    least = tl.zeros_like(square) + rows_cover[:, None]
    if MODE == RANGE:
        inner = cols < tl.load(t + COLUMNS)
        axis = t + tl.load(t + AXES)
        for k in tl.static_range(1, DEPTH):
            cover = tl.load(axis).to(tl.pointer_type(tl.float32)) + matrix * tl.load(t + COLUMNS)
            other = tl.load(cover + _slices(axis, cols, k, DEPTH), mask=inner, other=0.0)
            least = tl.minimum(least, other[None, :], propagate_nan=tl.PropagateNan.ALL)
            axis += 3
    return least


@triton.jit
def cover(
    t, s, square, rows, place, exists, cols, mask, tile, matrix,
    STORE: tl.constexpr, S_TYPE: tl.constexpr, MODE: tl.constexpr, DEPTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The estimate of SM3-II, from the old covers and the gradient. The new maxima are collected in buffers."""
    least = cover_estimate(
        t, s, square, rows, place, exists, cols, mask, tile, matrix, STORE, S_TYPE, MODE, DEPTH, ALIGN
    )
    nu = tl.load(s + DECAY2) * least + tl.load(s + GAIN2) * square
    if STORE:
        _collect(t, nu, place, exists, cols, mask, matrix, DEPTH)
    return nu


@triton.jit
def cover_maxima(
    t, s, square, rows, place, exists, cols, mask, tile, matrix,
    STORE: tl.constexpr, S_TYPE: tl.constexpr, MODE: tl.constexpr, DEPTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The sweep before a step of SM3-I, which only collects the maxima of g * g."""
    _collect(t, square, place, exists, cols, mask, matrix, DEPTH)
    return square

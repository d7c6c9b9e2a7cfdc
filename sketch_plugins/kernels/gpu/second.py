"""Second moments: each reads, blends and (``STORE``) writes its estimate for a tile of rows and columns."""

from __future__ import annotations

import triton
import triton.language as tl

from sketch_plugins.kernels.gpu.common import (
    COLUMNS,
    DECAY2,
    DIM2,
    DIM3,
    GAIN2,
    HASHES,
    NEW,
    ROWS,
    SECOND_A,
    SECOND_B,
    SECOND_C,
    SECOND_D,
    WIDTH,
    address,
    extent,
)


@triton.jit
def dense(t, s, square, rows, exists, cols, mask, STORE: tl.constexpr, DEPTH: tl.constexpr, ALIGN: tl.constexpr):
    """One float32 for each element."""
    base = address(t, SECOND_A, tl.float32, ALIGN)
    place = base + rows[:, None] * extent(t, COLUMNS, ALIGN) + cols[None, :]
    v = tl.load(place, mask=mask, other=0.0)
    v = tl.load(s + DECAY2) * v + tl.load(s + GAIN2) * square
    if STORE:
        tl.store(place, v, mask=mask)
    return v


@triton.jit
def count_min(t, s, square, rows, exists, cols, mask, STORE: tl.constexpr, DEPTH: tl.constexpr, ALIGN: tl.constexpr):
    """The minimum over the tables, which `fold` has written before."""
    columns, width, total = tl.load(t + COLUMNS), tl.load(t + WIDTH), tl.load(t + ROWS)
    hashes = tl.load(t + HASHES).to(tl.pointer_type(tl.int64))
    table = tl.load(t + SECOND_A).to(tl.pointer_type(tl.float32))
    least = tl.zeros_like(square)
    for j in tl.static_range(DEPTH):
        bucket = ((rows * tl.load(hashes + 4 * j) + tl.load(hashes + 4 * j + 1)) % total) % width
        v = tl.load(table + (j * width + bucket)[:, None] * columns + cols[None, :], mask=mask, other=0.0)
        if j == 0:
            least = v
        else:
            least = tl.where((v < least) | (v != v), v, least)
    return least


@triton.jit
def row_count_min(
    t, s, square, rows, exists, cols, mask, STORE: tl.constexpr, DEPTH: tl.constexpr, ALIGN: tl.constexpr
):
    """The profile's minimum times the row's exact scale."""
    scale = tl.load(tl.load(t + SECOND_B).to(tl.pointer_type(tl.float32)) + rows, mask=exists, other=0.0)
    return count_min(t, s, square, rows, exists, cols, mask, STORE, DEPTH, ALIGN) * scale[:, None]


@triton.jit
def _collect(place, nu_bits, exists):
    # Integer maxima of the bits of numbers >= 0: no order of the atomics changes them, and NaN is above all.
    tl.atomic_max(place, nu_bits, mask=exists, sem="relaxed")


@triton.jit
def cover(t, s, square, rows, exists, cols, mask, STORE: tl.constexpr, DEPTH: tl.constexpr, ALIGN: tl.constexpr):
    """SM3's covers of ``DEPTH`` axes: rows are axis 0, columns the others flattened. New maxima go to buffers."""
    axis0 = tl.load(t + SECOND_A).to(tl.pointer_type(tl.float32))
    axis1 = tl.load(t + SECOND_B).to(tl.pointer_type(tl.float32))
    inner = cols < tl.load(t + COLUMNS)
    dim2, dim3 = tl.load(t + DIM2), tl.load(t + DIM3)
    c1 = cols
    if DEPTH > 2:
        c1 = cols // (dim2 * dim3)
    least = tl.minimum(
        tl.load(axis0 + rows, mask=exists, other=0.0)[:, None], tl.load(axis1 + c1, mask=inner, other=0.0)[None, :],
        propagate_nan=tl.PropagateNan.ALL,
    )  # fmt: skip
    c2 = (cols // dim3) % dim2
    c3 = cols % dim3
    if DEPTH > 2:
        axis2 = tl.load(t + SECOND_C).to(tl.pointer_type(tl.float32))
        least = tl.minimum(
            least, tl.load(axis2 + c2, mask=inner, other=0.0)[None, :], propagate_nan=tl.PropagateNan.ALL
        )
    if DEPTH > 3:
        axis3 = tl.load(t + SECOND_D).to(tl.pointer_type(tl.float32))
        least = tl.minimum(
            least, tl.load(axis3 + c3, mask=inner, other=0.0)[None, :], propagate_nan=tl.PropagateNan.ALL
        )
    nu = tl.load(s + DECAY2) * least + tl.load(s + GAIN2) * square
    if STORE:
        new = tl.load(t + NEW).to(tl.pointer_type(tl.int32))
        bits = tl.where(mask, nu.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
        by_column = tl.max(bits, 0)
        _collect(new + rows, tl.max(bits, 1), exists)
        new += tl.load(t + ROWS)
        _collect(new + c1, by_column, inner)
        if DEPTH > 2:
            new += tl.load(t + COLUMNS) // (dim2 * dim3)
            _collect(new + c2, by_column, inner)
        if DEPTH > 3:
            new += dim2
            _collect(new + c3, by_column, inner)
    return nu

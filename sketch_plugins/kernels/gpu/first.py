"""First moments: each function reads, blends and writes a tile of one store, and returns the unrounded estimate."""

from __future__ import annotations

import triton
import triton.language as tl

from sketch_plugins.kernels.gpu.common import PLAIN, address, buckets_of, extent, mix32, noise
from sketch_plugins.kernels.gpu.table import COLUMNS, DECAY1, FIRST_A, FIRST_B, GAIN1, HASHES, HEIGHT, TILES, WIDTH


@triton.jit
def none(
    t,
    s,
    x,
    rows,
    exists,
    cols,
    mask,
    tile,
    STORE: tl.constexpr,
    F_TYPE: tl.constexpr,
    NOISE: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Without a first moment the estimate is the gradient itself."""
    return x


@triton.jit
def dense(
    t,
    s,
    x,
    rows,
    exists,
    cols,
    mask,
    tile,
    STORE: tl.constexpr,
    F_TYPE: tl.constexpr,
    NOISE: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One number for each element, float32 or bfloat16."""
    base = address(t, FIRST_A, F_TYPE, ALIGN)
    place = base + rows[:, None] * extent(t, COLUMNS, ALIGN) + cols[None, :]
    m = tl.load(s + DECAY1) * tl.load(place, mask=mask, other=0.0).to(tl.float32) + tl.load(s + GAIN1) * x
    if STORE:
        tl.store(place, m.to(F_TYPE), mask=mask)
    return m


@triton.jit
def int8(
    t,
    s,
    x,
    rows,
    exists,
    cols,
    mask,
    tile,
    STORE: tl.constexpr,
    F_TYPE: tl.constexpr,
    NOISE: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Codes and one scale for each block of a row; a tile's columns are one block."""
    columns = extent(t, COLUMNS, ALIGN)
    codes = address(t, FIRST_A, tl.int8, ALIGN)
    codes = codes + rows[:, None] * columns + cols[None, :]
    scales = tl.load(t + FIRST_B).to(tl.pointer_type(tl.float32)) + rows * tl.load(t + TILES) + tile
    old = tl.load(codes, mask=mask, other=0).to(tl.float32) * tl.load(scales, mask=exists, other=0.0)[:, None]
    m = tl.load(s + DECAY1) * old + tl.load(s + GAIN1) * x
    if STORE:
        # The bits of |m| have the order of the numbers, and NaN is the largest: the maximum of integers is enough.
        bits = tl.where(mask, m.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
        top = tl.max(bits, 1).to(tl.float32, bitcast=True)
        scale = tl.div_rn(top, 127.0 + tl.zeros_like(top))
        large = scale > 1e-37
        inverse = tl.where(large, tl.div_rn(1.0 + tl.zeros_like(scale), tl.where(large, scale, 1.0)), 0.0)
        code = m * inverse[:, None]
        if NOISE:
            random = noise(t, s, rows[:, None] * columns + cols[None, :], PLAIN)
            code = tl.floor(code + (random >> 8).to(tl.float32) * (1.0 / (1 << 24)))
            code = tl.minimum(tl.maximum(code, -127.0), 127.0)
        else:
            code = (code + 12582912.0) - 12582912.0  # 1.5 * 2**23: the nearest integer, ties to even
        tl.store(codes, code.to(tl.int8), mask=mask)
        tl.store(scales, scale, mask=exists)
    return m


@triton.jit
def _signed(t, rows, exists, cols, mask, j, bucket_columns, F_TYPE: tl.constexpr):
    hashes = tl.load(t + HASHES).to(tl.pointer_type(tl.int64)) + j * 4
    bucket = buckets_of(t, rows, hashes)
    own = (rows % tl.load(t + HEIGHT)).to(tl.uint64, bitcast=True)
    sign = 1.0 - 2.0 * (mix32(own, tl.load(hashes + 3).to(tl.uint64, bitcast=True)) & 1).to(tl.float32)
    table = (
        tl.load(t + FIRST_A).to(tl.pointer_type(F_TYPE)) + (j * tl.load(t + WIDTH) + bucket)[:, None] * bucket_columns
    )
    return tl.load(table + cols[None, :], mask=mask, other=0.0).to(tl.float32) * sign[:, None]


@triton.jit
def count_sketch(
    t,
    s,
    x,
    rows,
    exists,
    cols,
    mask,
    tile,
    STORE: tl.constexpr,
    F_TYPE: tl.constexpr,
    NOISE: tl.constexpr,
    DEPTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The median over the tables, which `fold` has written before. The middle values are found by their rank."""
    columns = tl.load(t + COLUMNS)
    m = tl.zeros_like(x)
    for i in tl.static_range(DEPTH):
        value = _signed(t, rows, exists, cols, mask, i, columns, F_TYPE)
        rank = tl.zeros_like(x)
        for j in tl.static_range(DEPTH):
            other = _signed(t, rows, exists, cols, mask, j, columns, F_TYPE)
            before = (other < value) | ((other == value) & (j < i))
            rank += before.to(tl.float32)
        if DEPTH % 2 == 1:
            m += tl.where(rank == DEPTH // 2, value, 0.0)
        else:
            m += tl.where((rank == DEPTH // 2) | (rank == DEPTH // 2 - 1), value * 0.5, 0.0)
        # A NaN has no rank, but must be kept.
        m = tl.where(value == value, m, value)
    return m

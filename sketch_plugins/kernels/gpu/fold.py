"""Writing sketches that the step only reads: several tables, signs, or touched rows."""

from __future__ import annotations

import triton
import triton.language as tl

from sketch_plugins.kernels.gpu.common import (
    BEGIN,
    COLUMNS,
    FIELDS,
    HASHES,
    MEAN,
    NUMBERS,
    ROWS,
    TILES,
    WEIGHTS,
    WIDTH,
    find,
    gradient,
    mix32,
)


@triton.jit
def _cell(x, rows, hashes, SIGNED: tl.constexpr):
    if SIGNED:
        seed = tl.load(hashes + 3).to(tl.uint64, bitcast=True)
        odd = mix32(rows.to(tl.uint64, bitcast=True), seed) & 1
        return x * (1.0 - 2.0 * odd.to(tl.float32))[:, None]
    return x * x


@triton.jit
def dense(
    table, numbers, count,
    P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, TARGET: tl.constexpr, DECAY: tl.constexpr, GAIN: tl.constexpr,
    SIGNED: tl.constexpr, WEIGHTED: tl.constexpr, L2_ON: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One bucket of one table (grid dimension 1) by ``N`` columns, all its members.

    ``WEIGHTED`` (row-normalised count-min): a member's squares enter with a weight of its own, and the bucket keeps
    one minus the mean share of its members.
    """
    pid, j = tl.program_id(0), tl.program_id(1)
    index = find(table, count, pid)
    t, s = table + index * FIELDS, numbers + index * NUMBERS
    local = pid - tl.load(t + BEGIN)
    across = tl.load(t + TILES)
    tile, bucket = local % across, local // across
    columns, total, width = tl.load(t + COLUMNS), tl.load(t + ROWS), tl.load(t + WIDTH)
    hashes = tl.load(t + HASHES).to(tl.pointer_type(tl.int64)) + 4 * j
    cols = tile * N + tl.arange(0, N)
    inner = cols < columns
    load = (total - bucket + width - 1) // width
    sums = tl.zeros([N], tl.float32)
    share = 0.0
    weights = tl.load(t + WEIGHTS).to(tl.pointer_type(tl.float32))
    for first in range(0, load, M):
        position = bucket + (first + tl.arange(0, M).to(tl.int64)) * width
        exists = position < total
        rows = tl.where(exists, ((position + total - tl.load(hashes + 1)) % total) * tl.load(hashes + 2) % total, 0)
        mask = exists[:, None] & inner[None, :]
        x = _cell(gradient(t, s, rows, rows, cols, mask, P_TYPE, G_TYPE, L2_ON, False), rows, hashes, SIGNED)
        if WEIGHTED:
            x = x * tl.load(weights + rows, mask=exists, other=0.0)[:, None]
            share += tl.sum(tl.load(weights + total + rows, mask=exists, other=0.0))
        sums += tl.sum(x, 0)
    place = tl.load(t + TARGET).to(tl.pointer_type(tl.float32)) + (j * width + bucket) * columns + cols
    old = tl.load(place, mask=inner, other=0.0)
    if WEIGHTED:
        new = (1.0 - share / load.to(tl.float32)) * old + sums / load.to(tl.float32)
    else:
        gain = tl.load(s + GAIN)
        if (tl.load(s + MEAN) != 0) & (not SIGNED):
            gain = gain / load.to(tl.float32)
        new = tl.load(s + DECAY) * old + gain * sums
    tl.store(place, new, mask=inner)


@triton.jit
def row_means(
    table, numbers, count,
    P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, L2_ON: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Means of the rows' squares, ``M`` rows a program, into the weights' buffer."""
    pid = tl.program_id(0)
    index = find(table, count, pid)
    t, s = table + index * FIELDS, numbers + index * NUMBERS
    columns, total = tl.load(t + COLUMNS), tl.load(t + ROWS)
    rows = (pid - tl.load(t + BEGIN)) * M + tl.arange(0, M).to(tl.int64)
    exists = rows < total
    sums = tl.zeros([M], tl.float32)
    for lo in range(0, columns, N):
        cols = lo + tl.arange(0, N)
        mask = exists[:, None] & (cols < columns)[None, :]
        x = gradient(t, s, rows, rows, cols, mask, P_TYPE, G_TYPE, L2_ON, False)
        sums += tl.sum(x * x, 1)
    tl.store(tl.load(t + WEIGHTS).to(tl.pointer_type(tl.float32)) + rows, sums / columns.to(tl.float32), mask=exists)


@triton.jit
def touched(
    g, g_stride, order, rows, bucket_of, n, table, columns, hashes, powers, sign,
    p, p_stride, l2,
    PACKED: tl.constexpr, SIGNED: tl.constexpr, L2_ON: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Touched rows, sorted by bucket: the program at the head of a segment adds up the whole segment.

    The bucket takes as many steps as it has touched rows, each with their mean; ``powers`` holds, for c of them, the
    decay and the gain of c steps. No atomics, and no number of segments that the host would have to wait for.
    """
    position = tl.program_id(0).to(tl.int64)
    bucket = tl.load(bucket_of + position)
    before = tl.load(bucket_of + tl.maximum(position - 1, 0))
    if (position == 0) | (before != bucket):
        cols = tl.program_id(1) * N + tl.arange(0, N)
        inner = cols < columns
        sums = tl.zeros([N], tl.float32)
        end = position
        same = True
        while same:
            at = tl.load(order + end)
            row = tl.load(rows + at)
            source = at
            if not PACKED:
                source = row
            x = tl.load(g + source * g_stride + cols, mask=inner, other=0.0).to(tl.float32) * sign
            if L2_ON:
                x += l2 * tl.load(p + row * p_stride + cols, mask=inner, other=0.0).to(tl.float32)
            if SIGNED:
                odd = mix32(row.to(tl.uint64, bitcast=True), tl.load(hashes + 3).to(tl.uint64, bitcast=True)) & 1
                sums += x * (1.0 - 2.0 * odd.to(tl.float32))
            else:
                sums += x * x
            end += 1
            same = (end < n) & (tl.load(bucket_of + tl.minimum(end, n - 1)) == bucket)
        c = end - position
        place = table + bucket * columns + cols
        old = tl.load(place, mask=inner, other=0.0)
        tl.store(
            place, tl.load(powers + 2 * c) * old + tl.load(powers + 2 * c + 1) * (sums / c.to(tl.float32)), mask=inner
        )

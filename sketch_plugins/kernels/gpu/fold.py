"""Writes sketches before a step that only reads them: sketches of several tables, with signs, or of touched rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sketch_plugins.kernels.gpu.common import (
    PACKED,
    TABLE1,
    TABLE2,
    find,
    gradient,
    held,
    load_of,
    members,
    mix32,
    rows_at,
)
from sketch_plugins.kernels.gpu.table import (
    AXES,
    BEGIN,
    COLUMNS,
    COUNT,
    DECAY2,
    FIELDS,
    GAIN2,
    HASHES,
    HEIGHT,
    INDEX,
    MEAN,
    NEW,
    NUMBERS,
    OWN,
    ROW,
    ROWS,
    SECOND_A,
    SECOND_B,
    TILES,
    WEIGHTS,
    WIDTH,
)
from sketch_plugins.stores.row_count_min import largest_square

LARGEST_SQUARE = tl.constexpr(largest_square(torch.float32))


@triton.jit
def _signs(t, rows, hashes, SIGNED: tl.constexpr):
    """1 or -1 for each row. They are computed before the gradient is loaded, which the division would else spill."""
    if SIGNED:
        seed = tl.load(hashes + 3).to(tl.uint64, bitcast=True)
        odd = mix32((rows % tl.load(t + HEIGHT)).to(tl.uint64, bitcast=True), seed) & 1
        return 1.0 - 2.0 * odd.to(tl.float32)
    else:
        return 0.0


@triton.jit
def _cell(x, signs, SIGNED: tl.constexpr, WEIGHTED: tl.constexpr):
    if SIGNED:
        return x * signs[:, None]
    if WEIGHTED:
        return _limited(x * x)
    return x * x


@triton.jit
def _limited(x):
    """Limit squares to a 512th of the largest float32, as `sketch_plugins.stores.row_count_min.largest_square` says."""
    return tl.where(x > LARGEST_SQUARE, LARGEST_SQUARE, x)


@triton.jit
def _held(x, t, s, cell, SIGNED: tl.constexpr, TYPE: tl.constexpr):
    if SIGNED:
        return held(x, t, s, cell, TABLE1, TYPE)
    else:
        return held(x, t, s, cell, TABLE2, TYPE)


@triton.jit
def dense(
    table, numbers, count,
    P_TYPE: tl.constexpr, C_TYPE: tl.constexpr, G_TYPE: tl.constexpr,
    TYPE: tl.constexpr, TARGET: tl.constexpr, DECAY: tl.constexpr,
    GAIN: tl.constexpr, SIGNED: tl.constexpr, WEIGHTED: tl.constexpr, L2_ON: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Write one bucket of one table (grid dimension 1) for ``N`` columns, from all its members.

    With ``WEIGHTED`` (row-normalised count-min) a member's squares have a weight of their own, and the bucket keeps the
    mean of the fractions that its members keep.
    """
    pid, j = tl.program_id(0), tl.program_id(1)
    index = find(table, count, pid)
    t = table + index * FIELDS
    s = numbers + tl.load(t + ROW) * NUMBERS
    local = pid - tl.load(t + BEGIN)
    across = tl.load(t + TILES)
    tile, bucket = local % across, local // across
    total = tl.load(t + ROWS)
    hashes = tl.load(t + HASHES).to(tl.pointer_type(tl.int64)) + 4 * j
    cols = tile * N + tl.arange(0, N)
    inner = cols < tl.load(t + COLUMNS)
    matrix = bucket // tl.load(t + OWN)
    load = load_of(tl.load(t + HEIGHT), tl.load(t + OWN), bucket, matrix)
    sums = tl.zeros([N], tl.float32)
    kept = 0.0
    weights = tl.load(t + WEIGHTS).to(tl.pointer_type(tl.float32))
    for first in range(0, load, M):
        rows, exists = members(tl.load(t + HEIGHT), tl.load(t + OWN), bucket, matrix, first, hashes, M)
        mask = exists[:, None] & inner[None, :]
        signs = _signs(t, rows, hashes, SIGNED)
        x = _cell(gradient(t, s, rows, rows, cols, mask, P_TYPE, C_TYPE, G_TYPE, L2_ON, False), signs, SIGNED, WEIGHTED)
        if WEIGHTED:
            x = x * tl.load(weights + rows, mask=exists, other=0.0)[:, None]
            kept += tl.sum(tl.load(weights + total + rows, mask=exists, other=0.0))
        sums += tl.sum(x, 0)
    # These are loaded here, because holding them through the loop would spill registers.
    cell = (j * tl.load(t + WIDTH) + bucket) * tl.load(t + COLUMNS) + cols
    place = tl.load(t + TARGET).to(tl.pointer_type(TYPE)) + cell
    old = tl.load(place, mask=inner, other=0.0).to(tl.float32)
    if WEIGHTED:
        new = kept / load.to(tl.float32) * old + sums / load.to(tl.float32)
    else:
        gain = tl.load(s + GAIN)
        if (tl.load(s + MEAN) != 0) & (not SIGNED):
            gain = gain / load.to(tl.float32)
        new = tl.load(s + DECAY) * old + gain * sums
    tl.store(place, _held(new, t, s, cell, SIGNED, TYPE), mask=inner)


@triton.jit
def row_means(
    table, numbers, count,
    P_TYPE: tl.constexpr, C_TYPE: tl.constexpr, G_TYPE: tl.constexpr,
    MODE: tl.constexpr, L2_ON: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Write the means of the rows' squares, ``M`` rows a program, to the weights' buffer."""
    pid = tl.program_id(0)
    index = find(table, count, pid)
    t = table + index * FIELDS
    s = numbers + tl.load(t + ROW) * NUMBERS
    columns = tl.load(t + COLUMNS)
    rows, g_rows, place, exists = rows_at(t, (pid - tl.load(t + BEGIN)) * M, M, MODE)
    sums = tl.zeros([M], tl.float32)
    for lo in range(0, columns, N):
        cols = lo + tl.arange(0, N)
        mask = exists[:, None] & (cols < columns)[None, :]
        x = gradient(t, s, rows, g_rows, cols, mask, P_TYPE, C_TYPE, G_TYPE, L2_ON, False)
        sums += tl.sum(_limited(x * x), 1)
    means = _limited(sums / columns.to(tl.float32))
    tl.store(tl.load(t + WEIGHTS).to(tl.pointer_type(tl.float32)) + place, means, mask=exists)


@triton.jit
def touched(
    table, numbers, order, bucket_of, powers,
    P_TYPE: tl.constexpr, C_TYPE: tl.constexpr, G_TYPE: tl.constexpr,
    TYPE: tl.constexpr, TARGET: tl.constexpr, MODE: tl.constexpr,
    SIGNED: tl.constexpr, WEIGHTED: tl.constexpr, L2_ON: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Write the buckets of touched rows, which are sorted by bucket for each table.

    The program at the head of a segment adds up the whole segment and writes the bucket once. The bucket takes as many
    steps as it has touched rows, each with their mean. ``powers`` holds the decay and the gain of c steps (with
    ``WEIGHTED``, see `dense`). There are no atomics, and the host does not wait for the number of segments.
    """
    t, s, j = table, numbers, tl.program_id(2)
    n = tl.load(t + COUNT)
    position = tl.program_id(0).to(tl.int64)
    order += j * n
    bucket_of += j * n
    bucket = tl.load(bucket_of + position)
    before = tl.load(bucket_of + tl.maximum(position - 1, 0))
    if (position == 0) | (before != bucket):
        hashes = tl.load(t + HASHES).to(tl.pointer_type(tl.int64)) + 4 * j
        index = tl.load(t + INDEX).to(tl.pointer_type(tl.int64))
        weights = tl.load(t + WEIGHTS).to(tl.pointer_type(tl.float32))
        cols = tl.program_id(1) * N + tl.arange(0, N)
        inner = cols < tl.load(t + COLUMNS)
        sums = tl.zeros([N], tl.float32)
        kept = 0.0
        end = position
        same = True
        while same:
            place = end + tl.arange(0, M).to(tl.int64)
            exists = tl.load(bucket_of + place, mask=place < n, other=-1) == bucket
            at = tl.load(order + place, mask=exists, other=0)
            rows = tl.load(index + at, mask=exists, other=0)
            g_rows = rows
            if MODE == PACKED:
                g_rows = at
            mask = exists[:, None] & inner[None, :]
            signs = _signs(t, rows, hashes, SIGNED)
            x = _cell(
                gradient(t, s, rows, g_rows, cols, mask, P_TYPE, C_TYPE, G_TYPE, L2_ON, False), signs, SIGNED, WEIGHTED
            )
            if WEIGHTED:
                x = x * tl.load(weights + at, mask=exists, other=0.0)[:, None]
                kept += tl.sum(tl.load(weights + n + at, mask=exists, other=0.0))
            sums += tl.sum(x, 0)
            found = tl.sum(exists.to(tl.int64))
            end += found
            same = found == M
        c = end - position
        mean = sums / c.to(tl.float32)
        # These are loaded here, because holding them through the loop would spill registers.
        bucket = tl.load(bucket_of + position)
        cell = (j * tl.load(t + WIDTH) + bucket) * tl.load(t + COLUMNS) + cols
        target = tl.load(t + TARGET).to(tl.pointer_type(TYPE)) + cell
        old = tl.load(target, mask=inner, other=0.0).to(tl.float32)
        if WEIGHTED:
            new = kept / c.to(tl.float32) * old + mean
        else:
            new = tl.load(powers + 2 * c) * old + tl.load(powers + 2 * c + 1) * mean
        tl.store(target, _held(new, t, s, cell, SIGNED, TYPE), mask=inner)


@triton.jit
def covers(table, numbers, AVERAGE: tl.constexpr, DEPTH: tl.constexpr, N: tl.constexpr):
    """Replace the covers of every tensor by the new maxima. With ``AVERAGE`` (SM3-I) the maxima enter an average.

    A row of programs for each tensor shares the elements of its axes.
    """
    t = table + tl.program_id(0) * FIELDS
    s = numbers + tl.load(t + ROW) * NUMBERS
    new = tl.load(t + tl.load(t + NEW)).to(tl.pointer_type(tl.float32))
    axis = t + tl.load(t + AXES)
    for k in tl.static_range(DEPTH):
        if k == 0:
            old = tl.load(t + SECOND_A).to(tl.pointer_type(tl.float32))
            length = tl.load(t + COUNT)
        else:
            old = tl.load(axis).to(tl.pointer_type(tl.float32))
            length = tl.load(axis + 1)
            axis += 3
        for first in range(tl.program_id(1) * N, length, tl.num_programs(1) * N):
            place = first + tl.arange(0, N)
            inside = place < length
            value = tl.load(new + place, mask=inside, other=0.0)
            if AVERAGE:
                before = tl.load(old + place, mask=inside, other=0.0)
                value = tl.load(s + DECAY2) * before + tl.load(s + GAIN2) * value
            tl.store(old + place, value, mask=inside)
        new += length


@triton.jit
def row_means_of(table, numbers, N: tl.constexpr):
    """Add the rows' squares, of which each tile of columns has written a sum, to the means of the rows.

    A row of programs for each tensor shares its rows.
    """
    t = table + tl.program_id(0) * FIELDS
    s = numbers + tl.load(t + ROW) * NUMBERS
    sums = tl.load(t + tl.load(t + NEW)).to(tl.pointer_type(tl.float32))
    means = tl.load(t + SECOND_B).to(tl.pointer_type(tl.float32))
    rows, tiles = tl.load(t + ROWS), tl.load(t + TILES)
    columns = tl.load(t + COLUMNS).to(tl.float32)
    for first in range(tl.program_id(1) * N, rows, tl.num_programs(1) * N):
        place = first + tl.arange(0, N)
        inside = place < rows
        total = tl.zeros([N], tl.float32)
        for tile in range(0, tiles):
            total += tl.load(sums + place * tiles + tile, mask=inside, other=0.0)
        old = tl.load(means + place, mask=inside, other=0.0)
        new = tl.load(s + DECAY2) * old + tl.load(s + GAIN2) * tl.div_rn(total, columns)
        tl.store(means + place, new, mask=inside)

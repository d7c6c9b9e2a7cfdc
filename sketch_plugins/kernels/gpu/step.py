"""The fused step: one template for every store and rule. p and g are read once, p is written once.

A program of ``tiles`` works on a rectangle of a parameter. A program of ``buckets`` works on the rows that share a
bucket of a count-min sketch of depth 1: it adds up their squares in registers, writes the bucket once and takes the
step of the rows. No program writes what another one reads, so the order in which programs run does not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sketch_plugins.kernels.gpu import weights
from sketch_plugins.kernels.gpu.common import (
    PLAIN,
    TABLE2,
    address,
    codes,
    extent,
    factor,
    find,
    gradient,
    held,
    load_of,
    members,
    noise,
    parameter,
    rows_at,
    sum_of_squares,
    to_bf16,
)
from sketch_plugins.kernels.gpu.table import (
    APPLY,
    BEGIN,
    COLUMNS,
    DECAY2,
    FIELDS,
    FOLD,
    GAIN2,
    HASHES,
    HEIGHT,
    INNER,
    LEAST,
    LOOKAHEAD,
    MEAN,
    MEASURE,
    NEW,
    NUMBERS,
    OWN,
    P_STRIDE,
    ROW,
    SECOND_A,
    SECOND_B,
    SHRINK,
    STEP,
    TILES,
    P,
)


@triton.jit
def apply(
    t, s, x, f, rows, g_rows, exists, cols, mask, tile,
    FIRST: tl.constexpr, P_TYPE: tl.constexpr, C_TYPE: tl.constexpr, F_TYPE: tl.constexpr, PHASE: tl.constexpr,
    AHEAD: tl.constexpr, UNIT: tl.constexpr, AFTER: tl.constexpr, NOISE: tl.constexpr, ROUND: tl.constexpr,
    DEPTH: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Write the first moment of ``x``, and ``p <- shrink * p - f * numerator``; return sums of squares of update and p.

    If a phase measures and applies, ``f`` and ``x`` do not contain the step size, which is applied after measuring.
    """
    ONCE: tl.constexpr = (MEASURE & PHASE) != 0 and (APPLY & PHASE) != 0
    squares = tl.full([], 0.0, tl.float64)
    norm = tl.full([], 0.0, tl.float64)
    if AFTER and (MEASURE & PHASE):
        # Clipping measures the update, or, if a first moment averages it, the input of that average.
        squares = sum_of_squares(tl.where(mask, x, 0.0))
    if AFTER and ONCE:
        x = x * tl.load(s + INNER)
    m = FIRST(t, s, x, rows, exists, cols, mask, tile, (APPLY & PHASE) != 0, F_TYPE, NOISE, DEPTH, ALIGN)
    if AHEAD:
        m = x + tl.load(s + LOOKAHEAD) * m
    if UNIT:
        size = tl.abs(m)
        m = tl.div_rn(m, tl.where(size < LEAST, LEAST, size))  # tl.maximum would not keep a NaN
    p = parameter(t, rows, cols, mask, P_TYPE, C_TYPE, ALIGN)
    update = tl.where(mask, m * f, 0.0)
    if MEASURE & PHASE:
        if not AFTER:
            squares = sum_of_squares(update)
        norm = sum_of_squares(p)
    if ONCE:
        update = update * tl.load(s + STEP)
    if APPLY & PHASE:
        base = address(t, P, P_TYPE, ALIGN)
        place = base + rows[:, None] * extent(t, P_STRIDE, ALIGN) + cols[None, :]
        new = tl.load(s + SHRINK) * p - update
        if C_TYPE is not None:
            index = rows[:, None] * tl.load(t + COLUMNS) + cols[None, :]
            if C_TYPE == tl.int8:
                random = noise(t, s, index, PLAIN)
            else:
                random = index  # nothing is rounded
            weight, code = weights.encode(new, random, P_TYPE, C_TYPE)
            tl.store(place, weight, mask=mask)
            tl.store(codes(t, rows, cols, C_TYPE, ALIGN), code, mask=mask)
        elif ROUND:
            index = rows[:, None] * tl.load(t + COLUMNS) + cols[None, :]
            tl.store(place, to_bf16(new, noise(t, s, index, PLAIN)), mask=mask)
        else:
            tl.store(place, new.to(P_TYPE), mask=mask)
    return squares, norm


@triton.jit
def _rate(s, PLACE: tl.constexpr, PHASE: tl.constexpr):
    """A number of the step, or 1 if `apply` uses it later (a measurement must not contain a learning rate of 0)."""
    if (MEASURE & PHASE) != 0 and (APPLY & PHASE) != 0:
        return tl.full([], 1.0, tl.float32)
    else:  # Triton needs a branch, because the types differ
        return tl.load(s + PLACE)


@triton.jit
def tiles(
    table, numbers, partial, count,
    FIRST: tl.constexpr, SECOND: tl.constexpr, P_TYPE: tl.constexpr, C_TYPE: tl.constexpr, G_TYPE: tl.constexpr,
    F_TYPE: tl.constexpr, S_TYPE: tl.constexpr, MODE: tl.constexpr, PHASE: tl.constexpr, AHEAD: tl.constexpr,
    UNIT: tl.constexpr, AFTER: tl.constexpr, L2_ON: tl.constexpr, NOISE: tl.constexpr, ROUND: tl.constexpr,
    DEPTH1: tl.constexpr, DEPTH2: tl.constexpr, ALIGN: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Take the step of ``M`` rows and ``BLOCK`` columns (``N`` is the next power of two).

    With ``BATCH`` they are rows of one matrix, which has numbers of its own.
    """
    pid = tl.program_id(0)
    index = find(table, count, pid)
    t = table + index * FIELDS
    s = numbers + tl.load(t + ROW) * NUMBERS
    local = pid - tl.load(t + BEGIN)
    across = tl.load(t + TILES)
    tile = local % across
    if BATCH:
        height = tl.load(t + HEIGHT)
        each = tl.cdiv(height, M) * across
        matrix = local // each
        s += matrix * NUMBERS
        rows, g_rows, place, exists = rows_at(t, matrix * height + (local - matrix * each) // across * M, M, MODE)
        exists = exists & (rows < (matrix + 1) * height)
    else:
        matrix = 0
        rows, g_rows, place, exists = rows_at(t, local // across * M, M, MODE)
    inside = tl.arange(0, N)
    cols = tile * BLOCK + inside
    mask = exists[:, None] & ((inside < BLOCK) & (cols < extent(t, COLUMNS, ALIGN)))[None, :]
    x = gradient(t, s, rows, g_rows, cols, mask, P_TYPE, C_TYPE, G_TYPE, L2_ON, ALIGN)
    f = _rate(s, STEP, PHASE)
    if SECOND is not None:
        STORE: tl.constexpr = (FOLD & PHASE) != 0
        v = SECOND(t, s, x * x, rows, place, exists, cols, mask, tile, matrix, STORE, S_TYPE, MODE, DEPTH2, ALIGN)
        if AFTER:
            x = x * factor(v, s, _rate(s, INNER, PHASE))
        else:
            f = factor(v, s, f)
    if (MEASURE | APPLY) & PHASE:
        squares, norm = apply(
            t, s, x, f, rows, g_rows, exists, cols, mask, tile,
            FIRST, P_TYPE, C_TYPE, F_TYPE, PHASE, AHEAD, UNIT, AFTER, NOISE, ROUND, DEPTH1, ALIGN,
        )  # fmt: skip
        if MEASURE & PHASE:
            tl.store(partial + 2 * pid, squares)
            tl.store(partial + 2 * pid + 1, norm)


@triton.jit
def _row_factors(r, bucket_mean):
    """``(M, 1)``: what the steps of rows with the means ``r`` are multiplied by: see `CountMin.step_factors`."""
    larger = r > bucket_mean
    return tl.where(larger, tl.sqrt_rn(tl.div_rn(bucket_mean, tl.where(larger, r, 1.0))), 1.0)[:, None]


@triton.jit
def _sums(t, rows):
    """Where the sums of the rows' squares begin. Held from the beginning, the address would spill registers."""
    return tl.load(t + tl.load(t + NEW)).to(tl.pointer_type(tl.float32)) + rows * tl.load(t + TILES)


@triton.jit
def buckets(
    table, numbers, partial, count,
    FIRST: tl.constexpr, P_TYPE: tl.constexpr, C_TYPE: tl.constexpr, G_TYPE: tl.constexpr, F_TYPE: tl.constexpr,
    S_TYPE: tl.constexpr, PHASE: tl.constexpr, AHEAD: tl.constexpr, UNIT: tl.constexpr, AFTER: tl.constexpr,
    L2_ON: tl.constexpr, NOISE: tl.constexpr, ROUND: tl.constexpr, ALIGN: tl.constexpr, SINGLE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, BATCH: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Take the step of one bucket and ``BLOCK`` columns.

    With ``SINGLE`` the bucket's members fit one tile of ``M`` rows, and g is read once. With ``BATCH`` each matrix has
    numbers of its own. With ``SCALED`` rows have factors of their own, from the means that the last step left, and the
    sums of this step's squares are written beside them, one for each tile. `fold.row_means_of` makes new means of them.
    """
    pid = tl.program_id(0)
    index = find(table, count, pid)
    t = table + index * FIELDS
    s = numbers + tl.load(t + ROW) * NUMBERS
    local = pid - tl.load(t + BEGIN)
    across = tl.load(t + TILES)
    tile, bucket = local % across, local // across
    inside = tl.arange(0, N)
    cols = tile * BLOCK + inside
    columns = extent(t, COLUMNS, ALIGN)
    inner = (inside < BLOCK) & (cols < columns)
    height, own = tl.load(t + HEIGHT), tl.load(t + OWN)
    matrix = bucket // own
    if BATCH:
        s += matrix * NUMBERS
    load = load_of(height, own, bucket, matrix)
    hashes = tl.load(t + HASHES).to(tl.pointer_type(tl.int64))
    place = address(t, SECOND_A, S_TYPE, ALIGN) + bucket * columns + cols

    v = tl.load(place, mask=inner, other=0.0).to(tl.float32)
    rows, exists = members(height, own, bucket, matrix, 0, hashes, M)
    mask = exists[:, None] & inner[None, :]
    if SCALED:
        means = tl.load(t + SECOND_B).to(tl.pointer_type(tl.float32))
        r = tl.load(means + rows, mask=exists, other=0.0)
        bucket_mean = tl.sum(r)
        if not SINGLE:
            for first in range(M, load, M):
                rows, exists = members(tl.load(t + HEIGHT), tl.load(t + OWN), bucket, matrix, first, hashes, M)
                bucket_mean += tl.sum(tl.load(means + rows, mask=exists, other=0.0))
        number = load.to(tl.float32)  # held in place of an int64, which takes two registers
        bucket_mean = tl.div_rn(bucket_mean, number)
        if SINGLE and C_TYPE is None:
            of_rows = _row_factors(r, bucket_mean)
    if SINGLE:
        x = gradient(t, s, rows, rows, cols, mask, P_TYPE, C_TYPE, G_TYPE, L2_ON, ALIGN)
    if FOLD & PHASE:
        if SINGLE:
            total = tl.sum(x * x, 0)
            if SCALED:
                tl.store(_sums(t, rows) + tile, tl.sum(x * x, 1), mask=exists)
        else:
            total = tl.zeros([N], tl.float32)
            for first in range(0, load, M):
                rows, exists = members(tl.load(t + HEIGHT), tl.load(t + OWN), bucket, matrix, first, hashes, M)
                mask = exists[:, None] & inner[None, :]
                y = gradient(t, s, rows, rows, cols, mask, P_TYPE, C_TYPE, G_TYPE, L2_ON, ALIGN)
                total += tl.sum(y * y, 0)
                if SCALED:
                    tl.store(_sums(t, rows) + tile, tl.sum(y * y, 1), mask=exists)
        gain = tl.load(s + GAIN2)
        if SCALED:  # such a table holds means
            gain = gain / number
        else:
            if tl.load(s + MEAN) != 0:
                gain = gain / load.to(tl.float32)
        kept = held(tl.load(s + DECAY2) * v + gain * total, t, s, bucket * columns + cols, TABLE2, S_TYPE)
        tl.store(place, kept, mask=inner)
        v = kept.to(tl.float32)
    # AFTER: the factor of the gradient before the first moment averages it. f: the factor of the numerator.
    f = _rate(s, STEP, PHASE)
    if AFTER:
        preconditioner = factor(v, s, _rate(s, INNER, PHASE))[None, :]
    else:
        f = factor(v, s, f)[None, :]
    squares = tl.full([], 0.0, tl.float64)
    norm = tl.full([], 0.0, tl.float64)
    if (MEASURE | APPLY) & PHASE:
        if SINGLE:
            if SCALED:
                if C_TYPE is not None:  # with the codes of weights, holding the factors would spill registers
                    of_rows = _row_factors(tl.load(means + rows, mask=exists, other=0.0), bucket_mean)
                if AFTER:
                    preconditioner = preconditioner * of_rows
                else:
                    f = f * of_rows
            if AFTER:
                x = x * preconditioner
            squares, norm = apply(
                t, s, x, f, rows, rows, exists, cols, mask, tile,
                FIRST, P_TYPE, C_TYPE, F_TYPE, PHASE, AHEAD, UNIT, AFTER, NOISE, ROUND, 1, ALIGN,
            )  # fmt: skip
        else:
            for first in range(0, load, M):
                rows, exists = members(tl.load(t + HEIGHT), tl.load(t + OWN), bucket, matrix, first, hashes, M)
                mask = exists[:, None] & inner[None, :]
                y = gradient(t, s, rows, rows, cols, mask, P_TYPE, C_TYPE, G_TYPE, L2_ON, ALIGN)
                each = f
                if SCALED:
                    of_rows = _row_factors(tl.load(means + rows, mask=exists, other=0.0), bucket_mean)
                    if AFTER:
                        y = y * of_rows
                    else:
                        each = f * of_rows
                if AFTER:
                    y = y * preconditioner
                    each = _rate(s, STEP, PHASE)  # loaded again, because holding it through the loop spills a register
                a, b = apply(
                    t, s, y, each, rows, rows, exists, cols, mask, tile,
                    FIRST, P_TYPE, C_TYPE, F_TYPE, PHASE, AHEAD, UNIT, AFTER, NOISE, ROUND, 1, ALIGN,
                )  # fmt: skip
                squares += a
                norm += b
        if MEASURE & PHASE:
            tl.store(partial + 2 * pid, squares)
            tl.store(partial + 2 * pid + 1, norm)

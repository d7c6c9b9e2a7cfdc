"""``update_clip`` and ``scale_parameter`` (Adafactor): each tensor's step size, from the sums of a measuring sweep.

With ``lagged_rms`` the step size follows from two numbers that the last step recorded: `recall` runs before the sweep
and `record` after it.

With ``BATCH`` the tensors are batches of matrices (experts). Each matrix is measured by itself and has numbers of its
own. The grid has a program for each matrix (axis 0, as long as the largest batch) of each tensor (axis 1).
"""

from __future__ import annotations

import triton
import triton.language as tl

from sketch_plugins.kernels import work
from sketch_plugins.kernels.gpu.table import (
    BEGIN,
    COLUMNS,
    COUNT,
    FIELDS,
    HEIGHT,
    INNER,
    LAST,
    NUMBERS,
    ROW,
    ROWS,
    STEP,
)

CLIP, RELATIVE, CORRECTION = (tl.constexpr(i) for i in (work.CLIP, work.RELATIVE, work.CORRECTION))


@triton.jit
def _matrices(t):
    """The number of matrices of a batch."""
    return tl.load(t + ROWS) // tl.load(t + HEIGHT)


@triton.jit
def _measured(table, partial, index, matrix, count, programs, s, BATCH: tl.constexpr, N: tl.constexpr):
    """RMS of the update and of the parameter. The partial sums are added in a fixed order."""
    t = table + index * FIELDS
    begin = tl.load(t + BEGIN)
    end = programs.to(tl.int64)
    if index + 1 < count:
        end = tl.load(t + FIELDS + BEGIN)
    if BATCH:
        each = (end - begin) // _matrices(t)
        begin += matrix * each
        end = begin + each
    squares = tl.zeros([N], tl.float64)
    norm = tl.zeros([N], tl.float64)
    for first in range(begin, end, N):
        place = first + tl.arange(0, N)
        squares += tl.load(partial + 2 * place, mask=place < end, other=0.0)
        norm += tl.load(partial + 2 * place + 1, mask=place < end, other=0.0)
    # These are loaded here, because holding them through the loop would spill registers.
    if BATCH:
        rows = tl.load(t + HEIGHT)
    else:
        rows = tl.load(t + COUNT)
    size = (rows * tl.load(t + COLUMNS)).to(tl.float64)
    update = tl.sqrt(tl.sum(squares) / size).to(tl.float32) * tl.load(s + CORRECTION)
    return update, tl.sqrt(tl.sum(norm) / size).to(tl.float32)


@triton.jit
def _settle(s, update, parameter, AFTER: tl.constexpr):
    """Change numbers according to both RMS."""
    step = tl.load(s + STEP)
    most = tl.load(s + RELATIVE)
    if most != 0:
        bounded = tl.where(parameter < 1e-3, 1e-3, parameter)
        step = step * tl.where(bounded > most, most, bounded)
    clip = tl.load(s + CLIP)
    if clip != 0:
        excess = update / clip
        excess = tl.where(excess < 1.0, 1.0, excess)
        if AFTER:
            tl.store(s + INNER, 1.0 / excess)
        else:
            step = step / excess
    tl.store(s + STEP, step)


@triton.jit
def _last(table, index, matrix):
    return tl.load(table + index * FIELDS + LAST).to(tl.pointer_type(tl.float32)) + 2 * matrix


@triton.jit
def _record(table, index, matrix, update, parameter):
    last = _last(table, index, matrix)
    tl.store(last, update)
    tl.store(last + 1, parameter)


@triton.jit
def _step_size(
    table, numbers, measured, partial, index, matrix, own, count, programs,
    AFTER: tl.constexpr, LAGGED: tl.constexpr, BATCH: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    s = measured + own * NUMBERS
    update, parameter = _measured(table, partial, index, matrix, count, programs, s, BATCH, N)
    _settle(numbers + own * NUMBERS, update, parameter, AFTER)
    if LAGGED:
        _record(table, index, matrix, update, parameter)


@triton.jit
def step_sizes(
    table, numbers, measured, partial, count, programs,
    AFTER: tl.constexpr, LAGGED: tl.constexpr, BATCH: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program for each tensor, or for each matrix. With ``LAGGED`` the RMS are also recorded for the next step."""
    if BATCH:
        matrix, index = tl.program_id(0).to(tl.int64), tl.program_id(1)
        t = table + index * FIELDS
        if matrix < _matrices(t):
            own = tl.load(t + ROW) + matrix
            _step_size(table, numbers, measured, partial, index, matrix, own, count, programs, AFTER, LAGGED, BATCH, N)
    else:
        index = tl.program_id(0)
        _step_size(table, numbers, measured, partial, index, 0, index, count, programs, AFTER, LAGGED, BATCH, N)


@triton.jit
def recall(table, numbers, AFTER: tl.constexpr, BATCH: tl.constexpr):
    """Change the numbers according to what the last step recorded."""
    if BATCH:
        matrix, index = tl.program_id(0).to(tl.int64), tl.program_id(1)
        t = table + index * FIELDS
        if matrix < _matrices(t):
            last = _last(table, index, matrix)
            _settle(numbers + (tl.load(t + ROW) + matrix) * NUMBERS, tl.load(last), tl.load(last + 1), AFTER)
    else:
        index = tl.program_id(0)
        last = _last(table, index, 0)
        _settle(numbers + index * NUMBERS, tl.load(last), tl.load(last + 1), AFTER)


@triton.jit
def record(table, numbers, partial, count, programs, BATCH: tl.constexpr, N: tl.constexpr):
    """Record what this step has measured, for the next one."""
    if BATCH:
        matrix, index = tl.program_id(0).to(tl.int64), tl.program_id(1)
        t = table + index * FIELDS
        if matrix < _matrices(t):
            s = numbers + (tl.load(t + ROW) + matrix) * NUMBERS
            update, parameter = _measured(table, partial, index, matrix, count, programs, s, BATCH, N)
            _record(table, index, matrix, update, parameter)
    else:
        index = tl.program_id(0)
        s = numbers + index * NUMBERS
        update, parameter = _measured(table, partial, index, 0, count, programs, s, BATCH, N)
        _record(table, index, 0, update, parameter)

"""``update_clip`` and ``scale_parameter`` (Adafactor): each tensor's step size, from the sums of a measuring sweep.

With ``lagged_rms`` the step size follows from two numbers that the last step recorded: `recall` runs before the sweep
and `record` after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sketch_plugins.kernels import work
from sketch_plugins.kernels.gpu.table import BEGIN, COLUMNS, COUNT, FIELDS, INNER, LAST, NUMBERS, STEP

CLIP, RELATIVE, CORRECTION = (tl.constexpr(i) for i in (work.CLIP, work.RELATIVE, work.CORRECTION))


@triton.jit
def _measured(table, partial, index, count, programs, s, N: tl.constexpr):
    """RMS of a tensor's update and of the tensor. Its partial sums are added in a fixed order."""
    t = table + index * FIELDS
    begin = tl.load(t + BEGIN)
    end = programs.to(tl.int64)
    if index + 1 < count:
        end = tl.load(t + FIELDS + BEGIN)
    squares = tl.zeros([N], tl.float64)
    norm = tl.zeros([N], tl.float64)
    for first in range(begin, end, N):
        place = first + tl.arange(0, N)
        squares += tl.load(partial + 2 * place, mask=place < end, other=0.0)
        norm += tl.load(partial + 2 * place + 1, mask=place < end, other=0.0)
    size = (tl.load(t + COUNT) * tl.load(t + COLUMNS)).to(tl.float64)
    update = tl.sqrt(tl.sum(squares) / size).to(tl.float32) * tl.load(s + CORRECTION)
    return update, tl.sqrt(tl.sum(norm) / size).to(tl.float32)


@triton.jit
def _settle(s, update, parameter, AFTER: tl.constexpr):
    """Change a tensor's numbers according to both RMS."""
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
def _record(table, index, update, parameter):
    last = tl.load(table + index * FIELDS + LAST).to(tl.pointer_type(tl.float32))
    tl.store(last, update)
    tl.store(last + 1, parameter)


@triton.jit
def step_sizes(
    table, numbers, measured, partial, count, programs, AFTER: tl.constexpr, LAGGED: tl.constexpr, N: tl.constexpr
):
    """One program for each tensor. With ``LAGGED`` the RMS are also recorded for the next step."""
    index = tl.program_id(0)
    update, parameter = _measured(table, partial, index, count, programs, measured + index * NUMBERS, N)
    _settle(numbers + index * NUMBERS, update, parameter, AFTER)
    if LAGGED:
        _record(table, index, update, parameter)


@triton.jit
def recall(table, numbers, AFTER: tl.constexpr):
    """Change the numbers according to what the last step recorded."""
    index = tl.program_id(0)
    last = tl.load(table + index * FIELDS + LAST).to(tl.pointer_type(tl.float32))
    _settle(numbers + index * NUMBERS, tl.load(last), tl.load(last + 1), AFTER)


@triton.jit
def record(table, numbers, partial, count, programs, N: tl.constexpr):
    """Record what this step has measured, for the next one."""
    index = tl.program_id(0)
    update, parameter = _measured(table, partial, index, count, programs, numbers + index * NUMBERS, N)
    _record(table, index, update, parameter)

"""Adafactor's two devices: the step size of each tensor from the sums that a measuring sweep left behind."""

from __future__ import annotations

import triton
import triton.language as tl

from sketch_plugins.kernels import work
from sketch_plugins.kernels.gpu.common import BEGIN, FIELDS, INNER, NUMBERS, STEP

CLIP, RELATIVE, CORRECTION = (tl.constexpr(i) for i in (work.CLIP, work.RELATIVE, work.CORRECTION))


@triton.jit
def step_sizes(table, numbers, measured, partial, sizes, count, programs, AFTER: tl.constexpr, N: tl.constexpr):
    """One program for each tensor; its partial sums are added in a fixed order."""
    index = tl.program_id(0)
    t, s = table + index * FIELDS, measured + index * NUMBERS
    begin = tl.load(t + BEGIN)
    end = programs.to(tl.int64)
    if index + 1 < count:
        end = tl.load(t + FIELDS + BEGIN)
    squares = tl.zeros([N], tl.float32)
    norm = tl.zeros([N], tl.float32)
    for first in range(begin, end, N):
        place = first + tl.arange(0, N)
        squares += tl.load(partial + 2 * place, mask=place < end, other=0.0)
        norm += tl.load(partial + 2 * place + 1, mask=place < end, other=0.0)
    size = tl.load(sizes + index)
    step = tl.load(numbers + index * NUMBERS + STEP)
    if tl.load(s + RELATIVE) != 0:
        rms = tl.sqrt_rn(tl.sum(norm) / size)
        step = step * tl.where(rms < 1e-3, 1e-3, rms)
    clip = tl.load(s + CLIP)
    if clip != 0:
        excess = tl.sqrt_rn(tl.sum(squares) / size) * tl.load(s + CORRECTION) / clip
        excess = tl.where(excess < 1.0, 1.0, excess)
        if AFTER:
            tl.store(numbers + index * NUMBERS + INNER, 1.0 / excess)
        else:
            step = step / excess
    tl.store(numbers + index * NUMBERS + STEP, step)

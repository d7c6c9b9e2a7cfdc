"""The fused step on a CPU: one sweep over parameter and gradient, compiled by Numba. Optional (extra ``cpu``).

The eager path (the definition) makes a dozen passes over each tile; here a thread owns a range of buckets (or rows),
sums a bucket's members, and takes their step while they are in its cache: p and g are read and p is written once.
Threads own what they write, and sums have a fixed order: the bits do not depend on the number of threads.

Why Numba: measured on BERT-base shapes beside it, torch.compile of the same sweep took 1.7 times as long, at 80
microseconds a call and 10 to 40 seconds of compilation; docs/architecture.md has the figures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload, register_jitable
from torch import Tensor

from sketch_plugins.kernels.work import (
    APPLY,
    CLIP,
    CORRECTION,
    DECAY1,
    DECAY2,
    FLOOR,
    FOLD,
    GAIN1,
    GAIN2,
    INNER,
    INSIDE,
    KEEP,
    L2,
    LOOKAHEAD,
    MEAN,
    MEASURE,
    RELATIVE,
    SCALE,
    SHIFT,
    SIGN,
    STEP,
    Work,
    is_rows,
)
from sketch_plugins.stores import CountMin, Cover, Dense, Int8, Store
from sketch_plugins.stores.base import State

# No "nnan" and no "ninf": a NaN or an infinity must come out as one.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "nsz", "contract", "arcp"}}

NONE, DENSE, INT8 = 0, 1, 2

# Columns worked on at a time where no block size asks for another number: the buffers stay in the first-level cache.
COLUMNS = 1024

# Offsets are unsigned: an index that may be negative is checked for it, and such a loop is not vectorised. Signed and
# unsigned numbers must not meet (their sum would be a float).
U = np.uint64


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled on first use, and kept on disk where there is a folder to write to."""
    try:
        return njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # "no locator available": neither the package's folder nor the user's can be written
        return njit(**_OPTIONS)(function)


@intrinsic
def _as_float(typing, bits):
    """The float32 with these bits (a scalar view does not exist in Numba)."""
    return types.float32(types.uint32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.FloatType()
    )


@intrinsic
def _as_bits(typing, value):
    """The bits of a float32."""
    return types.uint32(types.float32), lambda context, builder, signature, args: builder.bitcast(
        args[0], ir.IntType(32)
    )


def _wide(x):
    raise NotImplementedError


@overload(_wide)
def _wide_of(x):
    """float32 of a float32 or of the bits of a bfloat16 (uint16)."""
    if isinstance(x, types.Integer):
        return lambda x: _as_float(np.uint32(np.uint32(x) << np.uint32(16)))
    return lambda x: x


def _narrow(like, value):
    raise NotImplementedError


@overload(_narrow)
def _narrow_of(like, value):
    """``value`` as ``like`` is kept: itself, or the bits of the nearest bfloat16 (ties to even)."""
    if isinstance(like, types.Integer):

        def bits_of(like, value):
            bits = _as_bits(value)
            even = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            return np.uint16(0x7FC0) if nan else np.uint16(even >> np.uint32(16))

        return bits_of
    return lambda like, value: value


@register_jitable(**_OPTIONS)
def _factor(v, s, rate):
    """``rate`` over the denominator: ``rate / max(sqrt(v + inside) * scale + shift, floor)``."""
    root = np.sqrt(v + s[INSIDE]) * s[SCALE] + s[SHIFT]
    return rate / (s[FLOOR] if root < s[FLOOR] else root)  # a NaN stays one


@register_jitable(**_OPTIONS)
def _measure(o, n, x, xo, sign, f, fo, kind, dense, codes, scales, at, block, s, after):
    """Sum of squares of the update of ``n`` adjacent numbers, or (``after``) of what enters the first moment."""
    decay, gain, ahead = s[DECAY1], s[GAIN1], s[LOOKAHEAD]
    total = np.float64(0.0)
    for lo in range(U(0), n, block):
        old = scales[at] if kind == INT8 else np.float32(0.0)
        part = np.float32(0.0)
        for j in range(lo, min(lo + block, n)):
            y = sign * _wide(x[xo + j])
            u = y
            if not after:
                if kind == DENSE:
                    u = decay * _wide(dense[o + j]) + gain * y
                elif kind == INT8:
                    u = decay * (np.float32(codes[o + j]) * old) + gain * y
                if ahead != 0:
                    u = y + ahead * u
                u *= f[fo + j]
            part += u * u
        total += part
        at += U(1)
    return total


@register_jitable(**_OPTIONS)
def _apply(p, o, n, x, xo, sign, f, fo, m, kind, dense, codes, scales, at, block, s):
    """First moment and update of ``n`` adjacent numbers, from offset ``o``, in as few passes as there are reductions.

    ``x`` (from ``xo`` on, times ``sign``) is what the first moment averages, ``f`` what multiplies the numerator; ``m``
    is a buffer of a block; ``at`` is the place of the first block's scale.
    """
    decay, gain, keep, ahead = s[DECAY1], s[GAIN1], s[KEEP], s[LOOKAHEAD]
    if kind == NONE:
        for j in range(n):
            p[o + j] = _narrow(p[o + j], keep * _wide(p[o + j]) - sign * _wide(x[xo + j]) * f[fo + j])
    elif kind == DENSE:
        for j in range(n):
            y = sign * _wide(x[xo + j])
            v = decay * _wide(dense[o + j]) + gain * y
            dense[o + j] = _narrow(dense[o + j], v)
            v = v if ahead == 0 else y + ahead * v
            p[o + j] = _narrow(p[o + j], keep * _wide(p[o + j]) - v * f[fo + j])
    else:
        for lo in range(U(0), n, block):
            length, q, r, h = min(block, n - lo), o + lo, xo + lo, fo + lo
            old = decay * scales[at]
            # The order of the bits of |m| is that of the numbers (NaN above all): integer maxima vectorise.
            top = np.int32(0)
            for j in range(length):
                v = old * np.float32(codes[q + j]) + gain * (sign * _wide(x[r + j]))
                m[j] = v
                top = max(top, np.int32(_as_bits(v) & np.uint32(0x7FFFFFFF)))
            scale = _as_float(np.uint32(top)) / np.float32(127.0)
            scales[at] = scale
            at += U(1)
            inverse = np.float32(1.0) / scale if scale > np.float32(1e-37) else np.float32(0.0)
            # Adding 1.5 * 2**23 leaves the nearest integer (ties to even) in the lowest bits.
            if ahead == 0:
                for j in range(length):
                    p[q + j] = _narrow(p[q + j], keep * _wide(p[q + j]) - m[j] * f[h + j])
                    codes[q + j] = np.int8(_as_bits(m[j] * inverse + np.float32(12582912.0)))
            else:
                for j in range(length):
                    y = sign * _wide(x[r + j])
                    p[q + j] = _narrow(p[q + j], keep * _wide(p[q + j]) - (y + ahead * m[j]) * f[h + j])
                    codes[q + j] = np.int8(_as_bits(m[j] * inverse + np.float32(12582912.0)))


@register_jitable(**_OPTIONS)
def _span(p, o, n, g, x, f, m, kind, dense, codes, scales, at, block, s, phase, after):
    """Measure and apply ``n`` numbers of a row whose factors are ``f``; ``after``: of the preconditioned gradient."""
    sign, one, none = s[SIGN], np.float32(1.0), U(0)
    total = np.float64(0.0)
    if after:
        for j in range(n):
            x[j] = sign * _wide(g[o + j]) * f[j]
            f[j] = s[STEP]
        if phase & MEASURE:
            total += _measure(o, n, x, none, one, f, none, kind, dense, codes, scales, at, block, s, True)
        if phase & APPLY:
            _apply(p, o, n, x, none, one, f, none, m, kind, dense, codes, scales, at, block, s)
    else:
        if phase & MEASURE:
            total += _measure(o, n, g, o, sign, f, none, kind, dense, codes, scales, at, block, s, False)
        if phase & APPLY:
            _apply(p, o, n, g, o, sign, f, none, m, kind, dense, codes, scales, at, block, s)
    return total


@_compiled
def count_min(p, g, columns, kind, dense, codes, scales, block, table, width, band, begin, end, phase, s, squares):
    """Bands ``[begin, end)`` of ``band`` adjacent buckets of a count-min sketch of depth 1 with a strided hash.

    Adjacent buckets have adjacent members: memory is read in long runs, and a band is small enough that g is still in
    the cache when its squares are summed and the members take their step.
    """
    rows, blocks = U(len(p)) // columns, (columns + block - U(1)) // block
    f, m = np.empty(band * columns, np.float32), np.empty(block, np.float32)
    decay, sign = s[DECAY2], s[SIGN]
    even = kind != INT8 or columns % block == 0
    for unit in range(begin, end):
        first = unit * band
        height = min(band, width - first)
        total = np.float64(0.0)
        if phase & FOLD:
            for j in range(height * columns):
                f[j] = np.float32(0.0)
            for i in range(first, rows, width):
                o = i * columns
                for j in range(min(height, rows - i) * columns):
                    y = _wide(g[o + j])
                    f[j] += y * y
            for b in range(height):
                load = (rows - first - b + width - U(1)) // width
                gain = s[GAIN2] if s[MEAN] == 0 else s[GAIN2] / np.float32(load)
                o, q = (first + b) * columns, b * columns
                for j in range(columns):
                    table[o + j] = decay * table[o + j] + gain * f[q + j]
            if phase & MEASURE and kind == NONE:
                # The squares of a bucket's updates are its squares over one denominator: no second look at g.
                o = first * columns
                for b in range(height):
                    part = np.float32(0.0)
                    for j in range(b * columns, (b + U(1)) * columns):
                        u = _factor(table[o + j], s, s[STEP])
                        part += f[j] * u * u
                    total += part
        if phase & FOLD and phase & MEASURE and kind == NONE:
            squares[unit] = total
            continue
        o = first * columns
        for j in range(height * columns):
            f[j] = _factor(table[o + j], s, s[STEP])
        for i in range(first, rows, width):
            high = min(height, rows - i)
            # Where blocks end with a row, one run for all rows; else row by row.
            runs, n = (U(1), high * columns) if even else (high, columns)
            for r in range(runs):
                o, q = (i + r) * columns, r * columns
                at = (i + r) * blocks
                if phase & MEASURE:
                    total += _measure(o, n, g, o, sign, f, q, kind, dense, codes, scales, at, block, s, False)
                if phase & APPLY:
                    _apply(p, o, n, g, o, sign, f, q, m, kind, dense, codes, scales, at, block, s)
        squares[unit] = total
    return 0


@_compiled
def exact(p, g, columns, kind, dense, codes, scales, block, second, begin, end, phase, s, squares, after):
    """Rows ``[begin, end)`` with an exact second moment, or with none (an empty array)."""
    blocks = (columns + block - U(1)) // block
    wide = max(block, U(COLUMNS) // block * block)
    f, x, m = np.empty(wide, np.float32), np.empty(wide, np.float32), np.empty(block, np.float32)
    decay, gain, rate = s[DECAY2], s[GAIN2], s[INNER] if after else s[STEP]
    f[:] = s[STEP]
    for i in range(begin, end):
        total = np.float64(0.0)
        for lo in range(U(0), columns, wide):
            o, n = i * columns + lo, min(wide, columns - lo)
            at = i * blocks + lo // block
            if len(second):
                for j in range(n):
                    y = _wide(g[o + j])
                    f[j] = decay * second[o + j] + gain * (y * y)
                if phase & FOLD:
                    for j in range(n):
                        second[o + j] = f[j]
                for j in range(n):
                    f[j] = _factor(f[j], s, rate)
            total += _span(p, o, n, g, x, f, m, kind, dense, codes, scales, at, block, s, phase, after)
        squares[i] = total
    return 0


@_compiled
def cover(
    p,
    g,
    columns,
    kind,
    dense,
    codes,
    scales,
    block,
    row,
    column,
    new_row,
    new_column,
    begin,
    end,
    phase,
    s,
    squares,
    after,
):
    """Rows ``[begin, end)`` of a matrix with SM3-II's covers; ``new_column`` takes the maxima of these rows alone."""
    blocks = (columns + block - U(1)) // block
    wide = max(block, U(COLUMNS) // block * block)
    f, x, m = np.empty(wide, np.float32), np.empty(wide, np.float32), np.empty(block, np.float32)
    tops = new_column.view(np.int32)
    decay, gain, rate = s[DECAY2], s[GAIN2], s[INNER] if after else s[STEP]
    for i in range(begin, end):
        total = np.float64(0.0)
        old = row[i]
        top = np.int32(0)
        for lo in range(U(0), columns, wide):
            o, n = i * columns + lo, min(wide, columns - lo)
            at = i * blocks + lo // block
            # Integer maxima: the order of the bits is that of the numbers, NaN above all.
            if phase & FOLD:
                for j in range(n):
                    y = _wide(g[o + j])
                    other = column[lo + j]
                    nu = decay * (old if old < other else other) + gain * (y * y)
                    bits = np.int32(_as_bits(nu))
                    top = max(top, bits)
                    tops[lo + j] = max(tops[lo + j], bits)
                    f[j] = _factor(nu, s, rate)
            else:
                for j in range(n):
                    y = _wide(g[o + j])
                    other = column[lo + j]
                    f[j] = _factor(decay * (old if old < other else other) + gain * (y * y), s, rate)
            total += _span(p, o, n, g, x, f, m, kind, dense, codes, scales, at, block, s, phase, after)
        if phase & FOLD:
            new_row[i] = _as_float(np.uint32(top))
        squares[i] = total
    return 0


@_compiled
def sum_of_squares(p, columns, begin, end, squares):
    """``squares[i]``: the sum of row i's squares."""
    for i in range(begin, end):
        total = np.float64(0.0)
        for lo in range(U(0), columns, U(COLUMNS)):
            part = np.float32(0.0)
            o = i * columns + lo
            for j in range(min(U(COLUMNS), columns - lo)):
                y = _wide(p[o + j])
                part += y * y
            total += part
        squares[i] = total
    return 0


# -- from works to sweeps ---------------------------------------------------------------------------------------------

# Numbers swept between two meetings of the threads: with a measuring sweep before, the second one finds g in the cache.
BATCH = 1 << 22
# Numbers of a band of buckets, all members together.
BAND = 1 << 17
_NO_FLOATS, _NO_CODES = np.zeros(1, np.float32), np.zeros(1, np.int8)


def unsupported(w: Work) -> str | None:
    """Why these loops cannot take this parameter's step; None if they can."""
    first, second = (pair and pair[0] for pair in (w.first, w.second))
    if w.p.dtype not in _VIEWS or w.g.dtype not in _VIEWS:
        return f"a parameter of {w.p.dtype} with a gradient of {w.g.dtype}: allowed are torch.float32, torch.bfloat16"
    if not (w.p.is_contiguous() and w.g.is_contiguous() and is_rows(w.p)):
        return "a layout that is not contiguous"
    if w.rows is not None:
        return "row-sparse gradients"
    if w.flags & (1 << L2):
        return "weight decay that is added to the gradient"
    if w.stochastic:
        return "stochastic rounding of the parameter"
    if not (first is None or isinstance(first, Dense) or (isinstance(first, Int8) and not first.stochastic)):
        return f"the first moment of {first}"
    if isinstance(second, Cover):
        return None if second.variant == "II" and len(second.dims) == 2 else f"the second moment of {second}"
    if second is None or isinstance(second, Dense):
        return None
    if type(second) is not CountMin or second.bf16 or second.depth != 1 or not second.hashes(w.p.shape[0])[0].strided:
        return f"the second moment of {second}"
    return None


def run(works: Iterable[Work]) -> None:
    """Take the steps. Every work must be supported."""
    sweeps = [_Sweeps(w) for w in works]
    batch: list[_Sweeps] = []
    size = 0
    for i, sweep in enumerate(sweeps):
        batch.append(sweep)
        size += sweep.w.p.numel()
        if size < BATCH and i + 1 < len(sweeps):
            continue
        _parallel([s.measure() for s in batch if s.w.measure])
        for s in batch:
            s.set_step()
        _parallel([s.apply() for s in batch])
        for s in batch:
            s.finish()
        batch, size = [], 0


# (numbers a unit takes, units, a function of a range of units)
_Job = tuple[int, int, Callable[[int, int], Any]]


class _Sweeps:
    """One parameter's sweeps: their arguments, and the arrays that live from one to the next."""

    def __init__(self, w: Work) -> None:
        self.w = w
        self.rows, self.columns = w.p.shape
        if self.columns == 1 and not isinstance(w.second and w.second[0], CountMin | Cover):
            self.rows, self.columns = 1, self.rows
        self.p, self.g = _array(w.p), _array(w.g)
        store: Store | None
        state: State
        store, state = w.first or (None, {})
        self.block = min(store.block_size, self.columns) if isinstance(store, Int8) else min(COLUMNS, self.columns)
        kind = INT8 if isinstance(store, Int8) else DENSE if store else NONE
        dense, codes, scales = (
            _array(state[name]) if name in state else none
            for name, none in (("dense", _NO_FLOATS), ("codes", _NO_CODES), ("scales", _NO_FLOATS))
        )
        self.common = (self.p, self.g, U(self.columns), kind, dense, codes, scales, U(self.block))
        self.store, self.state = w.second or (None, {})
        self.numbers = list(w.numbers.tolist() if isinstance(w.numbers, Tensor) else w.numbers)
        self.units = self.rows
        self.width = self.band = 0
        if isinstance(self.store, CountMin):
            self.width = self.store.buckets(self.rows)
            # Gradient and parameter of a band, 8 bytes a number, stay in the second-level cache.
            members = -(-self.rows // self.width) * self.columns
            self.band = max(1, min(self.width, BAND // members))
            self.units = -(-self.width // self.band)
        self.squares, self.norm = np.zeros(self.units), np.zeros(self.rows)
        self.maxima: dict[int, np.ndarray] = {}
        self.new_row = np.zeros(self.rows, np.float32) if isinstance(self.store, Cover) else _NO_FLOATS

    def measure(self) -> _Job:
        measured = list(self.numbers)
        measured[STEP] = measured[INNER] = 1.0
        sweep = self._sweep(FOLD | MEASURE if isinstance(self.store, CountMin) else MEASURE, measured)
        # Units are buckets or rows; the parameter's norm is that of as many of its rows.
        share = self.rows / self.units

        def both(begin: int, end: int) -> None:
            sweep(begin, end)
            sum_of_squares(self.p, U(self.columns), U(round(begin * share)), U(round(end * share)), self.norm)

        return max(1, self.w.p.numel() // max(1, self.units)), self.units, both

    def set_step(self) -> None:
        if not self.w.measure:
            return
        n = self.rows * self.columns
        if self.numbers[RELATIVE]:
            rms = np.sqrt(self.norm.sum() / n)
            self.numbers[STEP] *= 1e-3 if rms < 1e-3 else rms
        if self.numbers[CLIP]:
            excess = np.sqrt(self.squares.sum() / n) * self.numbers[CORRECTION] / self.numbers[CLIP]
            excess = 1.0 if excess < 1.0 else excess
            self.numbers[INNER if self.w.after else STEP] /= excess

    def apply(self) -> _Job:
        phase = APPLY if self.w.measure and isinstance(self.store, CountMin) else FOLD | APPLY
        return max(1, self.w.p.numel() // max(1, self.units)), self.units, self._sweep(phase, self.numbers)

    def finish(self) -> None:
        if isinstance(self.store, Cover):
            self.state["axis_0"].copy_(torch.from_numpy(self.new_row))
            # Maxima of numbers >= 0 or NaN: as integers, so that a NaN wins.
            top = np.maximum.reduce([m.view(np.int32) for m in self.maxima.values()])
            self.state["axis_1"].copy_(torch.from_numpy(top.view(np.float32)))

    def _sweep(self, phase: int, numbers: Sequence[float]) -> Callable[[int, int], Any]:
        s = tuple(np.float32(v) for v in numbers)
        if isinstance(self.store, CountMin):
            table = _array(self.state["table"])
            return lambda begin, end: count_min(
                *self.common, table, U(self.width), U(self.band), U(begin), U(end), phase, s, self.squares
            )
        if isinstance(self.store, Cover):
            row, column = _array(self.state["axis_0"]), _array(self.state["axis_1"])

            def covers(begin: int, end: int) -> None:
                new = self.maxima[begin] = np.zeros(self.columns, np.float32)
                cover(
                    *self.common, row, column, self.new_row, new, U(begin), U(end), phase, s, self.squares, self.w.after
                )

            return covers
        second = _array(self.state["dense"]) if self.store else _NO_FLOATS[:0]
        return lambda begin, end: exact(*self.common, second, U(begin), U(end), phase, s, self.squares, self.w.after)


def _array(tensor: Tensor) -> np.ndarray:
    """The numbers, flat; those of bfloat16 as their bits."""
    tensor = tensor.detach().reshape(-1)
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


_VIEWS = (torch.float32, torch.bfloat16)

_POOL: tuple[int, int, ThreadPoolExecutor] | None = None


def _parallel(jobs: Sequence[_Job]) -> None:
    """Run the jobs' units in as many contiguous shares of equal size as torch has threads."""
    threads = torch.get_num_threads()
    shares = list(_shares(jobs, threads))
    if len(shares) < 2:
        for share in shares:
            _run(share)
        return
    waiting = [_pool(threads).submit(_run, share) for share in shares[1:]]
    _run(shares[0])
    for w in waiting:
        w.result()


def _run(calls: Sequence[Callable[[], Any]]) -> None:
    for call in calls:
        call()


def _shares(jobs: Sequence[_Job], threads: int) -> Iterator[list[Callable[[], Any]]]:
    total = sum(cost * units for cost, units, _ in jobs)
    share: list[Callable[[], Any]] = []
    size, limit = 0, max(1, -(-total // threads))
    for cost, units, function in jobs:
        begin = 0
        while begin < units:
            end = min(units, begin + max(1, -(-(limit - size) // max(1, cost))))
            share.append(partial(function, begin, end))
            size += (end - begin) * cost
            begin = end
            if size >= limit:
                yield share
                share, size = [], 0
    if share:
        yield share


def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads of this process: those of its parent are gone after a fork."""
    global _POOL
    if _POOL is None or _POOL[:2] != (os.getpid(), threads):
        _POOL = (os.getpid(), threads, ThreadPoolExecutor(threads - 1, "sketch-plugins"))
    return _POOL[2]

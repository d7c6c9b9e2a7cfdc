"""The loops of a fused step on a CPU, compiled by Numba: one for each store of the second moment.

Each loop takes a list of pieces (ranges of units of a parameter), so one call serves many parameters: 199 parameters of
BERT at 75 microseconds of Python each were a tenth of a step. A parameter is a row of `tasks` (see `cpu_table`), which
also holds its addresses. `cpu` makes these rows and cuts them into pieces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

import numpy as np
from numba import njit
from numba.extending import register_jitable

from sketch_plugins.kernels import cpu_table, tile, vector, work
from sketch_plugins.kernels.cpu_table import (
    AFTER,
    APART,
    BAND,
    BASE,
    BEGIN,
    BLOCK,
    CODES,
    COLUMN,
    COLUMNS,
    END,
    KIND,
    LAST,
    MATRICES,
    MAXIMA,
    NEW,
    PHASE,
    ROW,
    SCALES,
    SEED,
    SIZE,
    TABLE1,
    TABLE2,
    TASK,
    UNITS,
    WIDTH,
    G,
    P,
)
from sketch_plugins.kernels.vector import (
    FAST_MATH,
    LANES,
    at_address,
    at_least,
    largest,
    least,
    load,
    magnitude,
    root,
    splat,
    store,
    top,
    total,
    weights,
)
from sketch_plugins.kernels.work import (
    CLIP,
    CORRECTION,
    DECAY1,
    DECAY2,
    FLOOR,
    GAIN1,
    GAIN2,
    INNER,
    INSIDE,
    LOOKAHEAD,
    MEAN,
    NUMBER,
    RELATIVE,
    SCALE,
    SHIFT,
    SHRINK,
    SIGN,
    STEP,
    UNIT,
)

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": FAST_MATH}

# Stores of a first moment.
NONE, DENSE, INT8 = np.uint64(0), np.uint64(1), np.uint64(2)

# Numbers that are summed in float32 before their sum is added in float64. A row's buffers have this length, too, so
# that they stay in the first-level cache.
SPAN = 1024
U = np.uint64
_SPAN, _ZERO, _ONE, _TWO = U(SPAN), U(0), U(1), U(2)
FOLD, MEASURE, APPLY = U(work.FOLD), U(work.MEASURE), U(work.APPLY)
# Another phase, beside those of `work`: one sweep measures, for the next step, what it applies.
ONCE = U(8)
_0, _1 = np.float32(0.0), np.float32(1.0)
_LEAST_UNIT = np.float32(tile.LEAST)
# If float32 cannot hold a sum of squares, the squares of the numbers times DOWN are summed: any such sum is finite.
_MOST, _DOWN, _UP = np.float64(np.finfo(np.float32).max), np.float32(2.0**-70), np.float64(2.0**140)
# A sum below LEAST may have lost squares by underflow, so the squares of the numbers times RAISE are summed.
_LEAST, _RAISE, _LOWER = np.float64(2.0**-80), np.float32(2.0**70), np.float64(2.0**-140)
# If denominators are at least PLAIN, the sum of squares of a bucket's updates may be computed from the sum of squares
# of its gradients. A gradient below 1e-19, whose square underflows, is then an update below 1e-10, and a sum of at
# least ENOUGH outweighs such updates.
_PLAIN, _ENOUGH = np.float32(1e-9), np.float64(1e-10)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile the function in its first call. The result is kept on disk if there is a folder to write to."""
    # Numba only notices changes in this file and in a function's closure, so the closure has a hash of the other files.
    sources = [Path(str(module.__file__)).read_bytes() for module in (cpu_table, vector, work, tile)]
    stamp = CellType(hashlib.sha256(b"".join(sources)).hexdigest())
    code = function.__code__.replace(co_freevars=("_stamp",))
    stamped = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, (stamp,))
    stamped.__doc__, stamped.__qualname__ = function.__doc__, function.__qualname__
    try:
        return njit(cache=True, **_OPTIONS)(stamped)
    except RuntimeError:  # "no locator available": neither the package's folder nor the user's is writable
        return njit(**_OPTIONS)(stamped)


# A loop's body is written once. It is called with the constant LANES, and with less for the rest of a row.
_body = register_jitable(forceinline=True, **_OPTIONS)
_part = register_jitable(**_OPTIONS)


@_body
def _numbers(row):
    """A task's numbers as a tuple. The compiler would expect a store to change an array of them."""
    return (
        row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7], row[8], row[9], row[10], row[11], row[12],
        row[13], row[14], row[15], row[16], row[17], row[18], row[19],
    )  # fmt: skip


@_part
def _key(seed, step):
    """The halves of `hashing.key_of`."""
    x = (seed ^ (U(step) * U(0x9E3779B97F4A7C15))) + U(0x9E3779B97F4A7C15)
    z = (x ^ (x >> U(30))) * U(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> U(27))) * U(0x94D049BB133111EB)
    z = z ^ (z >> U(31))
    return z & U(0xFFFFFFFF), z >> U(32)


@_body
def _factor(v, s, rate):
    """``rate`` over the denominator: ``rate / max(sqrt(v + inside) * scale + shift, floor)``."""
    return rate / at_least(root(v + s[INSIDE]) * s[SCALE] + s[SHIFT], s[FLOOR])


@_body
def _update(p, o, u, shrink, n):
    store(p, o, shrink * load(p, o, n) - u, n)


@_body
def _numerator(y, v, ahead, unit):
    u = v if ahead == _0 else y + ahead * v
    return u if unit == _0 else u / at_least(magnitude(u), _LEAST_UNIT)


@_body
def _plain(p, o, x, xo, sign, f, fo, unit, shrink, n):
    y = sign * load(x, xo, n)
    _update(p, o, _numerator(y, y, _0, unit) * load(f, fo, n), shrink, n)


@_body
def _averaged(p, o, x, xo, sign, f, fo, dense, decay, gain, ahead, unit, shrink, n):
    y = sign * load(x, xo, n)
    v = decay * load(dense, o, n) + gain * y
    store(dense, o, v, n)
    _update(p, o, _numerator(y, v, ahead, unit) * load(f, fo, n), shrink, n)


@_body
def _blended(o, x, xo, sign, codes, old, gain, n):
    return old * load(codes, o, n) + gain * (sign * load(x, xo, n))


@_body
def _coded(p, o, x, xo, sign, f, fo, codes, old, gain, ahead, unit, shrink, inverse, n):
    y = sign * load(x, xo, n)
    v = old * load(codes, o, n) + gain * y
    store(codes, o, v * inverse, n)
    _update(p, o, _numerator(y, v, ahead, unit) * load(f, fo, n), shrink, n)


@_body
def _block(p, o, x, xo, sign, f, fo, codes, scales, at, n, s):
    """Write the int8 first moment of one block of ``n`` numbers, and update the parameter."""
    gain, ahead, unit, shrink = s[GAIN1], s[LOOKAHEAD], s[UNIT], s[SHRINK]
    old, most, whole = s[DECAY1] * scales[at], splat(_0), n - n % LANES
    for j in range(_ZERO, whole, LANES):
        most = top(most, magnitude(_blended(o + j, x, xo + j, sign, codes, old, gain, LANES)))
    if whole < n:
        most = top(most, magnitude(_blended(o + whole, x, xo + whole, sign, codes, old, gain, n - whole)))
    scale = largest(most) / np.float32(127.0)
    scales[at] = scale
    inverse = _1 / scale if scale > np.float32(1e-37) else _0
    for j in range(_ZERO, whole, LANES):
        _coded(p, o + j, x, xo + j, sign, f, fo + j, codes, old, gain, ahead, unit, shrink, inverse, LANES)
    if whole < n:
        j, left = whole, n - whole
        _coded(p, o + j, x, xo + j, sign, f, fo + j, codes, old, gain, ahead, unit, shrink, inverse, left)


@_part
def _apply(p, o, n, x, xo, sign, f, fo, kind, dense, codes, scales, at, block, s):
    """Write the first moment of ``n`` adjacent numbers, from offset ``o``, and update the parameter.

    The first moment averages ``x`` (from ``xo`` on, times ``sign``). ``f`` (from ``fo`` on) multiplies the numerator.
    ``at`` is the place of the first block's scale.
    """
    shrink, unit, whole = s[SHRINK], s[UNIT], n - n % LANES
    if kind == NONE:
        for j in range(_ZERO, whole, LANES):
            _plain(p, o + j, x, xo + j, sign, f, fo + j, unit, shrink, LANES)
        if whole < n:
            _plain(p, o + whole, x, xo + whole, sign, f, fo + whole, unit, shrink, n - whole)
    elif kind == DENSE:
        decay, gain, ahead = s[DECAY1], s[GAIN1], s[LOOKAHEAD]
        for j in range(_ZERO, whole, LANES):
            _averaged(p, o + j, x, xo + j, sign, f, fo + j, dense, decay, gain, ahead, unit, shrink, LANES)
        if whole < n:
            j, left = whole, n - whole
            _averaged(p, o + j, x, xo + j, sign, f, fo + j, dense, decay, gain, ahead, unit, shrink, left)
    elif block == U(128) and n % block == 0:  # loops over a block of known length are unrolled
        for j in range(_ZERO, n, U(128)):
            _block(p, o + j, x, xo + j, sign, f, fo + j, codes, scales, at, U(128), s)
            at += _ONE
    else:
        for j in range(_ZERO, n, block):
            _block(p, o + j, x, xo + j, sign, f, fo + j, codes, scales, at, min(block, n - j), s)
            at += _ONE


@_body
def _updated(o, x, xo, sign, f, fo, kind, dense, codes, old, s, n):
    """The update that `_measure` squares."""
    y = sign * load(x, xo, n)
    u = y
    if kind == DENSE:
        u = s[DECAY1] * load(dense, o, n) + s[GAIN1] * y
    elif kind == INT8:
        u = s[DECAY1] * old * load(codes, o, n) + s[GAIN1] * y
    return _numerator(y, u, s[LOOKAHEAD], s[UNIT]) * load(f, fo, n)


@_body
def _block_squares(o, n, x, xo, sign, f, fo, kind, dense, codes, old, s, scale):
    """Sum of squares of ``scale`` times the update of the ``n`` numbers of one block."""
    part, whole = splat(_0), n - n % LANES
    for j in range(_ZERO, whole, LANES):
        u = scale * _updated(o + j, x, xo + j, sign, f, fo + j, kind, dense, codes, old, s, LANES)
        part = part + u * u
    if whole < n:
        j, left = whole, n - whole
        u = scale * _updated(o + j, x, xo + j, sign, f, fo + j, kind, dense, codes, old, s, left)
        part = part + u * u
    return np.float64(total(part))


@_part
def _measure(o, n, x, xo, sign, f, fo, kind, dense, codes, scales, at, block, s):
    """Sum of squares of the update of ``n`` adjacent numbers."""
    out = np.float64(0.0)
    for lo in range(_ZERO, n, block):
        old, length = scales[at] if kind == INT8 else _0, min(block, n - lo)
        square = _block_squares(o + lo, length, x, xo + lo, sign, f, fo + lo, kind, dense, codes, old, s, _1)
        if not _LEAST <= square <= _MOST:
            scale, back = (_RAISE, _LOWER) if square < _LEAST else (_DOWN, _UP)
            square = back * _block_squares(
                o + lo, length, x, xo + lo, sign, f, fo + lo, kind, dense, codes, old, s, scale
            )
        out += square
        at += _ONE
    return out


@_body
def _span_squares(x, o, n, scale):
    part, whole = splat(_0), n - n % LANES
    for j in range(_ZERO, whole, LANES):
        y = scale * load(x, o + j, LANES)
        part = part + y * y
    if whole < n:
        y = scale * load(x, o + whole, n - whole)
        part = part + y * y
    return np.float64(total(part))


@_part
def _square(x, o, n):
    """Sum of squares of ``n`` adjacent numbers."""
    out = np.float64(0.0)
    for lo in range(_ZERO, n, _SPAN):
        length = min(_SPAN, n - lo)
        square = _span_squares(x, o + lo, length, _1)
        if not _LEAST <= square <= _MOST:
            scale, back = (_RAISE, _LOWER) if square < _LEAST else (_DOWN, _UP)
            square = back * _span_squares(x, o + lo, length, scale)
        out += square
    return out


@_body
def _preconditioned_body(g, o, sign, x, xo, f, fo, n):
    store(x, xo, sign * load(g, o, n) * load(f, fo, n), n)


@_part
def _span(p, o, n, g, x, f, fo, ones, kind, dense, codes, scales, at, block, s, now, after):
    """Measure or apply ``n`` adjacent numbers with the factors ``f``, from ``fo`` on.

    With ``after``, the first moment averages their preconditioned gradient, for which ``x`` has room.
    """
    if after:
        whole = n - n % LANES
        for j in range(_ZERO, whole, LANES):
            _preconditioned_body(g, o + j, s[SIGN], x, j, f, fo + j, LANES)
        if whole < n:
            _preconditioned_body(g, o + whole, s[SIGN], x, whole, f, fo + whole, n - whole)
        if now & MEASURE:
            return _square(x, _ZERO, n)
        _apply(p, o, n, x, _ZERO, _1, ones, _ZERO, kind, dense, codes, scales, at, block, s)
        return np.float64(0.0)
    if now & MEASURE:
        return _measure(o, n, g, o, s[SIGN], f, fo, kind, dense, codes, scales, at, block, s)
    _apply(p, o, n, g, o, s[SIGN], f, fo, kind, dense, codes, scales, at, block, s)
    return np.float64(0.0)


@_part
def _turns(phase):
    """(Sweeps, looks at each unit in a sweep): to measure and apply takes two looks, in two sweeps or in one (ONCE)."""
    both = phase & MEASURE and phase & APPLY
    once = phase & ONCE
    return (_TWO if both and not once else _ONE), (_TWO if both and once else _ONE)


@_part
def _now(phase, turn):
    """What this turn (a sweep or a look) does."""
    if phase & MEASURE and phase & APPLY:
        return MEASURE if turn == _ZERO else FOLD | APPLY
    return phase


@_part
def _measured(row, task, matrix, squares, norms):
    """RMS of the update and of the parameter: of the whole, or of one of the matrices that are measured one by one.

    The order of the sums does not depend on who measured.
    """
    units = task[UNITS] // task[APART]
    first = task[BASE] + matrix * units
    square, norm, n = np.float64(0.0), np.float64(0.0), np.float64(task[SIZE] // task[APART])
    for i in range(first, first + units):
        square += squares[i]
        norm += norms[i]
    return np.sqrt(square / n) * row[CORRECTION], np.sqrt(norm / n)


@_part
def _settle(row, task, rms, size):
    """Change numbers of a task according to both RMS."""
    if row[RELATIVE] != _0:
        bounded = 1e-3 if size < 1e-3 else size  # this comparison keeps NaN
        row[STEP] *= np.float32(row[RELATIVE] if bounded > row[RELATIVE] else bounded)
    if row[CLIP] != _0:
        excess = rms / row[CLIP]
        divisor = np.float32(1.0) if excess < 1.0 else np.float32(excess)
        if task[AFTER]:
            row[INNER] /= divisor
        else:
            row[STEP] /= divisor


@_part
def _settled(row, task, matrix, squares, norms):
    """Change numbers of a task according to what the units have measured."""
    rms, size = _measured(row, task, matrix, squares, norms)
    _settle(row, task, rms, size)


# -- count-min sketches -----------------------------------------------------------------------------------------------


@_body
def _fold_body(g, o, f, j, begins, n):
    y = load(g, o, n)
    square = y * y
    store(f, j, square if begins else load(f, j, n) + square, n)


@_body
def _table_body(table, o, f, j, decay, gain, n):
    store(table, o, decay * load(table, o, n) + gain * load(f, j, n), n)


@_body
def _bucket_body(table, o, f, j, part, most, s, n):
    """Squares of a bucket's updates, as its squares over one denominator. The gradient is not read a second time."""
    u = _factor(load(table, o, n), s, _1)
    return part + load(f, j, n) * u * u, top(most, u)


@_part
def _write_table(first, height, rows, width, columns, table, f, s, before):
    """Add the sums of a band's squares, ``f``, to the table."""
    for b in range(height):
        load_ = (rows - first - b + width - _ONE) // width
        gain = s[GAIN2] if s[MEAN] == _0 else s[GAIN2] / np.float32(load_)
        o, q, whole = (before + first + b) * columns, b * columns, columns - columns % LANES
        for j in range(_ZERO, whole, LANES):
            _table_body(table, o + j, f, q + j, s[DECAY2], gain, LANES)
        if whole < columns:
            _table_body(table, o + whole, f, q + whole, s[DECAY2], gain, columns - whole)


@_part
def _fold(g, first, height, rows, width, columns, table, f, p, norm, s, above, before):
    """Add the squares of a band's members to the table and to ``f``; return the parameter's sum of squares if ``norm``.

    ``rows`` and ``width`` are those of one matrix. ``above`` and ``before`` are the numbers of rows and of buckets of
    the matrices before it.
    """
    out = np.float64(0.0)
    for i in range(first, rows, width):
        o, n = (above + i) * columns, min(height, rows - i) * columns
        for lo in range(_ZERO, n, _SPAN):
            length, part = min(_SPAN, n - lo), splat(_0)
            whole = length - length % LANES
            for j in range(lo, lo + whole, LANES):
                _fold_body(g, o + j, f, j, i == first, LANES)
                if norm:
                    x = load(p, o + j, LANES)
                    part = part + x * x
            if whole < length:
                j, left = lo + whole, length - whole
                _fold_body(g, o + j, f, j, i == first, left)
                if norm:
                    x = load(p, o + j, left)
                    part = part + x * x
            if norm:
                square = np.float64(total(part))
                out += square if _LEAST <= square <= _MOST else _square(p, o + lo, length)
    _write_table(first, height, rows, width, columns, table, f, s, before)
    return out


@_part
def _factors(table, o, f, n, s, rate):
    whole = n - n % LANES
    for j in range(_ZERO, whole, LANES):
        store(f, j, _factor(load(table, o + j, LANES), s, rate), LANES)
    if whole < n:
        left = n - whole
        store(f, whole, _factor(load(table, o + whole, left), s, rate), left)


@_part
def _bucket_squares(table, o, f, n, s):
    """The sum of squares of a band's updates, from the squares of its gradients, and whether that sum can be used."""
    out, most = np.float64(0.0), splat(_0)
    for lo in range(_ZERO, n, _SPAN):
        length, part = min(_SPAN, n - lo), splat(_0)
        whole = length - length % LANES
        for j in range(lo, lo + whole, LANES):
            part, most = _bucket_body(table, o + j, f, j, part, most, s, LANES)
        if whole < length:
            j, left = lo + whole, length - whole
            part, most = _bucket_body(table, o + j, f, j, part, most, s, left)
        out += np.float64(total(part))
    return out, _ENOUGH <= out <= _MOST and largest(most) <= _1 / _PLAIN


@_body
def _added(f, j, square, begins, n):
    store(f, j, square if begins else load(f, j, n) + square, n)


@_body
def _one_row(g, o, f, weighted, j, weight, part, begins, weigh, n):
    y = load(g, o, n)
    square = y * y
    _added(f, j, square, begins, n)
    if weigh:
        _added(weighted, j, weight * square, begins, n)
    return part + square


@_body
def _four_rows(g, o, step, f, weighted, j, w1, w2, w3, w4, parts, begins, weigh, n):
    y1, y2, y3, y4 = load(g, o, n), load(g, o + step, n), load(g, o + U(2) * step, n), load(g, o + U(3) * step, n)
    y1, y2, y3, y4 = y1 * y1, y2 * y2, y3 * y3, y4 * y4
    _added(f, j, (y1 + y2) + (y3 + y4), begins, n)
    if weigh:
        _added(weighted, j, (w1 * y1 + w2 * y2) + (w3 * y3 + w4 * y4), begins, n)
    return parts[0] + y1, parts[1] + y2, parts[2] + y3, parts[3] + y4


@_body
def _whole(g, o, n, part):
    """A row's sum of squares, which may have to be summed again with scaled numbers."""
    square = np.float64(total(part))
    return square if _LEAST <= square <= _MOST else _square(g, o, n)


@_part
def _fold_scaled(
    g, first, height, rows, width, columns, table, f, p, norm, s, above, before, q, weighted, means, weigh
):
    """`_fold` for rows with factors of their own, ``q``.

    ``means`` (from ``above`` on) gets the means of the rows' squares, and ``weighted`` the sums of the squares times
    the squares of the factors, if ``weigh`` is set. Four rows are read together, so that both sums are loaded and
    stored less often.
    """
    out, step = np.float64(0.0), width * columns
    for r in range(height):
        members, c = (rows - first - r + width - _ONE) // width, r * columns
        k = _ZERO
        while k < members:
            row, at, many = above + first + r + k * width, k * height + r, k + U(4) <= members
            o, begins = row * columns, k == _ZERO
            sum1, sum2, sum3, sum4 = np.float64(0.0), np.float64(0.0), np.float64(0.0), np.float64(0.0)
            w1 = q[at] * q[at]
            if many:
                w2, w3, w4 = q[at + height], q[at + U(2) * height], q[at + U(3) * height]
                w2, w3, w4 = w2 * w2, w3 * w3, w4 * w4
                for lo in range(_ZERO, columns, _SPAN):
                    length, parts = min(_SPAN, columns - lo), (splat(_0), splat(_0), splat(_0), splat(_0))
                    whole = length - length % LANES
                    if weigh:
                        for j in range(lo, lo + whole, LANES):
                            parts = _four_rows(
                                g, o + j, step, f, weighted, c + j, w1, w2, w3, w4, parts, begins, True, LANES
                            )
                    else:
                        for j in range(lo, lo + whole, LANES):
                            parts = _four_rows(
                                g, o + j, step, f, weighted, c + j, w1, w2, w3, w4, parts, begins, False, LANES
                            )
                    if whole < length:
                        j, left = lo + whole, length - whole
                        parts = _four_rows(
                            g, o + j, step, f, weighted, c + j, w1, w2, w3, w4, parts, begins, weigh, left
                        )
                    sum1 += _whole(g, o + lo, length, parts[0])
                    sum2 += _whole(g, o + lo + step, length, parts[1])
                    sum3 += _whole(g, o + lo + U(2) * step, length, parts[2])
                    sum4 += _whole(g, o + lo + U(3) * step, length, parts[3])
                means[row + width] = np.float32(sum2 / np.float64(columns))
                means[row + U(2) * width] = np.float32(sum3 / np.float64(columns))
                means[row + U(3) * width] = np.float32(sum4 / np.float64(columns))
            else:
                for lo in range(_ZERO, columns, _SPAN):
                    length, part = min(_SPAN, columns - lo), splat(_0)
                    whole = length - length % LANES
                    for j in range(lo, lo + whole, LANES):
                        part = _one_row(g, o + j, f, weighted, c + j, w1, part, begins, weigh, LANES)
                    if whole < length:
                        j, left = lo + whole, length - whole
                        part = _one_row(g, o + j, f, weighted, c + j, w1, part, begins, weigh, left)
                    sum1 += _whole(g, o + lo, length, part)
            means[row] = np.float32(sum1 / np.float64(columns))
            if norm:
                for member in range(U(4) if many else _ONE):
                    out += _square(p, o + member * step, columns)
            k += U(4) if many else _ONE
    _write_table(first, height, rows, width, columns, table, f, s, before)
    return out


@_part
def _row_factors(means, q, first, height, rows, width, above):
    """What the steps of a band's rows are multiplied by: see `CountMin.step_factors`."""
    for b in range(height):
        sum_, load_ = _0, (rows - first - b + width - _ONE) // width
        for i in range(first + b, rows, width):
            sum_ += means[above + i]
        bucket, at = sum_ / np.float32(load_), b
        for i in range(first + b, rows, width):
            r = means[above + i]
            q[at] = np.sqrt(bucket / r) if r > bucket else _1
            at += height


@_body
def _scaled_body(f, j, scaled, q, n):
    store(scaled, j, q * load(f, j, n), n)


@_part
def _scaled(f, scaled, q, first, high, columns):
    """The factors of a run of rows, each multiplied by the row's own."""
    whole = columns - columns % LANES
    for r in range(high):
        own = splat(q[first + r])
        for j in range(r * columns, r * columns + whole, LANES):
            _scaled_body(f, j, scaled, own, LANES)
        if whole < columns:
            _scaled_body(f, r * columns + whole, scaled, q[first + r], columns - whole)


@_body
def _plain_scaled_body(p, o, g, sign, f, j, q, shrink, n):
    _update(p, o, sign * load(g, o, n) * (q * load(f, j, n)), shrink, n)


@_part
def _plain_scaled(p, g, o, f, q, first, high, columns, s):
    """Take the step of a run of rows without a first moment. ``o`` is the place of the first one."""
    whole, sign, shrink = columns - columns % LANES, s[SIGN], s[SHRINK]
    for r in range(high):
        own, begin = splat(q[first + r]), r * columns
        for j in range(begin, begin + whole, LANES):
            _plain_scaled_body(p, o + j, g, sign, f, j, own, shrink, LANES)
        if whole < columns:
            j, left = begin + whole, columns - whole
            _plain_scaled_body(p, o + j, g, sign, f, j, q[first + r], shrink, left)


@_compiled
def count_min(like_p, like_g, like_m, like_c, pieces, tasks, numbers, squares, norms, rows_, maxima, buffer):
    """Take the steps of count-min sketches of depth 1 with a strided hash. A unit is a band of adjacent buckets.

    Adjacent buckets have adjacent members, so memory is read in long runs. A band is so small that its gradient is
    still in the cache when its squares have been summed and its members take their step.
    """
    like_f, like_i = np.empty(0, np.float32), np.empty(0, np.int8)
    f = at_address(like_f, U(buffer.ctypes.data))
    for k in range(len(pieces)):
        t, begin, end, phase = pieces[k, TASK], pieces[k, BEGIN], pieces[k, END], pieces[k, PHASE]
        task, own = tasks[t], pieces[k, ROW]
        low, high = _key(task[SEED], numbers[own, NUMBER])
        p = weights(like_p, like_c, task[P], task[CODES], low, high)
        g, dense = at_address(like_g, task[G]), at_address(like_m, task[TABLE1])
        codes, scales = at_address(like_i, task[TABLE1]), at_address(like_f, task[SCALES])
        table = at_address(like_f, task[TABLE2])
        columns, kind, block, width, band = task[COLUMNS], task[KIND], task[BLOCK], task[WIDTH], task[BAND]
        after, wide = task[AFTER], max(block, _SPAN // block * block)
        behind = U(buffer.ctypes.data) + U(4) * band * columns
        means, scaled, own_f, q = at_address(like_f, task[COLUMN]), task[COLUMN] != _ZERO, f, f
        if scaled:
            own_f = at_address(like_f, behind)
            q = at_address(like_f, behind + U(4) * band * columns)
            behind += U(4) * (
                band * columns + band * ((task[SIZE] // columns // task[MATRICES] + width - _ONE) // width)
            )
        x, ones = at_address(like_f, behind), at_address(like_f, behind + U(4) * wide)
        # Rows, buckets and bands of one matrix.
        rows, blocks = task[SIZE] // columns // task[MATRICES], (columns + block - _ONE) // block
        bands = (width + band - _ONE) // band
        # If blocks end with a row, one run covers all rows; otherwise each row is a run.
        even = kind != INT8 or columns % block == 0
        s = _numbers(numbers[own])
        norm = s[RELATIVE] != _0 or task[LAST] != _ZERO
        sweeps, _ = _turns(phase)
        for sweep in range(sweeps):
            now = phase
            if sweeps == _TWO:
                now = (FOLD | MEASURE) if sweep == _ZERO else APPLY
            if sweep == _ONE:
                _settled(numbers[own], task, begin // (task[UNITS] // task[APART]), squares, norms)
                s = _numbers(numbers[own])
            if after:
                for j in range(wide):
                    ones[j] = s[STEP]
            for one in range(begin, end):
                # The second sweep goes in reverse, because the last units are still in the cache.
                unit = one if now & FOLD else begin + (end - _ONE - one)
                matrix = unit // bands
                first, above, before = (unit - matrix * bands) * band, matrix * rows, matrix * width
                height = min(band, width - first)
                o, n = (before + first) * columns, height * columns
                square, measured = np.float64(0.0), False
                if scaled:
                    _row_factors(means, q, first, height, rows, width, above)
                if now & FOLD:
                    if scaled:
                        new, weigh = rows_[task[NEW] :], (now & MEASURE) != _ZERO and (kind == NONE or after != _ZERO)
                        norms_ = _fold_scaled(
                            g, first, height, rows, width, columns, table, f, p, norm, s, above, before, q, own_f, new,
                            weigh,
                        )  # fmt: skip
                    else:
                        norms_ = _fold(g, first, height, rows, width, columns, table, f, p, norm, s, above, before)
                    if now & MEASURE:
                        norms[task[BASE] + unit] = norms_
                        if kind == NONE or after:
                            square, measured = _bucket_squares(table, o, own_f, n, s)
                            if not measured:
                                square = np.float64(0.0)
                members = (rows - first + width - _ONE) // width
                for look in (MEASURE, APPLY):  # with ONCE both, while the band is in the cache
                    if not now & look or (look == MEASURE and measured):
                        continue
                    rate = _1 if look == MEASURE else s[INNER] if after else s[STEP]
                    _factors(table, (before + first) * columns, f, n, s, rate)
                    # The second sweep goes in reverse here, too. After a fold of the same band the order stays.
                    back = now == APPLY
                    for one_ in range(members):
                        member = members - _ONE - one_ if back else one_
                        i = first + member * width
                        high = min(height, rows - i)
                        if scaled:
                            if kind == NONE and look == APPLY and not after:
                                _plain_scaled(p, g, (above + i) * columns, f, q, member * height, high, columns, s)
                                continue
                            _scaled(f, own_f, q, member * height, high, columns)
                        runs, length = (_ONE, high * columns) if even else (high, columns)
                        for r in range(runs):
                            for lo in range(_ZERO, length, wide if after else length):
                                row = above + i + r
                                o, fo, at = row * columns + lo, r * columns + lo, row * blocks + lo // block
                                part = min(wide, length - lo) if after else length
                                square += _span(
                                    p,
                                    o,
                                    part,
                                    g,
                                    x,
                                    own_f,
                                    fo,
                                    ones,
                                    kind,
                                    dense,
                                    codes,
                                    scales,
                                    at,
                                    block,
                                    s,
                                    look,
                                    after,
                                )
                if now & MEASURE:
                    squares[task[BASE] + unit] = square
                if scaled and now & APPLY:  # the last time that the old means are needed
                    for i in range(first, rows, width):
                        for r in range(above + i, above + min(i + height, rows)):
                            means[r] = s[DECAY2] * means[r] + s[GAIN2] * rows_[task[NEW] + r]
    return 0


# -- exact second moments, and none -----------------------------------------------------------------------------------


@_body
def _second_body(g, o, second, written, f, j, decay, gain, s, rate, n):
    y = load(g, o, n)
    v = decay * load(second, o, n) + gain * (y * y)
    if written:
        store(second, o, v, n)
    store(f, j, _factor(v, s, rate), n)


@_compiled
def exact(like_p, like_g, like_m, like_c, pieces, tasks, numbers, squares, norms, rows_, maxima, buffer):
    """Take the steps of exact second moments, or of none. A unit is ``COLUMNS`` numbers; the last one is shorter.

    So is the last one of each matrix, if matrices are measured one by one.
    """
    like_f, like_i = np.empty(0, np.float32), np.empty(0, np.int8)
    room, start = U(len(buffer)) // U(3), U(buffer.ctypes.data)
    f, x = at_address(like_f, start), at_address(like_f, start + U(4) * room)
    ones = at_address(like_f, start + U(8) * room)
    for k in range(len(pieces)):
        t, begin, end, phase = pieces[k, TASK], pieces[k, BEGIN], pieces[k, END], pieces[k, PHASE]
        task, own = tasks[t], pieces[k, ROW]
        low, high = _key(task[SEED], numbers[own, NUMBER])
        p = weights(like_p, like_c, task[P], task[CODES], low, high)
        g, dense = at_address(like_g, task[G]), at_address(like_m, task[TABLE1])
        codes, scales = at_address(like_i, task[TABLE1]), at_address(like_f, task[SCALES])
        second = at_address(like_f, task[TABLE2])
        columns, kind, block, after = task[COLUMNS], task[KIND], task[BLOCK], task[AFTER]
        blocks = (columns + block - _ONE) // block
        wide = max(block, _SPAN // block * block)
        # Numbers and units of one matrix, and what lies before the piece's matrix: numbers, units and blocks.
        size, units = task[SIZE] // task[APART], task[UNITS] // task[APART]
        matrix = begin // units
        above, before = matrix * size, matrix * units
        below = matrix * (size // columns * blocks + (size % columns + block - _ONE) // block)
        sweeps, looks = _turns(phase)
        for sweep in range(sweeps):
            if sweep == _ONE:
                _settled(numbers[own], task, matrix, squares, norms)
            s = _numbers(numbers[own])
            norm = s[RELATIVE] != _0 or task[LAST] != _ZERO
            for j in range(room):
                ones[j] = s[STEP]
            for i in range(begin, end):
                offset, stop = (i - before) * columns, min(columns, size - (i - before) * columns)
                for look in range(looks):
                    now, square = _now(phase, sweep + look), np.float64(0.0)
                    rate = _1 if now & MEASURE else s[INNER] if after else s[STEP]
                    if i == begin or (looks == _TWO and not task[TABLE2]):
                        for j in range(wide):
                            f[j] = rate
                    for lo in range(_ZERO, stop, wide):
                        o, n = above + offset + lo, min(wide, stop - lo)
                        at = below + (i - before) * blocks + lo // block
                        if task[TABLE2]:
                            whole, fold = n - n % LANES, (now & FOLD) != _ZERO
                            for j in range(_ZERO, whole, LANES):
                                _second_body(g, o + j, second, fold, f, j, s[DECAY2], s[GAIN2], s, rate, LANES)
                            if whole < n:
                                j, left = whole, n - whole
                                _second_body(g, o + j, second, fold, f, j, s[DECAY2], s[GAIN2], s, rate, left)
                        square += _span(
                            p, o, n, g, x, f, _ZERO, ones, kind, dense, codes, scales, at, block, s, now, after
                        )
                    if now & MEASURE:
                        squares[task[BASE] + i] = square
                        norms[task[BASE] + i] = _square(p, above + offset, stop) if norm else np.float64(0.0)
    return 0


# -- covers -----------------------------------------------------------------------------------------------------------


@_body
def _estimate(g, o, old, column, c, decay, gain, n):
    y = load(g, o, n)
    return y, decay * least(old, load(column, c, n)) + gain * (y * y)


@_body
def _cover_body(g, o, old, column, tops, c, f, j, most, s, rate, fold, n):
    """Factors of a few columns. Returns the maximum so far."""
    _, nu = _estimate(g, o, old, column, c, s[DECAY2], s[GAIN2], n)
    store(f, j, _factor(nu, s, rate), n)
    if fold:
        store(tops, c, top(load(tops, c, n), nu), n)
        return top(most, nu)
    return most


@_body
def _cover_ahead(g, o, old, column, tops, c, x, j, most, s, rate, n):
    """`_cover_body` that stores the preconditioned gradient in place of the factors."""
    y, nu = _estimate(g, o, old, column, c, s[DECAY2], s[GAIN2], n)
    store(x, j, s[SIGN] * y * _factor(nu, s, rate), n)
    store(tops, c, top(load(tops, c, n), nu), n)
    return top(most, nu)


@_body
def _cover_step(p, g, o, old, column, tops, c, most, s, n):
    """`_cover_body` that takes the step itself, if there is no first moment."""
    y, nu = _estimate(g, o, old, column, c, s[DECAY2], s[GAIN2], n)
    store(tops, c, top(load(tops, c, n), nu), n)
    _update(p, o, s[SIGN] * y * _factor(nu, s, s[STEP]), s[SHRINK], n)
    return top(most, nu)


@_body
def _columns_of(like_f, task, row):
    """The covers of the columns of the matrix that a row belongs to. Those of the matrices follow each other."""
    matrix = row // (task[UNITS] // task[APART])
    return at_address(like_f, task[COLUMN] + U(4) * matrix * task[COLUMNS])


@_compiled
def cover(like_p, like_g, like_m, like_c, pieces, tasks, numbers, squares, norms, rows_, maxima, buffer):
    """Take the steps of matrices with SM3-II's covers. A unit is a row.

    Each piece collects the maxima of its columns in a row of ``maxima``, and ``rows_`` gets the new covers of the rows.
    `finish` copies both into the state, because the old covers are read until then.
    """
    like_f, like_i = np.empty(0, np.float32), np.empty(0, np.int8)
    room, start = U(len(buffer)) // U(3), U(buffer.ctypes.data)
    f, x = at_address(like_f, start), at_address(like_f, start + U(4) * room)
    ones = at_address(like_f, start + U(8) * room)
    for k in range(len(pieces)):
        t, begin, end, phase = pieces[k, TASK], pieces[k, BEGIN], pieces[k, END], pieces[k, PHASE]
        task, own = tasks[t], pieces[k, ROW]
        low, high = _key(task[SEED], numbers[own, NUMBER])
        p = weights(like_p, like_c, task[P], task[CODES], low, high)
        g, dense = at_address(like_g, task[G]), at_address(like_m, task[TABLE1])
        codes, scales = at_address(like_i, task[TABLE1]), at_address(like_f, task[SCALES])
        columns, kind, block, after = task[COLUMNS], task[KIND], task[BLOCK], task[AFTER]
        row, column = at_address(like_f, task[TABLE2]), _columns_of(like_f, task, begin)
        blocks = (columns + block - _ONE) // block
        wide = max(block, _SPAN // block * block)
        tops = maxima[pieces[k, MAXIMA] : pieces[k, MAXIMA] + columns]
        sweeps, looks = _turns(phase)
        for sweep in range(sweeps):
            if sweep == _ONE:
                _settled(numbers[own], task, begin // (task[UNITS] // task[APART]), squares, norms)
            s = _numbers(numbers[own])
            norm = s[RELATIVE] != _0 or task[LAST] != _ZERO
            if _now(phase, sweep + looks - _ONE) & FOLD:
                for j in range(columns):
                    tops[j] = _0
            for j in range(room):
                ones[j] = s[STEP]
            for i in range(begin, end):
                for look in range(looks):
                    now, square = _now(phase, sweep + look), np.float64(0.0)
                    rate = _1 if now & MEASURE else s[INNER] if after else s[STEP]
                    old, most = splat(row[i]), splat(_0)
                    if kind == NONE and now & APPLY:
                        whole = columns - columns % LANES
                        for j in range(_ZERO, whole, LANES):
                            most = _cover_step(p, g, i * columns + j, old, column, tops, j, most, s, LANES)
                        if whole < columns:
                            j, left = whole, columns - whole
                            most = _cover_step(p, g, i * columns + j, old, column, tops, j, most, s, left)
                    elif kind == INT8 and after and now & APPLY:
                        at = i * blocks
                        for lo in range(_ZERO, columns, block):
                            o, n = i * columns + lo, min(block, columns - lo)
                            whole = n - n % LANES
                            for j in range(_ZERO, whole, LANES):
                                most = _cover_ahead(g, o + j, old, column, tops, lo + j, x, j, most, s, rate, LANES)
                            if whole < n:
                                j, left = whole, n - whole
                                most = _cover_ahead(g, o + j, old, column, tops, lo + j, x, j, most, s, rate, left)
                            if n == U(128):
                                _block(p, o, x, _ZERO, _1, ones, _ZERO, codes, scales, at, U(128), s)
                            else:
                                _block(p, o, x, _ZERO, _1, ones, _ZERO, codes, scales, at, n, s)
                            at += _ONE
                    else:
                        fold = (now & FOLD) != _ZERO
                        for lo in range(_ZERO, columns, wide):
                            o, n, at = i * columns + lo, min(wide, columns - lo), i * blocks + lo // block
                            whole = n - n % LANES
                            for j in range(_ZERO, whole, LANES):
                                most = _cover_body(
                                    g, o + j, old, column, tops, lo + j, f, j, most, s, rate, fold, LANES
                                )
                            if whole < n:
                                j, left = whole, n - whole
                                most = _cover_body(g, o + j, old, column, tops, lo + j, f, j, most, s, rate, fold, left)
                            square += _span(
                                p, o, n, g, x, f, _ZERO, ones, kind, dense, codes, scales, at, block, s, now, after
                            )
                    if now & FOLD:
                        rows_[task[NEW] + i] = largest(most)
                    if now & MEASURE:
                        squares[task[BASE] + i] = square
                        norms[task[BASE] + i] = _square(p, i * columns, columns) if norm else np.float64(0.0)
    return 0


@_compiled
def settle(tasks, numbers, chosen, squares, norms):
    """Change numbers according to what several pieces have measured.

    A row of ``chosen`` is a task, one of the matrices that are measured one by one, and the place of its numbers.
    """
    for k in range(len(chosen)):
        _settled(numbers[chosen[k, 2]], tasks[chosen[k, 0]], chosen[k, 1], squares, norms)
    return 0


@_compiled
def recall(tasks, numbers, chosen):
    """Change the numbers of ``chosen`` (see `settle`) according to what the last step measured."""
    like_f = np.empty(0, np.float32)
    for k in range(len(chosen)):
        task, place = tasks[chosen[k, 0]], _TWO * chosen[k, 1]
        last = at_address(like_f, task[LAST])
        _settle(numbers[chosen[k, 2]], task, np.float64(last[place]), np.float64(last[place + _ONE]))
    return 0


@_compiled
def record(tasks, numbers, chosen, squares, norms):
    """Store what this step has measured of ``chosen`` (see `settle`), for the next step."""
    like_f = np.empty(0, np.float32)
    for k in range(len(chosen)):
        task, place = tasks[chosen[k, 0]], _TWO * chosen[k, 1]
        last = at_address(like_f, task[LAST])
        rms, size = _measured(numbers[chosen[k, 2]], task, chosen[k, 1], squares, norms)
        last[place] = np.float32(rms)
        last[place + _ONE] = np.float32(size)
    return 0


@_compiled
def finish(tasks, pieces, rows_, maxima):
    """Replace the old covers by the new ones. A column's cover is the maximum of all pieces of its matrix.

    The pieces of a matrix follow each other, and have the same numbers.
    """
    like_f = np.empty(0, np.float32)
    for k in range(len(pieces)):
        task = tasks[pieces[k, TASK]]
        columns, row = task[COLUMNS], at_address(like_f, task[TABLE2])
        column = _columns_of(like_f, task, pieces[k, BEGIN])
        for i in range(pieces[k, BEGIN], pieces[k, END]):
            row[i] = rows_[task[NEW] + i]
        o, another = pieces[k, MAXIMA], k > 0 and pieces[k, ROW] == pieces[k - 1, ROW]
        whole = columns - columns % LANES
        for j in range(_ZERO, whole, LANES):
            new = load(maxima, o + j, LANES)
            store(column, j, top(load(column, j, LANES), new) if another else new, LANES)
        if whole < columns:
            new = load(maxima, o + whole, columns - whole)
            store(column, whole, top(load(column, whole, columns - whole), new) if another else new, columns - whole)
    return 0

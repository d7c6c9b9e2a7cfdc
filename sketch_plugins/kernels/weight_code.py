r"""Weights with more bits than their parameter's dtype has: the stored weight and a correction.

Let b be the bits of a stored weight without its sign: an integer that grows with the magnitude, by 1 from one
representable number to the next. The correction is an integer c in :math:`[-2^{F-1}, 2^{F-1})`, with F = 8 or 16
fractional bits. The pair (b, c) stands for the integer :math:`h = 2^F b + c`, and h for a number of the same format
with F more bits of the significand. So c counts fractions of the distance to the next representable number *on the side
that the number lies on*. This also holds at a power of two, below which numbers are twice as dense as above.

=========================  =======================================  ================================================
parameter                  F = 8 (24 bits)                          F = 16 (32 bits)
=========================  =======================================  ================================================
bfloat16, any finite x     1 + 8 + 15 bits; error below 2**-15 of   float32 itself: no error
                           x (stochastic) or 2**-16 (nearest)
float16, abs(x) >= 2**-14  1 + 5 + 18 bits; error below 2**-18      no error
float16, abs(x) < 2**-14   a multiple of 2**-32                     a multiple of 2**-40, to nearest
=========================  =======================================  ================================================

The subnormal numbers of float32 are those of bfloat16 with more bits, and the error is below 2**-141 (F = 8,
stochastic). With F = 8 a number between two codes is rounded up with a probability equal to its distance from the lower
one, so that the expected value is the number itself. The noise is a function of (seed, step, number of the element in
the local part), see `round_to_bf16`. So shards of other sizes are rounded with other noise, and all parameters use the
same noise.

The stored weight is the representable number nearest to the one that h stands for; half-way is rounded away from zero.
The sign is the stored weight's, also at zero. A number that rounds to infinity becomes one, as without a correction.
Any other number becomes at most the last code before infinity, even if 24 bits would round it further. Infinity and NaN
have the correction 0, and decoding does not read their correction. Only a stored NaN decodes to NaN: if other code has
changed a weight and c would lead below zero, the result is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.hashing import mix32, random32
from sketch_plugins.kernels.rounding import ACCELERATOR_NOISE, CPU_NOISE
from sketch_plugins.sharding.blocks import At, Matrix, Rows

#: ``weight_bits`` -> dtype of the correction.
CODES = {24: torch.int8, 32: torch.int16}
#: Dtypes of parameters that may have a correction.
HALF = (torch.bfloat16, torch.float16)

_ABS = 0x7FFFFFFF
# For float16: the float32 bits of 2**-14 (smaller numbers are subnormal) and of 2**16 (where it is infinite), and the
# difference between the bits of a float32 and the shifted bits of the same float16.
_LEAST, _ABOVE, _SHIFT = 0x38800000, 0x47800000, 0x38000000
# From this number on (half-way between the largest number and the next) the nearest number of the dtype is infinite.
_TIE = {torch.bfloat16: 0x7F7F8000, torch.float16: 0x477FF000}
# The bits of infinity.
_TOP = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
# The fingerprint of weights of which none was taken.
UNKNOWN = 0
_KNOWN = 1 << 62
_STREAM = 0x2545F491


def decode(weight: Tensor, code: Tensor, out: Tensor | None = None) -> Tensor:
    """The float32 numbers that weights (bfloat16 or float16) and their corrections stand for, written to ``out``."""
    fraction = 8 * code.element_size()
    stored = weight.contiguous().view(torch.int16).to(torch.int32)
    h = (stored & 0x7FFF).mul_(1 << fraction).add_(code).clamp_(min=0)
    if weight.dtype == torch.bfloat16:
        value = h.mul_(1 << (16 - fraction)).view(torch.float32)
    else:
        normal = (h << 5 if fraction == 8 else h >> 3).add_(_SHIFT).view(torch.float32)
        value = torch.where(h >> (10 + fraction) > 0, normal, h.to(torch.float32) * 2.0 ** -(24 + fraction))
    value = torch.where(stored < 0, -value, value)
    value = torch.where(weight.isfinite(), value, weight.to(torch.float32))
    return value if out is None else out.copy_(value)


def encode(x: Tensor, dtype: torch.dtype, bits: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(weight, code)`` of float32 numbers, for a parameter of ``dtype`` with ``bits`` (24 or 32) for each weight.

    Args:
        x: the numbers.
        dtype: bfloat16 or float16.
        bits: see `CODES`.
        noise: random integers (int32, 0 to 255) that decide how 24 bits are rounded. None rounds to nearest, half-way
            away from zero.
    """
    fraction, magnitude = 8 if bits == 24 else 16, x.contiguous().view(torch.int32) & _ABS
    finite = magnitude < _TIE[dtype]
    add: Tensor | int = 0
    if dtype == torch.bfloat16:
        if fraction == 8:
            add = 128 if noise is None else noise
        h = (magnitude + add) >> (16 - fraction)
    else:
        scaled = x.abs().mul_(2.0 ** (37 if fraction == 8 else 40)).clamp_(max=2.0**26)
        # From 2**23 on all float32 numbers are integers, and adding 0.5 would round to the next one.
        low = torch.where(scaled < 2.0**23, scaled + 0.5, scaled).to(torch.int32)
        high = magnitude.clamp(max=_ABOVE) - _SHIFT
        if fraction == 8:
            add = 16 if noise is None else noise >> 3
            low, high = (low + add) >> 5, (high + add) >> 5
        else:
            high = high << 3
        h = torch.where(magnitude < _LEAST, low, high)
    # A number that is nearer to the largest finite one must not be rounded to infinity.
    h = h.clamp(max=(_TOP[dtype] << fraction) - (1 << (fraction - 1)) - 1)
    stored = (h + (1 << (fraction - 1))) >> fraction
    code = h - (stored << fraction)
    signed = torch.where(x.signbit(), stored - 0x8000, stored).to(torch.int16).view(dtype)
    return torch.where(finite, signed, x.to(dtype)), code.masked_fill_(~finite, 0).to(CODES[bits])


def decoded(weight: Tensor, code: Tensor) -> Tensor:
    """`decode` of a whole parameter. Its temporaries have the size of a block."""
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    _blocks(CPU_NOISE if weight.device.type == "cpu" else ACCELERATOR_NOISE, (weight, code, out), decode)
    return out


def write_nearest(x: Tensor, weight: Tensor, code: Tensor) -> None:
    """Write float32 numbers as weights and corrections of the same shape, rounded to nearest, block by block."""

    def write(x: Tensor, weight: Tensor, code: Tensor) -> None:
        stored, own = encode(x, weight.dtype, 24 if code.dtype == torch.int8 else 32)
        weight.copy_(stored)
        code.copy_(own)

    _blocks(CPU_NOISE if x.device.type == "cpu" else ACCELERATOR_NOISE, (x, weight, code), write)


class Corrected(Matrix):
    """A parameter with corrections as a matrix of float32 numbers, which are written as weights and corrections.

    Args:
        matrix: the parameter.
        codes: its corrections, ``(R, D)``.
        seed: seed of the noise that rounds to 24 bits.
        step: number of the step, which the noise depends on, too.
    """

    def __init__(self, matrix: Matrix, codes: Tensor, seed: int, step: int) -> None:
        super().__init__(matrix.tensor, matrix.batch)
        self.codes, self.seed, self.step = codes, seed, step
        self.stored, self.dtype = self.dtype, torch.float32

    def views(self, at: At) -> bool:
        """False: `get` returns copies."""
        return False

    def get(self, at: At) -> Tensor:
        """The numbers of a tile or of rows, valid until the next call."""
        weight, code = super().get(at), at.get(self.codes)
        out = scratch.empty("corrected", weight.shape, torch.float32, weight.device)
        _blocks(self._limit, (weight, code, out), decode)
        return out

    def put(self, at: At, value: Tensor) -> None:
        """Write float32 numbers, shaped like ``get(at)``. ``value`` is rounded in place to what the weights hold."""
        bits = 24 if self.codes.dtype == torch.int8 else 32
        code = at.get(self.codes)
        # The sum of both is the number of each element. Expanded, they take no memory.
        rows = at.from_rows(at.index(value.device).unsqueeze(-1) * self.shape[1]).expand(value.shape)
        columns = torch.arange(at.lo, at.hi, device=value.device).expand(value.shape)

        def write(x: Tensor, c: Tensor, row: Tensor, column: Tensor) -> None:
            noise = None
            if bits == 24:
                noise = (random32(row + column, self.seed, self.step) & 0xFF).to(torch.int32)
            weight, own = encode(x, self.stored, bits, noise)
            x.copy_(weight)
            c.copy_(own)

        _blocks(self._limit, (value, code, rows, columns), write)
        super().put(at, value)
        if isinstance(at, Rows):
            at.put(self.codes, code)

    @property
    def _limit(self) -> int:
        return CPU_NOISE if self.device.type == "cpu" else ACCELERATOR_NOISE


def _blocks(limit: int, tensors: tuple[Tensor, ...], do: Callable[..., Any], dim: int = 0) -> None:
    """Call ``do`` with parts of tensors of one shape, each of at most ``limit`` elements."""
    first = tensors[0]
    if first.numel() <= limit or dim == first.ndim:
        do(*tensors)
        return
    size = first.shape[dim]
    each = max(1, limit // (first.numel() // size))
    for start in range(0, size, each):
        n = min(each, size - start)
        _blocks(limit, tuple(t.narrow(dim, start, n) for t in tensors), do, dim + 1)


def fingerprint(weight: Tensor) -> int:
    """A hash of weights (bfloat16 or float16, any layout) that recognises them. It is never `UNKNOWN`.

    Different weights have the same fingerprint with a probability of 2**-32.
    """
    limit = CPU_NOISE if weight.device.type == "cpu" else ACCELERATOR_NOISE
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    first = 0
    flat = weight.detach().reshape(-1) if weight.is_contiguous() or weight.numel() <= limit else None
    for part in flat.split(limit) if flat is not None else weight.detach().unbind():
        part = part.reshape(-1)
        for block in part.split(limit):
            number = torch.arange(first, first + len(block), device=weight.device)
            bits = block.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF
            total += mix32(number.mul_(1 << 16).add_(bits), _STREAM).sum()
            first += len(block)
    return int(total) & (_KNOWN - 1) | _KNOWN

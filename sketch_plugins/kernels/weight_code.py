r"""Weights of more bits than their parameter has: the stored weight and a correction of it.

Let b be the bits of a stored weight without its sign: an integer that grows with the magnitude, by 1 from one
representable number to the next. With F fractional bits (8 or 16) the pair (b, c), with c an integer in
:math:`[-2^{F-1}, 2^{F-1})`, stands for the integer :math:`h = 2^F b + c`, and h for a number by the same rule with F
more bits of the significand. So c counts fractions of the distance to the next representable number *on the side that
the number lies on*: at a power of two, where numbers below are twice as dense as those above, it does so on both sides.

=========================  =======================================  ================================================
parameter                  F = 8 (24 bits)                          F = 16 (32 bits)
=========================  =======================================  ================================================
bfloat16, any finite x     1 + 8 + 15 bits; error below             float32 itself: no error
                           2**-15 of x by chance, 2**-16 nearest
float16, abs(x) >= 2**-14  1 + 5 + 18 bits; error below 2**-18      no error
float16, abs(x) < 2**-14   a multiple of 2**-32                     a multiple of 2**-40, to nearest
=========================  =======================================  ================================================

Float32's own subnormal numbers are bfloat16's, with more bits: there the bound is 2**-141 (F = 8, by chance). With
F = 8 a number between two codes goes to the upper one with a probability that is its distance from the lower one, so
that the expectation is the number itself; the noise is a function of (seed, step, number of the element in what is
here of the parameter), see `round_to_bf16`: shards of other sizes are rounded with other noise, and all parameters
have the same.

The stored weight is the representable number nearest to the one that h stands for, half-way away from zero. The sign is
the stored weight's, at zero, too. What rounds to an infinity is one, as without a correction; what does not has the
last code before it at most, where 24 bits would be rounded further. An infinity and NaN have the correction 0, and one
that is there is not read. No pair of bits decodes to NaN but a stored NaN: where a weight was changed by somebody else,
a c that would lead below zero leads to zero.
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
#: Dtypes of parameters that may have one.
HALF = (torch.bfloat16, torch.float16)

_ABS = 0x7FFFFFFF
# Of float16: the bits of 2**-14 in float32 (below are its subnormal numbers), those of 2**16, where it is infinite, and
# what the bits of its own numbers, shifted, lack of float32's.
_LEAST, _ABOVE, _SHIFT = 0x38800000, 0x47800000, 0x38000000
# From here on the nearest number of the dtype is infinite: half-way from its largest one to what would be the next.
_TIE = {torch.bfloat16: 0x7F7F8000, torch.float16: 0x477FF000}
# The bits of infinity.
_TOP = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
# In the place of a fingerprint that nobody has taken.
UNKNOWN = 0
_KNOWN = 1 << 62
_STREAM = 0x2545F491


def decode(weight: Tensor, code: Tensor, out: Tensor | None = None) -> Tensor:
    """The float32 numbers that weights (bfloat16 or float16) and their corrections stand for; ``out`` takes them."""
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
    """``(weight, code)`` of float32 numbers, for parameters of ``dtype`` with ``bits`` (24 or 32) a weight.

    Args:
        x: the numbers.
        dtype: bfloat16 or float16.
        bits: see `CODES`.
        noise: random integers (int32, 0 to 255) that decide where 24 bits round to; None: to nearest, half-way away
            from zero.
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
        # From 2**23 on all float32 numbers are integers, and half of one would be rounded to the next.
        low = torch.where(scaled < 2.0**23, scaled + 0.5, scaled).to(torch.int32)
        high = magnitude.clamp(max=_ABOVE) - _SHIFT
        if fraction == 8:
            add = 16 if noise is None else noise >> 3
            low, high = (low + add) >> 5, (high + add) >> 5
        else:
            high = high << 3
        h = torch.where(magnitude < _LEAST, low, high)
    # Rounding must not carry a number to infinity that is nearer to the largest one.
    h = h.clamp(max=(_TOP[dtype] << fraction) - (1 << (fraction - 1)) - 1)
    stored = (h + (1 << (fraction - 1))) >> fraction
    code = h - (stored << fraction)
    signed = torch.where(x.signbit(), stored - 0x8000, stored).to(torch.int16).view(dtype)
    return torch.where(finite, signed, x.to(dtype)), code.masked_fill_(~finite, 0).to(CODES[bits])


def decoded(weight: Tensor, code: Tensor) -> Tensor:
    """`decode` of a whole parameter, with temporaries of a block."""
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    _blocks(CPU_NOISE if weight.device.type == "cpu" else ACCELERATOR_NOISE, (weight, code, out), decode)
    return out


def write_nearest(x: Tensor, weight: Tensor, code: Tensor) -> None:
    """Write float32 numbers as weights and corrections of the same shape, to nearest, with temporaries of a block."""

    def write(x: Tensor, weight: Tensor, code: Tensor) -> None:
        stored, own = encode(x, weight.dtype, 24 if code.dtype == torch.int8 else 32)
        weight.copy_(stored)
        code.copy_(own)

    _blocks(CPU_NOISE if x.device.type == "cpu" else ACCELERATOR_NOISE, (x, weight, code), write)


class Corrected(Matrix):
    """A parameter with corrections as a matrix of float32 numbers: read whole, and written as weight and correction.

    Args:
        matrix: the parameter.
        codes: its corrections, ``(R, D)``.
        seed: of the rounding to 24 bits,
        step: and the number of the step; the noise is a function of both and of the element's number.
    """

    def __init__(self, matrix: Matrix, codes: Tensor, seed: int, step: int) -> None:
        super().__init__(matrix.tensor, matrix.batch)
        self.codes, self.seed, self.step = codes, seed, step
        self.stored, self.dtype = self.dtype, torch.float32

    def views(self, at: At) -> bool:
        """What is read is a copy."""
        return False

    def get(self, at: At) -> Tensor:
        """The numbers of a tile or of rows, until the next call."""
        weight, code = super().get(at), at.get(self.codes)
        out = scratch.empty("corrected", weight.shape, torch.float32, weight.device)
        _blocks(self._limit, (weight, code, out), decode)
        return out

    def put(self, at: At, value: Tensor) -> None:
        """Write float32 numbers, shaped like ``get(at)``; they are rounded in place to what the weights hold."""
        bits = 24 if self.codes.dtype == torch.int8 else 32
        code = at.get(self.codes)
        # Both add up to the numbers of the elements; expanded, they take no memory.
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
    """Call ``do`` with parts of tensors of one shape, of ``limit`` elements at most."""
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
    """A number that says which weights (bfloat16 or float16, any layout) these are; never `UNKNOWN`.

    Others have the same one with a probability of 2**-32.
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

"""Stochastic rounding to bfloat16, and the noise that it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from sketch_plugins.hashing import random32
from sketch_plugins.sharding.blocks import At

# Elements whose noise is drawn at once: it takes 40 bytes for each, ten times what a tile itself does.
CPU_NOISE, ACCELERATOR_NOISE = 1 << 14, 1 << 20


def round_to_bf16(part: Tensor, at: At, columns: int, seed: int, step: int) -> Tensor:
    """``part`` (float32, changed) rounded stochastically to numbers that bfloat16 holds exactly.

    Away from zero with a probability equal to the fraction that is cut off, so that the expectation is the unrounded
    number; the noise is a function of (seed, step, element). Infinities and NaN stay what they are.
    """
    rows = at.from_rows(at.index(part.device).unsqueeze(-1) * columns)
    own = torch.arange(at.lo, at.hi, device=part.device)
    if torch.compiler.is_compiling():
        return round_stochastically(part, rows + own, seed, step)
    _round_blocks(part, rows, own, seed, step, CPU_NOISE if part.device.type == "cpu" else ACCELERATOR_NOISE)
    return part


def _round_blocks(part: Tensor, rows: Tensor, own: Tensor, seed: int, step: int, limit: int, dim: int = 0) -> None:
    """In place; the first number of each row and the places in it (``own``) add up to those of the elements."""
    if part.numel() <= limit:
        round_stochastically(part, rows + own, seed, step)
        return
    size = part.shape[dim]
    each = max(1, limit // (part.numel() // size))
    for start in range(0, size, each):
        n = min(each, size - start)
        block, last = part.narrow(dim, start, n), dim == part.ndim - 1
        of_rows, of_own = (rows, own.narrow(0, start, n)) if last else (rows.narrow(dim, start, n), own)
        _round_blocks(block, of_rows, of_own, seed, step, limit, dim + 1)


def round_stochastically(part: Tensor, index: Tensor, seed: int, step: int) -> Tensor:
    """`round_to_bf16` of elements whose numbers (int64, in the shape of ``part``) are ``index``."""
    bits = part.view(torch.int32)
    noise = (random32(index, seed, step) & 0xFFFF).to(torch.int32)
    noise.masked_fill_((bits & 0x7F800000) == 0x7F800000, 0)
    nan = part.isnan()  # its bits may all be in the half that is cut off
    return bits.add_(noise).bitwise_and_(-0x10000).view(torch.float32).masked_fill_(nan, float("nan"))

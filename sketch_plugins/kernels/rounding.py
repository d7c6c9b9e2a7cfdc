"""Stochastic rounding to bfloat16, and its noise."""

from __future__ import annotations

import torch
from torch import Tensor

from sketch_plugins.hashing import random32
from sketch_plugins.sharding.blocks import At

# Elements whose noise is drawn at one time. It takes 40 bytes for each, ten times what the tile itself takes.
CPU_NOISE, ACCELERATOR_NOISE = 1 << 14, 1 << 20


def round_to_bf16(part: Tensor, at: At, columns: int, seed: int, step: int) -> Tensor:
    """``part`` (float32, changed in place), rounded stochastically to numbers that bfloat16 holds exactly.

    Numbers are rounded away from zero with a probability equal to the fraction that is cut off, so that the expected
    value is the unrounded number. The noise is a function of (seed, step, element). Infinities and NaN stay.
    """
    rows = at.from_rows(at.index(part.device).unsqueeze(-1) * columns)
    own = torch.arange(at.lo, at.hi, device=part.device)
    if torch.compiler.is_compiling():
        return round_stochastically(part, rows + own, seed, step)
    _round_blocks(part, rows, own, seed, step, CPU_NOISE if part.device.type == "cpu" else ACCELERATOR_NOISE)
    return part


def _round_blocks(part: Tensor, rows: Tensor, own: Tensor, seed: int, step: int, limit: int, dim: int = 0) -> None:
    """Round in place. The sum of ``rows`` (the first element of each row) and ``own`` is the number of each element."""
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
    """`round_to_bf16` of elements with the numbers ``index`` (int64, in the shape of ``part``)."""
    bits = part.view(torch.int32)
    noise = (random32(index, seed, step) & 0xFFFF).to(torch.int32)
    noise.masked_fill_((bits & 0x7F800000) == 0x7F800000, 0)
    nan = part.isnan()  # all bits that make it a NaN may be among those that are cut off
    return bits.add_(noise).bitwise_and_(-0x10000).view(torch.float32).masked_fill_(nan, float("nan"))

"""Signed 8-bit state: int8 codes with one scale for each block of a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.hashing import uniform
from sketch_plugins.sharding.blocks import At
from sketch_plugins.stores.base import Ema, State, Store, blend


@dataclass(frozen=True)
class Int8(Store):
    """Block-quantised first moment: ``m = code * scale``, ``scale = max |m| of the block / 127``, code in [-127, 127].

    Blocks are ``block_size`` consecutive columns of one row (the last block of a row may be shorter), so a touched row
    is decoded and encoded alone. Cost: ``1 + 4 / min(block_size, D)`` bytes a parameter: 1.016 at 256, 1.031 at the
    default 128, 1.0625 at 64. The largest rounding error is ``scale / 2``, 1/254 of the block's maximum: smaller blocks
    cost scales and isolate outliers better.

    Args:
        block_size: columns of a block, >= 1.
        stochastic: round up with probability equal to the fraction, so that the stored value is unbiased; the noise
            is a function of (seed, step, element). Default: to nearest.
        seed: seed of that noise.
    """

    order: int = 1
    block_size: int = 128
    stochastic: bool = False
    seed: int = 0

    @property
    def align(self) -> int:  # type: ignore[override]
        return self.block_size

    def layout(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Codes of the parameter's shape, one scale for each block; a step counter where rounding is stochastic."""
        rows, columns = shape
        out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": (shape, torch.int8),
            "scales": ((rows, -(-columns // self.block_size)), torch.float32),
        }
        return out

    def read(self, state: State, at: At, dtype: torch.dtype) -> Tensor:
        """Decoded values (a copy, until the next read)."""
        codes = at.get(state["codes"])
        x = scratch.empty("decoded", codes.shape, dtype, codes.device).copy_(codes)
        scales = at.get(state["scales"], *self._blocks(at)).to(dtype)
        for part, block in self._split(x):
            part.mul_(scales[..., block].unsqueeze(-1))
        return x

    def advance(self, state: State, at: At, g: Tensor, ema: Ema) -> Tensor:
        """Decode, blend, encode; the estimate returned is the one before rounding."""
        est = blend(self.read(state, at, g.dtype), g, ema, self.order)
        scales = est.new_empty(*at.shape[:-1], self._blocks(at)[1] - self._blocks(at)[0])
        codes = scratch.like("codes", est)
        for (part, block), (code, _) in zip(self._split(est), self._split(codes), strict=True):
            scale = torch.abs(part, out=code).amax(-1).div_(127.0)
            # A block of zeros (or of numbers whose 1/127 underflows) has codes 0; a NaN or Inf lives on in the scale.
            inverse = torch.where(scale > 1e-37, 1.0 / scale, 0.0)
            torch.mul(part, inverse.unsqueeze(-1), out=code)
            scales[..., block] = scale
        if self.stochastic:
            codes.add_(self._noise(state, at, codes, ema.step)).floor_().clamp_(-127, 127)
        else:
            codes.round_()
        at.put(state["codes"], codes)
        at.put(state["scales"], scales, *self._blocks(at))
        return est

    def _blocks(self, at: At) -> tuple[int, int]:
        return at.lo // self.block_size, -(-at.hi // self.block_size)

    def _split(self, x: Tensor) -> Iterator[tuple[Tensor, slice]]:
        """``x`` as (whole blocks, block) and (the shorter last one, block), each ``(..., blocks, columns)``."""
        size, columns = self.block_size, x.shape[-1]
        whole = columns // size
        if whole:
            yield x[..., : whole * size].unflatten(-1, (whole, size)), slice(0, whole)
        if whole * size < columns:
            yield x[..., whole * size :].unsqueeze(-2), slice(whole, whole + 1)

    def _noise(self, state: State, at: At, like: Tensor, step: int) -> Tensor:
        columns = state["codes"].shape[1]
        index = at.from_rows(at.index(like.device).unsqueeze(-1) * columns)
        return uniform(index + torch.arange(at.lo, at.hi, device=like.device), self.seed, step, like.dtype)

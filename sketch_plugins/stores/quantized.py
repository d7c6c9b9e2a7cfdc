"""First moments as int8 codes with one scale for each block of a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.hashing import uniform
from sketch_plugins.sharding.blocks import At
from sketch_plugins.stores.base import Ema, Gradient, State, blend, given
from sketch_plugins.stores.blocked import Blocked


@dataclass(frozen=True)
class Int8(Blocked):
    """Block-quantised first moment: ``m = code * scale``, ``scale = max |m| of the block / 127``, code in [-127, 127].

    A block is ``block_size`` consecutive columns of one row (the last block of a row may be shorter), so a touched row
    is decoded and encoded by itself. It costs ``1 + 4 / min(block_size, D)`` bytes a parameter: 1.016 at 256, 1.031 at
    the default 128, 1.0625 at 64. Rounding to nearest has an error of at most ``scale / 2``, which is 1/254 of the
    block's maximum. Smaller blocks isolate outliers better and cost more scales.

    Args:
        block_size: number of columns of a block, >= 1.
        stochastic: round up with a probability equal to the fraction, so that the expected value is exact. The noise
            is a function of (seed, step, element). By default codes are rounded to nearest.
        seed: seed of that noise.
    """

    kernel = "int8"
    shared_by_block = "scales"

    order: int = 1
    block_size: int = 128
    stochastic: bool = False
    seed: int = 0

    def loop(self, rows: int) -> str:
        """The loop only rounds to nearest."""
        return "" if self.stochastic else "int8"

    def layout(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Codes of the parameter's shape, and one scale for each block."""
        rows, columns = shape
        return {"codes": (shape, torch.int8), "scales": ((rows, -(-columns // self.block_size)), torch.float32)}

    def slices(self, state: State, at: At, step: int) -> State:
        """Codes in blocks, their scales, and the noise for stochastic rounding."""
        out = super().slices(state, at, step)
        if self.stochastic and step:
            columns = state["codes"].shape[1]
            index = at.from_rows(at.index(state["codes"].device).unsqueeze(-1) * columns)
            index = index + torch.arange(at.lo, at.hi, device=index.device)
            out["noise"] = self.view(uniform(index, self.seed, step, torch.float32))
        return out

    def blend(self, slices: State, g: Tensor, ema: Ema) -> Tensor:
        """Decode, blend and encode. The returned estimate is not rounded."""
        est = blend(self._decode(slices, g.dtype), g, ema, self.order)
        scale = torch.abs(est, **scratch.out("codes", est)).amax(-1).div(127.0)
        # If a block is zero (or a 127th of its maximum underflows), its codes are 0. The scale keeps a NaN or infinity.
        inverse = torch.where(scale > 1e-37, 1.0 / scale, 0.0)
        codes = torch.mul(est, inverse.unsqueeze(-1), **scratch.out("codes", est))
        if "noise" in slices:
            codes.add_(slices["noise"]).floor_().clamp_(-127, 127)
        else:
            codes.round_()
        slices["codes"].copy_(codes)
        slices["scales"].copy_(scale)
        return est

    def assign(self, state: State, values: Tensor | Gradient) -> None:
        """Encode the values, rounded to nearest, as a step that forgets everything before it."""
        self.write(state, given(values, self.order), Ema(0.0, 1.0))

    def _decode(self, slices: State, dtype: torch.dtype) -> Tensor:
        return scratch.cast("decoded", slices["codes"], dtype).mul_(slices["scales"].to(dtype).unsqueeze(-1))

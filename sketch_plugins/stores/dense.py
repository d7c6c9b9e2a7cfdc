"""Exact state: one number for each element, in float32 (float64 for float64 parameters) or bfloat16."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.sharding.blocks import At
from sketch_plugins.stores.base import Ema, Gradient, State, Store, blend, given


@dataclass(frozen=True)
class Dense(Store):
    """``(R, D)`` numbers: 4 bytes a parameter, or 2 with ``bf16``.

    bfloat16 is rounded to nearest. That suits a first moment, of which a step moves 10 %. It does not suit an average
    with ``decay = 0.999``: its steps are below half a unit in the last place. Second moments are therefore float32.
    """

    kernel = "dense"

    def loop(self, rows: int) -> str:
        """Every dense state has a loop."""
        return "dense"

    order: int = 1
    bf16: bool = False

    def layout(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """One tensor of the parameter's shape."""
        return {"dense": (shape, torch.bfloat16 if self.bf16 else dtype)}

    def read(self, state: State, at: At, dtype: torch.dtype) -> Tensor:
        """The stored numbers: a view if they have the dtype and the place is a tile."""
        stored = at.get(state["dense"])
        if stored.dtype == dtype:
            return stored
        return scratch.cast("decoded", stored, dtype)

    def blend(self, slices: State, g: Tensor, ema: Ema) -> Tensor:
        """Blend the gradient. The returned estimate is not rounded."""
        stored = slices["dense"]
        if stored.dtype == g.dtype:
            return blend(stored, g, ema, self.order)
        est = blend(scratch.cast("decoded", stored, g.dtype), g, ema, self.order)
        stored.copy_(est)
        return est

    def assign(self, state: State, values: Tensor | Gradient) -> None:
        """Store the values, rounded to nearest in bfloat16."""
        values = given(values, self.order)
        for at in values.batches():
            at.put(state["dense"], values.get(at))

    def fill(self, state: State, value: float) -> None:
        """Set every number."""
        state["dense"].fill_(value)

"""The row-normalised count-min sketch: an exact scale for each row, and a sketch of the profile within the row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sketch_plugins.sharding.blocks import At
from sketch_plugins.stores.base import Ema, Gradient, State, given
from sketch_plugins.stores.count_min import CountMin
from sketch_plugins.stores.sketch import Cell, Segments, mean_weight

# Rows with a scale below this number leave the profile unchanged, because the quotient would overflow.
LEAST = 1e-30


@dataclass(frozen=True)
class RowCountMin(CountMin):
    """``v_i = r_i * min_j P_j[h_j(i)]``: r_i is the exact accumulator of row i's mean g * g, P_j a profile of mean 1.

    A rare row that shares a bucket with a frequent one keeps its own scale; only the profile is shared. In each step

        r_i' = decay * r_i + gain * mean(g_i * g_i)
        P_j[b]' = mean over the bucket's (touched) rows of (decay * r_i * P_j[b] + gain * g_i * g_i) / r_i'

    For a bucket of one row this is exactly ``decay * v + gain * g * g``. Rows with ``r_i' < 1e-30`` (`LEAST`) leave
    the profile unchanged. Squares are limited to a 512th of the largest number (`largest_square`), because an infinite
    square would make the quotient NaN.

    State: ``table (depth, width, D)`` and ``row (R, 1)``, which is ``4 / D`` bytes a parameter more than count-min.
    ``bucket`` has no meaning here, because profiles are always means. The method is not in the papers;
    docs/algorithms.md has its figures.
    """

    by_bucket = False
    kernel = "row_count_min"

    def layout(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The tables of profiles, and the scales of the rows."""
        return {**super().layout(shape, dtype), "row": ((shape[0], 1), dtype)}

    def read(self, state: State, at: At, dtype: torch.dtype) -> Tensor:
        """The profile times the row's scale."""
        return self._estimate(state["table"], at, dtype) * at.get(state["row"], 0, 1)

    def slices(self, state: State, at: At, step: int) -> State:
        """The estimate."""
        return {"estimate": self.read(state, at, torch.float32 if self.bf16 else state["table"].dtype)}

    def peek(self, state: State, at: At, g: Tensor, ema: Ema) -> Tensor:
        """The estimate."""
        return self.read(state, at, g.dtype)

    def write(self, state: State, grad: Gradient, ema: Ema) -> None:
        """Update the scales of the rows first, and then the profiles relative to them."""
        means = self._row_means(grad).squeeze(-1)
        row = state["row"].squeeze(-1)
        if grad.rows is None:
            old = row.mul_(ema.decay).clone()
            scale = row.add_(means, alpha=ema.gain)
        else:
            old = row.index_select(0, grad.rows).mul_(ema.decay)
            scale = old.add(means, alpha=ema.gain)
            row.index_copy_(0, grad.rows, scale)
        # x_i enters the profile with weight gain / r_i', and the old profile keeps the weight decay * r_i / r_i'. That
        # is exactly 0 for the row's first gradient. Computed as one minus the weight of x_i it would have a rounding
        # error, as large as the cells of small gradients.
        weight = torch.where(scale > LEAST, ema.gain / scale, 0.0)
        kept = torch.where(scale > LEAST, old / scale, 1.0)
        index = torch.arange(grad.shape[0], device=grad.device) if grad.rows is None else grad.rows
        for j, h in enumerate(self.hashes(grad.shape[0])):
            segments = Segments.of(h, index)
            decay = segments.means(kept)
            if grad.rows is None:
                mean, weights = mean_weight(h, grad.device), weight.unsqueeze(-1)
                self._fold(state["table"], j, h, grad, decay.unsqueeze(-1), mean, ema.step, weights)
            else:
                weights = weight.index_select(0, segments.order)
                weights /= segments.counts.repeat_interleave(segments.counts)
                self._fold_touched(state["table"], j, h, grad, segments, decay, weights, ema.step)

    def assign(self, state: State, values: Tensor | Gradient) -> None:
        """Set each row's scale to its mean, and each profile to the mean over the bucket's rows that have a profile."""
        values = given(values, self.order)
        scale = state["row"].squeeze(-1).copy_(self._row_means(values, self._value_cell).squeeze(-1))
        weights = torch.where(scale > LEAST, 1.0 / scale, 0.0)
        index = torch.arange(values.shape[0], device=values.device)
        for j, h in enumerate(self.hashes(values.shape[0])):
            alive = Segments.of(h, index).means((weights > 0).double()).unsqueeze(-1)
            share = torch.where(alive > 0, mean_weight(h, values.device) / alive, 0.0).to(scale.dtype)
            weight = weights.unsqueeze(-1)
            self._fold(state["table"], j, h, values, 0.0, share, 0, weight, self._value_cell)

    def estimate_scale(self, state: State, shape: tuple[int, int]) -> float:
        """1, because profiles are means."""
        return 1.0

    def clean(self, state: State, factor: float, step: int = 0) -> None:
        """Multiply the scales of the rows, and with them every estimate."""
        state["row"].mul_(factor) if factor else state["row"].zero_()

    def fill(self, state: State, value: float) -> None:
        """Set the scale of every row, and flat profiles."""
        state["row"].fill_(value)
        state["table"].fill_(1.0)  # exact in bfloat16, too

    def _cell(self, x: Tensor, sign: Callable[[], Tensor]) -> Tensor:
        return super()._cell(x, sign).clamp_(max=largest_square(x.dtype))

    def _row_means(self, grad: Gradient, cell: Cell | None = None) -> Tensor:
        return super()._row_means(grad, cell).clamp_(max=largest_square(grad.dtype))


def largest_square(dtype: torch.dtype) -> float:
    """The limit of squared gradients. With it, gain / scale is never subnormal; GPUs take subnormal numbers as 0."""
    return torch.finfo(dtype).max / 512

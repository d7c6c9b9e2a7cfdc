"""The row-normalised count-min sketch: an exact scale for each row, a sketch of the shape within the row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sketch_plugins.sharding.blocks import At, Tile
from sketch_plugins.stores.base import Ema, Gradient, State, given
from sketch_plugins.stores.count_min import CountMin
from sketch_plugins.stores.sketch import Cell, Segments, mean_weight

# Scales below have no profile: the quotient would overflow.
LEAST = 1e-30


@dataclass(frozen=True)
class RowCountMin(CountMin):
    """``v_i = r_i * min_j P_j[h_j(i)]``: r_i is the exact accumulator of row i's mean g * g, P_j a profile of mean 1.

    A rare row that shares a bucket with a frequent one keeps its own scale; only the profile is shared. Each step

        r_i' = decay * r_i + gain * mean(g_i * g_i)
        P_j[b]' = mean over the bucket's (touched) rows of (decay * r_i * P_j[b] + gain * g_i * g_i) / r_i'

    is, for a bucket of one row, exactly ``decay * v + gain * g * g``; rows with ``r_i' < 1e-30`` (`LEAST`) leave the
    profile alone. Squares end at a 512th of the largest number (`largest_square`): an infinite one would make NaN of
    the quotient. State: ``table (depth, width, D)`` and ``row (R, 1)``, ``4 / D`` bytes a parameter more than
    count-min. ``bucket`` has no meaning here (profiles are always means). Not in the papers; docs/algorithms.md has the
    figures.
    """

    by_bucket = False
    kernel = "row_count_min"

    def layout(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The profiles and the rows' scales."""
        return {**super().layout(shape, dtype), "row": ((shape[0], 1), dtype)}

    def read(self, state: State, at: At, dtype: torch.dtype) -> Tensor:
        """Profile times row scale."""
        return self._estimate(state["table"], at, dtype) * at.get(state["row"], 0, 1)

    def write(self, state: State, grad: Gradient, ema: Ema) -> None:
        """Row scales first, then the profiles relative to them."""
        means = self._row_means(grad)
        row = state["row"].squeeze(-1)
        if grad.rows is None:
            old = row.mul_(ema.decay).clone()
            scale = row.add_(means, alpha=ema.gain)
        else:
            old = row.index_select(0, grad.rows).mul_(ema.decay)
            scale = old.add(means, alpha=ema.gain)
            row.index_copy_(0, grad.rows, scale)
        # x_i enters the profile with weight gain / r_i', and leaves decay * r_i / r_i' of it: exactly nothing if it is
        # the row's first gradient. One minus the share of x_i would leave a rounding error there, of the size of cells
        # whose gradient is small.
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
        """The rows' means, and of the profiles the mean over those of a bucket's rows that have one."""
        values = given(values, self.order)
        scale = state["row"].squeeze(-1).copy_(self._row_means(values, self._value_cell))
        weights = torch.where(scale > LEAST, 1.0 / scale, 0.0)
        index = torch.arange(values.shape[0], device=values.device)
        for j, h in enumerate(self.hashes(values.shape[0])):
            alive = Segments.of(h, index).means((weights > 0).double()).unsqueeze(-1)
            share = torch.where(alive > 0, mean_weight(h, values.device) / alive, 0.0).to(scale.dtype)
            weight = weights.unsqueeze(-1)
            self._fold(state["table"], j, h, values, 0.0, share, 0, weight, self._value_cell)

    def estimate_scale(self, state: State, shape: tuple[int, int]) -> float:
        """Profiles are means."""
        return 1.0

    def clean(self, state: State, factor: float, step: int = 0) -> None:
        """Scales the rows, and with them every estimate."""
        state["row"].mul_(factor) if factor else state["row"].zero_()

    def fill(self, state: State, value: float) -> None:
        """Every row's scale, over flat profiles."""
        state["row"].fill_(value)
        state["table"].fill_(1.0)  # bfloat16 holds it

    def _cell(self, x: Tensor, sign: Callable[[], Tensor]) -> Tensor:
        return super()._cell(x, sign).clamp_(max=largest_square(x.dtype))

    def _row_means(self, grad: Gradient, cell: Cell | None = None) -> Tensor:
        cell = cell or self._cell
        n = grad.shape[0] if grad.rows is None else len(grad.rows)
        sums = torch.zeros(n, 1, dtype=grad.dtype, device=grad.device)
        for at in grad.batches():
            x = grad.get(at)
            part = cell(x, _unsigned).sum(-1, keepdim=True)
            if isinstance(at, Tile):
                at.get(sums, 0, 1).add_(part)
            else:
                sums[at.position] += part  # type: ignore[attr-defined]
        return sums.squeeze(-1).div_(grad.shape[1]).clamp_(max=largest_square(grad.dtype))


def largest_square(dtype: torch.dtype) -> float:
    """Where the squares of large gradients end: gain / scale is then no subnormal number, which GPUs take as zero."""
    return torch.finfo(dtype).max / 512


def _unsigned() -> Tensor:
    raise AssertionError("count-min has no signs")

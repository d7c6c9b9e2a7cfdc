"""The row-normalised count-min sketch: an exact scale for each row, a sketch of the shape within the row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sketch_plugins.hashing import RowHash
from sketch_plugins.sharding.blocks import At, Tile
from sketch_plugins.stores.base import Ema, Gradient, State
from sketch_plugins.stores.count_min import CountMin
from sketch_plugins.stores.sketch import _scale_rows, _segments


@dataclass(frozen=True)
class RowCountMin(CountMin):
    """``v_i = r_i * min_j P_j[h_j(i)]``: r_i is the exact accumulator of row i's mean g * g, P_j a profile of mean 1.

    A rare row that shares a bucket with a frequent one keeps its own scale; only the profile is shared. Each step

        r_i' = decay * r_i + gain * mean(g_i * g_i)
        P_j[b]' = mean over the bucket's (touched) rows of (decay * r_i * P_j[b] + gain * g_i * g_i) / r_i'

    is, for a bucket of one row, exactly ``decay * v + gain * g * g``; rows with ``r_i' < 1e-30`` leave the profile
    alone. State: ``table (depth, width, D)`` and ``row (R, 1)``, ``4 / D`` bytes a parameter more than count-min.
    ``bucket`` has no meaning here (profiles are always means). Not in the papers; docs/algorithms.md has the figures.
    """

    by_bucket = False

    def layout(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The profiles and the rows' scales."""
        return {**super().layout(shape, dtype), "row": ((shape[0], 1), dtype)}

    def read(self, state: State, at: At, dtype: torch.dtype) -> Tensor:
        """Profile times row scale."""
        return self._estimate(state["table"], at) * at.get(state["row"], 0, 1)

    def write(self, state: State, grad: Gradient, ema: Ema) -> None:
        """Row scales first, then the profiles relative to them."""
        means = self._row_means(grad)
        row = state["row"].squeeze(-1)
        if grad.rows is None:
            row.mul_(ema.decay).add_(means, alpha=ema.gain)
            scale = row
        else:
            scale = row.index_select(0, grad.rows).mul_(ema.decay).add_(means, alpha=ema.gain)
            row.index_copy_(0, grad.rows, scale)
        # x_i enters the profile with weight gain / r_i', and takes the share gain * mean_i / r_i' of it.
        weight = torch.where(scale > 1e-30, ema.gain / scale, 0.0)  # below, the quotient overflows
        share = means.mul_(weight)
        index = torch.arange(grad.shape[0], device=grad.device) if grad.rows is None else grad.rows
        for table, h in zip(state["table"], self.hashes(grad.shape[0]), strict=True):
            self._write_profile(table, h, grad, index, weight, share)

    def clean(self, state: State, factor: float) -> None:
        """Scales the rows, and with them every estimate."""
        state["row"].mul_(factor)

    def fill(self, state: State, value: float) -> None:
        """Every row's scale, over flat profiles."""
        state["row"].fill_(value)
        state["table"].fill_(1.0)

    def _row_means(self, grad: Gradient) -> Tensor:
        n = grad.shape[0] if grad.rows is None else len(grad.rows)
        sums = torch.zeros(n, 1, dtype=grad.dtype, device=grad.device)
        for at in grad.batches():
            x = grad.get(at)
            part = self._cell(x, _unsigned).sum(-1, keepdim=True)
            if isinstance(at, Tile):
                at.get(sums, 0, 1).add_(part)
            else:
                sums[at.position] += part  # type: ignore[attr-defined]
        return sums.squeeze(-1).div_(grad.shape[1])

    def _write_profile(
        self, table: Tensor, h: RowHash, grad: Gradient, index: Tensor, weight: Tensor, share: Tensor
    ) -> None:
        buckets, order = h.bucket(index).sort(stable=True)
        touched, counts = buckets.unique_consecutive(return_counts=True)
        for _, sums in _segments(buckets, share.index_select(0, order).unsqueeze(-1)):
            _scale_rows(table, touched, 1.0 - sums.squeeze(-1) / counts, grad)
        load = counts.repeat_interleave(counts)
        by_position = torch.empty_like(weight).index_copy_(0, order, weight.index_select(0, order) / load).unsqueeze(-1)
        if grad.rows is None:
            for at in grad.batches(self.period(grad.shape[0])):
                assert isinstance(at, Tile)
                x = grad.get(at)
                self._add(table, h, at, self._cell(x, _unsigned).mul_(at.get(by_position, 0, 1)), 1.0)
            return
        for part, at in grad.picked(order):
            x = grad.get(at)
            cells = self._cell(x, _unsigned).mul_(by_position.index_select(0, order[part]))
            target = table[:, at.lo : at.hi]
            for bucket, sums in _segments(buckets[part], cells):
                target.index_copy_(0, bucket, target.index_select(0, bucket).add_(sums))


def _unsigned() -> Tensor:
    raise AssertionError("count-min has no signs")

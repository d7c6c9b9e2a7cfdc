"""The count-min sketch of squared gradients (Cormode & Muthukrishnan 2005), which is read as a minimum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sketch_plugins import scratch
from sketch_plugins.hashing import RowHash
from sketch_plugins.kernels.tile import fold_squares
from sketch_plugins.sharding.blocks import At, Tile, tiles
from sketch_plugins.stores.base import Ema, Gradient, State, given
from sketch_plugins.stores.sketch import Cell, Sketch, mean_weight


@dataclass(frozen=True)
class CountMin(Sketch):
    """Second moments in buckets (arXiv 1902.00179, Alg. 3 and 4): the estimate of row i is ``min_j V_j[h_j(i)]``.

    With ``bucket="mean"`` (not in the paper) a dense step moves each bucket towards the *mean* of its rows' g * g.
    Steps then have the size of Adam's, so Adam's learning rate carries over. ``bucket="sum"`` is the original
    count-min sketch. With ``decay = 1`` its estimate is never below the true sum. With any decay it is never below the
    true average of a dense gradient. Its steps shrink by up to the square root of the number of rows in the bucket.

    With ``scaled`` (not in the paper) rows whose gradients are larger than those of their bucket take shorter steps.
    ``row_means (R, 1)`` holds the same average of each row's mean g * g: r_i. With R_b the mean of r over the bucket, a
    dense step divides the step of row i by ``sqrt(max(1, r_i / R_b))``, with the r and R_b that the step before left,
    so that the gradient is read once. `used` is what a step divides by, ``V_b * max(1, r_i / R_b)``. `read` returns
    ``V_b * r_i / R_b``, the estimate of rank one within each bucket, or V_b if r_i is 0 or R_b is not finite.
    A row-sparse step takes V_b alone and leaves r as it is. State: ``4 / D`` bytes a parameter more.

    Args:
        scaled: keep ``row_means``, for one table of means. Without effect if each row has a bucket of its own.
    """

    by_bucket = True

    kernel = "count_min"

    order: int = 2
    scaled: bool = False

    def has_scales(self, rows: int) -> bool:
        """Whether the state of a matrix with this number of rows has ``row_means``."""
        return self.scaled and self.depth == 1 and self.bucket == "mean" and self.buckets(rows) < rows

    def layout(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The tables, and the means of the rows."""
        means = {"row_means": ((shape[0], 1), dtype)} if self.has_scales(shape[0]) else {}
        return {**super().layout(shape, dtype), **means}

    def step_factors(self, state: State, grad: Gradient) -> Tensor | None:
        """``(R, 1)``: what the steps of the rows are multiplied by; None if no row is scaled. Before `write`."""
        means = state.get("row_means")
        if means is None or grad.rows is not None:
            return None
        bucket = self._bucket_means(means)
        # NaN and infinite means compare as false.
        return torch.where(means > bucket, torch.sqrt(bucket / means), 1.0)

    def read(self, state: State, at: At, dtype: torch.dtype) -> Tensor:
        """The bucket's estimate; with ``scaled`` times the row's share of it."""
        return self._shared_out(state, at, dtype, 0.0)

    def used(self, state: State, at: At, dtype: torch.dtype) -> Tensor:
        """The bucket's estimate; with ``scaled`` larger for a row that exceeds its bucket."""
        return self._shared_out(state, at, dtype, 1.0)

    def _shared_out(self, state: State, at: At, dtype: torch.dtype, least: float) -> Tensor:
        """The bucket's estimate times the row's share of it, which counts as ``least`` or more."""
        estimate = self._estimate(state["table"], at, dtype)
        means = state.get("row_means")
        if means is None:
            return estimate
        bucket = self._bucket_means(means)
        # A row without dense gradients has no share of its own, and sums may have overflowed.
        share = torch.where((means > 0) & bucket.isfinite(), means / bucket, 1.0).clamp_(min=least)
        return estimate * at.get(share.to(dtype), 0, 1)

    def slices(self, state: State, at: At, step: int) -> State:
        """The bucket's estimate, which `write` has written."""
        table = state["table"]
        return {"estimate": self._estimate(table, at, torch.float32 if self.bf16 else table.dtype)}

    def peek(self, state: State, at: At, g: Tensor, ema: Ema) -> Tensor:
        """The bucket's estimate."""
        return self._estimate(state["table"], at, g.dtype)

    def write(self, state: State, grad: Gradient, ema: Ema) -> None:
        """Write the table, and the means of the rows."""
        super().write(state, grad, ema)
        means = state.get("row_means")
        if means is not None and grad.rows is None:
            means.mul_(ema.decay).add_(self._row_means(grad), alpha=ema.gain)

    def assign(self, state: State, values: Tensor | Gradient) -> None:
        """Set each bucket to the mean (or sum) of its rows' values, and each row's mean to that of its values."""
        values = given(values, self.order)
        super().assign(state, values)
        if "row_means" in state:
            state["row_means"].copy_(self._row_means(values, self._value_cell))

    def _bucket_means(self, means: Tensor) -> Tensor:
        """``(R, 1)``: for each row, the mean of ``means`` over the rows of its bucket."""
        h = self.hashes(len(means))[0]
        places = torch.arange(h.rows, device=means.device)
        members = means if h.strided else means.index_select(0, h.row(places))
        cycles = -(-h.height // h.own)
        padded = functional.pad(members.view(h.matrices, h.height), (0, cycles * h.own - h.height))
        sums = padded.view(h.matrices, cycles, h.own).sum(1)
        load = h.load(torch.arange(h.width, device=means.device)).to(means.dtype)
        return (sums.view(-1) / load).index_select(0, h.bucket(places)).unsqueeze(-1)

    def _row_means(self, grad: Gradient, cell: Cell | None = None) -> Tensor:
        """``(rows, 1)``: means of the squares of all rows, or of the touched rows; of the values with `_value_cell`."""
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
        return sums.div_(grad.shape[1])

    def loop(self, rows: int) -> str:
        """The loop takes one float32 table with a strided hash, and only this class, no subclass."""
        one = type(self) is CountMin and self.depth == 1 and not self.bf16
        return "count_min" if one and self.hashes(rows)[0].strided else ""

    def _cell(self, x: Tensor, sign: Callable[[], Tensor]) -> Tensor:
        return torch.mul(x, x, **scratch.out("cells", x))

    def _value_cell(self, x: Tensor, sign: Callable[[], Tensor]) -> Tensor:
        return scratch.cast("cells", x, x.dtype)

    def _write_dense(self, tables: Tensor, j: int, h: RowHash, grad: Gradient, ema: Ema) -> None:
        if self.bf16 or not self.period(h.rows):
            super()._write_dense(tables, j, h, grad, ema)
            return
        table = tables[j].mul_(ema.decay)
        mean = self.bucket == "mean" and h.width < h.rows
        weights = torch.as_tensor(mean_weight(h, grad.device) if mean else 1.0, dtype=torch.float64)
        weights = weights.mul(ema.gain).to(table)
        fold = grad.run(fold_squares)
        places = tiles(*grad.shape, grad.chunk, h.own, matrices=h.matrices)
        for at in grad.distinct(places, lambda at: at.shape):
            first = h.bucket_of_place(at.start)
            part = slice(first, first + at.rows)
            fold(table[part, at.lo : at.hi], grad.get(at), weights[part] if weights.ndim else weights)

    def _combine(self, estimates: list[Tensor]) -> Tensor:
        least = estimates[0]
        for other in estimates[1:]:
            least = torch.minimum(least, other, out=least)  # with two or more tables the estimates are copies
        return least

    def clean(self, state: State, factor: float, step: int = 0) -> None:
        """Multiply the table by ``factor``, so that what rare rows inherited from frequent ones fades."""
        self._cleaned(state["table"], factor, step)
        if "row_means" in state:
            state["row_means"].mul_(factor) if factor else state["row_means"].zero_()

    def fill(self, state: State, value: float) -> None:
        """Set every bucket, and the mean of every row."""
        self._filled(state["table"], value)
        if "row_means" in state:
            state["row_means"].fill_(value)


def _unsigned() -> Tensor:
    raise AssertionError("count-min has no signs")

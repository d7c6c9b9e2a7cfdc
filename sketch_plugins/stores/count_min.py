"""The count-min sketch of squared gradients (Cormode & Muthukrishnan 2005), which is read as a minimum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.hashing import RowHash
from sketch_plugins.kernels.tile import fold_squares
from sketch_plugins.sharding.blocks import tiles
from sketch_plugins.stores.base import Ema, Gradient, State
from sketch_plugins.stores.sketch import Sketch, mean_weight


@dataclass(frozen=True)
class CountMin(Sketch):
    """Second moments in buckets (arXiv 1902.00179, Alg. 3 and 4): the estimate of row i is ``min_j V_j[h_j(i)]``.

    With ``bucket="mean"`` (not in the paper) a dense step moves each bucket towards the *mean* of its rows' g * g.
    Steps then have the size of Adam's, so Adam's learning rate carries over. ``bucket="sum"`` is the original
    count-min sketch. With ``decay = 1`` its estimate is never below the true sum. With any decay it is never below the
    true average of a dense gradient. Its steps shrink by up to the square root of the number of rows in the bucket.
    """

    by_bucket = True

    kernel = "count_min"

    order: int = 2

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

    def fill(self, state: State, value: float) -> None:
        """Set every bucket."""
        self._filled(state["table"], value)

"""The count-min sketch of squared gradients: unsigned, read back as the minimum. Cormode & Muthukrishnan 2005."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.hashing import RowHash
from sketch_plugins.kernels.tile import fold_squares
from sketch_plugins.sharding.blocks import Tile
from sketch_plugins.stores.base import Ema, Gradient, State
from sketch_plugins.stores.sketch import Sketch


@dataclass(frozen=True)
class CountMin(Sketch):
    """Second moments in buckets (arXiv 1902.00179, Alg. 3 and 4): the estimate of row i is ``min_j V_j[h_j(i)]``.

    ``bucket="mean"`` (not in the paper): a dense step moves each bucket towards the *mean* of its rows' g * g, which
    keeps the size of Adam's steps, so that its learning rate carries over. ``bucket="sum"`` is the count-min sketch
    proper: with ``decay = 1`` the estimate never falls below the true sum, with any decay never below the true average
    of a dense gradient; steps shrink by up to the square root of the bucket's load.
    """

    by_bucket = True

    order: int = 2

    def _cell(self, x: Tensor, sign: Callable[[], Tensor]) -> Tensor:
        return torch.mul(x, x, **scratch.out("cells", x))

    def _write_dense(self, table: Tensor, h: RowHash, grad: Gradient, ema: Ema) -> None:
        if not self.period(h.rows):
            super()._write_dense(table, h, grad, ema)
            return
        table.mul_(ema.decay)
        share = self._share(h, ema.gain)
        fold = grad.run(fold_squares)
        for at in grad.batches(h.width):
            assert isinstance(at, Tile)
            first = at.start % h.width
            bucket = torch.arange(first, first + at.rows, device=table.device)
            weight = (
                share(bucket).unsqueeze(-1)
                if callable(share)
                else torch.tensor(share, dtype=table.dtype, device=table.device)
            )
            fold(table[first : first + at.rows, at.lo : at.hi], grad.get(at), weight.to(table.dtype))

    def _combine(self, estimates: list[Tensor]) -> Tensor:
        least = estimates[0]
        for other in estimates[1:]:
            least = torch.minimum(least, other)
        return least

    def clean(self, state: State, factor: float) -> None:
        """``V *= factor``: what rare rows have inherited from frequent ones fades."""
        state["table"].mul_(factor)

    def fill(self, state: State, value: float) -> None:
        """Every bucket."""
        state["table"].fill_(value)

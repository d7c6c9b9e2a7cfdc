"""The count-sketch (Charikar et al. 2002, Spring et al. 2019): signed buckets, which are read as a median."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.stores.sketch import Sketch


@dataclass(frozen=True)
class CountSketch(Sketch):
    """Signed sketch of a first moment (arXiv 1902.00179, Alg. 2): ``S_j[h_j(i)]`` collects ``s_j(i) * x_i``.

    The estimate of row i is the median over j of ``s_j(i) * S_j[h_j(i)]``; for an even depth it is the mean of the
    middle two. Dense gradients use the linear sketch ``S = decay * S + gain * sum``, whose estimate is unbiased. The
    reference code's ``S += gain * (x - old)``, summed over c rows, multiplies the bucket by ``1 - c * gain`` and
    diverges.

    In a dense first moment the colliding rows are as large as the row itself, so it does not train: depth 1 diverged,
    and depth 3 stayed far behind. The optimizers refuse it unless an option allows it. It is meant for row-sparse
    gradients.
    """

    kernel = "count_sketch"

    order: int = 1
    bucket: str = "sum"

    def _cell(self, x: Tensor, sign: Callable[[], Tensor]) -> Tensor:
        return torch.mul(x, sign(), **scratch.out("cells", x))

    def _value_cell(self, x: Tensor, sign: Callable[[], Tensor]) -> Tensor:
        return self._cell(x, sign)

    def _signed(self, estimate: Tensor, sign: Callable[[], Tensor]) -> Tensor:
        return estimate * sign()

    def _combine(self, estimates: list[Tensor]) -> Tensor:
        if len(estimates) == 1:
            return estimates[0]
        ordered = torch.stack(estimates).sort(0).values
        middle = len(estimates) // 2
        return ordered[middle] if len(estimates) % 2 else (ordered[middle - 1] + ordered[middle]).div_(2)

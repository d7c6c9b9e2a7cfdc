"""k random entries, the same on every rank."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sketch_plugins.comm.base import Compressor, Payload, Reduce, check_seed, entries, to_device
from sketch_plugins.hashing import derive


class RandK(Compressor):
    r"""Sends k = density * d entries, drawn uniformly without replacement from ``(seed, step, key)``.

    Every rank draws the same ones, so no indices are sent, and an all-reduce sums the values.
    :math:`E \|x - C(x)\|^2 = (1 - k/d) \|x\|^2`.

    Args:
        seed: any integer; equal on all ranks.

    Raises:
        ValueError: ``seed`` is no integer.

    Source: rand-k of https://arxiv.org/abs/1809.07599. Deviation: there each worker draws its own entries.
    """

    name: ClassVar[str] = "randk"
    shared: ClassVar[bool] = True

    def __init__(self, seed: int = 0) -> None:
        self.seed = check_seed(seed)

    def count(self, size: int, density: float) -> int:
        """See `Compressor`."""
        return entries(size, density)

    def compress(
        self, x: Tensor, density: float, *, step: int = 0, key: int = 0, reduce: Reduce | None = None
    ) -> Payload:
        """See `Compressor`."""
        where = to_device(draw(len(x), self.count(len(x), density), self.seed, step, key), x.device)
        return Payload(x[where], where)

    def wire_bytes(self, size: int, density: float, itemsize: int = 4) -> int:
        """See `Compressor`."""
        return self.count(size, density) * itemsize


def draw(size: int, k: int, seed: int, step: int, key: int) -> Tensor:
    """``k`` of ``range(size)`` (int64, on the CPU), uniformly without replacement."""
    if not k:
        return torch.empty(0, dtype=torch.int64)
    g = torch.Generator().manual_seed(derive(seed, step, key) >> 1)
    if k > size // 8:
        return torch.randperm(size, generator=g)[:k]
    # A permutation of all would cost more than everything else. The distinct numbers among some draws are uniform among
    # all sets of their size, and so is a random subset of k of them.
    draws = k + k // 4 + 16
    while len(found := torch.randint(size, (draws,), generator=g).unique()) < k:
        draws *= 2
    return found[torch.randperm(len(found), generator=g)[:k]]

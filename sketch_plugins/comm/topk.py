"""The k entries of largest magnitude."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sketch_plugins.comm.base import Compressor, Payload, Reduce, entries, largest


class TopK(Compressor):
    r"""The k = density * d entries of largest magnitude of the whole vector, of equal ones any.

    On the wire: k values and k indices of 4 bytes (8 from 2**31 entries on).

    Source: top-k of https://arxiv.org/abs/1809.07599.
    """

    name: ClassVar[str] = "topk"
    shared: ClassVar[bool] = False

    def count(self, size: int, density: float) -> int:
        """See `Compressor`."""
        return entries(size, density)

    def compress(
        self, x: Tensor, density: float, *, step: int = 0, key: int = 0, reduce: Reduce | None = None
    ) -> Payload:
        """See `Compressor`."""
        where = largest(x, self.count(len(x), density))
        return Payload(x[where], where.to(_index_dtype(len(x))))

    def wire_bytes(self, size: int, density: float, itemsize: int = 4) -> int:
        """See `Compressor`."""
        return self.count(size, density) * (itemsize + _index_dtype(size).itemsize)


def _index_dtype(size: int) -> torch.dtype:
    return torch.int32 if size < 1 << 31 else torch.int64

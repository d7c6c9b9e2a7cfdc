"""The k entries of largest magnitude."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sketch_plugins.comm.base import Compressor, Payload, Reduce, entries, largest

# Number of entries that an offset of 2 bytes can address.
_RUN = 1 << 16


class TopK(Compressor):
    r"""Sends the k = density * d entries of largest magnitude of the whole vector; of equal ones any.

    It sends k values in the order of their positions and the last 2 bytes of each position. For a vector of more than
    2**16 entries it also sends how many of them are in each run of 2**16, with 4 bytes a run.

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
        where = largest(x, self.count(len(x), density)).sort().values
        offsets, runs = _low(where), _runs(len(x))
        if not runs:
            return Payload(x[where], offsets)
        ends = torch.searchsorted(where, torch.arange(1, runs + 1, device=x.device) * _RUN)
        counts = ends.diff(prepend=ends.new_zeros(1))
        return Payload(x[where], torch.cat([_low(counts), _low(counts >> 16), offsets]))

    def positions(self, index: Tensor, size: int, density: float) -> Tensor:
        """See `Compressor`."""
        runs = _runs(size)
        low = index.long() & (_RUN - 1)
        if not runs:
            return low
        counts, offsets = low[:runs] + (low[runs : 2 * runs] << 16), low[2 * runs :]
        # The run of the j-th entry is the number of runs that end before it. This does not wait for the device.
        run = torch.searchsorted(counts.cumsum(0), torch.arange(len(offsets), device=index.device), right=True)
        return offsets + run * _RUN

    def wire_bytes(self, size: int, density: float, itemsize: int = 4) -> int:
        """See `Compressor`."""
        return self.count(size, density) * (itemsize + 2) + 4 * _runs(size)


def _runs(size: int) -> int:
    """Number of runs of 2**16 entries whose counts are sent: 0 if there is only one run."""
    return -(-size // _RUN) if size > _RUN else 0


def _low(numbers: Tensor) -> Tensor:
    """The last 16 bits of each number, as int16."""
    low = numbers & (_RUN - 1)
    return (low - ((low >> 15) << 16)).to(torch.int16)

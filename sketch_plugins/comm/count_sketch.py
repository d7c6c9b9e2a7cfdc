"""Heavy hitters of the sum over all ranks, found in a count-sketch that an all-reduce sums."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from sketch_plugins.comm.base import Compressor, Payload, Reduce, check_seed, entries, largest, to_device
from sketch_plugins.hashing import derive

# Shorter runs are rotated by an index, many at once, because a call for each would take longer than its work.
MANY = 1 << 13
BATCH = 1 << 20


class CountSketchTopK(Compressor):
    r"""Sends the k = density * d entries whose *sum over the ranks* is largest, as estimated from a count-sketch of it.

    A sketch S is linear, :math:`\sum_i S(x_i) = S(\sum_i x_i)`, so the ranks' sketches are all-reduced, and the message
    does not grow with the number of ranks. Every rank then reads the same estimates from the sketch (the median of
    ``depth`` tables) and picks the same k entries. A second all-reduce sums the exact values of these entries, so no
    index is sent.

    Table j has W cells. The vector is cut into runs of W entries. Run b is rotated by a random number of places,
    multiplied by a random sign, and added to the table; the rotation and the sign are drawn from ``(seed, key, j, b)``.
    Entries of different runs share a cell with probability 1 / W, as in any count-sketch, and entries of one run never
    do. All additions stream through memory.

    It sends ``depth * W`` numbers of float32, then k values; ``W = width * k``, at most d. (The tables of float64
    gradients are float64. Half precision would not do for sums of many entries, because rounding would hide the large
    ones.)

    Args:
        depth: number of tables, >= 1 (default 3).
        width: cells of each table for one entry that is sent, >= 1 (default 2).
        seed: any integer; equal on all ranks.

    Raises:
        ValueError: ``depth`` or ``width`` is below 1; ``seed`` is no integer.

    Source: https://arxiv.org/abs/2007.07682 (FetchSGD), https://arxiv.org/abs/1902.06094 (an exact second round).
    Deviations from FetchSGD: each rank keeps its errors exactly, where FetchSGD's server keeps them in the sketch; and
    the exact value of an entry is sent, not its estimate. So no error is lost.
    """

    name: ClassVar[str] = "count_sketch"
    shared: ClassVar[bool] = True

    def __init__(self, depth: int = 3, width: float = 2.0, seed: int = 0) -> None:
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 1:
            raise ValueError(f"depth={depth!r} is not allowed: depth must be an integer >= 1")
        if not isinstance(width, (int, float)) or isinstance(width, bool) or not 1 <= width < math.inf:
            raise ValueError(f"width={width!r} is not allowed: width must be a number >= 1")
        self.depth, self.width, self.seed = depth, width, check_seed(seed)

    def count(self, size: int, density: float) -> int:
        """See `Compressor`."""
        return entries(size, density)

    def cells(self, size: int, density: float) -> int:
        """W, the number of cells of each table."""
        return min(size, math.ceil(self.width * self.count(size, density)))

    def sketch(self, x: Tensor, cells: int, key: int = 0) -> Tensor:
        """``(depth, cells)``: the tables of a vector."""
        tables = x.new_zeros(self.depth, cells)
        if not cells:  # the vector is empty
            return tables
        for j, shifts, signs in self._hashes(len(x), cells, key):
            if cells < MANY:
                for rows, index, flips in _batches(len(x), cells, shifts, signs, x.device, -1):
                    part = torch.nn.functional.pad(x[rows], (0, index.numel() - len(x[rows]))).view(index.shape)
                    tables[j] += part.gather(1, index).mul_(flips.to(x.dtype)).sum(0)
                continue
            for run, shift, sign in zip(x.split(cells), shifts, signs, strict=True):
                # Rotated by `shift`: the first part of the run is added from `shift` on, the rest at the front.
                head = min(len(run), cells - shift)
                tables[j, shift : shift + head].add_(run[:head], alpha=sign)
                tables[j, : len(run) - head].add_(run[head:], alpha=sign)
        return tables

    def estimate(self, tables: Tensor, size: int, key: int = 0) -> Tensor:
        """``(size,)``: for each entry the median of the estimates of all tables."""
        cells = tables.shape[1]
        if not cells:  # the vector is empty
            return tables.new_empty(size)
        hashes = [(shifts, signs) for _, shifts, signs in self._hashes(size, cells, key)]
        out = tables.new_empty(size)
        if cells < MANY:
            ways = [_batches(size, cells, shifts, signs, tables.device, 1) for shifts, signs in hashes]
            for batch in zip(*ways, strict=True):
                seen = torch.stack([
                    tables[j][index].mul_(sign.to(tables.dtype)) for j, (_, index, sign) in enumerate(batch)
                ])  # fmt: skip
                run = out[batch[0][0]]
                run.copy_(_median(seen).flatten()[: len(run)])
            return out
        for b, run in enumerate(out.split(cells)):
            seen = torch.stack([
                tables[j].roll(-shifts[b])[: len(run)] * signs[b] for j, (shifts, signs) in enumerate(hashes)
            ])  # fmt: skip
            run.copy_(_median(seen))
        return out

    def compress(
        self, x: Tensor, density: float, *, step: int = 0, key: int = 0, reduce: Reduce | None = None
    ) -> Payload:
        """See `Compressor`."""
        tables = self.sketch(x, self.cells(len(x), density), key)
        if reduce is not None:
            reduce(tables)
        where = largest(self.estimate(tables, len(x), key), self.count(len(x), density))
        return Payload(x[where], where)

    def wire_bytes(self, size: int, density: float, itemsize: int = 4) -> int:
        """See `Compressor`."""
        return self.depth * self.cells(size, density) * max(4, itemsize) + self.count(size, density) * itemsize

    def _hashes(self, size: int, cells: int, key: int) -> list[tuple[int, list[int], list[float]]]:
        runs = -(-size // cells) if size else 0
        found = []
        for j in range(self.depth):
            g = torch.Generator().manual_seed(derive(self.seed, key, j) >> 1)
            shifts = torch.randint(cells, (runs,), generator=g).tolist() if runs else []
            signs = (torch.randint(2, (runs,), generator=g) * 2.0 - 1.0).tolist() if runs else []
            found.append((j, shifts, signs))
        return found


def _batches(
    size: int, cells: int, shifts: list[int], signs: list[float], device: torch.device, way: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For batches of runs: their places in the vector, their rotations ``(runs, cells)``, and their signs."""
    step, inside = max(1, BATCH // cells), torch.arange(cells, device=device)
    for first in range(0, len(shifts), step):
        shift = to_device(torch.tensor(shifts[first : first + step]), device).unsqueeze(1)
        sign = to_device(torch.tensor(signs[first : first + step]), device).unsqueeze(1)
        begin, end = first * cells, min(size, (first + step) * cells)
        yield slice(begin, end), (inside + way * shift) % cells, sign


def _median(x: Tensor) -> Tensor:
    if len(x) == 3:  # three comparisons; sorting takes ten times as long
        a, b, c = x
        return torch.maximum(torch.minimum(a, b), torch.minimum(torch.maximum(a, b), c))
    return x[0] if len(x) == 1 else x.median(0).values

"""What count-sketch and count-min share: ``depth`` tables of ``width`` buckets, rows hashed, columns kept apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.hashing import RowHash, row_hashes
from sketch_plugins.sharding.blocks import At, Tile, row_batches
from sketch_plugins.stores.base import Ema, Gradient, State, Store

BUCKETS = ("mean", "sum")


@dataclass(frozen=True)
class Sketch(Store):
    """State ``table`` of shape ``(depth, width, D)``: row i lives in bucket ``h_j(i)`` of each table j.

    ``width`` is given, or follows from ``compression``, the fraction of rows kept as buckets in each table:
    ``width = ceil(compression * R)``, at least 1 and at most R. ``compression = 1`` hashes injectively and reproduces
    the dense method. Bytes: ``4 * depth * width / R`` a parameter.

    Dense gradients: every table decays once a step and each bucket takes the mean (or the sum) of its rows' x. Sparse
    gradients: only the buckets of touched rows change, by the order-free rule of `Ema.repeated`.
    """

    shared = True
    write_first = True

    order: int = 2
    compression: float = 0.05
    width: int = 0
    depth: int = 1
    hash: str = "strided"
    bucket: str = "mean"
    seed: int = 0

    def buckets(self, rows: int) -> int:
        """Width of each table for a parameter with ``rows`` rows."""
        width = self.width or math.ceil(self.compression * rows - 1e-9)
        return max(1, min(rows, width))

    def hashes(self, rows: int) -> tuple[RowHash, ...]:
        """The hash of each table."""
        return row_hashes(rows, self.buckets(rows), self.depth, self.hash, self.seed)

    def layout(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """One table for each hash, in the arithmetic dtype (bfloat16 could never decay at 0.999)."""
        return {"table": ((self.depth, self.buckets(shape[0]), shape[1]), dtype)}

    def period(self, rows: int) -> int:
        """Tiles follow the buckets of the strided hash where it is the only one."""
        return self.buckets(rows) if self.depth == 1 and self.hashes(rows)[0].strided else 0

    def read(self, state: State, at: At, dtype: torch.dtype) -> Tensor:
        """The combined estimate of the rows' buckets."""
        return self._estimate(state["table"], at)

    def write(self, state: State, grad: Gradient, ema: Ema) -> None:
        """Decay and add; see the class."""
        for table, h in zip(state["table"], self.hashes(grad.shape[0]), strict=True):
            if grad.rows is None:
                self._write_dense(table, h, grad, ema)
            else:
                self._write_touched(table, h, grad, ema)

    def slices(self, state: State, at: At, step: int) -> State:
        """`write` has been called: only the estimate is needed."""
        return {"estimate": self.read(state, at, state["table"].dtype)}

    def blend(self, slices: State, g: Tensor, ema: Ema) -> Tensor:
        """The estimate."""
        return slices["estimate"]

    def keep(self, state: State, at: At, slices: State) -> None:
        """Nothing to write."""

    def _cell(self, x: Tensor, sign: Callable[[], Tensor]) -> Tensor:
        """What a row adds to its bucket, as a new tensor; ``sign()`` is broadcastable to ``x``."""
        raise NotImplementedError

    def _combine(self, estimates: list[Tensor]) -> Tensor:
        """One estimate from those of the tables."""
        raise NotImplementedError

    def _signed(self, estimate: Tensor, sign: Callable[[], Tensor]) -> Tensor:
        return estimate

    def _write_dense(self, table: Tensor, h: RowHash, grad: Gradient, ema: Ema) -> None:
        table.mul_(ema.decay)
        for at in grad.batches(self.period(grad.shape[0])):
            assert isinstance(at, Tile)
            x = grad.get(at)
            self._add(table, h, at, self._cell(x, partial(_sign, h, at, x)), self._share(h, ema.gain))

    def _share(self, h: RowHash, gain: float) -> Callable[[Tensor], Tensor] | float:
        """Weight of a bucket's sum: ``gain``, or ``gain / rows of the bucket`` for the mean."""
        if self.bucket == "sum" or h.width == h.rows:
            return gain
        if h.rows % h.width == 0:
            return gain / (h.rows // h.width)
        return lambda bucket: gain / h.load(bucket).double()

    def _add(
        self, table: Tensor, h: RowHash, at: Tile, cells: Tensor, weight: Callable[[Tensor], Tensor] | float
    ) -> None:
        """``table[bucket] += weight(bucket) * sum of the bucket's cells`` for one tile, in a fixed order."""
        if self.period(h.rows):
            first = at.start % h.width
            target = table[first : first + at.rows, at.lo : at.hi]
            sums = cells[0]
            if at.cycles > 1:
                sums = torch.sum(cells, [0], **scratch.out("sums", sums))
            bucket = torch.arange(first, first + at.rows, device=table.device) if callable(weight) else None
            _add_weighted(target, sums, bucket, weight)
            return
        buckets, order = h.bucket(at.index(table.device)).sort(stable=True)
        cells = cells.flatten(0, 1)
        for bucket, sums in _segments(buckets, cells.index_select(0, order)):
            target = table[:, at.lo : at.hi]
            part = target.index_select(0, bucket)
            _add_weighted(part, sums, bucket, weight)
            target.index_copy_(0, bucket, part)

    def _write_touched(self, table: Tensor, h: RowHash, grad: Gradient, ema: Ema) -> None:
        assert grad.rows is not None
        buckets, order = h.bucket(grad.rows).sort(stable=True)
        touched, counts = buckets.unique_consecutive(return_counts=True)
        decay, gain = ema.repeated(counts)
        # First the decay of every touched bucket, then the weighted values: a segment may then span two batches.
        _scale_rows(table, touched, decay.to(table.dtype), grad)
        weights = (gain / counts).to(table.dtype).repeat_interleave(counts).unsqueeze(-1)
        for part, at in grad.picked(order):
            x = grad.get(at)
            cells = self._cell(x, partial(_sign, h, at, x)).mul_(weights[part])
            target = table[:, at.lo : at.hi]
            for bucket, sums in _segments(buckets[part], cells):
                target.index_copy_(0, bucket, target.index_select(0, bucket).add_(sums))

    def _estimate(self, tables: Tensor, at: At) -> Tensor:
        hashes = self.hashes(at.total)
        if isinstance(at, Tile) and self.period(at.total):
            first = at.start % hashes[0].width
            estimate = tables[0, first : first + at.rows, at.lo : at.hi]
            return self._combine([self._signed(estimate, partial(_sign, hashes[0], at, estimate))])
        index = at.index(tables.device)
        return self._combine(
            [
                self._signed(part, partial(_sign, h, at, part))
                for h, table in zip(hashes, tables, strict=True)
                for part in [at.from_rows(table[:, at.lo : at.hi].index_select(0, h.bucket(index)))]
            ]
        )


def _sign(h: RowHash, at: At, like: Tensor) -> Tensor:
    return at.from_rows(h.sign(at.index(like.device)).unsqueeze(-1)).to(like.dtype)


def _add_weighted(
    target: Tensor, sums: Tensor, bucket: Tensor | None, weight: Callable[[Tensor], Tensor] | float
) -> None:
    if callable(weight):
        assert bucket is not None
        target.addcmul_(sums, weight(bucket).to(sums.dtype).unsqueeze(-1))
    else:
        target.add_(sums, alpha=weight)


def _segments(buckets: Tensor, cells: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Sums of the rows of ``cells`` with equal (ascending) ``buckets``: no atomics, so the same on every run."""
    bucket, counts = buckets.unique_consecutive(return_counts=True)
    if len(bucket) == len(buckets):
        yield bucket, cells
    else:
        yield bucket, torch.segment_reduce(cells, "sum", lengths=counts, axis=0)


def _scale_rows(table: Tensor, rows: Tensor, factor: Tensor, grad: Gradient) -> None:
    for part, at in row_batches(len(table), rows, table.shape[1], grad.chunk):
        at.put(table, at.get(table).mul_(factor[part].unsqueeze(-1)))

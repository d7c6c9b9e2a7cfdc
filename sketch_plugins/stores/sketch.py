"""The base of count-sketch and count-min: ``depth`` tables of ``width`` buckets. Rows are hashed, columns are not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.hashing import CLEANING, TABLE1, TABLE2, RowHash, row_hashes
from sketch_plugins.kernels.rounding import round_to_bf16
from sketch_plugins.sharding.blocks import At, Rows, Tile, column_cuts, tiles
from sketch_plugins.stores.base import CHUNK, Ema, Estimates, Gradient, State, Store, Touched, given

# The elements of rows, and a function that returns the rows' signs -> what the rows add to their buckets.
Cell = Callable[[Tensor, Callable[[], Tensor]], Tensor]

BUCKETS = ("mean", "sum")
TABLE_DTYPES = ("fp32", "bf16")
# How many numbers of a bfloat16 table are rewritten at one time when no gradient sets the size of a chunk.
_REWRITE = 1 << 18


@dataclass(frozen=True)
class Sketch(Store):
    """State ``table`` of shape ``(depth, width, D)``: row i belongs to bucket ``h_j(i)`` of each table j.

    ``width`` is given, or follows from ``compression``, the number of buckets as a fraction of the rows:
    ``width = ceil(compression * R)``, at least 1 and at most R. With ``compression = 1`` each row has a bucket of its
    own, which is the dense method. Bytes a parameter: ``4 * depth * width / R``, or half of that with ``bf16``.

    With several ``matrices``, R and ``width`` are those of one matrix. Each matrix has buckets of its own, and the
    buckets of the matrices follow each other, as their rows do.

    With a dense gradient every table decays once a step, and each bucket takes the mean (or the sum) of its rows' x.
    With a sparse gradient only the buckets of touched rows change, as `Ema.repeated` describes.

    ``bf16`` tables are computed in the arithmetic dtype and rounded stochastically: away from zero with a probability
    equal to the fraction that is cut off. So the expected value of a cell is what float32 would hold. Rounding to
    nearest is not offered. At ``decay = 0.999`` a step lowers a cell by at most 1/1000 of its value, and half a unit in
    the last place of bfloat16 is 1/512 to 1/256 of it. Every decrease would be rounded away, and no cell could ever
    fall. A write rounds each cell once, however many tiles its rows come from. The noise is a function of (seed, step,
    cell), so it does not depend on the chunk size and is the same in a repeated or resumed run. The step reads the
    rounded table. Apart from the step's own write, only cleaning and the initial value round, with their own noise.
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
    bf16: bool = False
    matrices: int = 1

    def buckets(self, rows: int) -> int:
        """Width of each table for a parameter with ``rows`` rows; both numbers are those of all matrices."""
        rows //= self.matrices
        width = self.width or math.ceil(self.compression * rows - 1e-9)
        return self.matrices * max(1, min(rows, width))

    def hashes(self, rows: int) -> tuple[RowHash, ...]:
        """The hash of each table."""
        return row_hashes(rows, self.buckets(rows), self.depth, self.hash, self.seed, self.matrices)

    @property
    def noise_seed(self) -> int:
        """Seed of the noise that rounds bfloat16 tables. First and second moments have different streams."""
        return self.seed ^ (TABLE1 if self.order == 1 else TABLE2)

    def layout(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """One table for each hash, in the arithmetic dtype or in bfloat16."""
        return {"table": ((self.depth, self.buckets(shape[0]), shape[1]), torch.bfloat16 if self.bf16 else dtype)}

    def period(self, rows: int) -> int:
        """The buckets of one matrix, at which tiles are cut if there is one table and its hash is strided; else 0."""
        hash = self.hashes(rows)[0]
        return hash.own if self.depth == 1 and hash.strided else 0

    def bucket_of(self, at: Tile) -> int:
        """The bucket of the first row of a tile that was cut at the period."""
        return self.hashes(at.total)[0].bucket_of_place(at.start)

    def read(self, state: State, at: At, dtype: torch.dtype) -> Tensor:
        """The estimates of all tables for the rows, combined."""
        return self._estimate(state["table"], at, dtype)

    def write(self, state: State, grad: Gradient, ema: Ema) -> None:
        """Decay every table and add the gradient, as the class describes."""
        for j, h in enumerate(self.hashes(grad.shape[0])):
            if grad.rows is None:
                self._write_dense(state["table"], j, h, grad, ema)
            else:
                segments = Segments.of(h, grad.rows)
                decay, gain = ema.repeated(segments.counts)
                weights = (gain / segments.counts).to(grad.dtype).repeat_interleave(segments.counts)
                self._fold_touched(state["table"], j, h, grad, segments, decay.to(grad.dtype), weights, ema.step)

    def slices(self, state: State, at: At, step: int) -> State:
        """The estimate alone, because `write` was called before."""
        table = state["table"]
        return {"estimate": self.read(state, at, torch.float32 if self.bf16 else table.dtype)}

    def blend(self, slices: State, g: Tensor, ema: Ema) -> Tensor:
        """The estimate, which already contains the gradient."""
        return slices["estimate"].to(g.dtype)

    def write_back(self, state: State, at: At, slices: State) -> None:
        """Do nothing, because `write` was called before."""

    def assign(self, state: State, values: Tensor | Gradient) -> None:
        """Set each bucket to the (signed) mean or sum of its rows' values."""
        values = given(values, self.order)
        for j, h in enumerate(self.hashes(values.shape[0])):
            share = self._share(h, values.device)
            self._fold(state["table"], j, h, values, 0.0, share, 0, cell=self._value_cell)

    def estimate_scale(self, state: State, shape: tuple[int, int]) -> float:
        r"""For tables that sum: the c for which the sketch of ``c * read`` is nearest to the present table.

        Every row of a bucket reads the bucket's whole sum. If these estimates were summed again, the result would be
        too large by the number of rows in the bucket. With A the linear map of `assign` and S the table,
        :math:`c = \langle S, A\,read \rangle / \|A\,read\|^2`. For one table that is one over the number of rows in a
        bucket, and the sketch is S again. The computation allocates a second table, of the arithmetic dtype.
        """
        if self.bucket == "mean":
            return 1.0
        table = state["table"]
        dtype = torch.float32 if self.bf16 else table.dtype
        exact = replace(self, bf16=False)
        again = exact.allocate(shape, table.device, dtype)
        exact.assign(again, Gradient(Estimates(self, state, shape, dtype), None, dtype, CHUNK, shape))
        dot = norm = 0.0
        for new, old in zip(again["table"].view(-1).split(CHUNK), table.reshape(-1).split(CHUNK), strict=True):
            new, old = new.double(), old.double()  # products of second moments above 2e19 overflow float32
            dot += float(torch.dot(new, old))
            norm += float(torch.dot(new, new))
        return dot / norm if norm > 0 else 1.0

    def _cell(self, x: Tensor, sign: Callable[[], Tensor]) -> Tensor:
        """What a row with gradient ``x`` adds to its bucket, as a new tensor. ``sign()`` broadcasts to ``x``."""
        raise NotImplementedError

    def _value_cell(self, x: Tensor, sign: Callable[[], Tensor]) -> Tensor:
        """What a row with accumulator ``x`` adds to its bucket, as a new tensor."""
        raise NotImplementedError

    def _combine(self, estimates: list[Tensor]) -> Tensor:
        """One estimate from those of the tables."""
        raise NotImplementedError

    def _signed(self, estimate: Tensor, sign: Callable[[], Tensor]) -> Tensor:
        return estimate

    def _write_dense(self, tables: Tensor, j: int, h: RowHash, grad: Gradient, ema: Ema) -> None:
        self._fold(tables, j, h, grad, ema.decay, self._share(h, grad.device) * ema.gain, ema.step)

    def _share(self, h: RowHash, device: torch.device) -> Tensor | float:
        """The factor that a row's number is multiplied by when it enters its bucket."""
        return mean_weight(h, device) if self.bucket == "mean" and h.width < h.rows else 1.0

    def _fold(
        self,
        tables: Tensor,
        j: int,
        h: RowHash,
        grad: Gradient,
        decay: Tensor | float,
        gain: Tensor | float,
        step: int,
        weights: Tensor | None = None,
        cell: Cell | None = None,
    ) -> None:
        """``bucket <- decay * bucket + gain * sum of its rows' cells``, for table j, each slice of it written once.

        ``decay`` and ``gain`` are numbers or ``(width, 1)``. ``weights (R, 1)`` multiplies the rows' cells. ``cell``
        is `_cell` by default. A bucket's members are ``width`` places apart, in a fixed order, so tiles of places are
        tiles of rows if the hash is strided.
        """
        cell = cell or self._cell
        # The noise is made of int64, which takes twice the memory.
        chunk = grad.chunk // 2 if self.bf16 else grad.chunk
        cut = tiles(*grad.shape, max(1, chunk), h.own, matrices=h.matrices)
        slices = groupby(cut, lambda at: (h.bucket_of_place(at.start), at.lo, at.hi))
        together = ((key, list(places)) for key, places in slices)
        for (first, lo, hi), places in grad.distinct(together, lambda one: tuple(at.shape for at in one[1])):
            total: Tensor | None = None
            for place in places:
                at: At = place
                if not h.strided:
                    at = Rows(h.rows, h.row(place.index(grad.device)), lo, hi)
                x = grad.get(at)
                cells = cell(x, partial(_sign, h, at, x))
                if weights is not None:
                    cells.mul_(at.get(weights, 0, 1))
                if not h.strided:
                    cells = place.from_rows(cells)
                # This uses the slot of the factors, because a step needs them only after its sketches are written.
                slot = scratch.out("factor" if total is None else "sums", cells[0])
                sums = torch.sum(cells, [0], **slot) if place.cycles > 1 or total is None else cells[0]
                if total is None:
                    total = sums  # the first sum has at least as many buckets as the others
                else:
                    total[: len(sums)].add_(sums)
            assert total is not None
            part = slice(first, first + len(total))
            total.mul_(gain[part] if isinstance(gain, Tensor) else gain)
            where = Tile(self.depth * h.width, j * h.width + first, 1, len(total), lo, hi)
            self._blend(tables, where, decay[part] if isinstance(decay, Tensor) else decay, total, step)

    def _fold_touched(
        self,
        tables: Tensor,
        j: int,
        h: RowHash,
        grad: Gradient,
        segments: Segments,
        decay: Tensor,
        weights: Tensor,
        step: int,
    ) -> None:
        """`_fold` for touched rows: ``decay`` has one number for each touched bucket, ``weights`` for each row."""
        assert grad.rows is not None
        ends = [0, *segments.counts.cumsum(0).tolist()]
        number = torch.arange(len(segments.touched), device=grad.device).repeat_interleave(segments.counts)
        chunk = grad.chunk // 2 if self.bf16 else grad.chunk
        for lo, hi in column_cuts(grad.shape[1], max(1, chunk), 1):
            n = max(1, chunk // (hi - lo))
            for first in range(0, len(segments.touched), n):
                last = min(first + n, len(segments.touched))
                total: Tensor | None = None
                for begin in range(ends[first], ends[last], n):  # the rows of a bucket may span several batches
                    part = slice(begin, min(begin + n, ends[last]))
                    position = segments.order[part]
                    at = Touched(grad.shape[0], grad.rows[position], lo, hi, position)
                    x = grad.get(at)
                    cells = self._cell(x, partial(_sign, h, at, x)).mul_(weights[part].unsqueeze(-1))
                    bucket, sums = _segments(number[part], cells)
                    if ends[first] + n >= ends[last]:
                        total = sums
                        continue
                    if total is None:
                        total = torch.zeros(last - first, hi - lo, dtype=grad.dtype, device=grad.device)
                    bucket = bucket - first
                    total.index_copy_(0, bucket, total.index_select(0, bucket).add_(sums))
                assert total is not None
                where = Rows(self.depth * h.width, segments.touched[first:last] + j * h.width, lo, hi)
                self._blend(tables, where, decay[first:last].unsqueeze(-1), total, step)

    def _blend(self, tables: Tensor, where: At, decay: Tensor | float, total: Tensor, step: int) -> None:
        """Write ``decay * cell + total`` to cells of ``tables``, which are seen as one matrix, table after table."""
        flat = tables.view(-1, tables.shape[-1])
        cells = where.get(flat)
        if not self.bf16:
            cells.mul_(decay).add_(total)
            if isinstance(where, Rows):
                where.put(flat, cells)
            return
        new = scratch.cast("decoded", cells, total.dtype).mul_(decay).add_(total)
        where.put(flat, self._rounded(new, where, flat.shape[1], self.noise_seed, step))

    def _rewrite(self, table: Tensor, value: Callable[[Tensor], Tensor], seed: int, step: int) -> None:
        """Apply ``value`` to every cell in place, outside of a step's own write."""
        if not self.bf16:
            value(table)
            return
        flat = table.view(1, -1)
        for lo in range(0, flat.shape[1], _REWRITE):
            where = Tile(1, 0, 1, 1, lo, min(lo + _REWRITE, flat.shape[1]))
            new = value(where.get(flat).float())
            where.put(flat, self._rounded(new, where, flat.shape[1], seed, step))

    def _cleaned(self, table: Tensor, factor: float, step: int) -> None:
        # zero_ is not 0 * infinity: cleaning with 0 starts again even if squares have overflowed.
        clean = (lambda cells: cells.mul_(factor)) if factor else Tensor.zero_
        self._rewrite(table, clean, self.noise_seed ^ CLEANING, step)

    def _filled(self, table: Tensor, value: float) -> None:
        self._rewrite(table, lambda cells: cells.fill_(value), self.noise_seed, 0)

    @staticmethod
    def _rounded(new: Tensor, where: At, columns: int, seed: int, step: int) -> Tensor:
        return round_to_bf16(new.float(), where, columns, seed, step)

    def _estimate(self, tables: Tensor, at: At, dtype: torch.dtype) -> Tensor:
        hashes = self.hashes(at.total)
        if isinstance(at, Tile) and self.period(at.total):
            first = hashes[0].bucket_of_place(at.start)
            estimate = tables[0, first : first + at.rows, at.lo : at.hi]
            if estimate.dtype != dtype:
                estimate = scratch.cast(f"estimate {self.order}", estimate, dtype)
            return self._combine([self._signed(estimate, partial(_sign, hashes[0], at, estimate))])
        index = at.index(tables.device)
        return self._combine(
            [
                self._signed(part, partial(_sign, h, at, part))
                for h, table in zip(hashes, tables, strict=True)
                for part in [at.from_rows(table[:, at.lo : at.hi].index_select(0, h.bucket(index)).to(dtype))]
            ]
        )


class Segments(NamedTuple):
    """Touched rows sorted by bucket.

    Attributes:
        order: positions among the touched rows, sorted by bucket.
        touched: the numbers of the touched buckets, ascending.
        counts: how many of the touched rows belong to each of these buckets.
    """

    order: Tensor
    touched: Tensor
    counts: Tensor

    @classmethod
    def of(cls, h: RowHash, rows: Tensor) -> Segments:
        """Sort the touched rows by their buckets."""
        buckets, order = h.bucket(rows).sort(stable=True)
        # If all rows are touched, the counts are known without the numbers, which a rehearsal does not have.
        if len(rows) == h.rows:
            every = torch.arange(h.width, device=rows.device)
            return cls(order, every, h.load(every))
        return cls(order, *buckets.unique_consecutive(return_counts=True))

    def means(self, values: Tensor) -> Tensor:
        """The mean of ``values``, which has one number for each touched row, over the touched rows of each bucket."""
        sums = torch.segment_reduce(values.index_select(0, self.order), "sum", lengths=self.counts)
        return sums / self.counts


def mean_weight(h: RowHash, device: torch.device) -> Tensor | float:
    """One over the number of rows of each bucket: a number if all are equal, else ``(width, 1)`` in float64."""
    if h.rows % h.width == 0:
        return h.width / h.rows
    return 1.0 / h.load(torch.arange(h.width, device=device)).double().unsqueeze(-1)


def _sign(h: RowHash, at: At, like: Tensor) -> Tensor:
    return at.from_rows(h.sign(at.index(like.device)).unsqueeze(-1)).to(like.dtype)


def _segments(buckets: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the rows of ``cells`` with equal (ascending) ``buckets``. Without atomics, every run gives equal bits."""
    bucket, counts = buckets.unique_consecutive(return_counts=True)
    if len(bucket) == len(buckets):
        return bucket, cells
    return bucket, torch.segment_reduce(cells, "sum", lengths=counts, axis=0)

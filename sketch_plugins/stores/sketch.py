"""What count-sketch and count-min share: ``depth`` tables of ``width`` buckets, rows hashed, columns kept apart."""

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

# A row's number and its sign -> what enters a bucket.
Cell = Callable[[Tensor, Callable[[], Tensor]], Tensor]

BUCKETS = ("mean", "sum")
TABLE_DTYPES = ("fp32", "bf16")
# Numbers of a bfloat16 table that are rewritten at a time where no gradient says how large a chunk is.
_REWRITE = 1 << 18


@dataclass(frozen=True)
class Sketch(Store):
    """State ``table`` of shape ``(depth, width, D)``: row i lives in bucket ``h_j(i)`` of each table j.

    ``width`` is given, or follows from ``compression``, the fraction of rows kept as buckets in each table:
    ``width = ceil(compression * R)``, at least 1 and at most R. ``compression = 1`` hashes injectively and reproduces
    the dense method. Bytes: ``4 * depth * width / R`` a parameter, with ``bf16`` 2 in place of 4.

    Of ``matrices`` matrices, whose rows follow each other, R and ``width`` are those of one: each has buckets of its
    own, which follow each other, too.

    Dense gradients: every table decays once a step and each bucket takes the mean (or the sum) of its rows' x. Sparse
    gradients: only the buckets of touched rows change, by the order-free rule of `Ema.repeated`.

    ``bf16`` tables are computed in the arithmetic dtype and rounded stochastically, away from zero with a probability
    equal to the fraction that is cut off, so that the expected value of a cell is what float32 would hold. Rounding to
    nearest is not offered: at ``decay = 0.999`` a step changes a cell by at most 1/1000 of its value, and half a unit
    in the last place of bfloat16 is 1/512 to 1/256 of it: every step would be rounded away, and no cell could ever
    fall. A write rounds each cell once, however many tiles its rows come from; the noise is a function of (seed,
    step, cell), so that it repeats, resumes and does not depend on the chunk size. What the step reads is the rounded
    table. Besides the step's own write only cleaning and the initial value round, with noise of their own.
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
        """Width of each table for a parameter with ``rows`` rows, of all matrices."""
        rows //= self.matrices
        width = self.width or math.ceil(self.compression * rows - 1e-9)
        return self.matrices * max(1, min(rows, width))

    def hashes(self, rows: int) -> tuple[RowHash, ...]:
        """The hash of each table."""
        return row_hashes(rows, self.buckets(rows), self.depth, self.hash, self.seed, self.matrices)

    @property
    def noise_seed(self) -> int:
        """Seed of the noise that rounds bfloat16 tables: first and second moments have streams of their own."""
        return self.seed ^ (TABLE1 if self.order == 1 else TABLE2)

    def layout(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """One table for each hash, in the arithmetic dtype or in bfloat16."""
        return {"table": ((self.depth, self.buckets(shape[0]), shape[1]), torch.bfloat16 if self.bf16 else dtype)}

    def period(self, rows: int) -> int:
        """Tiles follow the buckets of the strided hash where it is the only one."""
        hash = self.hashes(rows)[0]
        return hash.own if self.depth == 1 and hash.strided else 0

    def bucket_of(self, at: Tile) -> int:
        """The bucket of the first row of a tile that respects the period."""
        return self.hashes(at.total)[0].bucket_of_place(at.start)

    def read(self, state: State, at: At, dtype: torch.dtype) -> Tensor:
        """The combined estimate of the rows' buckets."""
        return self._estimate(state["table"], at, dtype)

    def write(self, state: State, grad: Gradient, ema: Ema) -> None:
        """Decay and add; see the class."""
        for j, h in enumerate(self.hashes(grad.shape[0])):
            if grad.rows is None:
                self._write_dense(state["table"], j, h, grad, ema)
            else:
                segments = Segments.of(h, grad.rows)
                decay, gain = ema.repeated(segments.counts)
                weights = (gain / segments.counts).to(grad.dtype).repeat_interleave(segments.counts)
                self._fold_touched(state["table"], j, h, grad, segments, decay.to(grad.dtype), weights, ema.step)

    def slices(self, state: State, at: At, step: int) -> State:
        """`write` has been called: only the estimate is needed."""
        table = state["table"]
        return {"estimate": self.read(state, at, torch.float32 if self.bf16 else table.dtype)}

    def blend(self, slices: State, g: Tensor, ema: Ema) -> Tensor:
        """The estimate."""
        return slices["estimate"].to(g.dtype)

    def write_back(self, state: State, at: At, slices: State) -> None:
        """Nothing to write."""

    def assign(self, state: State, values: Tensor | Gradient) -> None:
        """Each bucket the (signed) mean or sum of its rows' values."""
        values = given(values, self.order)
        for j, h in enumerate(self.hashes(values.shape[0])):
            share = self._share(h, values.device)
            self._fold(state["table"], j, h, values, 0.0, share, 0, cell=self._value_cell)

    def estimate_scale(self, state: State, shape: tuple[int, int]) -> float:
        r"""Of tables that sum, the c for which the sketch of ``c * read`` is nearest to the present table.

        Every row of a bucket reads the whole sum, and their sum would be the bucket's load times it. With A the linear
        map of `assign` and S the table, :math:`c = \langle S, A\,read \rangle / \|A\,read\|^2`: one over the load
        for one table, whose sketch is then S again. Bytes beside the state: as many again.
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
            new, old = new.double(), old.double()  # products of two second moments overflow float32 from 2e19 on
            dot += float(torch.dot(new, old))
            norm += float(torch.dot(new, new))
        return dot / norm if norm > 0 else 1.0

    def _cell(self, x: Tensor, sign: Callable[[], Tensor]) -> Tensor:
        """What a row adds to its bucket, as a new tensor; ``sign()`` is broadcastable to ``x``."""
        raise NotImplementedError

    def _value_cell(self, x: Tensor, sign: Callable[[], Tensor]) -> Tensor:
        """What a row whose accumulator is ``x`` adds to its bucket, as a new tensor."""
        raise NotImplementedError

    def _combine(self, estimates: list[Tensor]) -> Tensor:
        """One estimate from those of the tables."""
        raise NotImplementedError

    def _signed(self, estimate: Tensor, sign: Callable[[], Tensor]) -> Tensor:
        return estimate

    def _write_dense(self, tables: Tensor, j: int, h: RowHash, grad: Gradient, ema: Ema) -> None:
        self._fold(tables, j, h, grad, ema.decay, self._share(h, grad.device) * ema.gain, ema.step)

    def _share(self, h: RowHash, device: torch.device) -> Tensor | float:
        """What a row's number is multiplied by as it enters its bucket."""
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
        """``bucket <- decay * bucket + gain * sum of its rows' cells``: a slice of table j at a time, written once.

        ``decay`` and ``gain`` are numbers or ``(width, 1)``; ``weights (R, 1)`` multiplies the rows' cells; ``cell`` is
        `_cell` where it is not given. A bucket's members are ``width`` places apart, in a fixed order: tiles of places
        are tiles of rows of a strided hash.
        """
        cell = cell or self._cell
        # The noise is made of int64.
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
                # The slot of the factors: nothing else of a step is needed before its sketches are written.
                slot = scratch.out("factor" if total is None else "sums", cells[0])
                sums = torch.sum(cells, [0], **slot) if place.cycles > 1 or total is None else cells[0]
                if total is None:
                    total = sums  # the first of them is as large as any
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
        """The same for touched rows: ``decay`` for each touched bucket, ``weights`` for each row, sorted by bucket."""
        assert grad.rows is not None
        ends = [0, *segments.counts.cumsum(0).tolist()]
        number = torch.arange(len(segments.touched), device=grad.device).repeat_interleave(segments.counts)
        chunk = grad.chunk // 2 if self.bf16 else grad.chunk
        for lo, hi in column_cuts(grad.shape[1], max(1, chunk), 1):
            n = max(1, chunk // (hi - lo))
            for first in range(0, len(segments.touched), n):
                last = min(first + n, len(segments.touched))
                total: Tensor | None = None
                for begin in range(ends[first], ends[last], n):  # a long segment may span several batches
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
        """``decay * cell + total``, for cells of all tables seen as one behind the other."""
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
        """Every cell in place, outside of a step's own write."""
        if not self.bf16:
            value(table)
            return
        flat = table.view(1, -1)
        for lo in range(0, flat.shape[1], _REWRITE):
            where = Tile(1, 0, 1, 1, lo, min(lo + _REWRITE, flat.shape[1]))
            new = value(where.get(flat).float())
            where.put(flat, self._rounded(new, where, flat.shape[1], seed, step))

    def _cleaned(self, table: Tensor, factor: float, step: int) -> None:
        # Not 0 * infinity: cleaning with 0 is a new beginning, also after squares that have overflowed.
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
        order: positions among the touched rows, by bucket.
        touched: the buckets, ascending.
        counts: how many of the touched rows each of them has.
    """

    order: Tensor
    touched: Tensor
    counts: Tensor

    @classmethod
    def of(cls, h: RowHash, rows: Tensor) -> Segments:
        """Sort them."""
        buckets, order = h.bucket(rows).sort(stable=True)
        if (
            len(rows) == h.rows
        ):  # all of them: known without a look at the numbers, which a rehearsed step does not have
            every = torch.arange(h.width, device=rows.device)
            return cls(order, every, h.load(every))
        return cls(order, *buckets.unique_consecutive(return_counts=True))

    def means(self, values: Tensor) -> Tensor:
        """The mean over each bucket's touched rows of a number for each row."""
        sums = torch.segment_reduce(values.index_select(0, self.order), "sum", lengths=self.counts)
        return sums / self.counts


def mean_weight(h: RowHash, device: torch.device) -> Tensor | float:
    """One over the rows of each bucket: a number where they are equal, else ``(width, 1)`` in float64."""
    if h.rows % h.width == 0:
        return h.width / h.rows
    return 1.0 / h.load(torch.arange(h.width, device=device)).double().unsqueeze(-1)


def _sign(h: RowHash, at: At, like: Tensor) -> Tensor:
    return at.from_rows(h.sign(at.index(like.device)).unsqueeze(-1)).to(like.dtype)


def _segments(buckets: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the rows of ``cells`` with equal (ascending) ``buckets``: no atomics, so the same on every run."""
    bucket, counts = buckets.unique_consecutive(return_counts=True)
    if len(bucket) == len(buckets):
        return bucket, cells
    return bucket, torch.segment_reduce(cells, "sum", lengths=counts, axis=0)

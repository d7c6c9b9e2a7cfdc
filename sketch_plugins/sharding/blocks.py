"""A parameter as a matrix of rows, read and written in tiles that never copy the whole of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

# A tensor of three dimensions is read as a batch of matrices only if their shorter side is at least LEAST_SIDE.
# Matrices with NO_KERNEL columns or more cannot be the kernels of a convolution: kernels of 16 and less are common, and
# the longest known one has 128 positions (wav2vec 2.0).
LEAST_SIDE, NO_KERNEL = 16, 256


def is_vocabulary(whole: tuple[int, ...]) -> bool:
    """Whether a parameter of this shape is taken for an embedding or output layer, whose rows are words.

    These are matrices of 8,192 rows or more, and 128 columns or more, whose rows are more than 16 times the columns.
    Shapes alone cannot tell all of them: (32000, 4096) of Llama 2 is none, and an up-projection (32768, 512) is one.
    """
    return len(whole) == 2 and whole[0] >= 8192 and whole[1] >= 128 and whole[0] > 16 * whole[1]


def is_batch(shape: torch.Size | tuple[int, ...]) -> bool:
    """Whether a parameter of this shape is read as a batch of matrices ``(E, R, D)``, such as the experts of a layer.

    The weight of a 1-d convolution, ``(out, in, kernel)``, has three dimensions, too. It is recognized by its short
    kernel, or because each "matrix" has fewer rows or columns than there are matrices: ``(768, 48, 128)``.
    """
    if len(shape) != 3:
        return False
    number, rows, columns = shape
    return min(rows, columns) >= LEAST_SIDE and (number <= min(rows, columns) or columns >= NO_KERNEL)


def matrix_shape(shape: torch.Size | tuple[int, ...], batch: int = 0) -> tuple[int, int]:
    """``(R, D)`` of a parameter: dimension 0 has the rows, all others the columns; vectors have one column.

    A convolution weight ``(out, in, kh, kw)`` is ``(out, in * kh * kw)``; a 0-d parameter is ``(1, 1)``.

    Args:
        shape: shape of the parameter.
        batch: how many of its first axes are a batch of matrices. The rows of the matrices follow each other, so with
            ``batch=1`` a parameter of shape ``(E, R, D)`` is ``(E * R, D)``.
    """
    if len(shape) == 0:
        return 1, 1
    return prod(shape[: batch + 1]), prod(shape[batch + 1 :])


@dataclass(frozen=True)
class Tile:
    """Rows ``[start, start + cycles * rows)`` of ``total``, columns ``[lo, hi)``, seen as ``(cycles, rows, hi - lo)``.

    ``cycles > 1`` occurs only with a strided hash of ``rows`` buckets: each cycle then runs through all the buckets,
    and a ``(rows, hi - lo)`` slice of the table broadcasts over the tile.
    """

    total: int
    start: int
    cycles: int
    rows: int
    lo: int
    hi: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of everything read for this tile."""
        return self.cycles, self.rows, self.hi - self.lo

    def get(self, table: Tensor, lo: int | None = None, hi: int | None = None) -> Tensor:
        """The tile of a ``(R, *)`` state tensor, as a view."""
        lo, hi = (self.lo, self.hi) if lo is None else (lo, hi)
        rows = table[self.start : self.start + self.cycles * self.rows, lo:hi]
        return rows.unflatten(0, (self.cycles, self.rows))

    def put(self, table: Tensor, value: Tensor, lo: int | None = None, hi: int | None = None) -> None:
        """Write ``value`` (anything that broadcasts and casts to the tile) into the state tensor."""
        self.get(table, lo, hi).copy_(value)

    def index(self, device: torch.device) -> Tensor:
        """Row numbers, ``(cycles * rows,)``."""
        return torch.arange(self.start, self.start + self.cycles * self.rows, device=device)

    def from_rows(self, value: Tensor) -> Tensor:
        """``(cycles * rows, *)`` reshaped to ``(cycles, rows, *)``."""
        return value.unflatten(0, (self.cycles, self.rows))


@dataclass(frozen=True, eq=False)
class Rows:
    """Distinct row numbers ``rows`` (int64) of ``total`` and columns ``[lo, hi)``, seen as ``(n, hi - lo)``."""

    total: int
    rows: Tensor
    lo: int
    hi: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of everything read for these rows."""
        return len(self.rows), self.hi - self.lo

    def get(self, table: Tensor, lo: int | None = None, hi: int | None = None) -> Tensor:
        """The rows of a ``(R, *)`` state tensor, as a copy."""
        lo, hi = (self.lo, self.hi) if lo is None else (lo, hi)
        return table[:, lo:hi].index_select(0, self.rows)

    def put(self, table: Tensor, value: Tensor, lo: int | None = None, hi: int | None = None) -> None:
        """Write ``value`` into the rows; they are distinct, so the order does not matter."""
        lo, hi = (self.lo, self.hi) if lo is None else (lo, hi)
        part = table[:, lo:hi]
        part.index_copy_(0, self.rows, value.to(table.dtype).expand(len(self.rows), part.shape[1]))

    def index(self, device: torch.device) -> Tensor:
        """Row numbers, ``(n,)``."""
        return self.rows

    def from_rows(self, value: Tensor) -> Tensor:
        """``(n, *)`` unchanged."""
        return value


At = Tile | Rows


class Matrix:
    """The ``(R, D)`` view of a parameter or of its gradient, for any strides.

    Tiles are views if the layout allows it. If the rows of an n-d tensor are not contiguous (channels_last,
    transposed), the whole rows of a tile are copied. So the temporaries of a step have the size of a tile, provided
    that a row fits into one.

    Args:
        tensor: the parameter or the gradient.
        batch: how many of its first axes are a batch of matrices; see `matrix_shape`.
    """

    batch = 0

    def __init__(self, tensor: Tensor, batch: int = 0) -> None:
        self.tensor = tensor
        self.shape, self.batch = matrix_shape(tensor.shape, batch), batch
        self.dtype, self.device = tensor.dtype, tensor.device
        self._base = tensor if tensor.ndim else tensor.view(1)
        try:
            self._flat: Tensor | None = self._base.view(self.shape)
        except RuntimeError:
            self._flat = None

    def views(self, at: At) -> bool:
        """Whether ``get(at)`` is a view of the parameter, so that writing into it needs no ``put``."""
        return self._flat is not None and isinstance(at, Tile)

    def get(self, at: At) -> Tensor:
        """The tile (a view if possible) or the rows (a copy)."""
        if self._flat is not None:
            return at.get(self._flat)
        if self.batch:
            rows = self._base[self._places(at)]
        elif isinstance(at, Rows):
            rows = self._base.index_select(0, at.rows)
        else:
            rows = self._base[at.start : at.start + at.cycles * at.rows]
        return at.from_rows(rows.reshape(len(rows), -1)[:, at.lo : at.hi])

    def put(self, at: At, value: Tensor) -> None:
        """Write ``value``, shaped like ``get(at)``."""
        if self._flat is not None:
            at.put(self._flat, value)
            return
        rows = value.reshape(-1, value.shape[-1]).to(self._base.dtype)
        if at.hi - at.lo < self.shape[1]:
            if self.batch:
                whole = self._base[self._places(at)]
            else:
                whole = self._base[at.start : at.start + len(rows)] if isinstance(at, Tile) else self._base[at.rows]
            full = whole.reshape(len(rows), -1).clone()
            full[:, at.lo : at.hi] = rows
            rows = full
        rows = rows.view(len(rows), *self._base.shape[self.batch + 1 :])
        if self.batch:
            self._base[self._places(at)] = rows
        elif isinstance(at, Rows):
            self._base.index_copy_(0, at.rows, rows)
        else:
            self._base[at.start : at.start + len(rows)].copy_(rows)

    def _places(self, at: At) -> tuple[Tensor, ...]:
        """An index for each axis of the batch and for the rows of its matrices."""
        return torch.unravel_index(at.index(self.device), self._base.shape[: self.batch + 1])


def tiles(
    rows: int, columns: int, chunk: int, period: int = 0, align: int = 1, matrices: int = 1, apart: bool = False
) -> Iterator[Tile]:
    """Cut ``(rows, columns)`` into tiles of about ``chunk`` elements (never fewer than one row of ``align`` columns).

    Args:
        rows: rows of the matrix.
        columns: columns of the matrix.
        chunk: maximum number of elements in a tile.
        period: number of buckets of a strided hash (0: none). Tiles then hold whole cycles of ``period`` rows, or stay
            within one cycle, so that a slice of the table fits them without an index. Tiles that use the same slice
            follow each other; the last one may be shorter.
        align: block size of quantized state: the columns of a tile are whole blocks, or one shorter block at the end.
        matrices: how many matrices the rows belong to. Each of them has cycles of its own.
        apart: no tile has rows of two matrices, also where there are no cycles.
    """
    if matrices > 1 and (period or apart):
        height = rows // matrices
        for first in range(0, rows, height):
            for at in tiles(height, columns, chunk, period, align):
                yield replace(at, total=rows, start=first + at.start)
        return
    for lo, hi in column_cuts(columns, chunk, align):
        n = max(1, chunk // (hi - lo))
        if not period or period >= rows:
            for start in range(0, rows, n):
                yield Tile(rows, start, 1, min(n, rows - start), lo, hi)
            continue
        full = rows // period * period
        if n >= period:
            cycles = n // period
            for start in range(0, full, cycles * period):
                yield Tile(rows, start, min(cycles, (full - start) // period), period, lo, hi)
        else:
            # Equal slices of a cycle, and all cycles of one slice in a row, so that the slice of the table is read
            # once.
            n = -(-period // -(-period // n))
            for b in range(0, period, n):
                for base in range(0, rows, period):
                    if base + b < rows:
                        yield Tile(rows, base + b, 1, min(n, period - b, rows - base - b), lo, hi)
            continue
        if full < rows:
            yield Tile(rows, full, 1, rows - full, lo, hi)


def row_batches(total: int, rows: Tensor, columns: int, chunk: int, align: int = 1) -> Iterator[tuple[slice, Rows]]:
    """Cut touched rows into batches of about ``chunk`` elements, with the slice of ``rows`` that each one covers."""
    for lo, hi in column_cuts(columns, chunk, align):
        n = max(1, chunk // (hi - lo))
        for start in range(0, len(rows), n):
            part = slice(start, start + n)
            yield part, Rows(total, rows[part], lo, hi)


def column_cuts(columns: int, chunk: int, align: int) -> Iterator[tuple[int, int]]:
    """``[lo, hi)`` of at most ``chunk`` columns each, on multiples of ``align`` except for a shorter end."""
    step = columns if columns <= chunk else max(align, chunk // align * align)
    for lo in range(0, columns, step):
        hi = min(lo + step, columns)
        whole = lo + (hi - lo) // align * align
        if lo < whole:
            yield lo, whole
        if whole < hi:
            yield whole, hi

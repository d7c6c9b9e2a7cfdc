"""A piece of a parameter with its state, and its place among the parameter's rows and columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from sketch_plugins.linalg.kronecker import Kronecker
from sketch_plugins.sharding.blocks import matrix_shape
from sketch_plugins.sharding.pieces import Piece
from sketch_plugins.stores import Store

PRECONDITIONER = "preconditioner"


@dataclass(frozen=True, eq=False)
class Held:
    """A piece of a parameter, and how its state is kept.

    Attributes:
        piece: the rectangle.
        stores: ``"first_moment"``, ``"second_moment"`` -> store, for the moments that it keeps.
        preconditioner: the covariances that it has; None if it has none.
        state: of an old piece ``{"step": ..., "first_moment": {...}, ...}`` or nothing; `recut` fills that of a new
            one.
        tail: meaning of the covariances' tails, see `frequent_directions.fold`.
        batch: how many of the first axes of the whole parameter are a batch of matrices.
        apart: each row of the parameter's matrix is a matrix of a batch that has RMS of its own (``lagged_rms``).
    """

    piece: Piece
    stores: Mapping[str, Store]
    preconditioner: Kronecker | None = None
    state: dict[str, Any] = field(default_factory=dict)
    tail: str = "trace"
    batch: int = 0
    apart: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """``(rows, columns)`` of the piece, as its moments have them: the rows of all its matrices."""
        return matrix_shape(self.piece.shape, 0 if self.within_row else self.batch)

    @property
    def rectangle(self) -> tuple[Span, Span]:
        """Its rows and its columns in the parameter's matrix."""
        rows, columns = (1, self.piece.numel) if self.within_row else matrix_shape(self.piece.shape)
        row, column = self.piece.row, self.piece.column
        return Span(row, row + rows), Span(column, column + columns)

    @property
    def box(self) -> Box:
        """Its matrices, and its rows and columns in each of them. A parameter that is not a batch has one matrix."""
        rows, columns = self.rectangle
        if not self.batch:
            return Box(Span(0, 1), rows, columns)
        width = matrix_shape(self.piece.whole[1:])[1]
        first = columns.lo // width
        if columns.lo % width == 0 and columns.hi % width == 0:
            return Box(rows, Span(first, columns.hi // width), Span(0, width))
        return Box(rows, Span(first, first + 1), Span(columns.lo - first * width, columns.hi - first * width))

    @property
    def at(self) -> str:
        """Its place in words, for messages."""
        rows, columns = self.rectangle
        return f"rows {rows.lo}:{rows.hi}, columns {columns.lo}:{columns.hi} of a parameter of shape {self.piece.whole}"

    @property
    def within_row(self) -> bool:
        """Whether it lies within one row of the parameter's matrix, so that its shape describes a part of this row."""
        return len(self.piece.shape) < len(self.piece.whole)


class Span(NamedTuple):
    """The range ``[lo, hi)``."""

    lo: int
    hi: int

    @property
    def size(self) -> int:
        """Number of elements; 0 if the span ends before it starts."""
        return max(0, self.hi - self.lo)

    def meet(self, other: Span) -> Span:
        """The intersection."""
        return Span(max(self.lo, other.lo), min(self.hi, other.hi))

    def within(self, other: Span) -> slice:
        """The span as a slice of the other one."""
        return slice(self.lo - other.lo, self.hi - other.lo)


class Box(NamedTuple):
    """Rows and columns of some of a parameter's matrices.

    Attributes:
        matrices: range of the matrices.
        rows: range of rows in each.
        columns: range of columns in each.
    """

    matrices: Span
    rows: Span
    columns: Span

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(span.size for span in self)

    def meet(self, other: Box) -> Box:
        """The intersection."""
        return Box(*(a.meet(b) for a, b in zip(self, other, strict=True)))

    def split(self, number: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices, and the rows in them, for row numbers of the box itself."""
        return number // self.rows.size + self.matrices.lo, number % self.rows.size + self.rows.lo

    def number(self, matrix: Tensor, row: Tensor) -> Tensor:
        """The row numbers of the box itself, for rows of matrices."""
        return (matrix - self.matrices.lo) * self.rows.size + row - self.rows.lo

    def has(self, matrix: Tensor, row: Tensor) -> Tensor:
        """Which of the rows lie in the box."""
        (first, last), (lo, hi) = self.matrices, self.rows
        return (matrix >= first) & (matrix < last) & (row >= lo) & (row < hi)


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state, copied."""
    return {name: tensor.clone() for name, tensor in state.items()}

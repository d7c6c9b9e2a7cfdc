"""The pieces of a parameter's matrix that a rank holds; each is a matrix of its own.

A parameter of shape ``(R, ...)`` is an R x D matrix (`sketch_plugins.sharding.blocks.matrix_shape`). A rank that holds
a part of it holds a few rectangles of that matrix. The local shard of a DTensor is one rectangle. The consecutive
elements in a flat partition of DeepSpeed's ZeRO are a part of a first row, a block of whole rows, and a part of a last
row. Each piece is handled as a tensor of its own shape, so that covers, sketches and preconditioners keep their
structure.

In a batch of matrices ``(E, R, D)`` (experts), a row of the R x D matrix above is itself a whole matrix. A rank's part
of such a matrix is cut in the same way: a part of a first row, a block of whole rows, and a part of a last row. A piece
has rows of two matrices only if it consists of whole matrices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from sketch_plugins.sharding.blocks import matrix_shape

_KEY = re.compile(r"\d+\[-?\d+,-?\d+:[\dx]*\]")


def is_lazy(p: Tensor) -> bool:
    """Whether it is a parameter of a lazy module that has no shape yet."""
    return bool(torch.nn.parameter.is_lazy(p))


@dataclass(frozen=True, eq=False)
class Original:
    """A parameter as it was given to its optimizer, before a framework replaced it by other tensors.

    Attributes:
        ref: returns the parameter, or None if it no longer exists: a weak reference, or a search.
        shape: shape of the whole parameter.
        index: its number among all the parameters of the optimizer.
        name: its name in messages.
        batch: how many of its first axes are a batch of matrices.
    """

    ref: Callable[[], Tensor | None]
    shape: tuple[int, ...]
    index: int
    name: str = ""
    batch: int = 0


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of a parameter that lie in a flat tensor.

    Attributes:
        index: number of the parameter among all those of its optimizer.
        whole: shape of the whole parameter.
        start: its first element, in the parameter's own (row-major) order.
        numel: number of elements.
        offset: offset of the first one in the flat tensor.
    """

    index: int
    whole: tuple[int, ...]
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class Piece:
    """A rectangle of a parameter's matrix, seen as a tensor.

    Attributes:
        index: number of the parameter among all those of its optimizer.
        whole: shape of the whole parameter.
        shape: shape of the piece: ``(rows, *whole[1:])`` for whole rows, else ``(rows, columns)``; vectors: ``(n,)``. A
            part of one matrix of a batch has the rows and columns of that matrix, and lies within one row.
        row: first row in the parameter's matrix.
        column: first column.
        offset: its offset in the flat tensor that holds it; 0 if there is none.
    """

    index: int
    whole: tuple[int, ...]
    shape: tuple[int, ...]
    row: int
    column: int
    offset: int = 0

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def complete(self) -> bool:
        """Whether it is the whole parameter."""
        return self.shape == self.whole

    @property
    def key(self) -> str:
        """Name of the piece among the pieces in a flat tensor; `index_of` reads it."""
        return f"{self.index}[{self.row},{self.column}:{'x'.join(map(str, self.shape))}]"

    @property
    def place(self) -> Tensor:
        """``(row, column, *whole)``, int64: the entry of a checkpoint that says which piece it is."""
        return torch.tensor([self.row, self.column, *self.whole], dtype=torch.int64)

    def of(self, flat: Tensor) -> Tensor:
        """The piece as a view of the flat tensor."""
        return flat[self.offset : self.offset + self.numel].view(self.shape)


def is_key(key: object) -> bool:
    """Whether it is the `Piece.key` of some piece."""
    return isinstance(key, str) and _KEY.fullmatch(key) is not None


def index_of(key: str) -> int:
    """The number of the parameter in the key of a piece."""
    return int(key.partition("[")[0])


def pieces(fragments: Sequence[Fragment], batch: Callable[[Fragment], int] = lambda f: 0) -> Iterator[Piece]:
    """Cut fragments into pieces: a part of a first row, a block of whole rows, and a part of a last row for each.

    Args:
        fragments: of any parameters.
        batch: how many of the first axes of a fragment's parameter are a batch of matrices. Then the parts of the
            first and of the last matrix are cut again, at the rows of the matrix.
    """
    for f in fragments:
        for piece in _cut(f):
            if batch(f) and piece.shape[1:] != f.whole[1:]:
                yield from _within(piece, f.whole[batch(f) :])
            else:
                yield piece


def _within(run: Piece, matrix: tuple[int, ...]) -> Iterator[Piece]:
    """Cut consecutive elements of one matrix of a batch at the rows of the matrix."""
    for piece in _cut(Fragment(run.index, matrix, run.column, run.numel, run.offset)):
        column = piece.row * matrix_shape(matrix)[1] + piece.column
        yield replace(piece, whole=run.whole, row=run.row, column=column)


def _cut(f: Fragment) -> Iterator[Piece]:
    if f.numel == 0:
        return
    if len(f.whole) < 2:
        yield Piece(f.index, f.whole, (f.numel,) if f.whole else (), f.start, 0, f.offset)
        return
    columns = matrix_shape(f.whole)[1]
    end = f.start + f.numel
    first, last = -(-f.start // columns), end // columns  # the whole rows are [first, last)
    if first > last:  # the fragment lies within one row
        yield Piece(f.index, f.whole, (1, f.numel), last, f.start - last * columns, f.offset)
        return
    if f.start < first * columns:
        n = first * columns - f.start
        yield Piece(f.index, f.whole, (1, n), first - 1, columns - n, f.offset)
    if first < last:
        at = f.offset + first * columns - f.start
        yield Piece(f.index, f.whole, (last - first, *f.whole[1:]), first, 0, at)
    if last * columns < end:
        at = f.offset + last * columns - f.start
        yield Piece(f.index, f.whole, (1, end - last * columns), last, 0, at)

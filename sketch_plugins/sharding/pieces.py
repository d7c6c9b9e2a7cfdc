"""What a rank holds of a parameter: pieces of its matrix, each a matrix of its own.

A parameter of shape ``(R, ...)`` is an R x D matrix (`sketch_plugins.sharding.blocks.matrix_shape`). A rank that holds
a part of it holds a few rectangles of that matrix: the local shard of a DTensor is one; the consecutive elements that a
flat partition of DeepSpeed's ZeRO keeps are a part of a first row, a body of whole rows, a part of a last row. Each
piece is handled as a tensor of its own shape, so that covers, sketches and preconditioners keep their structure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
    """A parameter as its optimizer was given it, before a framework put other tensors in its place.

    Attributes:
        ref: returns it, or None where it does not exist any more: a weak reference, or a search.
        shape: of the whole parameter.
        index: its number among all the parameters of the optimizer.
        name: what to call it.
    """

    ref: Callable[[], Tensor | None]
    shape: tuple[int, ...]
    index: int
    name: str = ""


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of a parameter that lie in a flat tensor.

    Attributes:
        index: number of the parameter among all those of its optimizer.
        whole: shape of the whole parameter.
        start: its first element, in the parameter's own (row-major) order.
        numel: how many.
        offset: where they start in the flat tensor.
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
        shape: of the piece: ``(rows, *whole[1:])`` for whole rows, else ``(rows, columns)``; vectors: ``(n,)``.
        row: first row in the parameter's matrix.
        column: first column.
        offset: where it starts in the flat tensor that holds it; 0 where there is none.
    """

    index: int
    whole: tuple[int, ...]
    shape: tuple[int, ...]
    row: int
    column: int
    offset: int = 0

    @property
    def numel(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def complete(self) -> bool:
        """Whether it is the whole parameter."""
        return self.shape == self.whole

    @property
    def key(self) -> str:
        """Names it among the pieces in a flat tensor; `index_of` reads it."""
        return f"{self.index}[{self.row},{self.column}:{'x'.join(map(str, self.shape))}]"

    @property
    def place(self) -> Tensor:
        """``(row, column, *whole)``, int64: what a checkpoint says of it."""
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


def pieces(fragments: Sequence[Fragment]) -> Iterator[Piece]:
    """Fragments as pieces: of each a part of a first row, a body of whole rows, a part of a last row."""
    for f in fragments:
        if f.numel == 0:
            continue
        if len(f.whole) < 2:
            yield Piece(f.index, f.whole, (f.numel,) if f.whole else (), f.start, 0, f.offset)
            continue
        columns = matrix_shape(f.whole)[1]
        end = f.start + f.numel
        first, last = -(-f.start // columns), end // columns  # whole rows: [first, last)
        if first > last:  # within one row
            yield Piece(f.index, f.whole, (1, f.numel), last, f.start - last * columns, f.offset)
            continue
        if f.start < first * columns:
            n = first * columns - f.start
            yield Piece(f.index, f.whole, (1, n), first - 1, columns - n, f.offset)
        if first < last:
            at = f.offset + first * columns - f.start
            yield Piece(f.index, f.whole, (last - first, *f.whole[1:]), first, 0, at)
        if last * columns < end:
            at = f.offset + last * columns - f.start
            yield Piece(f.index, f.whole, (1, end - last * columns), last, 0, at)

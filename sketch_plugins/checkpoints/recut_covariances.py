r"""Recut covariances: those of a new piece, from the covariances of the old pieces that overlap it.

The covariance of axis a of a block is a sum of products of slices over its other axes. So it is a sum over any cut of
these axes, and a cut of axis a itself leaves its diagonal blocks. For an overlap with an old block o,
:math:`S_o` selects the coordinates of the overlap from those of o, :math:`E_o` places them among the coordinates of the
new block, and :math:`\rho_o` is the share of o's other axes that lies in the overlap:

.. math:: L = \sum_o \rho_o \, E_o S_o L_o S_o^\top E_o^\top

Merging is exact up to rank k, with :math:`\rho = 1`. It is not known how much each row of a piece contributes to the
covariance of its columns, and all rows are taken to contribute equally: :math:`\rho` is an assumption if a piece is
split (but exact for its rows). Products between rows of two old pieces were never gathered, so the covariance of merged
rows is block diagonal. The factors are folded in float64, and the largest k directions stay. The trace is that of the
whole covariance: it adds up over every cut, including the tails. With ``tail="trace"``, the part of the trace outside
of an old sketch is taken to be spread evenly over the directions outside of it, as its preconditioner takes it:
:math:`L_o = V (values - tail) V^\top + tail \, I`. With ``"paper"`` and ``"sqrt"`` the bound carries over: it is the
largest sum of old tails over all coordinates, plus what is cut off now.

Statistics that were gathered since the last solve are folded in first, as the next solve would do it. An old piece
without a covariance for this axis (a part of a row) contributes nothing. The other pieces then represent it, and their
trace is scaled up in proportion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from sketch_plugins.checkpoints.recut_geometry import PRECONDITIONER, Held, Span, copied
from sketch_plugins.linalg import frequent_directions as fd
from sketch_plugins.linalg.frequent_directions import Covariance
from sketch_plugins.linalg.kronecker import Side
from sketch_plugins.linalg.solving import solve
from sketch_plugins.sharding.blocks import matrix_shape


class _Part(NamedTuple):
    """The contribution of one old block to a new one."""

    held: Held
    side: Side
    box: tuple[Span, ...]
    meet: tuple[Span, ...]


def covariances(
    old: Sequence[Held], h: Held, drained: dict[int, Mapping[str, Tensor]], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The covariances of a new piece, as the module's docstring describes.

    Args:
        old: the old pieces, with state.
        h: the new piece, which has a preconditioner.
        drained: identity of an old piece -> its covariances without a buffer; further pieces are added.
        device: where the new state is.
        dtype: its dtype.

    Raises:
        ValueError: a sum of covariances, or a buffer, has no finite decomposition; or the new piece is not a run of
            elements, which its preconditioner needs.
    """
    assert h.preconditioner is not None
    whole = h.preconditioner.allocate(device, dtype)
    for matrix, side in product(range(*h.box.matrices), h.preconditioner.sides):
        box, state = _box(h, side), _of_matrix(h, whole, matrix)
        parts = list(_parts(old, h, side, box, matrix))
        if len(parts) == 1 and parts[0].box == box and parts[0].side.rank == side.rank:
            o, theirs, before = parts[0].held, parts[0].side, parts[0].held.preconditioner
            buffered = h.preconditioner.buffered and before.buffered  # type: ignore[union-attr]
            if buffered or not before.buffered:  # type: ignore[union-attr]
                given = _of_matrix(o, o.state[PRECONDITIONER], matrix)
                for name in (*Covariance._fields, *(("buffer", "mass", "decay") if buffered else ())):
                    state[side.key(name)].copy_(given[theirs.key(name)])
                continue
        if parts:
            new = _covariance(parts, side, box, h.tail, drained, matrix)
            if not all(fd.finite(new)):
                raise ValueError(
                    f"the old covariances of the rows and columns of the new piece at {h.at} have no finite "
                    "decomposition, so they cannot be divided. Use the checkpoint of another step"
                )
            side.replace(state, new)
    return whole


def _of_matrix(h: Held, state: Mapping[str, Tensor], matrix: int) -> Mapping[str, Tensor]:
    """The covariances of one matrix of the parameter, as views; all of them if the parameter is not a batch."""
    assert h.preconditioner is not None
    if h.preconditioner.matrices is None:
        return state
    return {name: tensor[matrix - h.box.matrices.lo] for name, tensor in state.items()}


def _box(h: Held, side: Side) -> tuple[Span, ...]:
    """The block in coordinates of the parameter, or of one of its matrices; of a vector, in elements."""
    assert h.preconditioner is not None
    rows, columns = h.box.rows, h.box.columns
    dims = h.preconditioner.dims
    if dims == (h.piece.numel, 1):
        width = matrix_shape(h.piece.whole[h.batch :])[1]
        if rows.size > 1 and columns.size < width:
            raise ValueError(
                f"the piece at {h.at} is not a run of consecutive elements, which its preconditioner needs"
            )
        starts = [rows.lo * width + columns.lo, 0]
    else:
        starts = [rows.lo, columns.lo if len(dims) == 2 else 0, *(0 for _ in dims[2:])]
    block = h.preconditioner.blocks[side.block]
    return tuple(Span(start + s.start, start + s.stop) for start, s in zip(starts, block, strict=True))


def _parts(old: Sequence[Held], h: Held, side: Side, box: tuple[Span, ...], matrix: int) -> Iterator[_Part]:
    assert h.preconditioner is not None
    flat = h.preconditioner.dims == (h.piece.numel, 1)
    for o in old:
        # Trailing axes are merged in the same way for any rows. Otherwise these are not axes of the same tensor.
        if (
            o.preconditioner is None
            or matrix not in range(*o.box.matrices)
            or len(o.preconditioner.dims) != len(box)
            or (o.preconditioner.dims == (o.piece.numel, 1)) != flat
        ):
            continue
        if len(box) > 2 and o.preconditioner.dims[1:] != h.preconditioner.dims[1:]:
            continue
        for theirs in o.preconditioner.sides:
            if theirs.axis == side.axis:
                there = _box(o, theirs)
                meet = tuple(a.meet(b) for a, b in zip(there, box, strict=True))
                if all(s.size for s in meet):
                    yield _Part(o, theirs, there, meet)


def _covariance(
    parts: Sequence[_Part],
    side: Side,
    box: tuple[Span, ...],
    tail: str,
    drained: dict[int, Mapping[str, Tensor]],
    matrix: int,
) -> Covariance:
    axis, d = side.axis, side.size
    factors, mass, volume = [], torch.zeros((), dtype=torch.float64), 0
    tails, covered = torch.zeros(d, dtype=torch.float64), torch.zeros(d, dtype=torch.bool)
    for o, theirs, there, meet in parts:
        old = Covariance(*(t.double().cpu() for t in theirs.get(_of_matrix(o, _drained(o, drained), matrix))))
        share = prod(s.size / b.size for k, (s, b) in enumerate(zip(meet, there, strict=True)) if k != axis)
        cut, into = old.vectors[meet[axis].within(there[axis])], meet[axis].within(box[axis])
        columns = torch.zeros(d, theirs.rank, dtype=torch.float64)
        # Eigenvalues above the tail, if the tail stands for every direction and not only for those outside of V.
        above = old.values - old.tail if tail == "trace" else old.values
        columns[into] = cut * (above * share).clamp_min(0).sqrt()
        factors.append(columns)
        if meet[axis] == there[axis]:
            mass += share * old.trace
        else:
            kept = cut.square().sum(0)
            escaped = (old.trace - old.values.sum()).clamp_min(0) / max(1, theirs.size - theirs.rank)
            mass += share * ((old.values * kept).sum() + escaped * (meet[axis].size - kept.sum()).clamp_min(0))
        tails[into] += share * old.tail
        covered[into] = True
        volume += prod(s.size for s in meet)
    # The share of the other axes that is known for the known coordinates, and the number of these coordinates.
    others = prod(s.size for k, s in enumerate(box) if k != axis)
    count = int(covered.sum())
    density = volume / (count * others)
    stack = torch.cat(factors, -1) / density**0.5
    nothing = fd.start((), d, side.rank, torch.float64, torch.device("cpu"))
    new = fd.fold(nothing, stack, 1.0, tail=tail, solver="eigh", mass=mass / density * (d / count))
    if tail != "trace":
        return new._replace(tail=new.tail + tails.max() / density)
    values, order = (new.values + tails / density @ new.vectors.square()).sort(descending=True)
    rest = (new.trace - values.sum()).clamp_min(0) / (d - side.rank) if side.rank < d else torch.zeros_like(new.trace)
    return Covariance(new.vectors[:, order], values, rest, new.trace)


def _drained(o: Held, drained: dict[int, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """The piece's covariances, with the statistics gathered since the last solve folded in; its state is unchanged."""
    assert o.preconditioner is not None
    if not o.preconditioner.buffered:
        return o.state[PRECONDITIONER]
    if id(o) not in drained:
        state = copied(o.state[PRECONDITIONER])
        due: list[tuple[Side, Mapping[str, Tensor], Tensor | None]] = []
        for side in o.preconditioner.sides:
            if bool((state[side.key("mass")] != 0).any()) or bool((state[side.key("decay")] != 1).any()):
                due.append((side, state, None))
        if solve(due, 1.0, o.tail, "eigh"):
            raise ValueError(
                f"the statistics of the old piece at {o.at} have no finite decomposition, so they cannot be "
                "divided. Use the checkpoint of another step"
            )
        drained[id(o)] = state
    return drained[id(o)]

r"""Recut the state of a parameter's pieces: from a run that was sharded over W ranks to one over W' ranks.

Every piece (`sketch_plugins.sharding.pieces`) has stores of its own, made for its own rows. If a piece of the new
partition is also one of the old partition, its state is copied. Otherwise the new state is made from the *estimates* of
the old one:

=================== ================================================================================================
state               of a recut piece
=================== ================================================================================================
dense               exact, bit for bit
int8                bit for bit in blocks that are also blocks of the old pieces; in whole rows these are all blocks.
                    Blocks that were cut are encoded again, with an error of at most half a step of the new block
count-min, row      exact if every row has a bucket of its own. Otherwise the old estimates, averaged over the rows of
count-min           each new bucket: they lie between the smallest and the largest old estimate, and with one table the
                    sum over the rows stays the same. The rows' own scales of row count-min stay. ``bucket="sum"``, and
count-sketch        tables of signed sums: the same, with estimates scaled to values whose sketch is the old table
                    (`Store.estimate_scale`), so that nothing is counted once for each row of a bucket
cover               the maxima of the old estimates. They are never below the estimates, so upper bounds stay upper
                    bounds
covariances         see below
weight corrections  exact, bit for bit (``weight_bits``). Their fingerprints are left out: the weights that they are
                    loaded with are taken to be those of the checkpoint
rms                 (``lagged_rms``) averaged over the old pieces that overlap the new one, weighted by their size; in a
                    batch (experts) for each matrix, over the old pieces that have a part of it
steps               have to be equal
=================== ================================================================================================

**Covariances.** The covariance of axis a of a block is a sum of products of slices over its other axes. So it is a sum
over any cut of these axes, and a cut of axis a itself leaves its diagonal blocks. For an overlap with an old block o,
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
from dataclasses import dataclass, field
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.linalg import frequent_directions as fd
from sketch_plugins.linalg.frequent_directions import Covariance
from sketch_plugins.linalg.kronecker import Kronecker, Side
from sketch_plugins.linalg.solving import solve
from sketch_plugins.sharding.blocks import At, Matrix, Rows, matrix_shape, tiles
from sketch_plugins.sharding.pieces import Piece
from sketch_plugins.sharding.state_names import CORRECTION
from sketch_plugins.stores import Dense, Gradient, Int8, Store
from sketch_plugins.stores.base import CHUNK

MOMENTS = ("first_moment", "second_moment")
PRECONDITIONER = "preconditioner"
RMS = "rms"  # state of `lagged_rms`


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
        return matrix_shape(self.piece.shape, 0 if self._within else self.batch)

    @property
    def rectangle(self) -> tuple[Span, Span]:
        """Its rows and its columns in the parameter's matrix."""
        rows, columns = (1, self.piece.numel) if self._within else matrix_shape(self.piece.shape)
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
    def _within(self) -> bool:
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


def recut(old: Sequence[Held], new: Sequence[Held], dtype: torch.dtype = torch.float32) -> list[set[str]]:
    """Fill the state of ``new``, pieces of one parameter, from that of ``old``, as the module's docstring describes.

    Beside old and new state, only tiles, one table (``bucket="sum"``) and the factors of one covariance are allocated.
    If no old piece has state (no step was taken), the new ones get none.

    Args:
        old: pieces that do not overlap and together contain all of ``new``.
        new: pieces without state; they need not cover the whole parameter.
        dtype: arithmetic dtype: float64 for float64 parameters.

    Returns:
        For each new piece the names of the state that is bit for bit the old one.

    Raises:
        ValueError: pieces of different parameters; a new piece is not covered, or covered twice; some old pieces have
            state and others have none; step numbers differ; a state lacks what its stores need; a new piece has state,
            or needs a moment that the old ones did not keep.
    """
    old = [h for h in old if h.piece.numel]  # an empty piece has no state
    _check(old, new)
    exact: list[set[str]] = [set() for _ in new]
    started = [h for h in old if h.state]
    if not started:
        return exact
    drained: dict[int, Mapping[str, Tensor]] = {}
    with scratch.scratch():
        device = _device(started[0].state)
        for h, same in zip(new, exact, strict=True):
            if not h.piece.numel:
                continue
            state: dict[str, Any] = {"step": started[0].state["step"].clone()}
            if "place" in started[0].state:
                state["place"] = h.piece.place
            if "shape" in started[0].state:
                state["shape"] = torch.tensor(h.piece.shape, dtype=torch.int64)
            for name, store in h.stores.items():
                twin = next((o for o in old if _same(o, h) and o.stores.get(name) == store), None)
                if twin:
                    state[name], whole = _copied(twin.state[name]), True
                else:
                    state[name], whole = _moment(old, h, name, store, device, dtype)
                same |= {name} if whole else set()
            if h.preconditioner is not None:
                twin = next((o for o in old if _same(o, h) and o.preconditioner == h.preconditioner), None)
                state[PRECONDITIONER] = (
                    _copied(twin.state[PRECONDITIONER]) if twin else _preconditioner(old, h, drained, device, dtype)
                )
                same |= {PRECONDITIONER} if twin else set()
            if RMS in started[0].state:
                twin = next((o for o in old if _same(o, h)), None)
                state[RMS] = _copied(twin.state[RMS]) if twin else {"last": _root_mean(started, h)}
                same |= {RMS} if twin else set()
            if CORRECTION in started[0].state:
                twin = next((o for o in old if _same(o, h)), None)
                state[CORRECTION] = _copied(twin.state[CORRECTION]) if twin else _codes(old, h, device)
                same |= {CORRECTION}
            h.state.update(state)
    return exact


def _root_mean(old: Sequence[Held], new: Held) -> Tensor:
    if not new.apart:
        return _mean([(o.piece.numel, o.state[RMS]["last"]) for o in old])
    each = []
    for matrix in range(*new.rectangle[0]):
        near = [(o, o.rectangle[0]) for o in old if matrix in range(*o.rectangle[0])]
        parts = [
            (o.piece.numel // rows.size, o.state[RMS]["last"] if o._within else o.state[RMS]["last"][matrix - rows.lo])
            for o, rows in near
        ]
        each.append(_mean(parts))
    return each[0] if new._within else torch.stack(each)


def _mean(parts: Sequence[tuple[int, Tensor]]) -> Tensor:
    squares = sum(weight * last.square() for weight, last in parts)
    assert isinstance(squares, Tensor)
    return (squares / sum(weight for weight, _ in parts)).sqrt()


def _check(old: Sequence[Held], new: Sequence[Held]) -> None:
    wholes = {h.piece.whole for h in (*old, *new)}
    if len(wholes) > 1:
        raise ValueError(
            f"the pieces belong to parameters of different shapes ({', '.join(map(str, sorted(wholes)))}); "
            "all of them must belong to one parameter"
        )
    for h in new:
        if h.state:
            raise ValueError(f"the new piece at {_at(h)} already has state: {', '.join(h.state)}")
        covered = sum(o.box.meet(h.box).size for o in old)
        if covered != h.piece.numel:
            raise ValueError(
                (
                    f"the new piece at {_at(h)} has {h.piece.numel} elements, but the old pieces contain {covered} of "
                    "them"
                )
                + (": they overlap" if covered > h.piece.numel else "")
            )
    started = [h for h in old if h.state]
    if started and len(started) < len(old):
        without = next(h for h in old if not h.state)
        raise ValueError(
            f"the old piece at {_at(without)} has no state, but other pieces of the same parameter have state"
        )
    steps = sorted({float(h.state["step"]) for h in started})
    if len(steps) > 1:
        raise ValueError(
            f"the old pieces of one parameter are at different steps: {', '.join(f'{s:g}' for s in steps)}"
        )
    for h in started:
        expected = {"step", *h.stores, *([PRECONDITIONER] if h.preconditioner else [])}
        if not expected <= set(h.state) <= expected | {"place", "shape", RMS, CORRECTION}:
            raise ValueError(
                f"the state of the old piece at {_at(h)} contains {', '.join(h.state)}; expected "
                f"{', '.join(sorted(expected))}"
            )
        if "place" in h.state and not torch.equal(h.state["place"].cpu(), h.piece.place):
            raise ValueError(
                f"the state of the old piece at {_at(h)} was saved for position {h.state['place'].tolist()}, but "
                f"the piece is at {h.piece.place.tolist()} (row, column, shape of the parameter)"
            )


def _at(h: Held) -> str:
    rows, columns = h.rectangle
    return f"rows {rows.lo}:{rows.hi}, columns {columns.lo}:{columns.hi} of a parameter of shape {h.piece.whole}"


def _same(one: Held, other: Held) -> bool:
    return one.piece.shape == other.piece.shape and one.rectangle == other.rectangle


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def _device(state: Mapping[str, Any]) -> torch.device:
    for value in state.values():
        if isinstance(value, Mapping):
            for tensor in value.values():
                return tensor.device
    return torch.device("cpu")


# -- moments -----------------------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    held: Held
    store: Store
    state: dict[str, Tensor]
    scale: float


class _Old(Matrix):
    """The estimates that the old pieces have for a new one, as a matrix."""

    def __init__(self, sources: Sequence[_Source], of: Held, dtype: torch.dtype, device: torch.device) -> None:
        self.sources, self.of, self.shape, self.dtype, self.device = sources, of, of.matrix, dtype, device

    def views(self, at: At) -> bool:
        """Always False: nothing is written into it."""
        return False

    def get(self, at: At) -> Tensor:
        """The estimates, valid until the next call; 0 where no old piece has any."""
        out = scratch.empty("recut", at.shape, self.dtype, self.device).zero_()
        matrix, box = out.flatten(0, -2), self.of.box
        numbers, rows = box.split(at.index(self.device))
        wanted = Span(box.columns.lo + at.lo, box.columns.lo + at.hi)
        for source in self.sources:
            there = source.held.box
            meet = wanted.meet(there.columns)
            here = there.has(numbers, rows).nonzero().squeeze(-1)
            if meet.size and len(here):
                theirs = there.number(numbers[here], rows[here])
                values = _read(source, theirs, meet.within(there.columns), self.dtype)
                matrix[:, meet.within(wanted)].index_copy_(0, here, values)
        return out


def _read(source: _Source, rows: Tensor, columns: slice, dtype: torch.dtype) -> Tensor:
    """Rows and columns of the piece's own matrix, read in whole blocks of its store."""
    align, end = source.store.align, source.held.matrix[1]
    lo, hi = columns.start // align * align, min(end, -(-columns.stop // align) * align)
    values = source.store.read(source.state, Rows(source.held.matrix[0], rows, lo, hi), dtype)
    values = values.expand(len(rows), hi - lo)[:, columns.start - lo : columns.stop - lo]
    return values if source.scale == 1.0 else values * source.scale


def _moment(
    old: Sequence[Held], h: Held, name: str, store: Store, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Tensor], bool]:
    """The state of one moment, and whether it is bit for bit that of the old pieces."""
    sources = []
    for o in old:
        if not o.box.meet(h.box).size:
            continue
        if name in o.stores:
            state = o.state[name]
            sources.append(_Source(o, o.stores[name], state, o.stores[name].estimate_scale(state, o.matrix)))
        elif name != "first_moment":  # a momentum may start at 0 at any time, but an average of squares may not
            raise ValueError(f"the old piece at {_at(o)} has no {name}, but the new piece at {_at(h)} needs it")
    state = store.allocate(h.matrix, device, dtype)
    store.assign(state, Gradient(_Old(sources, h, dtype, device), None, dtype, CHUNK, h.matrix))
    copied = 0
    if isinstance(store, Int8):
        for source in sources:
            if isinstance(source.store, Int8) and source.store.block_size == store.block_size:
                copied += _copy_blocks(source, h, state, store.block_size)
    dense = isinstance(store, Dense) and all(source.store == store for source in sources)
    return state, dense or copied == h.piece.numel


def _codes(old: Sequence[Held], h: Held, device: torch.device) -> dict[str, Tensor]:
    """The corrections of the weights; each correction follows its weight."""
    there = [o for o in old if o.box.meet(h.box).size]
    # They are integers of at most 16 bits, which float32 holds exactly.
    sources = [_Source(o, Dense(), {"dense": o.state[CORRECTION]["codes"]}, 1.0) for o in there]
    whole = _Old(sources, h, torch.float32, device)
    dtype = there[0].state[CORRECTION]["codes"].dtype
    codes = torch.zeros(h.matrix, dtype=dtype, device=device)
    for at in tiles(*h.matrix, CHUNK):
        at.put(codes, whole.get(at))
    return {"codes": codes, "mark": torch.zeros(1, dtype=torch.int64, device=device)}


def _copy_blocks(source: _Source, h: Held, state: dict[str, Tensor], size: int) -> int:
    """Copy codes and scales of the blocks that an old and a new piece share, because encoding could change them.

    Returns:
        The number of codes.
    """
    box, there = h.box, source.held.box
    columns, old_columns, both = box.columns, there.columns, box.meet(there)
    shift = columns.lo - old_columns.lo
    if not both.size or shift % size:
        return 0
    blocks = []
    for number in range(-(-columns.size // size)):
        other = number + shift // size
        end = min(columns.lo + (number + 1) * size, columns.hi)
        if other >= 0 and old_columns.lo + other * size < old_columns.hi:
            if end == min(old_columns.lo + (other + 1) * size, old_columns.hi):
                blocks.append(number)
    if not blocks:
        return 0
    # The common blocks follow each other, because blocks can differ at the ends only.
    mine = Span(blocks[0], blocks[-1] + 1)
    theirs = Span(mine.lo + shift // size, mine.hi + shift // size)
    common = both.split(torch.arange(both.matrices.size * both.rows.size, device=state["codes"].device))
    to, origin = box.number(*common), there.number(*common)
    ends = min(mine.hi * size, columns.size), min(theirs.hi * size, old_columns.size)
    state["scales"][to, mine.lo : mine.hi] = source.state["scales"][origin, theirs.lo : theirs.hi]
    state["codes"][to, mine.lo * size : ends[0]] = source.state["codes"][origin, theirs.lo * size : ends[1]]
    return len(to) * (ends[0] - mine.lo * size)


# -- covariances -------------------------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """The contribution of one old block to a new one."""

    held: Held
    side: Side
    box: tuple[Span, ...]
    meet: tuple[Span, ...]


def _preconditioner(
    old: Sequence[Held], h: Held, drained: dict[int, Mapping[str, Tensor]], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
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
                    f"the old covariances of the rows and columns of the new piece at {_at(h)} have no finite "
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
                f"the piece at {_at(h)} is not a run of consecutive elements, which its preconditioner needs"
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
        state = _copied(o.state[PRECONDITIONER])
        due: list[tuple[Side, Mapping[str, Tensor], Tensor | None]] = []
        for side in o.preconditioner.sides:
            if bool((state[side.key("mass")] != 0).any()) or bool((state[side.key("decay")] != 1).any()):
                due.append((side, state, None))
        if solve(due, 1.0, o.tail, "eigh"):
            raise ValueError(
                f"the statistics of the old piece at {_at(o)} have no finite decomposition, so they cannot be "
                "divided. Use the checkpoint of another step"
            )
        drained[id(o)] = state
    return drained[id(o)]

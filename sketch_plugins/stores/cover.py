"""SM3's covers of squared gradients (Anil et al. 2019): one vector of maxima for each axis."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.sharding.blocks import At, Tile
from sketch_plugins.stores.base import Ema, Gradient, State, Store, Touched, given

VARIANTS = ("II", "I")


@dataclass(frozen=True)
class Cover(Store):
    r"""Second moments of an n-d tensor as maxima over its slices (arXiv 1901.11150): ``4 * sum(dims)`` bytes in all.

    The state has a tensor ``axis_k`` of shape ``(dims[k],)`` for each axis: :math:`\mu_r` of every slice r of axis k.
    An element belongs to one slice of each axis, and the minimum of their covers bounds it. With
    ``s <- decay * s + gain * x``

    .. math::
        \text{II:}\quad \nu_i &= \mathrm{decay} \min_{r \ni i} \mu_r + \mathrm{gain}\, g_i^2, \qquad
            \mu_r = \max_{i \in r} \nu_i \\
        \text{I:}\quad \mu_r &\leftarrow \mathrm{decay}\, \mu_r + \mathrm{gain} \max_{i \in r} g_i^2, \qquad
            \nu_i = \min_{r \ni i} \mu_r

    so that :math:`s_i \le \nu^{II}_i \le \nu^I_i` for the exact accumulator s. With ``decay = gain = 1`` none of them
    ever falls. II overwrites the covers; ``max(old, new)`` would keep peaks that no decay could lower.

    Every tile of a step reads the old covers, so the new maxima are collected beside them and replace them when the
    step ends. The order of maxima does not matter, so the result has the same bits for any cut into tiles.

    For a row-sparse gradient the row's own cover decides: :math:`\nu_i = \mathrm{decay}\, \mu_{row} +
    \mathrm{gain}\, g_i^2` (I: :math:`\nu_i = \mu_{row}`). Only the covers of touched rows are replaced. The covers of
    the other axes become the maximum of their old value and of what the rule gives for the touched rows. They must not
    fall, because they also cover rows that were not touched and have not decayed. So :math:`s \le \nu` holds in any
    mixture of dense and sparse steps (with a decay, for the lazy accumulator, whose rows decay when they are touched).
    The price is that these covers stay high until the next dense step of II, which computes all covers anew.

    In a batch of matrices (experts) each matrix has covers of its own: ``axis_0`` has the covers of all rows, and
    ``axis_1`` is ``(matrices, columns)``.

    Args:
        dims: shape of the parameter, with 2 or more dimensions (with fewer, an exact store is as small). Of a batch:
            the number of rows of all its matrices, and of columns.
        variant: ``"II"`` or ``"I"``.
        matrices: number of matrices of a batch; None: the parameter is no batch.
    """

    shared = True

    order: int = 2
    dims: tuple[int, ...] = ()
    variant: str = "II"
    matrices: int | None = None

    @property
    def tiles_apart(self) -> bool:  # type: ignore[override]
        """True for several matrices, because the columns of each have covers of their own."""
        return (self.matrices or 1) > 1

    @property
    def kernel(self) -> str:  # type: ignore[override]
        """The kernel of II also collects the new covers; the kernel of I only reads them."""
        return "cover" if self.variant == "II" else "cover_estimate"

    def loop(self, rows: int) -> str:
        """The loop takes variant II of a matrix, whose covers are those of rows and columns."""
        return "cover" if self.variant == "II" and len(self.dims) == 2 else ""

    @property
    def write_first(self) -> bool:  # type: ignore[override]
        """True for I, which reads the new covers. II reads the old ones together with the gradient."""
        return self.variant == "I"

    def layout(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """One vector for each axis, in the arithmetic dtype.

        Raises:
            ValueError: ``dims`` is not the shape of a tensor whose matrix has this shape.
        """
        if len(self.dims) < 2 or (self.dims[0], math.prod(self.dims[1:])) != tuple(shape):
            raise ValueError(
                f"dims={self.dims!r} is not the shape of a tensor that is a {shape[0]} x {shape[1]} matrix"
            )
        sizes: list[tuple[int, ...]] = [(n,) for n in self.dims]
        if self.matrices is not None:
            sizes[1] = self.matrices, self.dims[1]
        return {f"axis_{k}": (size, dtype) for k, size in enumerate(sizes)}

    def spread(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """State of a checkpoint in this layout.

        Earlier versions shared the covers of the columns among the matrices of a batch. Each matrix begins with them:
        they are upper bounds for it, too.
        """
        column = saved.get("axis_1")
        columns = self.dims[1]
        if self.matrices is None or not isinstance(column, Tensor) or column.ndim != 1 or len(column) < columns:
            return dict(saved)
        # The covers of a DTensor may have the length of the largest shard's.
        return {**saved, "axis_1": column[:columns].expand(self.matrices, -1).contiguous()}

    def read(self, state: State, at: At, dtype: torch.dtype) -> Tensor:
        """The minimum over the slices. For touched rows of a sparse gradient it is the row's cover alone."""
        return self._least(state, at)

    def write(self, state: State, grad: Gradient, ema: Ema) -> None:
        """Take one whole step: II as `advance` does it, I from the maxima of g * g."""
        working = self.begin(state, grad)
        for at in grad.batches():
            g = grad.get(at)
            if self.variant == "I":
                self._collect(working, at, torch.mul(g, g, **scratch.out("cover", g)))
            else:
                self.advance(working, at, g, ema)
        if self.variant == "I":
            for axis, new in _new(working).items():
                old = state[axis] if axis != "axis_0" or grad.rows is None else state[axis].index_select(0, grad.rows)
                new.mul_(ema.gain).add_(old, alpha=ema.decay)
        self.finish(state, working, grad)

    def begin(self, state: State, grad: Gradient) -> State:
        """The covers, and tensors ``new_k`` for the maxima of this step."""
        rows = state["axis_0"] if grad.rows is None else grad.rows
        room = {"new_0": torch.zeros(len(rows), dtype=state["axis_0"].dtype, device=state["axis_0"].device)}
        for k in range(1, len(self.dims)):
            room[f"new_{k}"] = torch.zeros_like(state[f"axis_{k}"])
        return {**state, **room}

    def advance(self, state: State, at: At, g: Tensor, ema: Ema) -> Tensor:
        """The estimate. II also collects its maxima in the tensors that `begin` added."""
        if self.variant == "I":
            return self._least(state, at)
        nu = self._estimate(state, at, g, ema)
        self._collect(state, at, nu)
        return nu

    def finish(self, state: State, working: State, grad: Gradient) -> None:
        """Replace the old covers by the new ones."""
        for axis, new in _new(working).items():
            if grad.rows is None:
                state[axis].copy_(new)
            elif axis == "axis_0":
                state[axis].index_copy_(0, grad.rows, new)
            else:
                torch.maximum(state[axis], new, out=state[axis])

    def peek(self, state: State, at: At, g: Tensor, ema: Ema) -> Tensor:
        """What `advance` would return, without collecting anything."""
        return self._least(state, at) if self.variant == "I" else self._estimate(state, at, g, ema)

    def assign(self, state: State, values: Tensor | Gradient) -> None:
        """Set each cover to the maximum over its slice."""
        values = given(values, self.order)
        working = self.begin(state, values)
        for at in values.batches():
            self._collect(working, at, values.get(at))
        self.finish(state, working, values)

    def fill(self, state: State, value: float) -> None:
        """Set every cover."""
        for tensor in state.values():
            tensor.fill_(value)

    def _estimate(self, state: State, at: At, g: Tensor, ema: Ema) -> Tensor:
        nu = self._least(state, at)
        if ema.decay != 1.0:
            nu.mul_(ema.decay)
        return nu.addcmul_(g, g, value=ema.gain)

    def _least(self, state: State, at: At) -> Tensor:
        """The minimum of the covers at a place, in a buffer of its own."""
        rows = state["axis_0"]
        out = scratch.empty("cover", at.shape, rows.dtype, rows.device)
        if isinstance(at, Touched):
            return out.copy_(rows.index_select(0, at.rows).unsqueeze(-1))
        if isinstance(at, Tile):
            rows = rows[at.start : at.start + at.cycles * at.rows]
        else:
            rows = rows.index_select(0, at.rows)
        if self.tiles_apart:
            columns, flat = state["axis_1"][:, at.lo : at.hi], out.flatten(0, -2)
            if isinstance(at, Tile):
                for matrix, part in self._matrices_of(at):
                    torch.minimum(rows[part].unsqueeze(-1), columns[matrix], out=flat[part])
            else:
                torch.minimum(rows.unsqueeze(-1), columns[self._matrix_of(at.rows)], out=flat)
            return out
        return torch.minimum(at.from_rows(rows).unsqueeze(-1), self._columns(state, at), out=out)

    def _matrix_of(self, rows: Tensor) -> Tensor:
        """The matrix of the batch that each row belongs to."""
        return rows // (self.dims[0] // (self.matrices or 1))

    def _matrices_of(self, at: Tile) -> Iterator[tuple[int, slice]]:
        """The matrices of the batch that have rows in a tile, and their rows within it."""
        height, end = self.dims[0] // (self.matrices or 1), at.start + at.cycles * at.rows
        for matrix in range(at.start // height, -(-end // height)):
            lo, hi = max(at.start, matrix * height), min(end, (matrix + 1) * height)
            yield matrix, slice(lo - at.start, hi - at.start)

    def _columns(self, state: State, at: At) -> Tensor:
        """The minimum over all axes except the first, for the columns of a tile."""
        if len(self.dims) == 2:
            return state["axis_1"].view(-1)[at.lo : at.hi]
        first = state["axis_1"]
        least = scratch.empty("cover_columns", (at.hi - at.lo,), first.dtype, first.device)
        for part, box in self._boxes(at):
            view = least[part].unflatten(0, [s.stop - s.start for s in box])
            for k, s in enumerate(box, 1):
                along = _along(state[f"axis_{k}"][s], k - 1, len(box))
                if k == 1:
                    view.copy_(along)
                else:
                    torch.minimum(view, along, out=view)
        return least

    def _collect(self, working: State, at: At, nu: Tensor) -> None:
        """Raise the maxima of the slices that the tile intersects."""
        matrix = nu.flatten(0, -2)
        if isinstance(at, Tile):
            rows = working["new_0"][at.start : at.start + len(matrix)]
            torch.maximum(rows, matrix.amax(1), out=rows)
        else:
            # Rows are indexed by their position among the touched rows. They come again for each cut of the columns.
            position = at.position  # type: ignore[attr-defined]
            working["new_0"][position] = torch.maximum(working["new_0"][position], matrix.amax(1))
        if self.tiles_apart:
            new = working["new_1"][:, at.lo : at.hi]
            if isinstance(at, Tile):
                for number, part in self._matrices_of(at):
                    torch.maximum(new[number], matrix[part].amax(0), out=new[number])
            else:
                new.scatter_reduce_(0, self._matrix_of(at.rows).unsqueeze(-1).expand_as(matrix), matrix, "amax")
            return
        columns = scratch.empty("maxima", matrix.shape[1:], nu.dtype, nu.device)
        torch.amax(matrix, 0, out=columns)
        for part, box in self._boxes(at):
            view = columns[part].unflatten(0, [s.stop - s.start for s in box])
            for k, s in enumerate(box, 1):
                others = [d for d in range(len(box)) if d != k - 1]
                new = working[f"new_{k}"].view(-1)[s]
                torch.maximum(new, view.amax(others) if others else view, out=new)

    def _boxes(self, at: At) -> list[tuple[slice, tuple[slice, ...]]]:
        """The tile's columns as boxes: ``(columns within the tile, a slice of each axis except the first)``.

        All columns together are one box, and so is any cut of a matrix. If k axes are flattened into the columns, a cut
        gives at most ``2 * k - 1`` boxes. Each box is a view of the flat columns, so no indices or scatter are needed.
        """
        out, start = [], 0
        for box in _boxes(at.lo, at.hi, self.dims[1:]):
            n = math.prod(s.stop - s.start for s in box)
            out.append((slice(start, start + n), box))
            start += n
        return out


def _boxes(lo: int, hi: int, dims: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """The flat positions ``[lo, hi)`` of a tensor of shape ``dims`` as boxes, in order."""
    inner = math.prod(dims[1:])
    first, last = -(-lo // inner), hi // inner  # whole slices of the first axis: [first, last)
    if first > last:  # the range lies within one slice
        yield from ((slice(last, first), *box) for box in _boxes(lo - last * inner, hi - last * inner, dims[1:]))
        return
    if lo < first * inner:
        yield from ((slice(first - 1, first), *box) for box in _boxes(lo - (first - 1) * inner, inner, dims[1:]))
    if first < last:
        yield slice(first, last), *(slice(0, n) for n in dims[1:])
    if last * inner < hi:
        yield from ((slice(last, last + 1), *box) for box in _boxes(0, hi - last * inner, dims[1:]))


def _along(vector: Tensor, axis: int, ndim: int) -> Tensor:
    return vector.view([-1 if d == axis else 1 for d in range(ndim)])


def _new(working: State) -> dict[str, Tensor]:
    """The maxima of this step, by the name of their axis."""
    return {f"axis_{name[4:]}": tensor for name, tensor in working.items() if name.startswith("new_")}

r"""Shampoo's preconditioner of a tensor: one sketched covariance for each axis of each of its blocks.

A tensor X with axes :math:`d_1, \ldots, d_r` is multiplied along axis i by
:math:`(L_i + \epsilon)^{a}`, where :math:`L_i` is the covariance of its unfoldings on that axis and :math:`a` the
exponent, :math:`-1 / (2 r)` in Shampoo (Gupta et al. 2018, https://arxiv.org/abs/1802.09568). The covariances are
sketches: `sketch_plugins.linalg.frequent_directions`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sketch_plugins.linalg import frequent_directions as fd
from sketch_plugins.linalg.frequent_directions import Covariance

State = Mapping[str, Tensor]

# Numbers in a stack of equal shapes that is decomposed in one call: bounds what it takes beside the state.
STACK = 1 << 24


@dataclass(frozen=True)
class Kronecker:
    """Which axes of a tensor have a covariance, and of which rank.

    Attributes:
        dims: the tensor's shape, small trailing axes merged (`merged`).
        cuts: for each axis the bounds of its blocks: ``((0, 512, 1024), (0, 768))``.
        ranks: for each axis the rank of its covariances; 0: the axis has none.
        buffered: covariances gather between solves (`frequent_directions.sampled`).
    """

    dims: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...]
    buffered: bool = True

    @cached_property
    def blocks(self) -> tuple[tuple[slice, ...], ...]:
        """Every block, as slices of the tensor."""
        spans = [[slice(a, b) for a, b in pairwise(c)] for c in self.cuts]
        return tuple(product(*spans))

    @cached_property
    def sides(self) -> tuple[Side, ...]:
        """Every axis of every block that has a covariance."""
        return tuple(
            Side(number, axis, block[axis].stop - block[axis].start, min(rank, block[axis].stop - block[axis].start))
            for number, block in enumerate(self.blocks)
            for axis, rank in enumerate(self.ranks)
            if rank
        )

    def layout(self, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of every state tensor."""
        return dict(_layout(self, dtype))

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of state, without allocating it."""
        return sum(math.prod(shape) * kind.itemsize for shape, kind in self.layout(dtype).values())

    def allocate(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The state of covariances that are 0."""
        state: dict[str, Tensor] = {}
        for side in self.sides:
            side.put(state, fd.start((), side.size, side.rank, dtype, device))
            if self.buffered:
                state[side.key("buffer")] = torch.zeros(side.size, side.rank, dtype=dtype, device=device)
                state[side.key("mass")] = torch.zeros((), dtype=dtype, device=device)
                state[side.key("decay")] = torch.ones((), dtype=dtype, device=device)
        return state

    def columns(self, x: Tensor) -> dict[Side, Tensor]:
        """The unfoldings ``(d, n)`` themselves; views where the layout allows it."""
        return {side: part.transpose(0, 1).reshape(side.size, -1) for side, part in self._unfolded(x)}

    def gather(self, state: State, x: Tensor, decay: float) -> None:
        """`Stack.gather` of one tensor."""
        Stack(self, [state]).gather(x.unsqueeze(0), decay)

    def precondition(self, state: State, x: Tensor, exponent: float, eps: float, tail: str) -> None:
        """``x``, contiguous and of the tensor's shape, times the inverse roots along every axis, in place."""
        power = moderate(x.unsqueeze(0))
        stack = Stack(self, [state])
        log = stack.turn(x.unsqueeze(0), stack.roots(exponent, eps, tail), sizes=True)
        assert log is not None
        x.mul_(log.exp().to(x.dtype)).ldexp_(power.to(x.dtype))

    def _unfolded(self, x: Tensor) -> Iterator[tuple[Side, Tensor]]:
        """``(m, d, n)``: m matrices whose columns are the vectors along the axis."""
        x = x.reshape(self.dims)
        for side in self.sides:
            part = x[self.blocks[side.block]]
            d = side.size
            if side.axis == part.ndim - 1:
                yield side, part.reshape(1, -1, d).mT
            else:
                yield side, part.reshape(-1, d, math.prod(part.shape[side.axis + 1 :]))


class Root(NamedTuple):
    """The inverse roots of one side of a stack, over what they are outside of the sketch's directions.

    Attributes:
        ratio: ``(c, k)``: the root in each direction of V, over that outside of V, less 1.
        log: ``(c)``: the logarithm of the root outside of V.
    """

    ratio: Tensor
    log: Tensor


class Stack:
    """The covariances of c tensors of equal layout, for operations on all of them at once.

    Args:
        kronecker: their layout.
        states: that of each.
    """

    def __init__(self, kronecker: Kronecker, states: Sequence[State]) -> None:
        self.kronecker, self.states = kronecker, states
        self._vectors: dict[Side, Tensor] = {}

    def gather(self, x: Tensor, decay: float) -> None:
        """Add the covariances of ``x``, ``(c, *shape)`` of any layout, to what the buffers hold, in place."""
        x = x.reshape(len(x), *self.kronecker.dims)
        names = [side.key(name) for side in self.kronecker.sides for name in ("buffer", "mass", "decay")]
        torch._foreach_mul_([state[name] for state in self.states for name in names], decay)
        for number, block in enumerate(self.kronecker.blocks):
            sides = [side for side in self.kronecker.sides if side.block == number]
            if not sides:
                continue
            part = x[(slice(None), *block)]
            for side in sides:
                self._add(side, "buffer", _sampled(part, side.axis, self.vectors(side)))
            squares = torch.linalg.vector_norm(part.reshape(len(part), -1), dim=1).square()
            for side in sides:  # the same along every axis
                self._add(side, "mass", squares)

    def roots(self, exponent: float, eps: float, tail: str) -> dict[Side, Root]:
        """`roots` of this stack alone."""
        return roots([self], [exponent], eps, tail)[0]

    def turn(self, x: Tensor, roots: Mapping[Side, Root], sizes: bool) -> Tensor | None:
        """Multiply ``x`` by the inverse roots along every axis, but for a positive factor for each tensor, in place.

        The roots themselves have any size (of a covariance of 1e-30 an exponent of -1 makes 1e30 along each axis).
        Here each is taken over its value outside of the sketch, where it is largest: no number grows.

        Args:
            x: ``(c, *shape)``, contiguous, of moderate numbers (`moderate`).
            roots: of `roots`.
            sizes: whether the factor is wanted.

        Returns:
            ``(c)``, the logarithm of the factor that is missing, float64 where the device has that; None without
            ``sizes``.
        """
        x, blocks = x.view(len(x), *self.kronecker.dims), self.kronecker.blocks
        logs, common = None, None
        if sizes or len(blocks) > 1:
            wide = torch.float32 if x.device.type == "mps" else torch.float64
            logs = torch.zeros(len(blocks), len(x), dtype=wide, device=x.device)
            for side, root in roots.items():
                logs[side.block] += root.log
            common = logs.amax(0)
        for number, block in enumerate(blocks):
            part = x[(slice(None), *block)]
            whole = part if part.is_contiguous() else part.contiguous()
            for side, root in roots.items():
                if side.block == number:
                    _stretch(whole, side.axis, self.vectors(side), root.ratio)
            if len(blocks) > 1:
                assert logs is not None and common is not None
                factor = (logs[number] - common).exp().to(x.dtype)
                whole.mul_(factor.view(-1, *[1] * (x.ndim - 1)))
            if whole is not part:
                part.copy_(whole)
        return common

    def vectors(self, side: Side) -> Tensor:
        """``(c, d, k)``; a copy where there are several, made once."""
        if side not in self._vectors:
            self._vectors[side] = self.stacked(side, "vectors")
        return self._vectors[side]

    def fetch(self) -> None:
        """Have the directions of all sides ready."""
        for side in self.kronecker.sides:
            self.vectors(side)

    def forget(self) -> None:
        """Let go of the directions: they have changed, or are not needed any more."""
        self._vectors = {}

    def stacked(self, side: Side, name: str) -> Tensor:
        """A tensor of each state, in a row."""
        return _stacked([state[side.key(name)] for state in self.states])

    def _add(self, side: Side, name: str, values: Tensor) -> None:
        torch._foreach_add_([state[side.key(name)] for state in self.states], values.unbind(0))


def roots(stacks: Sequence[Stack], exponents: Sequence[float], eps: float, tail: str) -> list[dict[Side, Root]]:
    """The inverse roots of all sides of stacks, of one dtype and on one device, in a few operations for all of them.

    Args:
        stacks: whose.
        exponents: of the covariances of each stack, at most 0.
        eps: see `frequent_directions.inverse_root`.
        tail: see `frequent_directions.fold`.

    Returns:
        Side -> its root, for each stack.
    """
    sides = [(number, side) for number, stack in enumerate(stacks) for side in stack.kronecker.sides]
    ranks = sorted({side.rank for _, side in sides})
    # By rank: shorter ones are filled up, with 0 in the place of values, which is never the largest.
    sides.sort(key=lambda one: one[1].rank)
    states = [(stacks[number], side) for number, side in sides]
    values = []
    for rank in ranks:
        one = _stacked([s[side.key("values")] for of, side in states if side.rank == rank for s in of.states])
        values.append(one if rank == ranks[-1] else torch.nn.functional.pad(one, (0, ranks[-1] - rank)))
    rests = _stacked([s[side.key("tail")] for of, side in states for s in of.states])
    counts = [len(of.states) for of, _ in states]
    each = tuple((side.size, exponents[number], n) for (number, side), n in zip(sides, counts, strict=True))
    whole = values[0] if len(values) == 1 else torch.cat(values)
    floors, powers = _floors_and_powers(each, whole)
    ratio, log = fd.relative_root(whole, rests, powers, floors, eps, tail)
    out: list[dict[Side, Root]] = [{} for _ in stacks]
    for (number, side), one, of in zip(sides, ratio.split(counts), log.split(counts), strict=True):
        out[number][side] = Root(one[:, : side.rank], of)
    return [{side: found[side] for side in stack.kronecker.sides} for stack, found in zip(stacks, out, strict=True)]


def _floors_and_powers(each: tuple[tuple[int, float, int], ...], like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """A number where all are equal; else a tensor, which has to be copied to a device, once."""
    key = each, like.dtype, like.device
    found = _CONSTANTS.get(key)
    if found is None:
        lists = (
            [fd.floor_of(size, like.dtype) for size, _, n in each for _ in range(n)],
            [exponent for _, exponent, n in each for _ in range(n)],
        )
        floors, powers = (
            one[0] if len(set(one)) == 1 else torch.tensor(one, dtype=like.dtype, device=like.device) for one in lists
        )
        found = floors, powers
        if type(like) is Tensor:  # what a fake one is given is fake, too
            if len(_CONSTANTS) > 256:
                _CONSTANTS.clear()
            _CONSTANTS[key] = found
    return found


_CONSTANTS: dict[Any, tuple[Tensor | float, Tensor | float]] = {}


def moderate(x: Tensor) -> Tensor:
    """Multiply each of ``x``, ``(c, *)``, by a power of 2, in place: their largest numbers are then in [1/2, 1).

    That changes no digit, and squares neither overflow nor vanish.

    Returns:
        ``(c)``, int32: the power by which each has to be multiplied to be what it was.
    """
    top = torch.linalg.vector_norm(x.reshape(len(x), -1), math.inf, dim=1)
    # Times 2**127 the smallest normal numbers of float32 are above 1. What is not finite has no exponent.
    limit = -math.frexp(torch.finfo(x.dtype).tiny)[1]
    power = torch.frexp(torch.where(top.isfinite(), top, 1.0)).exponent.clamp_(-limit, limit)
    x.mul_(torch.ldexp(torch.ones_like(top), -power.to(x.dtype)).view(-1, *[1] * (x.ndim - 1)))
    return power


@lru_cache(maxsize=4096)
def _layout(preconditioner: Kronecker, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for side in preconditioner.sides:
        d, k = side.size, side.rank
        shapes: dict[str, tuple[int, ...]] = {"vectors": (d, k), "values": (k,), "tail": (), "trace": ()}
        if preconditioner.buffered:
            shapes |= {"buffer": (d, k), "mass": (), "decay": ()}
        out |= {side.key(name): (shape, dtype) for name, shape in shapes.items()}
    return out


@dataclass(frozen=True)
class Side:
    """One axis of one block."""

    block: int
    axis: int
    size: int
    rank: int

    def key(self, name: str) -> str:
        """Name of a state tensor."""
        return f"{name}_{self.block}_{self.axis}"

    def get(self, state: State) -> Covariance:
        """Its covariance."""
        return Covariance(*(state[self.key(name)] for name in Covariance._fields))

    def put(self, state: dict[str, Tensor], new: Covariance) -> None:
        """Into a state that has none yet."""
        state |= {self.key(name): tensor for name, tensor in new._asdict().items()}

    def replace(self, state: State, new: Covariance) -> None:
        """In place of the present one."""
        for name, tensor in new._asdict().items():
            state[self.key(name)].copy_(tensor)


#: A covariance, its state, and new columns; without them what was gathered is folded.
Due = tuple[Side, State, Tensor | None]


def solve(due: Iterable[Due], decay: float, tail: str, solver: str) -> list[Due]:
    """Fold what was gathered (or the columns given) into the covariances: equal shapes in one batched call.

    A stack is bounded by `STACK` numbers; all of it is computed before anything of it is written. One flag is read for
    each: whether everything is finite.

    Returns:
        Those that could not be folded. Their covariances are the last ones, and what was gathered waits for the next
        solve, unless it is not finite itself: then it is dropped.
    """
    stacks: dict[tuple[object, ...], list[Due]] = {}
    failed: list[Due] = []
    for item in due:
        side, state, columns = item
        vectors = state[side.key("vectors")]
        width = None if columns is None else columns.shape[-1]
        stacks.setdefault((side.size, side.rank, width, vectors.dtype, vectors.device), []).append(item)
    for members in stacks.values():
        side, _, columns = members[0]
        numbers = side.size * (2 * side.rank if columns is None else side.rank + columns.shape[-1])
        most = max(1, STACK // numbers)
        for first in range(0, len(members), most):
            failed += _solve(members[first : first + most], decay, tail, solver)
    return failed


def _solve(members: Sequence[Due], decay: float, tail: str, solver: str) -> list[Due]:
    new, fine = None, None
    try:
        with fd.unchecked() as doubts:
            new = _folded(members, decay, tail, solver)
        fine = fd.finite(new, *doubts)
    except torch.linalg.LinAlgError:
        pass
    if new is None or fine is None or not all(fine):
        new = _folded(members, decay, tail, solver)
        fine = fd.finite(new)
    well = [i for i, fit in enumerate(fine) if fit]
    to, by = [], []
    for name, tensor in new._asdict().items():
        parts = tensor.unbind(0)
        to += [members[i][1][members[i][0].key(name)] for i in well]
        by += [parts[i] for i in well]
    if to:
        torch._foreach_copy_(to, by)
    # What was gathered is used up, or of no use where it is not finite. Else it waits for the next solve.
    used = [
        (side, state)
        for (side, state, columns), fit in zip(members, fine, strict=True)
        if columns is None
        and (fit or not all(bool(state[side.key(name)].isfinite().all()) for name in ("buffer", "mass")))
    ]
    if used:
        emptied = ("buffer", "mass", "decay")
        torch._foreach_zero_([state[side.key(name)] for side, state in used for name in emptied])
        torch._foreach_add_([state[side.key("decay")] for side, state in used], 1.0)
    return [item for item, fit in zip(members, fine, strict=True) if not fit]


def _folded(members: Sequence[Due], decay: float, tail: str, solver: str) -> Covariance:
    def stacked(name: str) -> Tensor:
        return _stacked([state[side.key(name)] for side, state, _ in members])

    old = Covariance(*map(stacked, Covariance._fields))
    columns = [c for _, _, c in members if c is not None]
    if columns:
        return fd.fold(old, _stacked(columns), decay, tail=tail, solver=solver)
    gathered = fd.drain(stacked("buffer"), old.vectors)
    return fd.fold(old, gathered, stacked("decay"), tail=tail, solver=solver, mass=stacked("mass"))


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def merged(shape: Sequence[int], most: int) -> tuple[int, ...]:
    """``shape`` with trailing axes merged while their product is at most ``most``; the first axis stays alone.

    Axes of length 1 vanish, but for the second of a vector. A convolution ``(64, 32, 3, 3)`` is ``(64, 288)`` at
    ``most=1024``.
    """
    first, *rest = [n for n in shape if n != 1] or [1]
    out: list[int] = []
    for n in reversed(rest):
        if out and out[0] * n <= most:
            out[0] *= n
        else:
            out.insert(0, n)
    return (first, *out) if out else (first, 1)


def cut(n: int, most: int) -> tuple[int, ...]:
    """Bounds of the fewest blocks of at most ``most`` (0: any size), as equal as can be."""
    count = -(-n // most) if most else 1
    return tuple(round(i * n / count) for i in range(count + 1))


def _sampled(x: Tensor, axis: int, vectors: Tensor) -> Tensor:
    """``L V`` with the covariances L of ``x``, ``(c, *)``, along an axis of each: ``(c, d, k)``."""
    count, d, k = vectors.shape
    before, behind = math.prod(x.shape[1 : axis + 1]), math.prod(x.shape[axis + 2 :])
    if behind == 1:
        return fd.sampled(x.reshape(count, -1, d).mT, vectors)
    if before == 1:
        return fd.sampled(x.reshape(count, d, behind), vectors)
    x = x.reshape(count, before, d, behind)
    # As many of the matrices at a time as keep the products below the size of x.
    most, vectors = max(1, before * behind // k), vectors.unsqueeze(1)
    parts = [fd.sampled(x[:, first : first + most], vectors).sum(1) for first in range(0, before, most)]
    return parts[0] if len(parts) == 1 else sum(parts[1:], parts[0])


def _stretch(x: Tensor, axis: int, vectors: Tensor, ratio: Tensor) -> None:
    """`frequent_directions.stretch` of contiguous ``x``, ``(c, *)``, along an axis of each."""
    count, d, k = vectors.shape
    before, behind = math.prod(x.shape[1 : axis + 1]), math.prod(x.shape[axis + 2 :])
    if behind == 1:
        fd.stretch_rows(x.view(count, -1, d), vectors, ratio)
    elif before == 1:
        fd.stretch(x.view(count, d, behind), vectors, ratio)
    else:
        x = x.view(count, before, d, behind)
        most = max(1, before * behind // k)
        for first in range(0, before, most):
            part = x[:, first : first + most]
            alone = part.is_contiguous()
            flat = part.reshape(-1, d, behind)
            times = part.shape[1]
            each = vectors.unsqueeze(1).expand(count, times, d, k).reshape(-1, d, k)
            fd.stretch(flat, each, ratio.unsqueeze(1).expand(count, times, k).reshape(-1, k))
            if not alone:
                part.copy_(flat.view(part.shape))

r"""Shampoo's preconditioner of a tensor: one sketched covariance for each axis of each of its blocks.

A tensor X with axes :math:`d_1, \ldots, d_r` is multiplied along each axis i by :math:`(L_i + \epsilon)^{a}`.
:math:`L_i` is the covariance of its unfoldings on that axis, and :math:`a` the exponent, :math:`-1 / (2 r)` in Shampoo
(Gupta et al. 2018, https://arxiv.org/abs/1802.09568). The covariances are sketches:
`sketch_plugins.linalg.frequent_directions`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sketch_plugins.linalg import frequent_directions as fd
from sketch_plugins.linalg.along_axis import sampled_along, stretch_along
from sketch_plugins.linalg.frequent_directions import Covariance

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Kronecker:
    """Which axes of a tensor have a covariance, and the ranks.

    Attributes:
        dims: the tensor's shape, with small trailing axes merged (`cutting.merged`).
        cuts: for each axis the bounds of its blocks: ``((0, 512, 1024), (0, 768))``.
        ranks: for each axis the rank of its covariances; 0 if it has none.
        buffered: covariances gather between solves (`frequent_directions.sampled`).
        matrices: None, or the number of matrices of shape ``dims`` if the tensor is a batch (experts). Each matrix has
            its own covariances, and the state tensors have a first axis for the matrices.
    """

    dims: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...]
    buffered: bool = True
    matrices: int | None = None

    @property
    def batch(self) -> tuple[int, ...]:
        """The first axes of the state tensors: ``(matrices,)``, or none."""
        return () if self.matrices is None else (self.matrices,)

    @property
    def count(self) -> int:
        """The number of matrices. A tensor that is no batch counts as one."""
        return 1 if self.matrices is None else self.matrices

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
        """The shape and dtype of every state tensor, by name."""
        return dict(_layout(self, dtype))

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of state, without allocating it."""
        return sum(math.prod(shape) * kind.itemsize for shape, kind in self.layout(dtype).values())

    def allocate(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The state of covariances that are 0."""
        state: dict[str, Tensor] = {}
        for side in self.sides:
            side.put(state, fd.start(self.batch, side.size, side.rank, dtype, device))
            if self.buffered:
                state[side.key("buffer")] = torch.zeros(*self.batch, side.size, side.rank, dtype=dtype, device=device)
                state[side.key("mass")] = torch.zeros(self.batch, dtype=dtype, device=device)
                state[side.key("decay")] = torch.ones(self.batch, dtype=dtype, device=device)
        return state

    def columns(self, x: Tensor) -> dict[Side, Tensor]:
        """The unfoldings ``(*batch, d, n)`` themselves; they are views if the layout allows it."""
        return {side: part.transpose(-3, -2).reshape(*self.batch, side.size, -1) for side, part in self._unfolded(x)}

    def gather(self, state: State, x: Tensor, decay: float) -> None:
        """`Stack.gather` of one tensor."""
        Stack(self, [state]).gather(x.unsqueeze(0), decay)

    def precondition(self, state: State, x: Tensor, exponent: float, eps: float, tail: str) -> None:
        """Multiply ``x`` (contiguous, of the tensor's shape) by the inverse roots along every axis, in place."""
        each = x.view(self.count, -1)
        power = moderate(each)
        stack = Stack(self, [state])
        log = stack.turn(x.unsqueeze(0), stack.roots(exponent, eps, tail), sizes=True)
        assert log is not None
        each.mul_(log.exp().to(x.dtype).unsqueeze(-1)).ldexp_(power.to(x.dtype).unsqueeze(-1))

    def _unfolded(self, x: Tensor) -> Iterator[tuple[Side, Tensor]]:
        """``(*batch, m, d, n)``: m matrices whose columns are the vectors along the axis."""
        x = x.reshape(*self.batch, *self.dims)
        for side in self.sides:
            part = x[(slice(None),) * len(self.batch) + self.blocks[side.block]]
            d = side.size
            if side.axis == len(self.dims) - 1:
                yield side, part.reshape(*self.batch, 1, -1, d).mT
            else:
                behind = math.prod(part.shape[len(self.batch) + side.axis + 1 :])
                yield side, part.reshape(*self.batch, -1, d, behind)


class Root(NamedTuple):
    """The inverse roots of one side of a stack, relative to the root outside of the sketch's directions.

    Attributes:
        ratio: ``(n, k)``: the root in each direction of V, divided by the root outside of V, less 1.
        log: ``(n)``: the logarithm of the root outside of V.
    """

    ratio: Tensor
    log: Tensor


class Stack:
    """The covariances of c tensors of equal layout. Its operations work on all of their n matrices at once.

    Args:
        kronecker: the layout.
        states: the state of each tensor.
    """

    def __init__(self, kronecker: Kronecker, states: Sequence[State]) -> None:
        self.kronecker, self.states = kronecker, states
        self._vectors: dict[Side, Tensor] = {}

    def gather(self, x: Tensor, decay: float) -> None:
        """Add the covariances of ``x``, ``(c, *shape)`` of any layout, to the buffers, in place."""
        x = x.reshape(-1, *self.kronecker.dims)
        names = [side.key(name) for side in self.kronecker.sides for name in ("buffer", "mass", "decay")]
        torch._foreach_mul_([state[name] for state in self.states for name in names], decay)
        for number, block in enumerate(self.kronecker.blocks):
            sides = [side for side in self.kronecker.sides if side.block == number]
            if not sides:
                continue
            part = x[(slice(None), *block)]
            for side in sides:
                self._add(side, "buffer", sampled_along(part, side.axis, self.vectors(side)))
            squares = torch.linalg.vector_norm(part.reshape(len(part), -1), dim=1).square()
            for side in sides:  # the sum of squares is the same along every axis
                self._add(side, "mass", squares)

    def roots(self, exponent: float, eps: float, tail: str) -> dict[Side, Root]:
        """`roots` of this stack alone."""
        return roots([self], [exponent], eps, tail)[0]

    def turn(self, x: Tensor, roots: Mapping[Side, Root], sizes: bool) -> Tensor | None:
        """Multiply ``x`` by the inverse roots along every axis, up to a positive factor for each matrix, in place.

        The roots themselves may have any size: a covariance of 1e-30 with an exponent of -1 gives 1e30 along each
        axis. Here each root is divided by its value outside of the sketch, where it is largest. So no number grows.

        Args:
            x: ``(c, *shape)``, contiguous, with moderate numbers (`moderate`).
            roots: as `roots` returns them.
            sizes: whether to return the factor.

        Returns:
            ``(n)``: the logarithm of the factor that is missing from each matrix (float64 if the device has it); None
            without ``sizes``.
        """
        x, blocks = x.view(-1, *self.kronecker.dims), self.kronecker.blocks
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
                    stretch_along(whole, side.axis, self.vectors(side), root.ratio)
            if len(blocks) > 1:
                assert logs is not None and common is not None
                factor = (logs[number] - common).exp().to(x.dtype)
                whole.mul_(factor.view(-1, *[1] * (x.ndim - 1)))
            if whole is not part:
                part.copy_(whole)
        return common

    def vectors(self, side: Side) -> Tensor:
        """``(n, d, k)``. With several tensors it is a copy, which is made once."""
        if side not in self._vectors:
            self._vectors[side] = self.stacked(side, "vectors")
        return self._vectors[side]

    def fetch(self) -> None:
        """Prepare the directions of all sides."""
        for side in self.kronecker.sides:
            self.vectors(side)

    def forget(self) -> None:
        """Release the directions, because they have changed or are not needed any more."""
        self._vectors = {}

    def stacked(self, side: Side, name: str) -> Tensor:
        """A tensor of each state, one after the other, by matrices."""
        return _rows([state[side.key(name)] for state in self.states], bool(self.kronecker.batch))

    def _add(self, side: Side, name: str, values: Tensor) -> None:
        if self.kronecker.batch:
            values = values.unflatten(0, (-1, self.kronecker.count))
        torch._foreach_add_([state[side.key(name)] for state in self.states], values.unbind(0))


def roots(stacks: Sequence[Stack], exponents: Sequence[float], eps: float, tail: str) -> list[dict[Side, Root]]:
    """The inverse roots of all sides of stacks of one dtype and device, in a few operations for all of them.

    Args:
        stacks: the stacks.
        exponents: for each stack, the exponent of its covariances, at most 0.
        eps: see `frequent_directions.inverse_root`.
        tail: see `frequent_directions.fold`.

    Returns:
        For each stack, the root of each side.
    """
    sides = [(number, side) for number, stack in enumerate(stacks) for side in stack.kronecker.sides]
    ranks = sorted({side.rank for _, side in sides})
    # Sides are sorted by rank. Shorter ones are padded with values of 0, which is never the largest.
    sides.sort(key=lambda one: one[1].rank)
    states = [(stacks[number], side) for number, side in sides]
    batched = any(stack.kronecker.batch for stack in stacks)
    values = []
    for rank in ranks:
        those = [s[side.key("values")] for of, side in states if side.rank == rank for s in of.states]
        one = _rows(those, batched, 1)
        values.append(one if rank == ranks[-1] else torch.nn.functional.pad(one, (0, ranks[-1] - rank)))
    rests = _rows([s[side.key("tail")] for of, side in states for s in of.states], batched, 0)
    counts = [len(of.states) * of.kronecker.count for of, _ in states]
    each = tuple((side.size, exponents[number], n) for (number, side), n in zip(sides, counts, strict=True))
    whole = values[0] if len(values) == 1 else torch.cat(values)
    floors, powers = _floors_and_powers(each, whole)
    ratio, log = fd.relative_root(whole, rests, powers, floors, eps, tail)
    out: list[dict[Side, Root]] = [{} for _ in stacks]
    for (number, side), one, of in zip(sides, ratio.split(counts), log.split(counts), strict=True):
        out[number][side] = Root(one[:, : side.rank], of)
    return [{side: found[side] for side in stack.kronecker.sides} for stack, found in zip(stacks, out, strict=True)]


def _floors_and_powers(each: tuple[tuple[int, float, int], ...], like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Floors and exponents: a number if all are equal, else a tensor, which is copied to the device once."""
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
        if type(like) is Tensor:  # tensors made from a fake one are fake, too, and must not be kept
            if len(_CONSTANTS) > 256:
                _CONSTANTS.clear()
            _CONSTANTS[key] = found
    return found


_CONSTANTS: dict[Any, tuple[Tensor | float, Tensor | float]] = {}


def moderate(x: Tensor) -> Tensor:
    """Multiply each of ``x``, ``(c, *)``, by a power of 2 that brings its largest number into [1/2, 1), in place.

    That changes no digit, and squares neither overflow nor vanish.

    Returns:
        ``(c)``, int32: the exponent of the power of 2 that restores each of them.
    """
    top = torch.linalg.vector_norm(x.reshape(len(x), -1), math.inf, dim=1)
    # Times 2**127 the smallest normal numbers of float32 are above 1. Numbers that are not finite have no exponent.
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
        out |= {side.key(name): ((*preconditioner.batch, *shape), dtype) for name, shape in shapes.items()}
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
        """Add the covariance to a state that has none yet."""
        state |= {self.key(name): tensor for name, tensor in new._asdict().items()}

    def replace(self, state: State, new: Covariance) -> None:
        """Replace the present covariance."""
        for name, tensor in new._asdict().items():
            state[self.key(name)].copy_(tensor)


def _rows(tensors: Sequence[Tensor], batched: bool, ndim: int | None = None) -> Tensor:
    """Concatenate tensors along a first axis: those of a batch have one, the others get one.

    Args:
        tensors: the tensors.
        batched: whether any of them has an axis for matrices.
        ndim: number of dimensions without that axis, if only some of them have it; None if all have.
    """
    if not batched:
        return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)
    return joined([t.unsqueeze(0) if t.ndim == ndim else t for t in tensors])


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors along their first axis. A single tensor is not copied."""
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]

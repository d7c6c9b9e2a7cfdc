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
        buffered: covariances gather between solves (`frequent_directions.accumulate`).
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

    def gather(self, state: State, x: Tensor, decay: float) -> None:
        """Add the covariances of ``x`` (any view of the tensor's shape) to what the buffers hold, in place."""
        squares: dict[int, Tensor] = {}  # of a block: the same along every axis
        for side, unfolded in self._unfolded(x):
            if side.block not in squares:
                squares[side.block] = _square(unfolded)
            vectors, buffer = state[side.key("vectors")], state[side.key("buffer")]
            mass, weight = state[side.key("mass")], state[side.key("decay")]
            # As many of the matrices at a time as keep the products below the size of x.
            count = max(1, len(unfolded) * unfolded.shape[2] // side.rank)
            for first in range(0, len(unfolded), count):
                fd.accumulate(buffer, vectors, unfolded[first : first + count], 1.0 if first else decay)
            mass.mul_(decay).add_(squares[side.block])
            weight.mul_(decay)

    def columns(self, x: Tensor) -> dict[Side, Tensor]:
        """The unfoldings ``(d, n)`` themselves; views where the layout allows it."""
        return {side: part.transpose(0, 1).reshape(side.size, -1) for side, part in self._unfolded(x)}

    def precondition(self, state: State, x: Tensor, exponent: float, eps: float, tail: str) -> None:
        """``x``, contiguous and of the tensor's shape, times the inverse roots along every axis, in place."""
        log, power = self.turn(state, x, exponent, eps, tail, sizes=True)
        x.mul_(log.exp().to(x.dtype)).ldexp_(-power.to(x.dtype))

    def turn(
        self, state: State, x: Tensor, exponent: float, eps: float, tail: str, sizes: bool
    ) -> tuple[Tensor, Tensor]:
        """`precondition` but for a positive factor, the same for all of ``x``.

        The roots themselves have any size (of a covariance of 1e-30 an exponent of -1 makes 1e30 along each axis), and
        so have gradients. ``x`` is made of numbers of moderate size, whose squares neither overflow nor vanish, and
        along each axis it is multiplied by the root over that of the largest eigenvalue.

        Args:
            state: the covariances.
            x: contiguous and of the tensor's shape; changed in place.
            exponent: of the covariances, at most 0.
            eps: see `frequent_directions.inverse_root`.
            tail: see `frequent_directions.fold`.
            sizes: whether the logarithm is wanted. Without it 0 is returned, and nothing is computed for it where
                there are no blocks that have to be comparable.

        Returns:
            ``(log, power)``, 0-d, float64 where the device has that: what is missing is a factor of
            ``exp(log) / 2**power``.
        """
        x = x.view(self.dims)
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        sides = [(side, side.get(state)) for side in self.sides]
        logs = torch.zeros(len(self.blocks), dtype=wide, device=x.device)
        sizes = sizes or len(self.blocks) > 1
        if sizes:
            for side, covariance in sides:
                logs[side.block] += exponent * fd.largest(covariance, tail).to(wide).log()
        common = logs.amax() if sizes else logs.new_zeros(())
        # A power of 2 changes no digit. No entry grows by more than this: by `floor` in every `inverse_root`.
        smallest, largest = x.aminmax()
        top = torch.maximum(-smallest, largest)
        growth = max(
            sum(exponent * math.log2(fd.floor_of(s.size, x.dtype)) for s, _ in sides if s.block == number)
            for number in range(len(self.blocks))
        )
        # Times the root's largest factor it has to be a number itself.
        limit = int(0.8 * math.log2(torch.finfo(x.dtype).max))
        power = (-round(growth / 2) - torch.frexp(top).exponent.to(wide)).clamp(-limit, limit)
        scale = torch.ldexp(torch.ones_like(top), power.to(x.dtype))
        for number, block in enumerate(self.blocks):
            part = x[block]
            whole = part if part.ndim == 2 or part.is_contiguous() else part.contiguous()
            factor = scale * (logs[number] - common).exp().to(x.dtype) if len(self.blocks) > 1 else scale
            for side, covariance in sides:
                if side.block == number:
                    inside, outside = fd.inverse_root(covariance, exponent, eps, tail, absolute=False)
                    _along(whole, side.axis, covariance.vectors, inside * factor, outside * factor)
                    factor = torch.ones_like(scale)
            if whole is not part:
                part.copy_(whole)
        return common, power

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
    def stacked(name: str) -> Tensor:
        return torch.stack([state[side.key(name)] for side, state, _ in members])

    old = Covariance(*map(stacked, Covariance._fields))
    columns = [c for _, _, c in members if c is not None]
    if columns:
        stack = torch.stack(columns) if len(columns) > 1 else columns[0].unsqueeze(0)
        new = fd.fold(old, stack, decay, tail=tail, solver=solver)
    else:
        gathered = fd.drain(stacked("buffer"), old.vectors)
        new = fd.fold(old, gathered, stacked("decay"), tail=tail, solver=solver, mass=stacked("mass"))
    fine = fd.finite(new)
    for i, (side, state, _) in enumerate(members):
        if fine[i]:
            side.replace(state, Covariance(*(tensor[i] for tensor in new)))
        # What was gathered is used up, or of no use. Else it waits for the next solve.
        if not columns and (
            fine[i] or not all(bool(state[side.key(name)].isfinite().all()) for name in ("buffer", "mass"))
        ):
            state[side.key("buffer")].zero_()
            state[side.key("mass")].zero_()
            state[side.key("decay")].fill_(1.0)
    return [item for item, well in zip(members, fine, strict=True) if not well]


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


def _along(x: Tensor, axis: int, vectors: Tensor, inside: Tensor, outside: Tensor) -> None:
    d = vectors.shape[0]
    if x.ndim == 2:
        x = x.mT if axis == 1 else x
    elif axis == x.ndim - 1:
        x = x.view(-1, d).mT
    else:
        x = x.view(-1, d, math.prod(x.shape[axis + 1 :]))
    fd.multiply(x, vectors, inside, outside)


def _square(x: Tensor) -> Tensor:
    """The sum of squares, where the layout allows it without memory for them."""
    for view in (x, x.mT):
        if view.is_contiguous():
            flat = view.view(-1)
            return torch.dot(flat, flat)
    return x.square().sum()

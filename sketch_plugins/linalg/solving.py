"""Solves of covariances: what was gathered is folded into the sketches, with one decomposition for equal shapes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from sketch_plugins.linalg import frequent_directions as fd
from sketch_plugins.linalg.decompositions import unchecked
from sketch_plugins.linalg.frequent_directions import Covariance
from sketch_plugins.linalg.kronecker import Side, State, joined

# How many numbers of equal shapes are decomposed in one call. This limits the memory that a call takes.
STACK = 1 << 24

#: Covariances of a side (one for each matrix of a batch), their state, and new columns. Without columns, what was
#: gathered is folded.
Due = tuple[Side, State, Tensor | None]


def solve(due: Iterable[Due], decay: float, tail: str, solver: str) -> list[Due]:
    """Fold what was gathered (or the given columns) into the covariances, equal shapes in one batched call.

    A stack has at most `STACK` numbers. All of it is computed before any of it is written. The host waits once for each
    stack, for one flag of each matrix: whether its result is finite.

    Returns:
        The items that could not be folded. Their covariances stay, and what they gathered waits for the next solve,
        unless it is not finite itself: then it is dropped.
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
        for some in _batches(members, max(1, STACK // numbers)):
            failed += _solve(some, decay, tail, solver)
    return failed


def _batches(members: Sequence[Due], most: int) -> Iterator[list[_Some]]:
    """Runs of at most ``most`` matrices. A member with more matrices is split into runs of its own matrices."""
    some: list[_Some] = []
    held = 0
    for item in members:
        side, state, _ = item
        vectors = state[side.key("vectors")]
        count = len(vectors) if vectors.ndim > 2 else 1
        for first in range(0, count, most):
            size = min(most, count - first)
            if held and held + size > most:
                yield some
                some, held = [], 0
            some.append(_Some(item, slice(first, first + size) if vectors.ndim > 2 else None, size))
            held += size
    if some:
        yield some


class _Some(NamedTuple):
    """Matrices of one item: those of a slice, or (``at=None``) the only one of an item that is no batch."""

    item: Due
    at: slice | None
    size: int

    def get(self, name: str) -> Tensor:
        """``(size, *)``: a state tensor, as a view."""
        side, state, _ = self.item
        tensor = state[side.key(name)]
        return tensor.unsqueeze(0) if self.at is None else tensor[self.at]

    def columns(self) -> Tensor | None:
        """The new columns, ``(size, d, n)``, or None."""
        columns = self.item[2]
        return columns if columns is None else columns.unsqueeze(0) if self.at is None else columns[self.at]


def _solve(members: Sequence[_Some], decay: float, tail: str, solver: str) -> list[Due]:
    new, fine = None, None
    try:
        with unchecked() as doubts:
            new = _folded(members, decay, tail, solver)
        fine = fd.finite(new, *doubts)
    except torch.linalg.LinAlgError:
        pass
    if new is None or fine is None or not all(fine):
        new = _folded(members, decay, tail, solver)
        fine = fd.finite(new)
    counts = [one.size for one in members]
    fits = [fine[end - n : end] for n, end in zip(counts, accumulate(counts), strict=True)]
    to, by = [], []
    for name, tensor in new._asdict().items():
        for one, fit, part in zip(members, fits, tensor.split(counts), strict=True):
            to += _where(one.get(name), fit)
            by += _where(part, fit)
    if to:
        torch._foreach_copy_(to, by)
    # What was gathered is used up, or useless if it is not finite. Otherwise it waits for the next solve.
    emptied, ones = [], []
    for one, fit in zip(members, fits, strict=True):
        if one.item[2] is not None:
            continue
        if not all(fit):
            finite = one.get("buffer").isfinite().flatten(1).all(1) & one.get("mass").isfinite()
            fit = [good or not waits for good, waits in zip(fit, finite.tolist(), strict=True)]
        emptied += [part for name in ("buffer", "mass", "decay") for part in _where(one.get(name), fit)]
        ones += _where(one.get("decay"), fit)
    if emptied:
        torch._foreach_zero_(emptied)
        torch._foreach_add_(ones, 1.0)
    failed = {id(one.item): one.item for one, fit in zip(members, fits, strict=True) if not all(fit)}
    return list(failed.values())


def _where(tensor: Tensor, fit: Sequence[bool]) -> list[Tensor]:
    """The matrices that fit, as views; one view if all fit."""
    return [tensor] if all(fit) else [tensor[i] for i, good in enumerate(fit) if good]


def _folded(members: Sequence[_Some], decay: float, tail: str, solver: str) -> Covariance:
    def stacked(name: str) -> Tensor:
        return joined([one.get(name) for one in members])

    old = Covariance(*map(stacked, Covariance._fields))
    columns = [c for c in (one.columns() for one in members) if c is not None]
    if columns:
        return fd.fold(old, joined(columns), decay, tail=tail, solver=solver)
    gathered = fd.drain(stacked("buffer"), old.vectors)
    return fd.fold(old, gathered, stacked("decay"), tail=tail, solver=solver, mass=stacked("mass"))

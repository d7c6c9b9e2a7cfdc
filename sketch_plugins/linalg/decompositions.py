"""Decompositions of batches that do not fail silently: eigenpairs, singular pairs, orthonormal columns."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def eigenpairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues, and eigenvectors, of symmetric matrices."""
    return _robust(_symmetric, matrix)


def basis(matrix: Tensor) -> Tensor:
    """Orthonormal columns, of which the first j span what the first j columns of the matrix span."""
    return _robust(_orthogonal, matrix)[1]


def left_singular_pairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Descending singular values, and left singular vectors."""
    return _robust(_singular, matrix)


def _symmetric(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def _singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return values, left


def _orthogonal(matrix: Tensor) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(matrix)
    return r, q


class _Doubts(threading.local):
    sums: list[Tensor] | None = None


_DOUBTS = _Doubts()


@contextmanager
def unchecked() -> Iterator[list[Tensor]]:
    """Within this block decompositions do not check their results, so that they do not wait for the device.

    Yields:
        A list to which each decomposition adds a tensor with one number for each member of its batch. The number is
        finite if all numbers that went in and came out are finite.
    """
    before, _DOUBTS.sums = _DOUBTS.sums, []
    try:
        yield _DOUBTS.sums
    finally:
        _DOUBTS.sums = before


def _robust(decompose: Callable[[Tensor], tuple[Tensor, Tensor]], matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose each matrix of a batch into two parts: one that grows with the matrix, and one that does not.

    LAPACK's divide and conquer fails for some finite matrices (MKL's for one in six float32 matrices with many zero
    rows): it does not converge, or returns NaN without an error. Members of the batch whose result is not finite are
    therefore computed again (`_rescued`). If nothing helps, the result is NaN.
    """
    if matrix.is_meta:  # a rehearsal has no numbers to check
        return decompose(matrix)
    if _DOUBTS.sums is not None:
        size, vectors = decompose(matrix)
        # The matrix is checked, too, because eigh may read only one half of it.
        _DOUBTS.sums.append(
            _sum(size, matrix.ndim - 2) + _sum(vectors, matrix.ndim - 2) + _sum(matrix, matrix.ndim - 2)
        )
        return size, vectors
    good: Tensor | None = None
    try:
        size, vectors = decompose(matrix)
        # The matrix is checked, too, because eigh may read only one half of it.
        good = _finite_members(size, vectors) & matrix.isfinite().flatten(-2).all(-1)
        if bool(good.all()):
            return size, vectors
    except torch.linalg.LinAlgError:
        pass
    batch = matrix.shape[:-2]
    members = matrix.reshape(-1, *matrix.shape[-2:])
    # An exception does not say which members failed.
    fine = [False] * len(members) if good is None else good.reshape(-1).tolist()
    found: list[tuple[Tensor, Tensor]] = []
    for i, one in enumerate(members):
        if fine[i]:
            found.append((size.reshape(-1, *size.shape[len(batch) :])[i], vectors.reshape(-1, *vectors.shape[-2:])[i]))
        else:
            found.append(_rescued(decompose, one, good is None and len(members) > 1))
    parts = [torch.stack(part) for part in zip(*found, strict=True)]
    return parts[0].reshape(*batch, *parts[0].shape[1:]), parts[1].reshape(*batch, *parts[1].shape[1:])


def _rescued(
    decompose: Callable[[Tensor], tuple[Tensor, Tensor]], matrix: Tensor, untried: bool
) -> tuple[Tensor, Tensor]:
    """Decompose one matrix: as it is if ``untried``, then in float64 scaled to 1, then with a slightly larger diagonal.

    A larger diagonal moves eigenvalues by some units in the last place of float64. It helps because the algorithms fail
    where numbers are exactly 0.
    """
    top = matrix.abs().amax() if matrix.numel() else matrix.new_zeros(())
    if bool(top.isfinite()):
        exact = matrix.double() / torch.where(top > 0, top, 1.0).double()
        off = exact.clone()
        off.diagonal().add_(max(matrix.shape) * torch.finfo(torch.float64).eps)
        own: list[tuple[Tensor, Tensor | None]] = [(matrix, None)] if untried else []
        for attempt, scale in [*own, (exact, top), (off, top)]:
            try:
                size, vectors = decompose(attempt)
            except torch.linalg.LinAlgError:
                continue
            if scale is not None:
                size, vectors = (size * scale.double()).to(matrix.dtype), vectors.to(matrix.dtype)
            if bool(_finite_members(size, vectors)):
                return size, vectors
    return _nothing(decompose, matrix)


def _nothing(decompose: Callable[[Tensor], tuple[Tensor, Tensor]], matrix: Tensor) -> tuple[Tensor, Tensor]:
    """NaN in the shapes that ``decompose`` returns."""
    d, n = matrix.shape[-2:]
    least = min(d, n)
    shape = (least, n) if decompose is _orthogonal else (least,)
    return matrix.new_full(shape, torch.nan), matrix.new_full((d, least), torch.nan)


def _sum(x: Tensor, batch: int) -> Tensor:
    """The sum of each member of a batch."""
    return x.sum(tuple(range(batch, x.ndim)))


def _finite_members(size: Tensor, vectors: Tensor) -> Tensor:
    """``(*)``: a flag for each member of a batch."""
    numbers = size.isfinite()
    for _ in range(size.ndim - vectors.ndim + 2):
        numbers = numbers.all(-1)
    return numbers & vectors.isfinite().flatten(-2).all(-1)

"""Which axes of a tensor have a covariance (`Sketchy`), and its rank."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, TypedDict

import torch

from sketch_plugins.linalg.cutting import cut, merged
from sketch_plugins.linalg.kronecker import Kronecker
from sketch_plugins.optim.declaring import count, option


class Covariances(TypedDict, total=False):
    """Which axes have a covariance, and its rank."""

    rank: Annotated[
        float | None,
        option(
            32,
            "k: an integer, or a fraction (0, 1) of the axis. If it exceeds the axis, it becomes its length, which is "
            "exact Shampoo.",
            allowed="an integer >= 1 or a fraction in (0, 1)",
            check=lambda v: 0 < v < 1 or (v >= 1 and v == int(v)),
            structural=True,
        ),
    ]
    budget: Annotated[
        float | None,
        option(
            0.0,
            "bytes of state a parameter, in place of ``rank`` (0: use ``rank``). Each preconditioned tensor takes the "
            "largest rank, the same for its axes, with which its whole state stays within the budget. If rank 1 does "
            "not fit, the tensor is not preconditioned. It is an error if this is so for every tensor of the group "
            "that would have a covariance for every axis.",
            allowed="a number >= 0",
            check=lambda v: v >= 0,
            structural=True,
        ),
    ]
    precondition: Annotated[
        str | None,
        option(
            "auto",
            '``"auto"``: as above; ``"all"``: every axis, however long; ``"none"``: the graft alone (for a '
            "parameter group).",
            choices=("auto", "all", "none"),
            structural=True,
        ),
    ]
    merge_dims: Annotated[
        int | None, count(1024, "trailing axes are merged while their product is at most this.", 1, structural=True)
    ]
    max_block_dim: Annotated[int | None, count(8192, "longest axis of a block (0: no blocks).", 0, structural=True)]
    max_axis: Annotated[int | None, count(16384, "longer axes have no covariance, see above.", 1, structural=True)]
    max_aspect_ratio: Annotated[
        float | None,
        option(
            16.0,
            "axes longer than this times the rest of the tensor have no covariance either.",
            allowed="a number > 0",
            check=lambda v: v > 0,
            structural=True,
        ),
    ]
    embedding_rate: Annotated[
        float | None,
        option(
            2.0,
            "the factor of the learning rate for tensors that have covariances for some of their axes only, because "
            "others are too long: embeddings and output layers. Weight decay does not have it.",
            allowed="a number > 0",
            check=lambda v: v > 0,
        ),
    ]


#: Options that decide which axes have a covariance.
AXES = ("precondition", "merge_dims", "max_axis", "max_aspect_ratio")


@lru_cache(maxsize=1024)
def axes_with_covariances(
    shape: tuple[int, ...], precondition: str, merge: int, longest: int, ratio: float
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """The tensor's axes, with small ones merged, and which of them have a covariance."""
    size = 1
    for n in shape:
        size *= n
    if len(shape) < 2 or size == 0 or precondition == "none":
        return shape, ()
    dims = merged(shape, merge)
    if min(dims) == 1:
        return dims, ()
    return dims, tuple(precondition == "all" or (d <= longest and d <= ratio * (size // d)) for d in dims)


@lru_cache(maxsize=1024)
def axes_of(shape: tuple[int, ...], whole: tuple[int, ...], *options: Any) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """`axes_with_covariances` of a part of a parameter: an axis has a covariance if it has one in the whole parameter.

    But if the part is a single row or column of a larger parameter, no axis has one.
    """
    dims, own = axes_with_covariances(shape, *options)
    if shape == whole or not own:
        return dims, own
    others, preconditioned = axes_with_covariances(whole, *options)
    narrow = any(n == 1 != m for n, m in zip(shape, whole, strict=False))
    if narrow or len(shape) != len(whole) or len(others) != len(dims):
        return dims, ()
    return dims, preconditioned


def factor_of(preconditioner: Kronecker, group: Mapping[str, Any]) -> float:
    """The factor of the learning rate for a tensor with these covariances."""
    return 1.0 if all(preconditioner.ranks) else float(group["embedding_rate"])


@lru_cache(maxsize=1024)
def preconditioner_of(
    dims: tuple[int, ...],
    preconditioned: tuple[bool, ...],
    rank: float,
    budget: float,
    others: int,
    longest: int,
    buffered: bool,
    dtype: torch.dtype,
    matrices: int | None = None,
) -> Kronecker | None:
    """The covariances of these axes (for each of the matrices); None if the budget is too small for rank 1."""
    cuts = tuple(cut(d, longest) if on else (0, d) for d, on in zip(dims, preconditioned, strict=True))

    def of_rank(rank: float) -> Kronecker:
        ranks = [
            0 if not on else min(d, max(1, round(rank * d) if rank < 1 else int(rank)))
            for d, on in zip(dims, preconditioned, strict=True)
        ]
        return Kronecker(dims, cuts, tuple(ranks), buffered, matrices)

    if not budget:
        return of_rank(rank)
    size = matrices or 1
    for d in dims:
        size *= d
    low, high = 0, max(dims)
    while low < high:  # the largest rank that fits
        middle = (low + high + 1) // 2
        fits = of_rank(middle).nbytes(dtype) + others <= budget * size
        low, high = (middle, high) if fits else (low, middle - 1)
    if low == 0:
        return None
    return of_rank(low)

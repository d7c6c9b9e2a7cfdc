"""Which axes of a tensor have a covariance (`Sketchy`), and of which rank."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, TypedDict

import torch

from sketch_plugins.linalg.kronecker import Kronecker, cut, merged
from sketch_plugins.optim.declaring import count, option


class Covariances(TypedDict, total=False):
    """Which axes have a covariance, and of which rank."""

    rank: Annotated[
        float | None,
        option(
            32,
            "k: an integer, or a fraction (0, 1) of the axis. More than the axis is the axis: exact Shampoo.",
            allowed="an integer >= 1 or a fraction in (0, 1)",
            check=lambda v: 0 < v < 1 or (v >= 1 and v == int(v)),
            structural=True,
        ),
    ]
    budget: Annotated[
        float | None,
        option(
            0.0,
            "bytes of state a parameter, instead of ``rank`` (0: use ``rank``): each preconditioned tensor takes the "
            "largest rank, the same for its axes, with which its whole state stays within it; none at all where rank 1 "
            "does not. An error where that goes for every tensor of the group that would have one for every axis.",
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
            "nor have axes longer than this times the rest of the tensor.",
            allowed="a number > 0",
            check=lambda v: v > 0,
            structural=True,
        ),
    ]


#: Options that decide which axes have one.
AXES = ("precondition", "merge_dims", "max_axis", "max_aspect_ratio")


@lru_cache(maxsize=1024)
def axes_with_covariances(
    shape: tuple[int, ...], precondition: str, merge: int, longest: int, ratio: float
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """The tensor's axes, small ones merged, and which of them have a covariance."""
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
    """`axes_with_covariances` of a part of a parameter: those axes have a covariance that have one in the whole.

    But a part that is a single row, or column, of what was more has none.
    """
    dims, own = axes_with_covariances(shape, *options)
    if shape == whole or not own:
        return dims, own
    others, preconditioned = axes_with_covariances(whole, *options)
    narrow = any(n == 1 != m for n, m in zip(shape, whole, strict=False))
    if narrow or len(shape) != len(whole) or len(others) != len(dims):
        return dims, ()
    return dims, preconditioned


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
    """The covariances of these axes (of each of so many matrices); None where the budget is too small for any."""
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

"""Checks on all ranks that gradients are finite before anything is decomposed, and warns of failed decompositions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.notices import warn
from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.optim.taking import Members
from sketch_plugins.sharding.dtensors import local_grad
from sketch_plugins.sharding.parts import Part
from sketch_plugins.sharding.process_groups import agree

# Covariances of norms above this overflow: sums of a hundred squares in float32.
LARGEST = 1e18


def _small(grads: Iterable[Tensor]) -> bool:
    """Whether one norm of all gradients is small. In float16 it may overflow although every gradient is finite."""
    values = [_values(g) for g in grads]
    return not values or bool(torch.nn.utils.get_total_norm(values) < LARGEST)


def _all_finite(grad: Tensor) -> bool:
    if grad.numel() == 0 or grad.device.type == "meta":  # without numbers
        return True
    norm = torch.linalg.vector_norm(_values(grad), dtype=torch.float64)
    return bool(norm < LARGEST if grad.dtype != torch.float64 else torch.isfinite(norm))


def _values(grad: Tensor) -> Tensor:
    values = grad.coalesce().values() if grad.layout == torch.sparse_coo else grad
    return values.float() if values.dtype.itemsize == 1 else values  # torch has no norm of float8


def check_finite(optimizer: SketchOptimizer, members: Members, among: Sequence[Mapping[str, Any]]) -> bool:
    """Whether parameters may take a step (see `_may_step`), because decompositions of infinities or NaN do not end.

    If parameters are spread over ranks, the ranks ask each other, so that all come to the same answer.

    Raises:
        ValueError: a gradient is not finite, on this rank or on another that has a part of the same parameters, and its
            group does not have ``nonfinite="skip"``.
    """
    parts = optimizer._parts
    grads = [(group, index, local_grad(group["params"][index])) for group, index in members]
    by_device: dict[torch.device, list[Tensor]] = {}
    for _, _, grad in grads:
        if grad.numel() > 0 and grad.device.type != "meta":
            by_device.setdefault(grad.device, []).append(grad)
    others = parts.process_groups(among)
    # The host waits for one number of each device.
    if agree(all([_small(of) for of in by_device.values()]), others):
        return True
    skip = "nonfinite" in optimizer.OPTIONS
    wrong = [(group, index) for group, index, grad in grads if not _all_finite(grad)]
    refused = [(group, index) for group, index in wrong if not (skip and group["nonfinite"] == "skip")]
    if not agree(not refused, others):
        whose, what = "a parameter on another rank", "nothing has been changed"
        if refused:
            group, index = refused[0]
            of = parts.of(index, group["params"][index])
            part = next((part for part in of if part.grad is not None and not _all_finite(part.grad)), of[0])
            whose = optimizer._label(group, part)
            if part.key is not None:  # ZeRO steps its groups (stage 3: sub-groups) one by one
                what = "nothing of its group has been changed"
        raise ValueError(
            (
                f"{whose} has a gradient that is not finite, or whose squares are not finite; {what}. Scale the "
                "loss or clip the gradients"
            )
            + (", or use nonfinite='skip'" if skip else "")
        )
    return agree(not wrong, others)


def warn_of(failed: Sequence[tuple[Part, Mapping[str, Any]]], optimizer: SketchOptimizer) -> None:
    """Warn once of all parts (with their groups) whose covariances could not be decomposed."""
    if not failed:
        return
    labels = list(dict.fromkeys(optimizer._label(group, part).rstrip(",") for part, group in failed))
    more = f" and of {len(labels) - 1} other parameters" if len(labels) > 1 else ""
    warn(
        f"the covariance of {labels[0]}{more} could not be decomposed, neither in its own precision nor "
        "in float64, so the last preconditioner stays in use. If this happens again, the gradients may "
        "be too large (the sum of their squares exceeds float32): scale the loss or clip the gradients",
        RuntimeWarning,
    )

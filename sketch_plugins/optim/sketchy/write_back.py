"""The last part of a preconditioned step: it writes the parameter, with learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.kernels.weight_code import Corrected
from sketch_plugins.optim.eager import number, shrink_of, update, write_tile
from sketch_plugins.optim.pending import Pending
from sketch_plugins.optim.weight_bits import matrix_of
from sketch_plugins.sharding.blocks import Matrix


def take(one: Pending, whole: Matrix, size: float | Tensor) -> None:
    """``p <- (1 - decay) * p - size * whole``, tile by tile."""
    assert one.rule is not None
    grad, shrink = one.grad, shrink_of(one.rule, one.grad)
    factor = number(size, grad)
    matrix = matrix_of(one)
    state: Mapping[str, Any] = one.state
    for at in grad.batches():
        part, in_place = matrix.get(at), matrix.views(at) and matrix.dtype == grad.dtype
        if not in_place and not isinstance(matrix, Corrected):
            part = scratch.cast("parameter", part, grad.dtype)
        update(part, whole.get(at), {}, factor, shrink, None, None, None)
        if not in_place:
            write_tile(matrix, at, part, one.group, state)

"""Compares many tensors with how they looked before, in one call of torch if it has that.

torch.compile checks a program's inputs before each call with a class of torch's own (`TensorGuards`): type, dispatch
keys (which include device, layout and the negative bit), dtype, sizes and strides. It does so in C++, without making
Python objects for attributes. Read one by one, these facts take a quarter of the host's part of a step.

The class is private. Tensors that it does not find alike are compared in Python. If it is missing, or stricter than
needed, a step takes longer and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # tests/optim/test_host.py fails if it has moved
    TensorGuards = None  # type: ignore[assignment, misc]


class Alike:
    """How some tensors look. It keeps none of them alive."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._check: Any = None
        self._count = len(tensors)
        if TensorGuards is not None:
            try:
                guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
                self._check = guards.check
            except Exception:  # the class is private, and its signature may have changed
                self._check = None

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """True if each of these tensors looks like the one at its place. False means that they may not."""
        return self._check is not None and len(tensors) == self._count and bool(self._check(*tensors))

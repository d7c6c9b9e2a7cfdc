"""Whether tensors look as they did: one call for all of them, where torch offers it.

torch.compile looks at a program's inputs before each call with a class of torch's own (`TensorGuards`): type, dispatch
keys (and with them device, layout and a negative flag), dtype, sizes and strides, in C++ and without an attribute made
for Python. Asked for one by one, these facts are a quarter of the host's part of a step.

The class is private. What it does not find alike is looked at in Python, so that without it, or where it is stricter
than needed, a step takes longer and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # tests/optim/test_host.py says so when it has moved
    TensorGuards = None  # type: ignore[assignment, misc]


class Alike:
    """How some tensors look; none of them is kept alive."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._check: Any = None
        self._count = len(tensors)
        if TensorGuards is not None:
            try:
                guards = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
                self._check = guards.check
            except Exception:  # another signature: it is private
                self._check = None

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """True: these tensors look like those, one by one. False: they may or may not."""
        return self._check is not None and len(tensors) == self._count and bool(self._check(*tensors))

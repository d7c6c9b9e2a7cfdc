"""A process group that counts the bytes given to it, and passes them on."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class CountingGroup(dist.ProcessGroup):
    """Replaces the default group for DistributedDataParallel and its hook; ``sent`` is in bytes."""

    def __init__(self) -> None:
        inner = dist.group.WORLD
        super().__init__(inner.rank(), inner.size())
        self.inner, self.sent = inner, 0

    def _count(self, tensors: Any) -> None:
        tensors = tensors if isinstance(tensors, (list, tuple)) else [tensors]
        self.sent += sum(t.nbytes if isinstance(t, torch.Tensor) else sum(x.nbytes for x in t) for t in tensors)

    def allreduce(self, tensors: Any, *args: Any) -> Any:
        self._count(tensors)
        return self.inner.allreduce(tensors, *args)

    def allgather(self, outputs: Any, inputs: Any, *args: Any) -> Any:
        self._count(inputs)
        return self.inner.allgather(outputs, inputs, *args)

    def _allgather_base(self, output: Any, given: Any, *args: Any) -> Any:
        self._count(given)
        return self.inner._allgather_base(output, given, *args)

    def all_gather_single(self, output: Any, given: Any, *args: Any) -> Any:
        self._count(given)
        return self.inner.all_gather_single(output, given, *args)

    def broadcast(self, tensors: Any, *args: Any) -> Any:
        self._count(tensors)
        return self.inner.broadcast(tensors, *args)

    def barrier(self, *args: Any) -> Any:
        return self.inner.barrier(*args)

    def size(self) -> int:
        return self.inner.size()

    def rank(self) -> int:
        return self.inner.rank()

    def getBackendName(self) -> str:
        return "counting"

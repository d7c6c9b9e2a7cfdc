"""Questions to all ranks of process groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def reduces_on(groups: Sequence[Any]) -> torch.device:
    """A device that the process groups can reduce on."""
    if all("gloo" in torch.distributed.get_backend(group) for group in groups):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def agree(flag: bool, groups: Sequence[Any]) -> bool:
    """Whether the flag is set on every rank of the process groups."""
    if not groups:
        return flag
    import torch.distributed as dist

    tensor = torch.tensor(int(flag), device=reduces_on(groups))
    for group in groups:
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=group)
    return bool(tensor.item())

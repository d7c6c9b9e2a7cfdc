"""A flag on the device that decides whether the weights move in a step. The host does not read it."""

from __future__ import annotations

import torch
from torch import Tensor


class Gate:
    """Multiplies the learning rate and the weight decay of one step by a flag, which stays on its device.

    If the flag is set, every number keeps its bits. Otherwise steps have size 0 and weights do not decay.

    Args:
        flag: 0-d, int32: 1 if the weights move, else 0.
    """

    def __init__(self, flag: Tensor) -> None:
        self._flag = flag
        self._on: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._sizes: dict[tuple[float, torch.device, torch.dtype], Tensor] = {}

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The flag on a device and in a dtype, made once for all tensors.

        Only a CPU waits for the flag of another device, because it computes with it at once.
        """
        if device.type == "meta":  # of a rehearsal, which needs shapes only
            return torch.ones((), dtype=dtype, device=device)
        key = device, dtype
        if key not in self._on:
            self._on[key] = self._flag.to(device, dtype, non_blocking=device.type != "cpu")
        return self._on[key]

    def moves(self, device: torch.device) -> Tensor:
        """The flag as 0-d bool."""
        return self.on(device, torch.bool)

    def size(self, size: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """0-d: the size of a step, or 0. Equal numbers give the same tensor."""
        flag = self.on(device, dtype)
        if isinstance(size, Tensor):
            return flag * size.to(device, dtype)
        if device.type == "meta":
            return flag
        key = size, device, dtype
        if key not in self._sizes:
            self._sizes[key] = flag * size
        return self._sizes[key]

    def shrink(self, shrink: Tensor) -> Tensor:
        """0-d: the factor by which weights decay (one minus the weight decay), or 1."""
        return torch.where(self.moves(shrink.device), shrink, 1.0)

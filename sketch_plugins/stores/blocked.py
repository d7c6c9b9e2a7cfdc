"""Stores of one code for each element, and one number for each block of a row."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sketch_plugins.sharding.blocks import At, Rows
from sketch_plugins.stores.base import State, Store


class Blocked(Store):
    """Blocks are ``block_size`` consecutive columns of one row; the last block of a row may be shorter.

    A touched row is decoded and encoded alone, and so is a block. The state has ``codes`` in the parameter's shape, and
    in the tensor named `shared_by_block` one number for each block. Subclasses are frozen dataclasses with a field
    ``block_size``, and implement ``layout``, ``blend``, ``assign`` and ``_decode``.
    """

    shared_by_block = ""

    @property
    def align(self) -> int:  # type: ignore[override]
        """Tiles hold whole blocks."""
        return self.block_size

    def view(self, tensor: Tensor) -> Tensor:
        """``(..., blocks, columns of a block)``; tiles hold whole blocks or one shorter block, see ``align``."""
        return tensor.unflatten(-1, (-1, min(self.block_size, tensor.shape[-1])))

    def unview(self, tensor: Tensor) -> Tensor:
        """The tile with its columns in one dimension again."""
        return tensor.flatten(-2)

    def read(self, state: State, at: At, dtype: torch.dtype) -> Tensor:
        """Decoded values (a copy, until the next read)."""
        whole = at.lo + (at.hi - at.lo) // self.block_size * self.block_size
        if at.lo < whole < at.hi:  # not a tile of a step: its last block is shorter
            parts = [replace(at, lo=lo, hi=hi) for lo, hi in ((at.lo, whole), (whole, at.hi))]
            return torch.cat([self.read(state, part, dtype).clone() for part in parts], -1)
        return self.unview(self._decode(self.slices(state, at, 0), dtype))

    def slices(self, state: State, at: At, step: int) -> State:
        """Codes in blocks, and what they share."""
        shared = at.get(state[self.shared_by_block], *self._blocks(at))
        return {"codes": self.view(at.get(state["codes"])), self.shared_by_block: shared}

    def write_back(self, state: State, at: At, slices: State) -> None:
        """Write slices that were copies back."""
        if isinstance(at, Rows):
            at.put(state["codes"], slices["codes"].flatten(-2))
            at.put(state[self.shared_by_block], slices[self.shared_by_block], *self._blocks(at))

    def _decode(self, slices: State, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def _blocks(self, at: At) -> tuple[int, int]:
        return at.lo // self.block_size, -(-at.hi // self.block_size)

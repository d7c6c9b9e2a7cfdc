"""The base of stores that keep one code for each element and one number for each block of a row."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sketch_plugins.sharding.blocks import At, Rows
from sketch_plugins.stores.base import State, Store


class Blocked(Store):
    """A store whose blocks are ``block_size`` consecutive columns of one row. The last block may be shorter.

    No block holds elements of two rows, so a touched row is decoded and encoded by itself. The state has ``codes`` in
    the parameter's shape, and one number for each block in the tensor that `shared_by_block` names. Subclasses are
    frozen dataclasses with a field ``block_size``, and implement ``layout``, ``blend``, ``assign`` and ``_decode``.
    """

    shared_by_block = ""

    @property
    def align(self) -> int:  # type: ignore[override]
        """The block size: a tile holds whole blocks."""
        return self.block_size

    def view(self, tensor: Tensor) -> Tensor:
        """The tile as ``(..., blocks, columns of a block)``. It holds whole blocks or one shorter block."""
        return tensor.unflatten(-1, (-1, min(self.block_size, tensor.shape[-1])))

    def unview(self, tensor: Tensor) -> Tensor:
        """The tile with its columns in one dimension."""
        return tensor.flatten(-2)

    def read(self, state: State, at: At, dtype: torch.dtype) -> Tensor:
        """The decoded values. They are a copy, which is valid until the next read."""
        whole = at.lo + (at.hi - at.lo) // self.block_size * self.block_size
        if at.lo < whole < at.hi:  # only outside of a step: whole blocks and a shorter last one
            parts = [replace(at, lo=lo, hi=hi) for lo, hi in ((at.lo, whole), (whole, at.hi))]
            return torch.cat([self.read(state, part, dtype).clone() for part in parts], -1)
        return self.unview(self._decode(self.slices(state, at, 0), dtype))

    def slices(self, state: State, at: At, step: int) -> State:
        """Codes in blocks, and the numbers that the blocks share."""
        shared = at.get(state[self.shared_by_block], *self._blocks(at))
        return {"codes": self.view(at.get(state["codes"])), self.shared_by_block: shared}

    def write_back(self, state: State, at: At, slices: State) -> None:
        """Write the slices to the state if they were copies."""
        if isinstance(at, Rows):
            at.put(state["codes"], slices["codes"].flatten(-2))
            at.put(state[self.shared_by_block], slices[self.shared_by_block], *self._blocks(at))

    def _decode(self, slices: State, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def _blocks(self, at: At) -> tuple[int, int]:
        return at.lo // self.block_size, -(-at.hi // self.block_size)

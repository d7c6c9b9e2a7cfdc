"""The largest entries of each block."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sketch_plugins.comm.base import Compressor, Payload, Reduce, largest
from sketch_plugins.comm.base import entries as _entries


class BlockTopK(Compressor):
    r"""Sends the b = density * B entries of largest magnitude in each block of B consecutive entries, at least one.

    It satisfies :math:`\|x - C(x)\|^2 \le (1 - b/B) \|x\|^2`, like the k largest of all entries, at a fraction of their
    cost, because a block fits into the registers of one program. It sends the values and the offset of each in its
    block: 1 byte for B up to 256, and 2 bytes above. A last block of r < B entries sends density * r.

    Args:
        block: B, 2 to 32768. If the density is below 1 / B, one entry of each block is still sent.
        fused: add, pick and clear in one kernel. None (default): on CUDA if Triton is installed; False: never; True:
            required, an error without a kernel. With ``TRITON_INTERPRET=1`` also on a CPU, for tests.

    Raises:
        ValueError: ``block`` is out of range; in `take`, ``fused=True`` without a kernel.

    Source: the family of k-contractions of https://arxiv.org/abs/1809.07599, definition 2.1.
    """

    name: ClassVar[str] = "block_topk"
    shared: ClassVar[bool] = False

    def __init__(self, block: int = 1024, fused: bool | None = None) -> None:
        if not isinstance(block, int) or isinstance(block, bool) or not 2 <= block <= 32768:
            raise ValueError(f"block={block!r} is not allowed: block must be an integer from 2 to 32768")
        if fused not in (None, True, False):
            raise ValueError(f"fused={fused!r} is not one of None, True, False")
        self.block = block
        self.fused = fused

    @property
    def index_dtype(self) -> torch.dtype:
        """Dtype of an offset."""
        return torch.uint8 if self.block <= 256 else torch.int16

    def parts(self, size: int, density: float) -> tuple[int, int, int]:
        """Number of whole blocks, entries sent of each, and entries sent of the rest."""
        rest = size % self.block
        return size // self.block, _entries(self.block, density), _entries(rest, density) if rest else 0

    def count(self, size: int, density: float) -> int:
        """See `Compressor`."""
        blocks, each, last = self.parts(size, density)
        return blocks * each + last

    def compress(
        self, x: Tensor, density: float, *, step: int = 0, key: int = 0, reduce: Reduce | None = None
    ) -> Payload:
        """See `Compressor`."""
        blocks, each, last = self.parts(len(x), density)
        body, tail = x[: blocks * self.block].view(blocks, self.block), x[blocks * self.block :]
        inside = largest(body, each) if blocks else x.new_empty((0, each), dtype=torch.int64)
        values = body.gather(1, inside).flatten()
        index = inside.flatten()
        if last:
            behind = largest(tail, last)
            values, index = torch.cat([values, tail[behind]]), torch.cat([index, behind])
        return Payload(values, index.to(self.index_dtype))

    def positions(self, index: Tensor, size: int, density: float) -> Tensor:
        """See `Compressor`."""
        blocks, each, last = self.parts(size, density)
        begin = torch.arange(0, blocks * self.block, self.block, device=index.device).repeat_interleave(each)
        if last:
            begin = torch.cat([begin, begin.new_full((last,), blocks * self.block)])
        return index.long() + begin

    def wire_bytes(self, size: int, density: float, itemsize: int = 4) -> int:
        """See `Compressor`."""
        return self.count(size, density) * (itemsize + self.index_dtype.itemsize)

    def take(
        self,
        memory: Tensor,
        grad: Tensor,
        gain: Tensor | float,
        density: float,
        *,
        step: int = 0,
        key: int = 0,
        reduce: Reduce | None = None,
        momentum: Tensor | None = None,
        beta: float = 0.0,
        masking: bool = True,
    ) -> Payload:
        """See `Compressor`; here it may run as one kernel."""
        if self._has_kernel(memory):
            from sketch_plugins.kernels.gpu import block_topk

            values, index = block_topk.take(
                memory, grad, gain, self.block, self.parts(len(memory), density), step, key, momentum, beta, masking
            )
            return Payload(values, index.to(self.index_dtype))
        return super().take(
            memory, grad, gain, density, step=step, key=key, momentum=momentum, beta=beta, masking=masking
        )

    def _has_kernel(self, memory: Tensor) -> bool:
        from sketch_plugins.kernels.interpretation import interpreted

        if self.fused is False:
            return False
        if not memory.is_cuda and not (self.fused and interpreted()):
            if self.fused:
                raise ValueError(
                    f"fused=True does not support a gradient on {memory.device}: there is a kernel for cuda only"
                )
            return False
        # The block has to be a power of two, and small enough for the registers of a program.
        fits = self.block & (self.block - 1) == 0 and 16 <= self.block <= 4096 and memory.dtype != torch.float64
        try:
            import triton  # noqa: F401
        except Exception as error:  # a broken installation may raise any error
            if self.fused:
                raise ValueError(f"fused=True: Triton cannot be imported ({error})") from error
            return False
        if self.fused and not fits:
            raise ValueError(
                f"fused=True does not support block={self.block!r} with {memory.dtype}: the kernel needs a power "
                "of two from 16 to 4096 and does not take float64"
            )
        return fits

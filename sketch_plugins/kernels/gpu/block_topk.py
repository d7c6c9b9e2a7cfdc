"""Error feedback with the largest entries of each block in one sweep: add to the memory, pick, clear.

The definition is `sketch_plugins.comm.base.Compressor.take` with `BlockTopK`. The only difference is which of equal
magnitudes is picked: here it is the first.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketch_plugins.hashing import TABLE1, TABLE2, key_of
from sketch_plugins.kernels.gpu import common

# How many numbers of a block one thread holds. No target spills, and 16 warps of them are the largest block.
PER_THREAD = 8
LARGEST = 16 * 32 * PER_THREAD


def take(
    memory: Tensor,
    grad: Tensor,
    gain: Tensor | float,
    block: int,
    parts: tuple[int, int, int],
    step: int,
    key: int,
    momentum: Tensor | None,
    beta: float,
    masking: bool,
) -> tuple[Tensor, Tensor]:
    """The picked values (float32) and their offsets (int16), for each block in ascending order of the offsets."""
    blocks, each, last = parts
    device, size = memory.device, memory.numel()
    values = torch.empty(blocks * each + last, dtype=torch.float32, device=device)
    index = torch.empty(len(values), dtype=torch.int16, device=device)
    if not size:
        return values, index
    gain = gain if isinstance(gain, Tensor) else torch.full((), gain, dtype=torch.float32, device=device)
    noise = [k >> s & 0xFFFFFFFF for stream in (TABLE1, TABLE2) for k in (key_of(key ^ stream, step),) for s in (0, 32)]
    # The dtype is int64, because unsigned numbers of 32 bits do not fit an int32.
    keys = torch.tensor(noise, dtype=torch.int64)
    keys = keys.pin_memory().to(device, non_blocking=True) if memory.is_cuda else keys
    with torch.cuda.device(device) if memory.is_cuda else contextlib.nullcontext():
        # Whole blocks need no masks, and only then are loads 128 bits wide. The rest has a launch of its own.
        for programs, first, k, whole in ((blocks, 0, each, True), (int(last > 0), blocks, last, False)):
            if programs:
                select[(programs,)](
                    memory, memory if momentum is None else momentum, grad, gain.float(), values, index, keys,
                    size, first, each, k, beta,
                    BLOCK=block, WHOLE=whole, MOMENTUM=momentum is not None, MASKING=masking,
                    num_warps=max(1, block // (32 * PER_THREAD)),
                )  # fmt: skip
    return values, index


@triton.jit
def select(
    memory, momentum, grad, gain, values, index, keys,
    size, first, each, k, beta,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, MOMENTUM: tl.constexpr, MASKING: tl.constexpr,
):  # fmt: skip
    """Pick ``k`` entries of a block. There is one program for each block from ``first`` on."""
    block = tl.program_id(0).to(tl.int64) + first
    begin = block * BLOCK
    memory += begin
    momentum += begin
    offset = tl.arange(0, BLOCK)
    mask = offset >= 0 if WHOLE else offset < size - begin
    m = _load(memory + offset, mask, WHOLE)
    # A gain of 0 means that the gradient is not finite. Then nothing is added, and nothing decays.
    factor = tl.load(gain)
    g = tl.where(factor == 0, 0.0, _load(grad + begin + offset, mask, WHOLE) * factor)
    if MOMENTUM:
        g += tl.where(factor == 0, 1.0, beta) * _load(momentum + offset, mask, WHOLE)
        m += tl.where(factor == 0, 0.0, g)
    else:
        m += g
    # The bits of magnitudes have their order. Elements that do not exist come last.
    bits = m.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if not WHOLE:
        bits = tl.where(mask, bits, -1)
    # The k-th largest magnitude is found from its highest bit down: 31 counts for any k.
    threshold = 0
    for i in range(31):
        candidate = threshold | (1 << (30 - i))
        enough = tl.sum((bits >= candidate).to(tl.int32), 0) >= k
        threshold = tl.where(enough, candidate, threshold)
    above = bits > threshold
    equal = (bits == threshold).to(tl.int32)
    missing = k - tl.sum(above.to(tl.int32), 0)
    picked = above | ((equal > 0) & (tl.cumsum(equal, 0) <= missing))
    place = block * each + tl.cumsum(picked.to(tl.int32), 0) - 1
    tl.store(values + place, m, mask=picked)
    tl.store(index + place, offset.to(tl.int16), mask=picked)
    _write(memory, tl.where(picked, 0.0, m), begin, offset, keys, mask, WHOLE)
    if MOMENTUM:
        if MASKING:
            g = tl.where(picked, 0.0, g)
        _write(momentum, g, begin, offset, keys + 2, mask, WHOLE)


@triton.jit
def _load(pointer, mask, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointer).to(tl.float32)
    else:
        return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _write(pointer, x, begin, offset, keys, mask, WHOLE: tl.constexpr):
    x = _held(x, begin, offset, keys, pointer.dtype.element_ty)
    if WHOLE:
        tl.store(pointer + offset, x)
    else:
        tl.store(pointer + offset, x, mask=mask)


@triton.jit
def _held(x, begin, offset, keys, TYPE: tl.constexpr):
    """``x`` as a memory of this type holds it. The noise is that of `hashing.random32`."""
    if TYPE == tl.bfloat16:
        at = begin + offset
        low = tl.load(keys).to(tl.uint64, bitcast=True)
        high = tl.load(keys + 1).to(tl.uint64, bitcast=True)
        first = common.mix32(at.to(tl.uint64, bitcast=True), low).to(tl.uint64)
        return common.to_bf16(x, common.mix32(first, high))
    else:  # Triton needs a branch, because the types differ
        return x

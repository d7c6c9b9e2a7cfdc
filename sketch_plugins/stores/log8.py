"""Second moments in 8 bits: the leading bits of a float32, with one exponent for each block of a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.hashing import TABLE2, random32
from sketch_plugins.kernels.rounding import ACCELERATOR_NOISE, CPU_NOISE
from sketch_plugins.sharding.blocks import At
from sketch_plugins.stores.base import Ema, Gradient, State, blend, given
from sketch_plugins.stores.blocked import Blocked

# The number of low bits of a float32 that are cut off. 4 of its 23 mantissa bits stay: 1/16 to 1/32 of the number.
CUT = 19
# The bits of the largest finite number, and of infinity.
LARGEST, INFINITE = 0x7F7FFFFF, 0x7F800000
# Every NaN that arithmetic leaves becomes this one, because its further bits depend on the processor.
QUIET = 0x7FC00000


@dataclass(frozen=True)
class Log8(Blocked):
    r"""Logarithmically spaced second moments: 1.016 bytes a parameter, each number within a sixteenth.

    The bits :math:`b` of a float32 number v > 0, read as an integer, grow as its logarithm does. The upper bits
    :math:`k = \lfloor b / 2^{19} \rfloor` are kept, which gives sixteen numbers in each octave. A block of
    ``block_size`` consecutive columns of a row keeps its largest k, called top, and for each element a code c of 8 bits
    with :math:`k = top - 255 + c`. Code 0 stands for v = 0. Codes reach 16 octaves below the largest number of the
    block (1/65,000 of it, 1/256 of its root). A smaller number gets code 1 and is read as too large, which makes its
    step smaller, never larger.

    With ``decay = 0.999`` one step moves an average by less than the distance between codes. Numbers are therefore
    rounded stochastically, so that the expected value is the number: 19 random bits are added before the lower bits
    are cut off. The noise is a function of (seed, step, element). k does not depend on the block's largest number, so
    the other numbers of a block stay when its largest number changes. (An infinity or a NaN lifts all other numbers of
    its block, except zeros, to 16 octaves below it. Their steps are almost zero until it is gone.)

    Args:
        block_size: number of columns of a block, >= 1.
        seed: seed of the noise.
    """

    kernel = "log8"
    shared_by_block = "tops"
    order: int = 2
    block_size: int = 128
    seed: int = 0

    def layout(self, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Codes of the parameter's shape, and the largest k of each block."""
        rows, columns = shape
        return {"codes": (shape, torch.uint8), "tops": ((rows, -(-columns // self.block_size)), torch.int16)}

    def why_impossible(self, name: str, tensor: Tensor) -> str | None:
        """NaN if a block's exponent is that of NaN, or the number if no float32 has such an exponent; else None."""
        if name != "tops" or not tensor.numel():
            return None
        low, high = (int(number) for number in torch.aminmax(tensor))
        if INFINITE >> CUT < high < 1 << (31 - CUT):
            return "NaN"
        return None if 0 <= low and high <= INFINITE >> CUT else str(low if low < 0 else high)

    def slices(self, state: State, at: At, step: int) -> State:
        """Codes in blocks, the largest k of each block, and the noise that is added before bits are cut off."""
        out = super().slices(state, at, step)
        if step:
            out["noise"] = self.view(self._noise(at, state["codes"], step))
        return out

    def _noise(self, at: At, codes: Tensor, step: int) -> Tensor:
        """19 random bits for each element. They are made of int64, so only a few rows are made at one time."""
        columns, device = codes.shape[1], codes.device
        out = scratch.empty("noise of codes", at.shape, torch.int32, device)
        first = at.from_rows(at.index(device).unsqueeze(-1) * columns).reshape(-1, 1)
        own, flat = torch.arange(at.lo, at.hi, device=device), out.view(-1, at.hi - at.lo)
        each = max(1, (CPU_NOISE if device.type == "cpu" else ACCELERATOR_NOISE) // max(1, at.hi - at.lo))
        for lo in range(0, len(flat), each):
            part = random32(first[lo : lo + each] + own, self.seed ^ TABLE2, step)
            flat[lo : lo + each] = part.bitwise_and_((1 << CUT) - 1)
        return out

    def blend(self, slices: State, g: Tensor, ema: Ema) -> Tensor:
        """Decode, blend and encode. The returned estimate is not rounded."""
        est = blend(self._decode(slices, g.dtype), g, ema, self.order)
        number = scratch.cast("number", est, torch.float32)
        bits = number.view(torch.int32).bitwise_and_(0x7FFFFFFF)  # a NaN may have a sign
        noise = slices.get("noise", 1 << (CUT - 1))  # without noise: to nearest
        k = torch.add(bits, noise, **scratch.out("rounded bits", bits)).clamp_(max=LARGEST)
        torch.maximum(k, bits, out=k).clamp_(max=QUIET).bitwise_right_shift_(CUT)  # keeps an infinity or a NaN
        tops = k.amax(-1).clamp_(min=255)
        codes = torch.sub(k, tops.unsqueeze(-1), **scratch.out("new codes", k)).add_(255).clamp_(min=1)
        slices["codes"].copy_(torch.minimum(codes, k, out=codes))  # code 0 if k is 0
        slices["tops"].copy_(tops)
        return est

    def assign(self, state: State, values: Tensor | Gradient) -> None:
        """Encode the values, rounded to nearest."""
        values = given(values, self.order)
        for at in values.batches(align=self.align):
            slices = self.slices(state, at, 0)
            root = torch.sqrt(self.view(values.get(at)))  # `blend` takes a gradient and averages its square
            self.blend(slices, root, Ema(0.0, 1.0))
            self.write_back(state, at, slices)

    def fill(self, state: State, value: float) -> None:
        """Set every number to ``value``, rounded to nearest."""
        bits = int(torch.tensor(value, dtype=torch.float32).view(torch.int32))
        k = min(bits + (1 << (CUT - 1)), LARGEST) >> CUT
        state["tops"].fill_(max(k, 255))
        state["codes"].fill_(min(k, 255))

    def _decode(self, slices: State, dtype: torch.dtype) -> Tensor:
        codes, tops = slices["codes"], slices["tops"].to(torch.int32).unsqueeze(-1)
        k = scratch.cast("k", codes, torch.int32).add_(tops).sub_(255)
        number = k.clamp_(min=0).bitwise_left_shift_(CUT).masked_fill_(codes == 0, 0).view(torch.float32)
        return scratch.cast("decoded second", number, dtype)

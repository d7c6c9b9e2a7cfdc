"""The rules by which DeepSpeed's ZeRO lays out parameters in flat tensors, for any number of ranks, without an engine.

They are checked on engines: a layout that is computed for a checkpoint's own number of ranks must have the sizes of the
checkpoint (`reshard` refuses it otherwise), and in `tests/deepspeed/test_reshard.py` an engine loads one that is
computed for another number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import gcd, prod

from sketch_plugins.sharding.pieces import Fragment


@dataclass(frozen=True)
class Parameter:
    """A trainable parameter of a group.

    Attributes:
        name: name in the model's state dict.
        shape: shape of the whole parameter.
        itemsize: bytes of its elements in the model.
    """

    name: str
    shape: tuple[int, ...]
    itemsize: int = 4

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Buffer:
    """Flat tensors that hold some parameters, one on each rank.

    Attributes:
        group: number of the parameter group.
        parameters: the parameters, in the order of their places in the buffer.
        world: number of ranks.
        size: number of elements of the tensor of one rank, including padding.
    """

    group: int
    parameters: tuple[Parameter, ...]
    world: int
    size: int

    def fragments(self, rank: int) -> list[Fragment]:
        """The fragments in a rank's tensor; ``index`` is the number in `parameters`."""
        raise NotImplementedError

    def padding(self, rank: int) -> int:
        """Number of elements at the end of the rank's tensor, after all parameters."""
        raise NotImplementedError


@dataclass(frozen=True)
class Joint(Buffer):
    """Stages 1 and 2: parameters follow each other, and all of them together are cut into equal parts.

    Attributes:
        paddings: number of elements between each parameter and the next.
    """

    paddings: tuple[int, ...]

    def fragments(self, rank: int) -> list[Fragment]:
        """The fragments of the parameters in ``[rank * size, (rank + 1) * size)``."""
        low, out = rank * self.size, []
        ends = accumulate(p.numel + gap for p, gap in zip(self.parameters, self.paddings, strict=True))
        for index, (p, gap, end) in enumerate(zip(self.parameters, self.paddings, ends, strict=True)):
            at = end - gap - p.numel
            first, last = max(at, low), min(at + p.numel, low + self.size)
            if first < last:
                out.append(Fragment(index, p.shape, first - at, last - first, first - low))
        return out

    def padding(self, rank: int) -> int:
        """Padding after the last of all parameters; padding between two parameters does not count."""
        end = sum(p.numel for p in self.parameters) + sum(self.paddings)
        return min(self.size, max(0, (rank + 1) * self.size - end))


@dataclass(frozen=True)
class Single(Buffer):
    """Stage 3: each parameter is cut into equal parts, and the parts of a rank follow each other."""

    def fragments(self, rank: int) -> list[Fragment]:
        """Part number ``rank`` of each parameter, unless it is empty."""
        offset, out = 0, []
        for index, p in enumerate(self.parameters):
            part = _part(p, self.world)
            first = min(rank * part, p.numel)
            last = min(first + part, p.numel)
            if first < last:
                out.append(Fragment(index, p.shape, first, last - first, offset))
            offset += part
        return out

    def padding(self, rank: int) -> int:
        """Always 0: there is no padding at the end, because each part has its own."""
        return 0


def joint(groups: Sequence[Sequence[Parameter]], world: int, round_robin: bool, aligned: bool) -> list[Buffer]:
    """The buffers of stages 1 and 2 and of ``BF16_Optimizer``, one for each group.

    A buffer is padded to a multiple of twice the number of ranks. ``round_robin``: parameters are dealt to the ranks in
    turn, and those of one rank follow each other. ``aligned``: each parameter but the last is padded to 16 bytes.
    """
    out: list[Buffer] = []
    for number, given in enumerate(groups):
        parameters = dealt(given, world) if round_robin else list(given)
        unit = 16 // gcd(16, parameters[0].itemsize) if aligned else 1
        paddings, at = [], 0
        for p in parameters:
            at += p.numel
            paddings.append(-at % unit)
            at += paddings[-1]
        at -= paddings[-1]
        paddings[-1] = 0
        size = -(-at // (2 * world)) * 2
        out.append(Joint(number, tuple(parameters), world, size, tuple(paddings)))
    return out


def single(groups: Sequence[Sequence[Parameter]], world: int, most: int) -> list[Buffer]:
    """The sub-groups of stage 3: a new one begins when one has ``most`` elements on a rank."""
    out: list[Buffer] = []
    for number, parameters in enumerate(groups):
        runs: list[list[Parameter]] = [[]]
        for p in parameters:
            if runs[-1] and sum(_part(q, world) for q in runs[-1]) >= most:
                runs.append([])
            runs[-1].append(p)
        out += [Single(number, tuple(run), world, sum(_part(p, world) for p in run)) for run in runs if run]
    return out


def dealt(given: Sequence[Parameter], world: int) -> list[Parameter]:
    """Numbers 0, W, 2 W, ..., then 1, W + 1, ...: the order of ``round_robin_gradients``."""
    return [p for first in range(min(world, len(given))) for p in given[first::world]]


def undealt(dealt: Sequence[Parameter], world: int) -> list[Parameter]:
    """The order before `dealt`."""
    places = [i for first in range(min(world, len(dealt))) for i in range(first, len(dealt), world)]
    return [p for _, p in sorted(zip(places, dealt, strict=True), key=lambda pair: pair[0])]


def _part(p: Parameter, world: int) -> int:
    return -(-p.numel // world)

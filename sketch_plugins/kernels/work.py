"""What a fused backend is given: one parameter's step, described by plain tensors and a vector of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.sharding.parts import has_address
from sketch_plugins.stores.base import Ema, State, Store

# A sweep may fold the gradient into the second moment, measure the update (and the parameter), and apply the step.
FOLD, MEASURE, APPLY = 1, 2, 4

# Places in the vector of numbers that a kernel is given for each parameter.
(
    DECAY1,  # of the first moment: m <- decay * m + gain * x
    GAIN1,
    DECAY2,  # of the second
    GAIN2,
    MEAN,  # 1: a bucket takes the mean of its rows' squares; 0: the sum
    SCALE,  # denominator = max(sqrt(v + inside) * scale + shift, floor)
    SHIFT,
    INSIDE,
    FLOOR,
    STEP,  # learning rate, with the bias correction of the first moment
    SHRINK,  # one minus the decoupled weight decay
    LOOKAHEAD,  # Nesterov's momentum
    SIGN,  # -1 ascends
    L2,  # coupled weight decay
    CORRECTION,  # bias correction of the first moment alone: part of the update that CLIP measures
    INNER,  # multiplies the preconditioned gradient before the first moment averages it (`Work.after`)
    CLIP,  # update_clip; 0: off
    RELATIVE,  # not 0: the step is multiplied by the RMS of the parameter, at least 1e-3 and at most this
    NUMBER,  # of the step, from 1: seeds stochastic rounding
    UNIT,  # 1: the numerator is divided by its own magnitude, or by tile.LEAST where that is less: its sign
) = range(20)
NUMBERS = 20


@dataclass(eq=False)
class Work:
    """One parameter's step.

    Attributes:
        p: the parameter as an ``(R, D)`` view with unit stride along columns.
        g: its gradient, likewise; for a sparse gradient the ``(n, D)`` values.
        rows: touched rows (int64, distinct, ascending), None: all.
        packed: ``g`` holds the touched rows only.
        first: store of the first moment and its state; None: there is none.
        second: store of the second moment and its state; None: there is none.
        numbers: see the places above.
        after: the first moment averages the gradient over the denominator, and is not divided any more (SM3, Sketchy);
            what is clipped is then that quotient, before it is averaged: by INNER, not by STEP.
        measure: the sweep before has to measure the update or the parameter.
        stochastic: round a bfloat16 parameter stochastically.
        seed: of the rounding.
        flags: a bit for each of ``numbers`` that is not 0, for numbers that live on a device.
        correction: what the weights have beyond their dtype, ``(R, D)`` (see `weight_code`); None: nothing. A step
            reads and writes both.
        last: RMS of the update before it was clipped, and of the parameter before it moved, as the last step measured
            them; this step goes by them (unless it has to ``measure``) and leaves its own. None: nobody keeps them.
        emas: averages of the first and the second moment: what the host has to know of the numbers, wherever they live.
    """

    p: Tensor
    g: Tensor
    rows: Tensor | None
    packed: bool
    first: tuple[Store, State] | None
    second: tuple[Store, State] | None
    numbers: list[float] | Tensor = field(default_factory=lambda: [0.0] * NUMBERS)
    after: bool = False
    measure: bool = False
    stochastic: bool = False
    seed: int = 0
    flags: int = 0
    emas: tuple[Ema | None, Ema | None] = (None, None)
    last: Tensor | None = None
    correction: Tensor | None = None

    @property
    def once(self) -> bool:
        """The sweep that takes the step also measures it, for the next one."""
        return self.last is not None and not self.measure

    def __post_init__(self) -> None:
        if not isinstance(self.numbers, Tensor) and any(self.numbers):
            self.flags = sum(1 << place for place, value in enumerate(self.numbers) if value)


def is_rows(tensor: Tensor) -> bool:
    """Whether a 2-D tensor is rows of adjacent numbers, each behind the other or with gaps."""
    return tensor.shape[1] == 1 or tensor.stride(1) == 1 or tensor.numel() == 0


def misread(w: Work) -> str | None:
    """What a kernel, which is given addresses, would not see of the tensors; None: nothing."""
    state = [tensor for pair in (w.first, w.second) if pair for tensor in pair[1].values()]
    state += [tensor for tensor in (w.last, w.correction) if tensor is not None]
    if not all(has_address(tensor) for tensor in (w.p, w.g, *state)):
        return "one of its tensors has no memory of its own, and a kernel reads memory by its address"
    if any(tensor.is_neg() for tensor in (w.p, w.g, *state)):
        return (
            "one of its tensors is a lazily negated view (torch.is_neg), and a kernel would read its values "
            "with the wrong sign"
        )
    if w.flags & (1 << UNIT) and (w.second is not None or w.after):
        return "the kernels compute a sign step only without a second moment"
    if not all(tensor.is_contiguous() and tensor.device == w.p.device for tensor in state):
        return "its state is not contiguous, or is on another device than the parameter"
    return None


def same_tasks(tasks: Sequence[Any], last: Sequence[Any]) -> bool:
    """Whether a program that was made for ``last`` is one for ``tasks``: the same objects in the same order."""
    return len(tasks) == len(last) and all(map(is_, tasks, last))


FLOATS = (torch.float32, torch.bfloat16, torch.float16)

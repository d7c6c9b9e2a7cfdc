"""The input of a fused backend: one parameter's step, described by plain tensors and a vector of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.sharding.tensors import has_address
from sketch_plugins.stores.base import Ema, State, Store
from sketch_plugins.stores.cover import Cover

# The phases of a sweep. It may write the second moment, measure the update (and the parameter), and apply the step.
FOLD, MEASURE, APPLY = 1, 2, 4

# The places of the numbers in the vector that a kernel gets for each parameter.
(
    DECAY1,  # first moment: m <- decay * m + gain * x
    GAIN1,
    DECAY2,  # second moment
    GAIN2,
    MEAN,  # 1: a bucket takes the mean of its rows' squares. 0: it takes the sum
    SCALE,  # denominator = max(sqrt(v + inside) * scale + shift, floor)
    SHIFT,
    INSIDE,
    FLOOR,
    STEP,  # learning rate, with the bias correction of the first moment
    SHRINK,  # one minus the decoupled weight decay
    LOOKAHEAD,  # Nesterov's momentum
    SIGN,  # -1 for ascent
    L2,  # coupled weight decay
    CORRECTION,  # bias correction of the first moment alone, for the update that CLIP measures
    INNER,  # factor of the preconditioned gradient before the first moment averages it (`Work.after`)
    CLIP,  # update_clip; 0: off
    RELATIVE,  # if not 0, the step is multiplied by the RMS of the parameter, which counts as 1e-3 to RELATIVE
    NUMBER,  # number of the step, from 1, which seeds stochastic rounding
    UNIT,  # 1: the numerator is replaced by its sign (it is divided by its magnitude, which counts as >= tile.LEAST)
) = range(20)
NUMBERS = 20
#: STEP and SHRINK, which are next to each other, of a step that moves no weight.
STANDING = 0.0, 1.0


@dataclass(eq=False)
class Work:
    """One parameter's step.

    Attributes:
        p: the parameter as an ``(R, D)`` view with unit stride along columns.
        g: its gradient in the same form; for a packed sparse gradient the ``(n, D)`` values.
        rows: touched rows (int64, distinct, ascending), or None for all rows.
        packed: ``g`` holds only the touched rows.
        first: store of the first moment and its state, or None if there is no first moment.
        second: store of the second moment and its state, or None if there is no second moment.
        numbers: the numbers of the step, at the places above.
        after: the first moment averages the gradient after it was divided by the denominator (SM3, Sketchy). Clipping
            then measures that quotient and changes INNER, not STEP.
        measure: a sweep has to measure the update or the parameter before the step.
        stochastic: round a bfloat16 parameter stochastically.
        seed: seed of that rounding.
        flags: one bit for each of ``numbers``, set if it is not 0. The host reads it if the numbers are on a device.
        correction: the corrections of the weights, ``(R, D)`` (see `weight_code`), or None. A step reads and writes
            both weights and corrections.
        last: two RMS that the last step measured: of the update before it was clipped, and of the parameter before it
            moved. This step uses them (unless it has to ``measure``) and replaces them. None if they are not kept.
            ``(2,)``; of a batch of matrices ``(matrices, 2)``.
        matrices: number of matrices (experts) that the rows belong to. Each has RMS of its own, and covers.
        emas: averages of the first and the second moment, which the host needs even if the numbers are on a device.
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
    matrices: int = 1

    @property
    def apart(self) -> int:
        """Number of matrices that are handled one by one: they are measured, or each has covers of its own columns."""
        covers = self.second is not None and self.second[0].tiles_apart
        return self.matrices if self.measure or self.last is not None or covers else 1

    @property
    def once(self) -> bool:
        """Whether the sweep that takes the step also measures it, for the next step."""
        return self.last is not None and not self.measure

    def __post_init__(self) -> None:
        if not isinstance(self.numbers, Tensor) and any(self.numbers):
            self.flags = sum(1 << place for place, value in enumerate(self.numbers) if value)


def is_rows(tensor: Tensor) -> bool:
    """Whether each row of a 2-D tensor is adjacent in memory. There may be gaps between the rows."""
    return tensor.shape[1] == 1 or tensor.stride(1) == 1 or tensor.numel() == 0


def misread(w: Work) -> str | None:
    """Why a kernel, which reads memory by its address, would misread a tensor of this work, or None."""
    state = [tensor for pair in (w.first, w.second) if pair for tensor in pair[1].values()]
    state += [tensor for tensor in (w.last, w.correction) if tensor is not None]
    if not all(has_address(tensor) for tensor in (w.p, w.g, *state)):
        return "one of its tensors has no memory of its own, and a kernel reads memory by its address"
    if any(tensor.is_neg() for tensor in (w.p, w.g, *state)):
        return (
            "one of its tensors is a lazily negated view (torch.is_neg), and a kernel would read its values "
            "with the wrong sign"
        )
    if w.second is not None and isinstance(w.second[0], Cover) and w.apart != (w.second[0].matrices or 1):
        return f"its {w.apart} matrices are handled one by one, but covers are kept for {w.second[0].matrices or 1}"
    if w.flags & (1 << UNIT) and (w.second is not None or w.after):
        return "the kernels compute a sign step only without a second moment"
    if not all(tensor.is_contiguous() and tensor.device == w.p.device for tensor in state):
        return "its state is not contiguous, or is on another device than the parameter"
    return None


def same_tasks(tasks: Sequence[Any], last: Sequence[Any]) -> bool:
    """Whether a program made for ``last`` is one for ``tasks``: they are the same objects in the same order."""
    return len(tasks) == len(last) and all(map(is_, tasks, last))


FLOATS = (torch.float32, torch.bfloat16, torch.float16)

"""The rule of a step, which is one parameter's update in numbers, and the interface of state beside the moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sketch_plugins.optim.gate import Gate
from sketch_plugins.optim.options import held
from sketch_plugins.stores import Ema

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class Further(Protocol):
    """State of a parameter beside its moments."""

    def layout(self, dtype: torch.dtype) -> Layout:
        """The shape and dtype of every tensor, by name. ``dtype`` is the arithmetic dtype."""

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of all tensors."""

    def allocate(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors as they are before a parameter's first step."""


class LastRms:
    """State of ``lagged_rms``: the RMS of the last update before clipping, and of the parameter before it moved.

    Args:
        matrices: number of matrices of a batch (experts), each of which has RMS of its own; None: the parameter, or the
            part of one, is measured as a whole.
    """

    def __init__(self, matrices: int | None = None) -> None:
        self.matrices = matrices

    def layout(self, dtype: torch.dtype) -> Layout:
        """One tensor of both numbers, ``(2,)``; of a batch ``(matrices, 2)``."""
        return {"last": ((2,) if self.matrices is None else (self.matrices, 2), dtype)}

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of all numbers."""
        return 2 * dtype.itemsize * (1 if self.matrices is None else self.matrices)

    def allocate(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Zeros, which the first step replaces before anything reads them."""
        return {name: torch.zeros(size, dtype=kind, device=device) for name, (size, kind) in self.layout(dtype).items()}

    def spread(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """State of a checkpoint in this layout.

        Earlier versions measured a batch as a whole. Each matrix then begins with the RMS of the whole.
        """
        last = saved.get("last")
        if self.matrices is None or not isinstance(last, Tensor) or tuple(last.shape) != (2,):
            return dict(saved)
        return {**saved, "last": last.expand(self.matrices, 2).contiguous()}


class Denominator(NamedTuple):
    """``max(root / divisor + shift, floor)`` for the root of a second moment: bias correction and epsilon."""

    divisor: float | Tensor
    shift: float | Tensor

    def floor(self, dtype: torch.dtype) -> float:
        """The smallest denominator: 1e-30 in float32, or 0 (no floor) if epsilon is larger.

        A gradient of 0 over a second moment of 0 is no step, whatever epsilon is. Without a floor, and with a tiny
        epsilon or none, the learning rate over the denominator would be infinite, and 0 times that would be NaN. The
        root of a second moment that is not 0 is at least 3e-23.
        """
        least = 1e8 * torch.finfo(dtype).tiny
        return least if isinstance(self.shift, Tensor) or self.shift < least else 0.0

    def of(self, root: Tensor) -> Tensor:
        """The denominator, written in place of the root."""
        if isinstance(self.divisor, Tensor) or self.divisor != 1.0:
            root.div_(self.divisor)
        if isinstance(self.shift, Tensor) or self.shift != 0:
            root.add_(self.shift if isinstance(self.shift, Tensor) else held(self.shift, root.dtype))
        floor = self.floor(root.dtype)
        return root.clamp_(min=floor) if floor else root


@dataclass(frozen=True)
class Rule:
    """One parameter's update in one step: ``p <- (1 - decay) * p - step_size * correction * numerator / denominator``.

    Attributes:
        first: average of the first moment, or None if there is no first moment.
        second: average of the second moment, or None if there is no second moment.
        step_size: the learning rate; a float or a 0-d tensor.
        correction: bias correction of the numerator. It belongs to the update that ``update_clip`` measures.
        decay: decoupled weight decay times the learning rate.
        denominator: computed from the root of the second moment's estimate; None if there is no denominator.
        floor: added to that estimate under the root.
        precondition_first: the first moment averages ``g / denominator`` in place of g, and is not divided afterwards:
            ``p <- (1 - decay) * p - step_size * numerator``. ``update_clip`` then measures ``g / denominator`` and
            scales it before it is averaged. ``correction`` has to be 1.
        lookahead: Nesterov's momentum, with the numerator ``g + lookahead * m``. None: the numerator is m, or g if
            there is no first moment.
        sign: the numerator is replaced by its sign: it is divided by ``max(|numerator|, 1e-30)``.
        gate: decides on the device whether ``step_size`` and ``decay`` count as 0 (``nonfinite="deferred"``); None:
            they never do. Kernels get it beside the numbers of the rule.
    """

    first: Ema | None
    second: Ema | None
    step_size: float | Tensor
    correction: float | Tensor
    decay: float | Tensor
    lookahead: float | None
    denominator: Denominator | None
    floor: float = 0.0
    precondition_first: bool = False
    sign: bool = False
    gate: Gate | None = None

    def times(self, factor: float) -> Rule:
        """The same update with a learning rate that is ``factor`` times as large; the weight decay stays."""
        return self if factor == 1.0 else replace(self, step_size=self.step_size * factor)

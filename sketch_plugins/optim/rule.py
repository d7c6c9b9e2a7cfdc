"""The rule of a step: one parameter's update in numbers, and state beside the two moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sketch_plugins.stores import Ema

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class Further(Protocol):
    """State of a parameter beside its moments."""

    def layout(self, dtype: torch.dtype) -> Layout:
        """Name -> (shape, dtype) of every tensor; ``dtype`` is the arithmetic dtype."""

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of all of them."""

    def allocate(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a parameter's first step."""


class LastRms:
    """``lagged_rms``: RMS of the last step's update before it was clipped, and of the parameter before it moved."""

    def layout(self, dtype: torch.dtype) -> Layout:
        """Two numbers."""
        return {"last": ((2,), dtype)}

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of both."""
        return 2 * dtype.itemsize

    def allocate(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Zeros: the first step measures before anybody reads them."""
        return {"last": torch.zeros(2, dtype=dtype, device=device)}


class Denominator(NamedTuple):
    """``max(root / divisor + shift, floor)`` of the root of a second moment: bias correction and epsilon."""

    divisor: float | Tensor
    shift: float | Tensor

    def floor(self, dtype: torch.dtype) -> float:
        """The least denominator: 1e-30 in float32, 0 (none) where epsilon is larger.

        A gradient of 0 over a second moment of 0 is no step, whatever epsilon is. Without an epsilon, or with a tiny
        one, the quotient of the learning rate and the denominator would be infinite, and 0 times that NaN. The root of
        a second moment that is not 0 is 3e-23 or more.
        """
        least = 1e8 * torch.finfo(dtype).tiny
        return least if isinstance(self.shift, Tensor) or self.shift < least else 0.0

    def of(self, root: Tensor) -> Tensor:
        """In place of the root."""
        if isinstance(self.divisor, Tensor) or self.divisor != 1.0:
            root.div_(self.divisor)
        if isinstance(self.shift, Tensor) or self.shift != 0:
            root.add_(self.shift)
        floor = self.floor(root.dtype)
        return root.clamp_(min=floor) if floor else root


@dataclass(frozen=True)
class Rule:
    """One parameter's update in one step: ``p <- (1 - decay) * p - step_size * correction * numerator / denominator``.

    Attributes:
        first: average of the first moment, None where there is none.
        second: average of the second moment, None where there is none.
        step_size: the learning rate; a float or a 0-d tensor.
        correction: bias correction of the numerator; part of the update that ``update_clip`` measures.
        decay: decoupled weight decay times the learning rate.
        denominator: from the root of the second moment's estimate; None where there is none.
        floor: added to that estimate under the root.
        precondition_first: the first moment averages ``g / denominator`` in place of g and is not divided any more:
            ``p <- (1 - decay) * p - step_size * numerator``. ``update_clip`` then measures ``g / denominator``, and
            scales it before it is averaged; ``correction`` has to be 1.
        lookahead: Nesterov's momentum: the numerator is then ``g + lookahead * m``; else m, or g where there is no m.
        sign: the numerator is its own sign: divided by ``max(|numerator|, 1e-30)``.
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

"""Update clipping and relative steps (Adafactor's two devices), in Python.

Source: https://arxiv.org/abs/1804.04235. The kernels have the same formulas: `sweeps.settle`, `norms.step_sizes`. The
root mean squares that they take are those of a parameter, or of each matrix of a batch (`measuring`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

#: Adafactor's floor of a parameter's root mean square: a bias that starts at 0 still moves.
SCALE_FLOOR = 1e-3
#: The longest step of a group with a ``reference_rms`` below 1, as a multiple of the learning rate. Without this limit
#: weights of RMS 1 (a norm's, an embedding's by default) would take 59 times AdamW's step.
MOST_RELATIVE = 20.0


def excess(rms: Tensor, group: Mapping[str, Any]) -> Tensor | None:
    """``max(1, RMS(update) / update_clip)``, by which an update is divided; None where clipping is off."""
    return (rms / group["update_clip"]).clamp_(min=1.0) if group.get("update_clip") else None


def bounded(size: Tensor, group: Mapping[str, Any]) -> Tensor:
    """The RMS of a parameter that `scale_parameter` multiplies its step by: at least 1e-3, at most `largest_rms`."""
    return size.clamp(min=SCALE_FLOOR, max=largest_rms(group))


def largest_rms(group: Mapping[str, Any]) -> float:
    """The largest RMS that `scale_parameter` uses: it limits a step to 20 times that of the learning rate itself.

    Infinite with ``reference_rms=1``, Adafactor's form.
    """
    reference = float(group["reference_rms"])
    return MOST_RELATIVE * reference if reference < 1 else math.inf

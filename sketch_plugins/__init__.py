"""Memory-compressed optimizers that drop into the training framework people already use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sketch_plugins.memory.in_backward import InBackward
from sketch_plugins.memory.report import StateReport, state_report
from sketch_plugins.optim import (
    SM3,
    CSAdagrad,
    CSAdam,
    CSMomentum,
    CSRMSprop,
    MemSGD,
    SAdagrad,
    Sketchy,
    quadratic_warmup,
)
from sketch_plugins.optim.convert import convert_state

if TYPE_CHECKING:
    from sketch_plugins.memory.plan import Plan, plan

__version__ = "0.1.0"

__all__ = [
    "SM3",
    "CSAdagrad",
    "CSAdam",
    "CSMomentum",
    "CSRMSprop",
    "InBackward",
    "MemSGD",
    "Plan",
    "SAdagrad",
    "Sketchy",
    "StateReport",
    "convert_state",
    "plan",
    "quadratic_warmup",
    "state_report",
]


def __getattr__(name: str) -> Any:
    # Lazily: fake tensors bring half of torch's compiler with them, which training does without.
    if name in ("Plan", "plan"):
        from sketch_plugins.memory import plan as module

        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

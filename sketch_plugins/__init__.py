"""Memory-compressed optimizers that drop into the training framework people already use."""

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

__version__ = "0.1.0"

__all__ = [
    "SM3",
    "CSAdagrad",
    "CSAdam",
    "CSMomentum",
    "CSRMSprop",
    "InBackward",
    "MemSGD",
    "SAdagrad",
    "Sketchy",
    "StateReport",
    "convert_state",
    "quadratic_warmup",
    "state_report",
]

"""Memory-compressed optimizers for the training frameworks that people already use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sketch_plugins.version import __version__ as __version__

if TYPE_CHECKING:
    from sketch_plugins.memory.advise import advise
    from sketch_plugins.memory.advise_table import Advice
    from sketch_plugins.memory.in_backward import InBackward
    from sketch_plugins.memory.numerics import NumericsProbe
    from sketch_plugins.memory.plan import plan
    from sketch_plugins.memory.plan_table import Plan
    from sketch_plugins.memory.report import StateReport, state_report
    from sketch_plugins.optim import (
        SM3,
        CSAdagrad,
        CSAdam,
        CSLion,
        CSMomentum,
        CSRMSprop,
        MemSGD,
        SAdagrad,
        Sketchy,
        quadratic_warmup,
    )
    from sketch_plugins.optim.convert import convert_state
    from sketch_plugins.optim.full_precision import (
        cast_model,
        full_precision_state_dict,
        load_full_precision_state_dict,
    )

__all__ = [
    "SM3",
    "Advice",
    "CSAdagrad",
    "CSAdam",
    "CSLion",
    "CSMomentum",
    "CSRMSprop",
    "InBackward",
    "MemSGD",
    "NumericsProbe",
    "Plan",
    "SAdagrad",
    "Sketchy",
    "StateReport",
    "advise",
    "cast_model",
    "convert_state",
    "full_precision_state_dict",
    "load_full_precision_state_dict",
    "plan",
    "quadratic_warmup",
    "state_report",
]

#: Names that are not in `sketch_plugins.optim` -> the module that has them.
_ELSEWHERE = {
    "Advice": "memory.advise_table",
    "InBackward": "memory.in_backward",
    "NumericsProbe": "memory.numerics",
    "Plan": "memory.plan_table",
    "StateReport": "memory.report",
    "advise": "memory.advise",
    "cast_model": "optim.full_precision",
    "convert_state": "optim.convert",
    "full_precision_state_dict": "optim.full_precision",
    "load_full_precision_state_dict": "optim.full_precision",
    "plan": "memory.plan",
    "state_report": "memory.report",
}
#: Subpackages that are attributes after ``import sketch_plugins`` alone.
_PACKAGES = ("comm", "kernels", "linalg", "memory", "optim", "sharding", "stores")


def __getattr__(name: str) -> Any:
    # Imported lazily. torch takes seconds to import, and `sketch-plugins run` starts programs that may not need it.
    # Fake tensors (`plan`) import half of torch's compiler, which training does not need.
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'optim')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})

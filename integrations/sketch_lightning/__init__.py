"""Sketched optimizers in Lightning: strategies by name, callbacks.

    import sketch_lightning

    trainer = lightning.Trainer(strategy="cs_adam")        # or "ddp_cs_adam", "fsdp_sm3", "deepspeed_sketchy_stage_2"

Importing this package adds the strategies to the registries of ``lightning.pytorch`` and of ``pytorch_lightning``,
whichever there is; one that has not been imported yet gets them when it is. The classes are attributes of this package:
`SketchStrategy`, `SketchDDPStrategy`, `SketchFSDPStrategy`, `SketchDeepSpeedStrategy` and the callbacks
`OptimizerStateMonitor`, `SketchCleaning`, `ReclaimBatchSize`, `OptimizerInBackward`. Lightning under its two names is
two class trees, which do not mix: the attributes are those of ``lightning.pytorch`` if that is imported or nothing else
is, and of ``pytorch_lightning`` otherwise. To name one: ``from sketch_lightning.pytorch_lightning import
SketchDDPStrategy``, or ``from sketch_lightning.lightning_pytorch import ...``.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

from sketch_lightning import _private
from sketch_plugins.import_hooks import is_initializing, when_imported

_STRATEGIES = (
    "SketchStrategy",
    "SketchDDPStrategy",
    "MemSGDStrategy",
    "SketchFSDPStrategy",
    "SketchDeepSpeedStrategy",
)
_CALLBACKS = ("OptimizerStateMonitor", "SketchCleaning", "ReclaimBatchSize", "OptimizerInBackward")
#: Namespace of Lightning -> module with its classes.
_MODULES = {"lightning.pytorch": "lightning_pytorch", "pytorch_lightning": "pytorch_lightning"}

__all__ = [
    "OptimizerInBackward",
    "OptimizerStateMonitor",
    "ReclaimBatchSize",
    "SketchCleaning",
    "SketchDDPStrategy",
    "SketchDeepSpeedStrategy",
    "SketchFSDPStrategy",
    "SketchStrategy",
    "known_names",
    "register",
]

#: Where an optimizer is named.
USAGE = 'Trainer(strategy="{name}")'


def register() -> None:
    """Add the strategies to every registry of Lightning that is imported, or will be. Calling it again does no harm.

    Raises:
        ModuleNotFoundError: there is no Lightning.
        _private.MovedSymbolError: Lightning lacks a name that is needed.
        ValueError: Lightning has a strategy of its own under one of our names.
    """
    installed = [namespace for namespace in _private.NAMESPACES if _private.is_installed(namespace)]
    if not installed:
        raise ModuleNotFoundError("sketch_lightning needs Lightning: pip install 'sketch-plugins[lightning]'")
    for namespace in installed:
        # The strategies are enough, and there long before the rest of Lightning is.
        if hasattr(sys.modules.get(f"{namespace}.strategies"), "__all__"):  # the last line of that module
            _add(namespace)  # its import may not have ended, for a hook of `sketch-plugins run` may be calling
        else:
            when_imported(f"{namespace}.strategies", functools.partial(_add, namespace))


def known_names() -> list[str]:
    """Every strategy of Lightning's registry, ours among them once they are registered."""
    return list(_private.find(_present(), "strategies", "StrategyRegistry").available_strategies())


def _add(namespace: str) -> None:
    # It adds its strategies itself: its own import may be what imports Lightning.
    importlib.import_module(f"sketch_lightning.{_MODULES[namespace]}")


def _present() -> str:
    for namespace in _private.NAMESPACES:
        module = sys.modules.get(namespace)
        if module is not None and not is_initializing(module):
            return namespace
    return next(namespace for namespace in _private.NAMESPACES if _private.is_installed(namespace))


def __getattr__(name: str) -> Any:
    # Lazily: importing Lightning takes seconds, and this package may be imported while it is half imported.
    if name in _STRATEGIES or name in _CALLBACKS:
        return getattr(importlib.import_module(f"sketch_lightning.{_MODULES[_present()]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()

"""Sketched optimizers in Lightning: strategies by name, callbacks.

    import sketch_lightning

    trainer = lightning.Trainer(strategy="cs_adam")        # or "ddp_cs_adam", "fsdp_sm3", "deepspeed_sketchy_stage_2"

Importing this package adds the strategies to the registries of ``lightning.pytorch`` and of ``pytorch_lightning``, if
they are installed. One that is not imported yet gets them when it is imported. The classes are attributes of this
package: `SketchStrategy`, `SketchDDPStrategy`, `SketchFSDPStrategy`, `SketchDeepSpeedStrategy` and the callbacks
`OptimizerStateMonitor`, `SketchCleaning`, `ReclaimBatchSize`, `OptimizerInBackward`. The two names of Lightning have
separate classes, which cannot be mixed. The attributes belong to ``lightning.pytorch`` if it is imported, or if only it
is installed, and to ``pytorch_lightning`` otherwise. To choose: ``from sketch_lightning.pytorch_lightning import
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
#: Namespace of Lightning -> module with our classes for it.
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

#: How an optimizer is named in the framework.
USAGE = 'Trainer(strategy="{name}")'


def register() -> None:
    """Add the strategies to every registry of Lightning, now or when it is imported. Calling it again does no harm.

    Raises:
        ModuleNotFoundError: Lightning is not installed.
        _private.MovedSymbolError: Lightning lacks a name that is needed.
        ValueError: Lightning has a strategy of its own under one of our names.
    """
    installed = [namespace for namespace in _private.NAMESPACES if _private.is_installed(namespace)]
    if not installed:
        raise ModuleNotFoundError("sketch_lightning needs Lightning: pip install 'sketch-plugins[lightning]'")
    for namespace in installed:
        # The module with the strategies is enough; it is complete long before the rest of Lightning.
        if hasattr(sys.modules.get(f"{namespace}.strategies"), "__all__"):  # the last line of that module
            _add(namespace)  # also within the import of Lightning, because a hook of `sketch-plugins run` may call this
        else:
            when_imported(f"{namespace}.strategies", functools.partial(_add, namespace))


def known_names() -> list[str]:
    """Every strategy in Lightning's registry, including ours once they are registered."""
    return list(_private.find(_present(), "strategies", "StrategyRegistry").available_strategies())


def _add(namespace: str) -> None:
    # The module adds its strategies itself, because its own import may be the one that imports Lightning.
    importlib.import_module(f"sketch_lightning.{_MODULES[namespace]}")


def _present() -> str:
    for namespace in _private.NAMESPACES:
        module = sys.modules.get(namespace)
        if module is not None and not is_initializing(module):
            return namespace
    return next(namespace for namespace in _private.NAMESPACES if _private.is_installed(namespace))


def __getattr__(name: str) -> Any:
    # Imported lazily: importing Lightning takes seconds, and it may be only partly imported now.
    if name in _STRATEGIES or name in _CALLBACKS:
        return getattr(importlib.import_module(f"sketch_lightning.{_MODULES[_present()]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()

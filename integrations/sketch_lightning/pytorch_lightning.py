"""The strategies and callbacks for ``pytorch_lightning``."""

from __future__ import annotations

from typing import Any

from sketch_lightning import names, strategies

_made = strategies.build("pytorch_lightning", __name__)

SketchStrategy = _made["SketchStrategy"]
SketchDDPStrategy = _made["SketchDDPStrategy"]
MemSGDStrategy = _made["MemSGDStrategy"]
SketchFSDPStrategy = _made["SketchFSDPStrategy"]
SketchDeepSpeedStrategy = _made["SketchDeepSpeedStrategy"]

names.add_to_registry("pytorch_lightning", _made)


def __getattr__(name: str) -> Any:
    # The callbacks need all of Lightning, which is only partly imported when the strategies are requested.
    if name in ("OptimizerStateMonitor", "SketchCleaning", "ReclaimBatchSize", "OptimizerInBackward"):
        from sketch_lightning import callbacks

        made = callbacks.build("pytorch_lightning", __name__)
        globals().update(made)
        return made[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

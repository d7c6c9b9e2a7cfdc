"""Sketched optimizers in accelerate.

    import sketch_accelerate

    model, optimizer, data = accelerator.prepare(model, CSAdam(model.parameters(), lr=1e-3), data)

``Accelerator.prepare`` takes our optimizers without this package, too. The package adds two things. When an
``Accelerator`` runs DeepSpeed, it imports ``sketch_deepspeed``, so that offloading does not replace the optimizer by
``DeepSpeedCPUAdam``, and DeepSpeed's configuration can name it (``DummyOptim``). And it refuses FSDP1 before training
starts.

``accelerator.ddp_handler = MemSGDKwargs(memsgd={"density": 0.01})`` sparsifies gradients between processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sketch_accelerate._private import MovedSymbolError, known_names, register

if TYPE_CHECKING:
    from sketch_accelerate.comm import MemSGDKwargs

__all__ = ["MemSGDKwargs", "MovedSymbolError", "known_names", "register"]

#: How an optimizer is given to the framework.
USAGE = "Accelerator.prepare(model, optimizer)"

register()


def __getattr__(name: str) -> Any:
    # Imported lazily: accelerate may be only partly imported now, and its base class may not exist yet.
    if name == "MemSGDKwargs":
        from sketch_accelerate.comm import MemSGDKwargs

        return MemSGDKwargs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

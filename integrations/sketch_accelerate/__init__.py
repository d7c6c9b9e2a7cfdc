"""Sketched optimizers in accelerate.

    import sketch_accelerate

    model, optimizer, data = accelerator.prepare(model, CSAdam(model.parameters(), lr=1e-3), data)

``Accelerator.prepare`` takes them without this package, too. What it adds: DeepSpeed's side (``sketch_deepspeed``) is
there as soon as an ``Accelerator`` runs DeepSpeed, so that the optimizer is not replaced by ``DeepSpeedCPUAdam`` under
offloading and can be named in DeepSpeed's configuration (``DummyOptim``); and FSDP1 is refused before training starts.

``accelerator.ddp_handler = MemSGDKwargs(memsgd={"density": 0.01})`` sparsifies gradients between processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sketch_accelerate._private import MovedSymbolError, known_names, register

if TYPE_CHECKING:
    from sketch_accelerate.comm import MemSGDKwargs

__all__ = ["MemSGDKwargs", "MovedSymbolError", "known_names", "register"]

#: Where an optimizer is given.
USAGE = "Accelerator.prepare(model, optimizer)"

register()


def __getattr__(name: str) -> Any:
    # Lazily: this package may be imported while accelerate is half imported, when its base class does not exist yet.
    if name == "MemSGDKwargs":
        from sketch_accelerate.comm import MemSGDKwargs

        return MemSGDKwargs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

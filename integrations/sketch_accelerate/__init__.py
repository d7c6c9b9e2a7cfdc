"""Sketched optimizers in accelerate.

    import sketch_accelerate

    model, optimizer, data = accelerator.prepare(model, CSAdam(model.parameters(), lr=1e-3), data)

``Accelerator.prepare`` takes them without this package, too. What it adds: DeepSpeed's side (``sketch_deepspeed``) is
there as soon as an ``Accelerator`` runs DeepSpeed, so that the optimizer is not replaced by ``DeepSpeedCPUAdam`` under
offloading and can be named in DeepSpeed's configuration (``DummyOptim``); and FSDP1 is refused before training starts.
"""

from __future__ import annotations

from sketch_accelerate._private import MovedSymbolError, register

__all__ = ["MovedSymbolError", "register"]

register()

"""Sketched optimizers in DeepSpeed.

    import sketch_deepspeed

    config = {"optimizer": {"type": "cs_adam", "params": {"lr": 1e-4, "compression": 0.05}}, ...}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

Importing this package makes every name of ``sketch_plugins.registry`` an optimizer of DeepSpeed's configuration. The
optimizers can also be given to ``deepspeed.initialize(optimizer=...)``; ZeRO accepts them in both cases.
"""

from __future__ import annotations

from sketch_deepspeed._private import MovedSymbolError, known_names, register

__all__ = ["MovedSymbolError", "known_names", "register"]

#: How an optimizer is named in the framework.
USAGE = '"optimizer": {{"type": "{name}"}}'

register()

"""Gradient compression in accelerate: ``accelerator.ddp_handler = MemSGDKwargs(memsgd={"density": 0.01})``."""

from sketch_accelerate.comm import MemSGDKwargs

__all__ = ["MemSGDKwargs"]

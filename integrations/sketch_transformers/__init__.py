"""Sketched optimizers in the Hugging Face Trainer.

    import sketch_transformers

    args = TrainingArguments("out", optim="cs_adam", optim_args="compression=0.05")

Importing this package makes every name of ``sketch_plugins.registry`` a value of ``TrainingArguments.optim``, and with
``_layerwise`` behind it (``cs_adam_layerwise``) the same optimizer, whose steps are taken in backward. Import it
before ``HfArgumentParser(TrainingArguments)``: the parser copies the names when it is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sketch_transformers._private import register

if TYPE_CHECKING:
    from sketch_transformers.callback import SketchCallback
    from sketch_transformers.comm import enable_memsgd

__all__ = ["SketchCallback", "enable_memsgd", "register"]

register()


def __getattr__(name: str) -> Any:
    # Lazily, because this package may be imported while transformers is half imported (`python -m sketch_plugins run`),
    # when the base class of the callback does not exist yet.
    if name == "SketchCallback":
        from sketch_transformers.callback import SketchCallback

        return SketchCallback
    if name == "enable_memsgd":
        from sketch_transformers.comm import enable_memsgd

        return enable_memsgd
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

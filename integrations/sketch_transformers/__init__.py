"""Sketched optimizers in the Hugging Face Trainer.

    import sketch_transformers

    args = TrainingArguments("out", optim="cs_adam", optim_args="compression=0.05")

Importing this package makes every name of ``sketch_plugins.registry`` a value of ``TrainingArguments.optim``. With the
suffix ``_layerwise`` (``cs_adam_layerwise``) a name means the same optimizer with steps in backward. Import the package
before ``HfArgumentParser(TrainingArguments)``, because the parser copies the names when it is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sketch_transformers._private import known_names
from sketch_transformers.registration import register

if TYPE_CHECKING:
    from sketch_transformers.callback import SketchCallback
    from sketch_transformers.comm import enable_memsgd
    from sketch_transformers.full_precision import save_full_precision
    from sketch_transformers.reclaim import ReclaimBatchSize, reclaim_batch_size

__all__ = [
    "ReclaimBatchSize",
    "SketchCallback",
    "enable_memsgd",
    "known_names",
    "reclaim_batch_size",
    "register",
    "save_full_precision",
]

#: How an optimizer is named in the framework.
USAGE = 'TrainingArguments(optim="{name}")'

register()


def __getattr__(name: str) -> Any:
    # Imported lazily: transformers may be only partly imported now (`python -m sketch_plugins run`), and the base class
    # of the callbacks may not exist yet.
    if name == "SketchCallback":
        from sketch_transformers.callback import SketchCallback

        return SketchCallback
    if name == "enable_memsgd":
        from sketch_transformers.comm import enable_memsgd

        return enable_memsgd
    if name == "save_full_precision":
        from sketch_transformers.full_precision import save_full_precision

        return save_full_precision
    if name in ("ReclaimBatchSize", "reclaim_batch_size"):
        from sketch_transformers import reclaim

        return getattr(reclaim, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Everything of accelerate that is changed, or used without being documented: nothing of it is named elsewhere here.

Changed is ``Accelerator.prepare``, which first looks at what it is given and at what will run it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sketch_plugins import patching
from sketch_plugins.optim import SketchOptimizer

#: Where in accelerate the names are that this package touches: module, then dotted name in it. Not in the package
#: itself, which is half imported when `sketch-plugins run` registers this one.
TOUCHED = (
    ("accelerate.accelerator", "Accelerator.prepare"),
    ("accelerate.accelerator", "Accelerator.distributed_type"),
    ("accelerate.utils", "DistributedType.DEEPSPEED"),
    ("accelerate.utils", "DistributedType.FSDP"),
)


class MovedSymbolError(patching.MovedSymbolError):
    """A name of accelerate that this package relies on is not where it was."""


_ACCELERATE = patching.Framework(
    package="accelerate",
    touched=TOUCHED,
    purpose="watch over its optimizers",
    instead="They work without sketch_accelerate; with "
    'DeepSpeed and offloading set "zero_force_ds_cpu_optimizer": false, or accelerate replaces them.',
    error=MovedSymbolError,
)


def register() -> None:
    """Have every ``Accelerator`` look at what it prepares. Calling it again does no harm.

    Raises:
        MovedSymbolError: see :func:`check`.
    """
    check()
    patching.wrap(_ACCELERATE.find("accelerate.accelerator", "Accelerator"), "prepare", _looking)


def check() -> None:
    """Look up every name this package touches.

    Raises:
        MovedSymbolError: names the first one that is missing and the version of accelerate.
    """
    _ACCELERATE.check()


def known_names() -> list[str]:
    """None: accelerate knows no optimizers by name."""
    return []


def _looking(prepare: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Ours, and not asked for anything but under DistributedDataParallel.
        tell = getattr(getattr(self, "ddp_handler", None), "prepared_by", None)
        if tell is not None:
            tell(self)
        kinds = _ACCELERATE.find("accelerate.utils", "DistributedType")
        if self.distributed_type == kinds.DEEPSPEED:
            # The one place where an integration imports another: accelerate is a way to run DeepSpeed. What DeepSpeed
            # and accelerate do to an optimizer there is dealt with in that package, also for those who need no
            # accelerate.
            import sketch_deepspeed

            sketch_deepspeed.register()
        elif self.distributed_type == kinds.FSDP and _fsdp_version(self) == 1:
            for given in args:
                if isinstance(getattr(given, "optimizer", given), SketchOptimizer):
                    raise ValueError(
                        f"{type(getattr(given, 'optimizer', given)).__name__} does not support FSDP1, "
                        "whose flat parameters have no shape that could be compressed. Use FSDP2: "
                        "fsdp_version: 2 in the configuration of accelerate, "
                        "FullyShardedDataParallelPlugin(fsdp_version=2), or --fsdp_version 2"
                    )
        return prepare(self, *args, **kwargs)

    return wrapped


def _fsdp_version(accelerator: Any) -> int:
    # There was one version only before accelerate knew the second.
    return int(getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1))

"""All names of accelerate that this package changes, or uses although they are not documented.

It changes ``Accelerator.prepare``, which first checks its arguments and the framework that will run them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sketch_plugins import patching
from sketch_plugins.optim import SketchOptimizer

#: Names of accelerate that this package uses: module, then dotted name in it. They are not looked up in the package
#: itself, which is only partly imported when `sketch-plugins run` registers this one.
TOUCHED = (
    ("accelerate.accelerator", "Accelerator.prepare"),
    ("accelerate.accelerator", "Accelerator.distributed_type"),
    ("accelerate.utils", "DistributedType.DEEPSPEED"),
    ("accelerate.utils", "DistributedType.FSDP"),
)


class MovedSymbolError(patching.MovedSymbolError):
    """accelerate lacks a name that this package relies on."""


_ACCELERATE = patching.Framework(
    package="accelerate",
    touched=TOUCHED,
    purpose="watch over its optimizers",
    instead="They work without sketch_accelerate; with "
    'DeepSpeed and offloading set "zero_force_ds_cpu_optimizer": false, or accelerate replaces them.',
    error=MovedSymbolError,
)


def register() -> None:
    """Let every ``Accelerator`` check what it prepares. Calling it again does no harm.

    Raises:
        MovedSymbolError: see :func:`check`.
    """
    check()
    patching.wrap(_ACCELERATE.find("accelerate.accelerator", "Accelerator"), "prepare", _looking)


def check() -> None:
    """Look up every name that this package uses.

    Raises:
        MovedSymbolError: names the first one that is missing and the version of accelerate.
    """
    _ACCELERATE.check()


def known_names() -> list[str]:
    """An empty list, because accelerate knows no optimizers by name."""
    return []


def _looking(prepare: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A MemSGDKwargs of ours; accelerate itself calls it under DistributedDataParallel only.
        tell = getattr(getattr(self, "ddp_handler", None), "prepared_by", None)
        if tell is not None:
            tell(self)
        kinds = _ACCELERATE.find("accelerate.utils", "DistributedType")
        if self.distributed_type == kinds.DEEPSPEED:
            # Only here an integration imports another one, because accelerate is a way to run DeepSpeed. That package
            # handles what DeepSpeed and accelerate do to an optimizer there, also for users without accelerate.
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
    # Before accelerate had the second version, it had only one.
    return int(getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1))

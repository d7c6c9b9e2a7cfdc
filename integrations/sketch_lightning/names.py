"""The strategies' names in Lightning's registry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sketch_lightning import _private
from sketch_plugins import registry

#: The ways in which DDP starts its processes; "" is Lightning's "ddp".
_STARTS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}


def add_to_registry(namespace: str, classes: Mapping[str, Any]) -> None:
    """Add every name of the family to Lightning's registry. Calling it again does no harm.

    Raises:
        ValueError: Lightning has a strategy of its own under one of our names.
    """
    strategies = _private.find(namespace, "strategies", "StrategyRegistry")
    for name, cls, options in _entries(classes):
        if name in strategies:
            if strategies[name]["strategy"] is not cls:
                raise ValueError(f"{namespace} already has a strategy {name!r}")
            continue
        strategies.register(name, cls, description=f"{cls.__name__}({options})", **options)


def _entries(classes: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    ddp, deepspeed = classes["SketchDDPStrategy"], classes["SketchDeepSpeedStrategy"]
    for suffix, method in _STARTS.items():
        yield f"ddp{suffix}_memsgd", classes["MemSGDStrategy"], {"start_method": method}
    for name in registry.names():
        own: dict[str, Any] = {"optimizer": name}
        yield name, classes["SketchStrategy"], own
        yield f"fsdp_{name}", classes["SketchFSDPStrategy"], own
        for suffix, method in _STARTS.items():
            yield f"ddp{suffix}_{name}", ddp, {**own, "start_method": method}
            yield (
                f"ddp{suffix}_find_unused_parameters_true_{name}",
                ddp,
                {**own, "start_method": method, "find_unused_parameters": True},
            )
        yield f"deepspeed_{name}", deepspeed, own
        for stage in (1, 2, 3):
            yield f"deepspeed_{name}_stage_{stage}", deepspeed, {**own, "stage": stage}
        for stage in (2, 3):
            offload = {"offload_optimizer": True, **({"offload_parameters": True} if stage == 3 else {})}
            yield f"deepspeed_{name}_stage_{stage}_offload", deepspeed, {**own, "stage": stage, **offload}

"""What the callbacks share: the trainer's optimizers, hooks before their updates, and checks of counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from sketch_lightning import _private
from sketch_plugins.optim import SketchOptimizer


def before_update(optimizer: torch.optim.Optimizer, function: Callable[[], Any]) -> Any:
    """Call the function before each update, when the gradients are those that the optimizer uses: clipped, unscaled.

    Lightning's ``on_before_optimizer_step`` comes before clipping, and also in steps that a gradient scaler skips.

    Returns:
        A handle that removes it.
    """

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # Lightning computes and clips the gradients in the closure.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            function()
            return None

        def then() -> Any:
            loss = closure()
            with torch.no_grad():
                function()
            return loss

        if len(args) > 1:
            return (args[0], then, *args[2:]), kwargs
        return args, {**kwargs, "closure": then}

    return optimizer.register_step_pre_hook(hook)


def named_optimizers(trainer: Any) -> Iterator[tuple[int, str, torch.optim.Optimizer]]:
    """Number, name in the logs, and the optimizer inside any wrapper."""
    for number, optimizer in enumerate(trainer.optimizers):
        prefix = "optimizer" if len(trainer.optimizers) == 1 else f"optimizer_{number}"
        inner = optimizer
        while not isinstance(inner, SketchOptimizer) and hasattr(inner, "optimizer"):
            inner = inner.optimizer  # DeepSpeed's wrappers
        if not _private.is_mock(inner):
            yield number, prefix, inner


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless ``value`` is an integer >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} is not allowed: {name} must be an integer >= 1")

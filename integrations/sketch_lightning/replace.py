"""Replace an optimizer of torch by a sketched one, in every reference to it, schedulers included."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, ReduceLROnPlateau

from sketch_plugins.optim import SketchOptimizer
from sketch_plugins.optim.written import written_by


def has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether one of torch's optimizers has taken a step. Its state does not say so: Adagrad has one from the start."""
    return any(float(state.get("step", 1)) > 0 for state in optimizer.state.values() if state)


def adopt_groups(optimizer: torch.optim.Optimizer) -> None:
    """Convert parameter groups that Lightning has put in place of ours.

    When a run is resumed, Lightning's ``BaseFinetuning`` sets ``param_groups`` to groups of the checkpoint. If one of
    torch's optimizers wrote the checkpoint, they have that optimizer's keys.
    """
    if not isinstance(optimizer, SketchOptimizer):
        return
    options = optimizer.OPTIONS.keys() & optimizer.defaults.keys()
    if all(group.keys() >= options for group in optimizer.param_groups):
        return
    groups, optimizer.param_groups = optimizer.param_groups, []
    try:
        for group in groups:
            if written_by(group) is None:
                optimizer.add_param_group(dict(group))
            else:  # groups of ours, from a version that had fewer options
                missing = {name: optimizer.defaults[name] for name in options - group.keys()}
                optimizer._add_group({**missing, **group})
    except BaseException:
        optimizer.param_groups = groups
        raise


def rewire(schedulers: Iterable[Any], replaced: Mapping[int, tuple[Any, SketchOptimizer]]) -> None:
    """Let schedulers, and schedulers within them, drive the new optimizers. Their state does not change.

    Args:
        schedulers: of torch or others.
        replaced: id of an old optimizer -> (the old one, the new one).
    """
    seen: set[int] = set()
    scheduled: dict[int, SketchOptimizer] = {}

    def visit(scheduler: Any) -> None:
        if id(scheduler) in seen or not hasattr(scheduler, "__dict__"):
            return
        seen.add(id(scheduler))
        for key, value in list(vars(scheduler).items()):
            if id(value) in replaced:
                new = replaced[id(value)][1]
                setattr(scheduler, key, new)
                scheduled[id(new)] = new
                if hasattr(scheduler, "use_beta1"):  # CyclicLR and OneCycleLR: which key of a group is the momentum
                    scheduler.use_beta1 = "betas" in new.defaults
            for inner in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(inner, (LRScheduler, ReduceLROnPlateau)):
                    visit(inner)

    for scheduler in schedulers:
        visit(scheduler)
    for new in scheduled.values():
        # Every scheduler marks the optimizer's `step`, so that other schedulers can tell whether it was called before
        # theirs. This one multiplies by 1.
        ConstantLR(new, factor=1.0, total_iters=1)


def follow(module: Any, replaced: Mapping[int, tuple[Any, SketchOptimizer]]) -> list[Any]:
    """Put the new optimizers into a module's attributes, and into the lists, tuples and dicts there.

    Args:
        module: the module.
        replaced: see `rewire`.

    Returns:
        The schedulers that were found in the same places; they still drive the old optimizers.
    """
    schedulers: list[Any] = []
    seen: set[int] = set()

    def new(value: Any) -> Any:
        if id(value) in replaced:
            return replaced[id(value)][1]
        if isinstance(value, (LRScheduler, ReduceLROnPlateau)) or (
            id(getattr(value, "__dict__", {}).get("optimizer")) in replaced  # a scheduler that is not torch's
        ):
            schedulers.append(value)
        elif isinstance(value, tuple):
            inner = [new(one) for one in value]
            if any(one is not other for one, other in zip(inner, value, strict=True)):
                return value._make(inner) if hasattr(value, "_make") else tuple(inner)
        elif isinstance(value, (list, dict)) and id(value) not in seen:
            seen.add(id(value))
            for key, one in list(value.items() if isinstance(value, dict) else enumerate(value)):
                made = new(one)
                if made is not one:
                    value[key] = made
        return value

    for key, value in list(vars(module).items()):
        made = new(value)
        if made is not value:
            setattr(module, key, made)
    return schedulers


def retire(old: torch.optim.Optimizer, new: SketchOptimizer) -> None:
    """Make every use of the old optimizer an error, because a step or a new group would have no effect."""
    names = type(old).__name__, type(new).__name__

    def refuse(what: str) -> Any:
        def refused(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
            raise RuntimeError(
                f"this {names[0]} was replaced by {names[1]} after configure_optimizers: {what}. Use "
                "self.optimizers(), which returns the new optimizer"
            )

        return types.MethodType(refused, old)

    old.step = refuse("its step would train without the sketched optimizer")  # type: ignore[method-assign]
    old.add_param_group = refuse("parameters added to it would not be trained")  # type: ignore[method-assign]
    old.load_state_dict = refuse("a state loaded into it would not be used")  # type: ignore[method-assign]


def restored_momentum(scheduler: Any, state: Any) -> None:
    """Change a scheduler's saved state so that it names the momentum of the optimizer that it drives now.

    Args:
        scheduler: the scheduler that is about to load the state.
        state: the state, which is changed, with the states of schedulers within.
    """
    optimizer = getattr(scheduler, "optimizer", None)
    if not isinstance(optimizer, SketchOptimizer) or not isinstance(state, dict):
        return
    if "use_beta1" in state:
        state["use_beta1"] = "betas" in optimizer.defaults
    for inner, saved in zip(getattr(scheduler, "_schedulers", ()), state.get("_schedulers", ()), strict=False):
        restored_momentum(inner, saved)

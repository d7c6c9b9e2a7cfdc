"""A sketched optimizer in the place of one of torch's: hyperparameters, groups and schedulers stay."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, ReduceLROnPlateau

from sketch_plugins import registry
from sketch_plugins.optim import SketchOptimizer

#: What is replaced. Subclasses are not: they may do something else.
REPLACED: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.Adagrad,
)


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for every parameter group, typed; values may be text.

    Raises:
        ValueError: no such optimizer; an unknown option, or one with a value that is not allowed; ``lr``, which belongs
            to the module, because its schedule starts from it.
    """
    given = registry.parse_options(name, options)
    if "lr" in given:
        raise ValueError(
            f"optimizer_kwargs has lr={given['lr']!r}: the learning rate is that of the optimizer which the module "
            "builds, because its schedule starts from there. Set it in the module"
        )
    try:
        registry.get(name).cls([torch.empty(0)], **given)  # the constructor knows which values go together
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer={name!r} with optimizer_kwargs={dict(options)!r}: {error}") from error
    return given


def counterpart(optimizer: torch.optim.Optimizer, name: str, options: Mapping[str, Any]) -> SketchOptimizer:
    """The optimizer ``name`` for the parameter groups of one of torch's, with their hyperparameters.

    What both have in common is carried over group by group: ``lr``, ``maximize``, ``weight_decay``; of Adam and AdamW
    ``betas`` and ``eps`` (not to ``sm3``, where they mean something else); of SGD ``momentum`` and ``nesterov``; of
    Adagrad everything, to ``cs_adagrad``. Keys that schedulers keep in the groups stay. Nothing that was set is
    dropped: what the new optimizer cannot do is an error, unless ``options`` say what to do instead.

    Args:
        optimizer: of type Adam, AdamW, SGD or Adagrad, without state.
        name: of the registry.
        options: for every group; they win over the hyperparameters.

    Raises:
        ValueError: another type of optimizer; a hyperparameter that has no meaning for the new one.
    """
    if type(optimizer) not in REPLACED:
        raise ValueError(
            f"{type(optimizer).__module__}.{type(optimizer).__qualname__} has no sketched counterpart: allowed are "
            f"{', '.join(cls.__name__ for cls in REPLACED)}. Or let configure_optimizers build the sketched optimizer "
            "itself, which is then left alone"
        )
    cls = registry.get(name).cls
    groups = []
    for group in optimizer.param_groups:
        names = group.get("param_names")
        members = list(zip(names, group["params"], strict=True)) if names else list(group["params"])
        extra = {
            key: value
            for key, value in group.items()
            if key not in optimizer.defaults and key not in ("params", "param_names")
        }
        own = {key: value for key, value in _carried(optimizer, group, name, options).items() if key not in options}
        groups.append({**extra, **own, "params": members})
    return cls(groups, **options)


def _carried(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], name: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    cls, kind = registry.get(name).cls, type(optimizer).__name__
    own = {"lr": group["lr"], "maximize": group["maximize"]}

    # A scheduler that cycles the momentum has changed the group's already; it will drive the new optimizer's.
    said = optimizer.defaults if "max_momentum" in group else group

    def leave(key: str, default: Any, why: str = "") -> None:
        if said.get(key, default) != default and key not in given:
            how = f"set it with optimizer_kwargs={{{key!r}: ...}} or " if key in cls.OPTIONS else ""
            raise ValueError(
                f"{kind}({key}={said[key]!r}) cannot be carried over to {name}{why}: {how}leave it at {default!r}"
            )

    leave("differentiable", False)
    decoupled = False
    if kind in ("Adam", "AdamW"):
        decoupled = kind == "AdamW" or bool(group.get("decoupled_weight_decay", False))
        if cls.ADAM_SETTINGS:
            own |= {"betas": group["betas"], "eps": group["eps"]}
        else:
            leave("betas", (0.9, 0.999), ", whose betas mean something else")
            leave("eps", 1e-8, ", whose eps means something else")
        leave("amsgrad", False)
    elif kind == "SGD":
        leave("dampening", 0)
        if "momentum" in cls.OPTIONS:
            own["momentum"] = group["momentum"]
        elif "first_moment" in cls.OPTIONS and group["momentum"] and "betas" not in given:
            second = cls([torch.empty(0)], **given).param_groups[0]["betas"][1]
            own["betas"] = (group["momentum"], second)
        elif "betas" not in given:
            leave("momentum", 0, ", which keeps no momentum")
        if "nesterov" in cls.OPTIONS and (group["nesterov"] or "momentum" in cls.OPTIONS):
            own["nesterov"] = group["nesterov"]
        else:
            leave("nesterov", False)
    elif "lr_decay" in cls.OPTIONS:  # Adagrad as itself
        own |= {key: group[key] for key in ("lr_decay", "eps", "initial_accumulator_value")}
    else:
        leave("lr_decay", 0)
        leave("eps", 1e-10)
        leave("initial_accumulator_value", 0)
    return own | _weight_decay(group, kind, name, decoupled, given)


def _weight_decay(
    group: Mapping[str, Any], kind: str, name: str, decoupled: bool, given: Mapping[str, Any]
) -> dict[str, Any]:
    decay = group["weight_decay"]
    if "decoupled_weight_decay" in registry.get(name).cls.OPTIONS:
        return {"weight_decay": decay, **({"decoupled_weight_decay": True} if decoupled and decay else {})}
    if decay and not decoupled and "weight_decay" not in given:
        raise ValueError(
            f"{kind}(weight_decay={decay!r}) adds the decay to the gradient, {name} takes it off the weights as AdamW "
            f"does: build AdamW, or say optimizer_kwargs={{'weight_decay': {decay!r}}} to have it so"
        )
    return {"weight_decay": decay}


def rewire(schedulers: Iterable[Any], replaced: Mapping[int, tuple[Any, SketchOptimizer]]) -> None:
    """Let schedulers, and schedulers within them, drive the new optimizers. Their state stays as it is.

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
                if hasattr(scheduler, "use_beta1"):  # CyclicLR and OneCycleLR: what of a group is the momentum
                    scheduler.use_beta1 = "betas" in new.defaults
            for inner in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(inner, (LRScheduler, ReduceLROnPlateau)):
                    visit(inner)

    for scheduler in schedulers:
        visit(scheduler)
    for new in scheduled.values():
        # Any scheduler marks the optimizer's `step`, by which others tell whether it was called before theirs. This one
        # multiplies by 1.
        ConstantLR(new, factor=1.0, total_iters=1)


def follow(module: Any, replaced: Mapping[int, tuple[Any, SketchOptimizer]]) -> list[Any]:
    """Put the new optimizers into a module's attributes, and into the lists, tuples and dicts there.

    Args:
        module: whose.
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
    """Let a step of the old optimizer be an error: whoever still has it would train with it unseen."""
    names = type(old).__name__, type(new).__name__

    def step(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"this {names[0]} was replaced by {names[1]} after configure_optimizers: a step of it would train without "
            "the sketched optimizer. Use self.optimizers(), which gives the new one"
        )

    old.step = types.MethodType(step, old)  # type: ignore[method-assign]


def restored_momentum(scheduler: Any, state: Any) -> None:
    """Let a scheduler's saved state say what of a group is the momentum of the optimizer that it drives now.

    Args:
        scheduler: into which the state is about to be loaded.
        state: is changed, with those of schedulers within.
    """
    optimizer = getattr(scheduler, "optimizer", None)
    if not isinstance(optimizer, SketchOptimizer) or not isinstance(state, dict):
        return
    if "use_beta1" in state:
        state["use_beta1"] = "betas" in optimizer.defaults
    for inner, saved in zip(getattr(scheduler, "_schedulers", ()), state.get("_schedulers", ()), strict=False):
        restored_momentum(inner, saved)


def describe(old: torch.optim.Optimizer, new: SketchOptimizer, options: Mapping[str, Any]) -> str:
    """What was replaced by what, for the log."""
    rates = sorted({float(group["lr"]) for group in new.param_groups})
    given = "".join(f", {key}={value!r}" for key, value in options.items())
    return f"{type(old).__name__} by {type(new).__name__}(lr={', '.join(f'{rate:g}' for rate in rates)}{given})"

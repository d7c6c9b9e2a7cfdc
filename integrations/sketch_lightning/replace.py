"""A sketched optimizer in the place of one of torch's: hyperparameters, groups and schedulers stay."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, ReduceLROnPlateau

from sketch_plugins import registry
from sketch_plugins.optim import SketchOptimizer
from sketch_plugins.optim.hyperparameters import carried_over
from sketch_plugins.optim.written import written_by

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

    What both have in common is carried over, group by group and to the defaults, from which groups that are added later
    take what they do not say: ``lr``, ``maximize``, ``weight_decay``; of Adam and AdamW
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
    carry = _Carrying(optimizer, name, options)
    # Groups that are added later (BackboneFinetuning) take what they do not say from the defaults.
    made = cls([carry.group(group) for group in optimizer.param_groups], **{**carry.defaults(), **options})
    carry.follow(made)
    return made


class _Carrying:
    """From parameter groups in the words of a torch optimizer to groups of ours: the first ones, and later ones."""

    def __init__(self, optimizer: torch.optim.Optimizer, name: str, options: Mapping[str, Any]) -> None:
        self.cls, self.name, self.options = registry.get(name).cls, name, options
        self.kind, self.said = type(optimizer).__name__, dict(optimizer.defaults)

    def defaults(self) -> dict[str, Any]:
        """The module's hyperparameters, for the constructor."""
        return self._own(self.said)

    def group(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """One of the optimizer's groups, which has all hyperparameters."""
        names = group.get("param_names")
        members = list(zip(names, group["params"], strict=True)) if names else group["params"]
        if not isinstance(members, torch.Tensor):
            members = list(members)
        extra = {
            key: value for key, value in group.items() if key not in self.said and key not in ("params", "param_names")
        }
        return {**self._own(group), **extra, "params": members}  # what is said in our words wins

    def follow(self, made: SketchOptimizer) -> None:
        """Let groups that are added to ``made`` later say what they say in the words of the replaced optimizer.

        A group of SGD that has a momentum means ``betas[0]`` of an optimizer with betas, and what cannot be carried
        over is the same error as in ``configure_optimizers``.
        """

        def add_param_group(self: SketchOptimizer, param_group: Any) -> None:
            if isinstance(param_group, dict) and "params" in param_group:
                param_group = carry.group({**carry.said, **param_group})
            type(self).add_param_group(self, param_group)

        carry = self
        made.add_param_group = types.MethodType(add_param_group, made)  # type: ignore[method-assign]

    def _own(self, group: Mapping[str, Any]) -> dict[str, Any]:
        # A scheduler that cycles the momentum has changed the group's already; it will drive the new optimizer's.
        said = self.said if "max_momentum" in group else group
        own = carried_over(self.cls, self.name, self.kind, group, said=said, given=self.options)
        return {key: value for key, value in own.items() if key not in self.options}


def has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether one of torch's optimizers has taken a step. Adagrad has state before its first one."""
    return any(float(state.get("step", 1)) > 0 for state in optimizer.state.values() if state)


def adopt_groups(optimizer: torch.optim.Optimizer) -> None:
    """Let groups that somebody has put in place of ours be groups of ours.

    Lightning's ``BaseFinetuning`` sets ``param_groups`` when a run is resumed, to groups as the checkpoint has them. If
    the checkpoint was written with one of torch's optimizers, they are in that optimizer's words.
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
            else:  # ours already, of a version that had fewer options
                missing = {name: optimizer.defaults[name] for name in options - group.keys()}
                type(optimizer).add_param_group(optimizer, {**missing, **group})
    except BaseException:
        optimizer.param_groups = groups
        raise


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
    """Let the use of the old optimizer be an error: whoever still has it would train, or unfreeze, with it unseen."""
    names = type(old).__name__, type(new).__name__

    def refuse(what: str) -> Any:
        def refused(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
            raise RuntimeError(
                f"this {names[0]} was replaced by {names[1]} after configure_optimizers: {what}. Use "
                "self.optimizers(), which gives the new one"
            )

        return types.MethodType(refused, old)

    old.step = refuse("a step of it would train without the sketched optimizer")  # type: ignore[method-assign]
    old.add_param_group = refuse("parameters that are added to it would not be trained")  # type: ignore[method-assign]
    old.load_state_dict = refuse("a state that is loaded into it would not be used")  # type: ignore[method-assign]


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

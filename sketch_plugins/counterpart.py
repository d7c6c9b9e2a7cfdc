"""A sketched optimizer with the hyperparameters and groups of one of torch's, to take its place."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sketch_plugins import registry
from sketch_plugins.optim import SketchOptimizer
from sketch_plugins.optim.hyperparameters import carried_over


@dataclass(frozen=True)
class Wording:
    """How messages call what the user wrote; the defaults are those of a caller in Python.

    Attributes:
        options: where the options of the new optimizer are given.
        owner: who builds torch's optimizer.
        instead: what to do about an optimizer without counterpart.
        set_option: a pattern for what the user writes to set an option, with ``{key}`` and ``{value}``.
    """

    options: str = "options"
    owner: str = "the program"
    instead: str = "Build one of these, or the sketched optimizer itself"
    set_option: str = "options={{{key!r}: {value}}}"

    def how(self, key: str, value: Any) -> str:
        """What the user writes to set an option."""
        return self.set_option.format(key=key, value=value)


PLAIN = Wording()

#: What is replaced. Subclasses are not: they may do something else.
REPLACED: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.Adagrad,
)


def split_options(text: str | None) -> dict[str, str]:
    """``"compression=0.1,seed=1"`` as a dictionary.

    Raises:
        ValueError: a part is not of the form key=value, or a key is given twice.
    """
    given: dict[str, str] = {}
    for part in text.split(",") if text else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            raise ValueError(f"{part!r} is not of the form key=value")
        if key in given:
            raise ValueError(f"{key!r} is given twice")
        given[key] = value
    return given


def check_options(name: str, options: Mapping[str, Any], words: Wording = PLAIN) -> dict[str, Any]:
    """Options for every parameter group, typed; values may be text.

    Raises:
        ValueError: no such optimizer; an unknown option, or one with a value that is not allowed; ``lr``, which belongs
            to who builds torch's optimizer, because its schedule starts from it.
    """
    given = registry.parse_options(name, options)
    if "lr" in given:
        raise ValueError(
            f"{words.options} sets lr={given['lr']!r}, but the learning rate is set by {words.owner}, where "
            f"its schedule starts. Set it in {words.owner}"
        )
    try:
        registry.get(name).cls([torch.empty(0)], **given)  # the constructor knows which values go together
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer={name!r} with {words.options}={dict(options)!r}: {error}") from error
    return given


def counterpart(
    optimizer: torch.optim.Optimizer, name: str, options: Mapping[str, Any], words: Wording = PLAIN
) -> SketchOptimizer:
    """The optimizer ``name`` for the parameter groups of one of torch's, with their hyperparameters.

    What both have in common is carried over, group by group and to the defaults, from which groups that are added later
    take what they do not say: ``lr``, ``maximize``, ``weight_decay``; of Adam and AdamW ``betas`` and ``eps`` (not to
    ``sm3``, which has an epsilon and decay rates of its own); of SGD ``momentum`` and ``nesterov``; of Adagrad
    everything, to ``cs_adagrad``. ``sm3`` takes the place of Adagrad with ``preset="paper"``, whose second moments are
    sums as well. Keys that schedulers keep in the groups stay. Nothing that was set is dropped: what the new optimizer
    cannot do is an error, unless ``options`` say what to do instead.

    Args:
        optimizer: of type Adam, AdamW, SGD or Adagrad, without state.
        name: of the registry.
        options: for every group; they win over the hyperparameters.
        words: of error messages.

    Raises:
        ValueError: another type of optimizer; a hyperparameter that has no meaning for the new one.
    """
    carry = _Carrying(optimizer, name, options, words)
    made = carry.cls(carry.groups(optimizer), **carry.settings())
    carry.follow(made)
    return made


def become(optimizer: Any, name: str, options: Mapping[str, Any], words: Wording = PLAIN) -> None:
    """Turn one of torch's optimizers that has just been built into its counterpart, the same object.

    References to the object then refer to the counterpart: constructors cannot return another object.

    Args:
        optimizer: see `counterpart`.
        name: see `counterpart`.
        options: see `counterpart`.
        words: of error messages.

    Raises:
        ValueError: see `counterpart`. The object is then of no use.
    """
    carry = _Carrying(optimizer, name, options, words)
    groups, settings = carry.groups(optimizer), carry.settings()
    optimizer.__dict__.clear()
    optimizer.__class__ = carry.cls
    carry.cls.__init__(optimizer, groups, **settings)
    carry.follow(optimizer)


def without_counterpart(cls: type, words: Wording = PLAIN) -> str:
    """The message for an optimizer that has none."""
    return (
        f"{cls.__module__}.{cls.__qualname__} has no sketched counterpart; only "
        f"{', '.join(cls.__name__ for cls in REPLACED)} can be replaced. {words.instead}"
    )


class _Carrying:
    """From parameter groups in the words of a torch optimizer to groups of ours: the first ones, and later ones."""

    def __init__(self, optimizer: torch.optim.Optimizer, name: str, options: Mapping[str, Any], words: Wording) -> None:
        if type(optimizer) not in REPLACED:
            raise ValueError(without_counterpart(type(optimizer), words))
        self.cls, self.name, self.options, self.words = registry.get(name).cls, name, options, words
        self.kind, self.said = type(optimizer).__name__, dict(optimizer.defaults)
        if self.kind == "Adagrad" and name == "sm3":  # sums, as Adagrad's, and a rate that is meant for them
            self.options = {"preset": "paper", **options}

    def groups(self, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        """All of the optimizer's groups, for the constructor."""
        return [self.group(group) for group in optimizer.param_groups]

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the constructor, which groups that are added later take what they do not say from."""
        return {**self._own(self.said), **self.options}

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
        over is the same error as at the start.
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
        own = carried_over(self.cls, self.name, self.kind, group, said=said, given=self.options, how=self.words.how)
        return {key: value for key, value in own.items() if key not in self.options}


def describe(old: type[torch.optim.Optimizer], new: SketchOptimizer, options: Mapping[str, Any]) -> str:
    """What was replaced by what, for the log."""
    rates = sorted({float(group["lr"]) for group in new.param_groups})
    given = "".join(f", {key}={value!r}" for key, value in options.items())
    return f"{old.__name__} by {type(new).__name__}(lr={', '.join(f'{rate:g}' for rate in rates)}{given})"

"""Replaces one of torch's optimizers by a sketched optimizer with the same hyperparameters and parameter groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sketch_plugins import registry
from sketch_plugins.optim import SketchOptimizer
from sketch_plugins.optim.hyperparameters import carried_over


@dataclass(frozen=True)
class Wording:
    """The words that error messages use for what the user wrote. The defaults suit a caller in Python.

    Attributes:
        options: where the options of the new optimizer are given.
        owner: who builds torch's optimizer.
        instead: what the user can do about an optimizer that has no counterpart.
        set_option: a pattern of what the user writes to set an option, with ``{key}`` and ``{value}``.
    """

    options: str = "options"
    owner: str = "the program"
    instead: str = "Build one of these, or the sketched optimizer itself"
    set_option: str = "options={{{key!r}: {value}}}"

    def how(self, key: str, value: Any) -> str:
        """What the user writes to set an option."""
        return self.set_option.format(key=key, value=value)


PLAIN = Wording()

#: The classes that are replaced. Their subclasses are not, because they may do something else.
REPLACED: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.Adagrad,
)


def check_options(name: str, options: Mapping[str, Any], words: Wording = PLAIN) -> dict[str, Any]:
    """Check options that are meant for every parameter group, and return them typed. Their values may be text.

    Raises:
        ValueError: the optimizer or an option does not exist, a value is not allowed, or ``lr`` is given. The learning
            rate belongs to whoever builds torch's optimizer, because its schedule starts from it.
    """
    given = registry.parse_options(name, options)
    if "lr" in given:
        raise ValueError(
            f"{words.options} sets lr={given['lr']!r}, but the learning rate is set by {words.owner}, where "
            f"its schedule starts. Set it in {words.owner}"
        )
    try:
        registry.get(name).cls([torch.empty(0)], **given)  # the constructor checks which values go together
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer={name!r} with {words.options}={dict(options)!r}: {error}") from error
    return given


def counterpart(
    optimizer: torch.optim.Optimizer, name: str, options: Mapping[str, Any], words: Wording = PLAIN
) -> SketchOptimizer:
    """A new optimizer ``name`` with the parameter groups and hyperparameters of one of torch's optimizers.

    The hyperparameters that both optimizers have are carried over for each group, and for the defaults of groups that
    are added later: ``lr``, ``maximize`` and ``weight_decay``; from Adam and AdamW ``betas`` and ``eps`` (not to
    ``sm3``, which has an epsilon and decay rates of its own); from SGD ``momentum`` and ``nesterov``; from Adagrad
    everything, to ``cs_adagrad``. If ``sm3`` replaces Adagrad, it has ``preset="paper"``, whose second moments are
    sums, too. Keys that schedulers keep in the groups stay. No setting is dropped: a hyperparameter that the new
    optimizer does not support is an error, unless ``options`` say what to do instead.

    Args:
        optimizer: an optimizer of type Adam, AdamW, SGD or Adagrad, without state.
        name: name of the new optimizer in the registry.
        options: options for every group; they override the hyperparameters.
        words: the words of error messages.

    Raises:
        ValueError: the optimizer has another type, or a hyperparameter has no meaning for the new optimizer.
    """
    carry = _Carrying(optimizer, name, options, words)
    made = carry.cls(carry.groups(optimizer), **carry.settings())
    made._arriving = carry
    return made


def become(optimizer: Any, name: str, options: Mapping[str, Any], words: Wording = PLAIN) -> None:
    """Turn one of torch's optimizers that has just been built into its counterpart. It stays the same object.

    A constructor cannot return another object, so the object itself changes, and all references to it stay valid. The
    groups are those of a program that does not know our options. A key in them that torch's optimizer does not read is
    the program's own, so it is an error if it has the name of an option: we would read it as that option, too.

    Args:
        optimizer: see `counterpart`.
        name: see `counterpart`.
        options: see `counterpart`.
        words: the words of error messages.

    Raises:
        ValueError: see `counterpart`; or a group has a key of its own with the name of an option. The object cannot be
            used afterwards.
    """
    carry = _Carrying(optimizer, name, options, words, group_options=False)
    groups, settings = carry.groups(optimizer), carry.settings()
    optimizer.__dict__.clear()
    optimizer.__class__ = carry.cls
    carry.cls.__init__(optimizer, groups, **settings)
    optimizer._arriving = carry


def without_counterpart(cls: type, words: Wording = PLAIN) -> str:
    """The error message for an optimizer that has no counterpart."""
    return (
        f"{cls.__module__}.{cls.__qualname__} has no sketched counterpart; only "
        f"{', '.join(cls.__name__ for cls in REPLACED)} can be replaced. {words.instead}"
    )


class _Carrying:
    """Translates parameter groups of a torch optimizer to ours: the first ones and those that are added later.

    Later groups use the option names of the replaced optimizer. For example, the momentum of a group of SGD becomes
    ``betas[0]`` if the new optimizer has betas. Anything that cannot be carried over is the same error as at the start.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        name: str,
        options: Mapping[str, Any],
        words: Wording,
        group_options: bool = True,
    ) -> None:
        if type(optimizer) not in REPLACED:
            raise ValueError(without_counterpart(type(optimizer), words))
        self.cls, self.name, self.options, self.words = registry.get(name).cls, name, options, words
        self.kind, self.said, self.group_options = type(optimizer).__name__, dict(optimizer.defaults), group_options
        if self.kind == "Adagrad" and name == "sm3":  # this preset has sums, as Adagrad does, and takes its rates
            self.options = {"preset": "paper", **options}

    def __call__(self, group: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
        """What becomes of a group that is added later, under this number."""
        return [self.group({**self.said, **group}, number)]

    def groups(self, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        """All groups of the optimizer, translated for the constructor."""
        return [self.group(group, number) for number, group in enumerate(optimizer.param_groups)]

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of the constructor. They are the defaults of groups that are added later."""
        return {**self._own(self.said), **self.options}

    def group(self, group: Mapping[str, Any], number: int) -> dict[str, Any]:
        """One of the optimizer's groups, translated. It has all hyperparameters."""
        names = group.get("param_names")
        members = list(zip(names, group["params"], strict=True)) if names else group["params"]
        if not isinstance(members, torch.Tensor):
            members = list(members)
        extra = {
            key: value for key, value in group.items() if key not in self.said and key not in ("params", "param_names")
        }
        if not self.group_options:
            self._refuse_options(extra, number)
        return {**self._own(group), **extra, "params": members}  # options under our own names come last and win

    def _refuse_options(self, extra: Mapping[str, Any], number: int) -> None:
        options = {"preset", *self.cls.OPTIONS, *self.cls.FIXED}
        for key, value in extra.items():
            if key in options:
                raise ValueError(
                    f"parameter group {number} has the key {key!r} (its value is {value!r}), which is not one of "
                    f"{self.kind}'s and is the name of an option of {self.name}: {self.name} would read a value that "
                    f"{self.words.owner} means for something else. Rename or remove the key in {self.words.owner}. If "
                    f"the option is meant, set it for all groups: {self.words.how(key, '...')}"
                )

    def _own(self, group: Mapping[str, Any]) -> dict[str, Any]:
        # If a scheduler cycles the momentum, it has already changed the group's, and it will change the new one, too.
        said = self.said if "max_momentum" in group else group
        own = carried_over(self.cls, self.name, self.kind, group, said=said, given=self.options, how=self.words.how)
        return {key: value for key, value in own.items() if key not in self.options}


def describe(old: type[torch.optim.Optimizer], new: SketchOptimizer, options: Mapping[str, Any]) -> str:
    """What was replaced and by what, for the log."""
    rates = sorted({float(group["lr"]) for group in new.param_groups})
    given = "".join(f", {key}={value!r}" for key, value in options.items())
    return f"{old.__name__} by {type(new).__name__}(lr={', '.join(f'{rate:g}' for rate in rates)}{given})"

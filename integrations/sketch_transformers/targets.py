"""``optim_target_modules``: which parameters are compressed. The others get the same optimizer without compression."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from sketch_transformers import _private

#: Options of a parameter group that is kept exact.
EXACT: dict[str, Any] = {"preset": "exact"}


def select_parameters(model: torch.nn.Module, target_modules: str | list[str]) -> set[torch.Tensor]:
    """The parameters of the modules that ``target_modules`` match, and of everything inside those modules.

    The rules are those of transformers: a string is a regular expression for a module's whole name, or "all-linear"; an
    entry of a list is a part of the name or a regular expression for all of it. Here "all-linear" includes ``Conv1D``,
    GPT-2's linear layer. A parameter that several modules share (tied embeddings) is selected if one of them is.

    Raises:
        ValueError: the string or an entry of the list is no regular expression, or matches nothing that is trained.
    """
    if isinstance(target_modules, str):
        entries: list[str | list[str]] = [target_modules]
    elif isinstance(target_modules, (list, tuple)) and all(isinstance(entry, str) for entry in target_modules):
        entries = [[entry] for entry in target_modules]  # one by one, so that each has to match something
    else:
        raise ValueError(
            f"optim_target_modules={target_modules!r}: expected a regular expression, 'all-linear' or a list of strings"
        )
    selected: set[torch.Tensor] = set()
    for entry in entries:
        found = {p for module in _matching(model, entry) for p in module.parameters() if p.requires_grad}
        if not found:
            raise ValueError(
                f"optim_target_modules={target_modules!r}: {entry!r} does not match a module with trainable "
                f"parameters; the modules are {_names(model)}"
            )
        selected |= found
    if not selected:
        raise ValueError("optim_target_modules is empty, so it selects nothing. Use None to compress every parameter.")
    return selected


def only_on(cls: type[torch.optim.Optimizer], selected: set[torch.Tensor]) -> type[torch.optim.Optimizer]:
    """A stand-in for ``cls`` that makes an instance of ``cls`` which compresses only the ``selected`` parameters.

    Every group becomes two, with the group's own options (weight decay, learning rate). The groups may come from
    Trainer, from a subclass of it, or from a user who calls the class. GaLore returns ``{"params": groups}`` instead,
    which loses these groups.
    """

    def new(_: type, params: Any, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        made: Any = cls([part for group in groups for part in _split(group, selected)], *args, **kwargs)
        made._arriving = partial(_later, selected)
        return made

    # Python does not run `__init__` again on the result of `__new__`, because it is no instance of the stand-in.
    return type(cls.__name__, (cls,), {"__new__": new, "__module__": cls.__module__, "__doc__": cls.__doc__})


def _later(selected: set[torch.Tensor], group: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """The parts of a group that is added later: it is split like the first ones."""
    return list(_split(group, selected))


def _split(group: dict[str, Any], selected: set[torch.Tensor]) -> Iterator[dict[str, Any]]:
    """The compressed and the exact part of a group, if they are not empty."""
    members = group["params"]
    members = [members] if isinstance(members, torch.Tensor) else list(members)
    compressed = [member for member in members if _tensor(member) in selected]
    exact = [member for member in members if _tensor(member) not in selected]
    if compressed:
        yield {**group, "params": compressed}
    if exact:
        yield {**group, **EXACT, "params": exact}


def _tensor(member: Any) -> torch.Tensor:
    return member[1] if isinstance(member, tuple) else member  # torch also accepts named_parameters()


def _matching(model: torch.nn.Module, entry: str | list[str]) -> list[torch.nn.Module]:
    if isinstance(entry, str) and entry.replace("_", "-") == "all-linear":
        linear = (torch.nn.Linear, _private.conv1d_class())
        return [module for module in model.modules() if isinstance(module, linear)]
    try:
        return [module for name, module in model.named_modules() if _private.matches_target(entry, name)]
    except re.error as error:
        raise ValueError(f"optim_target_modules: {entry!r} is not a regular expression ({error})") from error


def _names(model: torch.nn.Module, limit: int = 40) -> str:
    names = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters(False))]
    more = f", ... ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more

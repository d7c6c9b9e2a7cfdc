"""Names of parameters: those that a parameter group has, or those that the model has for them.

torch keeps names in a group (``param_names``) if an optimizer is given ``named_parameters()``, and then refuses groups
without names. Frameworks give an optimizer parameters without names, and add groups later. The names that their
integration finds in the model therefore have a key of their own. This key demands nothing of other groups, and it
belongs to the group, so checkpoints contain it, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

#: Key of a parameter group for names that an integration found in the model.
NAMES = "sketch_plugins_names"


def names_of(group: Mapping[str, Any]) -> Sequence[str]:
    """The names of a group's parameters; empty unless each of its present parameters has one."""
    for key in ("param_names", NAMES):
        names = group.get(key)
        if isinstance(names, (list, tuple)) and len(names) == len(group["params"]):
            return names
    return ()


def names_in(model: nn.Module) -> dict[int, str]:
    """The name in the model for the identity of each parameter."""
    return {id(p): name for name, p in model.named_parameters()}


def name_parameters(optimizer: Any, model: nn.Module) -> None:
    """Give the parameters of one of our optimizers the names of the model, for messages, reports and checkpoints.

    Groups that have names (`torch.optim.Optimizer` was given ``named_parameters()``) keep them. A parameter that does
    not belong to the model keeps the name ``group.index``.
    """
    known = names_in(model)
    for number, group in enumerate(optimizer.param_groups):
        if not group.get("param_names") and any(id(p) in known for p in group["params"]):
            group[NAMES] = [known.get(id(p), f"{number}.{index}") for index, p in enumerate(group["params"])]
    optimizer._parts.rename(known)

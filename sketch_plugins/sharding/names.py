"""Names of parameters, in a parameter group's own words or in those of the model that they come from.

torch keeps names in a group (``param_names``) where an optimizer is given ``named_parameters()``, and then refuses
groups without. Frameworks give parameters alone, and add groups later: names that their integration finds in the model
have a key of their own, which binds nobody and goes where the group goes, into checkpoints too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

#: The key.
NAMES = "sketch_plugins_names"


def names_of(group: Mapping[str, Any]) -> Sequence[str]:
    """The names of a group's parameters; empty where it has none, or none for each of its present parameters."""
    for key in ("param_names", NAMES):
        names = group.get(key)
        if isinstance(names, (list, tuple)) and len(names) == len(group["params"]):
            return names
    return ()


def names_in(model: nn.Module) -> dict[int, str]:
    """Identity of a parameter -> its name in the model."""
    return {id(p): name for name, p in model.named_parameters()}


def name_parameters(optimizer: Any, model: nn.Module) -> None:
    """Call the parameters of one of our optimizers by their names in the model, in messages, reports and checkpoints.

    Groups that have names (`torch.optim.Optimizer` was given ``named_parameters()``) keep them. A parameter that is not
    the model's is called ``group.index``, as ever.
    """
    known = names_in(model)
    for number, group in enumerate(optimizer.param_groups):
        if not group.get("param_names") and any(id(p) in known for p in group["params"]):
            group[NAMES] = [known.get(id(p), f"{number}.{index}") for index, p in enumerate(group["params"])]
    optimizer._parts.rename(known)

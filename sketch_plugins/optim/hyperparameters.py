"""Translates hyperparameters of torch's own optimizers to our options, group by group. No setting is dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sketch_plugins.optim.base import SketchOptimizer


def carried_over(
    cls: type[SketchOptimizer],
    name: str,
    kind: str,
    group: Mapping[str, Any],
    *,
    said: Mapping[str, Any] | None = None,
    given: Mapping[str, Any] | None = None,
    how: Callable[[str, Any], str] = lambda key, value: f"optimizer_kwargs={{{key!r}: {value}}}",
) -> dict[str, Any]:
    """Options for ``cls`` with the meaning of a parameter group of torch's optimizer.

    Args:
        cls: the class of the new optimizer.
        name: its name in messages.
        kind: ``"Adam"``, ``"AdamW"``, ``"SGD"`` or ``"Adagrad"``.
        group: a parameter group of that optimizer, or its ``defaults``. It has all hyperparameters.
        said: tells whether a hyperparameter that ``cls`` lacks was set. None: ``group`` tells. (A scheduler may have
            changed it in the group.)
        given: options that the user sets for ``cls``. They decide what to do about a hyperparameter that has no
            meaning for ``cls``.
        how: returns what the user writes to set an option, from its name and its value.

    Raises:
        ValueError: a hyperparameter was set that has no meaning for ``cls``.
    """
    given, said = given or {}, group if said is None else said
    own = {"lr": group["lr"], "maximize": group["maximize"]}

    def leave(key: str, default: Any, why: str = "") -> None:
        if said.get(key, default) != default and key not in given:
            instead = f"set it with {how(key, '...')} or " if key in cls.OPTIONS else ""
            raise ValueError(
                f"{kind}({key}={said[key]!r}) cannot be transferred to {name}{why}: {instead}keep it at {default!r}"
            )

    leave("differentiable", False)
    decoupled = False
    if kind in ("Adam", "AdamW"):
        decoupled = kind == "AdamW" or bool(group.get("decoupled_weight_decay", False))
        if cls.ADAM_SETTINGS:
            own |= {"betas": group["betas"], "eps": group["eps"]}
        else:
            leave("betas", (0.9, 0.999), ", whose betas are the decay rates of other averages")
            leave("eps", 1e-8, ", whose eps is another one, within the root")
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
    return own | _weight_decay(cls, name, kind, group["weight_decay"], decoupled, given, how)


def _weight_decay(
    cls: type[SketchOptimizer],
    name: str,
    kind: str,
    decay: Any,
    decoupled: bool,
    given: Mapping[str, Any],
    how: Callable[[str, Any], str],
) -> dict[str, Any]:
    if "decoupled_weight_decay" in cls.OPTIONS:
        # This is also set if the decay is 0, because a group that is added later may have AdamW's kind of decay.
        return {"weight_decay": decay, **({"decoupled_weight_decay": True} if decoupled else {})}
    if decay and not decoupled and "weight_decay" not in given:
        raise ValueError(
            f"{kind}(weight_decay={decay!r}) adds the weight decay to the gradient, but {name} decouples it, "
            f"as AdamW does. Build AdamW instead, or set {how('weight_decay', repr(decay))} to use decoupled "
            "weight decay"
        )
    return {"weight_decay": decay}

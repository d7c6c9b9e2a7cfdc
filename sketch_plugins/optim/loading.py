"""Loads a state dict completely or not at all, and keeps the dtype of every tensor."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch


def check_containers(state_dict: Any, what: str = "the state dict") -> None:
    """Raise ValueError unless a state dict has a mapping "state" and a list "param_groups" of groups with "params".

    ``what`` is its name in the message.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"{what} is a {type(state_dict).__name__}; expected a mapping with 'state' and 'param_groups'")
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"{what} has no {key!r}; it has {', '.join(map(str, state_dict)) or 'nothing'}")
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, Mapping):
        raise ValueError(f"'state' of {what} is a {type(state).__name__}; expected a mapping")
    if not isinstance(groups, list | tuple):
        raise ValueError(f"'param_groups' of {what} is a {type(groups).__name__}; expected a list")
    for number, group in enumerate(groups):
        if not isinstance(group, Mapping):
            raise ValueError(f"group {number} of {what} is a {type(group).__name__}; expected a mapping")
        if not isinstance(group.get("params"), list | tuple):
            found = f"params={group['params']!r}" if "params" in group else "no 'params'"
            raise ValueError(f"group {number} of {what} has {found}; expected a list of the keys in 'state'")
        for key in group["params"]:
            if not isinstance(key, Hashable):
                raise ValueError(
                    f"group {number} of {what} has the key {key!r} in 'params', which cannot be a key of 'state'"
                )


def load(
    optimizer: torch.optim.Optimizer,
    state_dict: dict[str, Any],
    prepare: Callable[[dict[str, Any]], tuple[dict[str, Any], dict[Any, Any]]],
) -> None:
    """Load as torch's ``load_state_dict`` does, but with the state that ``prepare`` returns, neither copied nor cast.

    Args:
        optimizer: the optimizer that loads.
        state_dict: the state dict as the caller, and hooks of other code, give it.
        prepare: checks a state dict and changes nothing. It returns the state dict whose groups torch shall load, and
            the state (keys are parameters, or keys of other code's entries). If it raises, the optimizer has not
            changed.

    Raises:
        ValueError: the state dict is no mapping, or ``prepare`` raises it.
    """
    if not isinstance(state_dict, Mapping):
        check_containers(state_dict)
    made: dict[Any, Any] = {}

    def look(_: Any, incoming: dict[str, Any]) -> dict[str, Any]:
        incoming, state = prepare(incoming)
        made.update(state)
        return {**incoming, "state": {}}

    def restore(_: Any) -> None:
        optimizer.state.update(made)

    # This hook runs last before loading, and first after it, so hooks of other code see the whole state both times.
    before = optimizer.register_load_state_dict_pre_hook(look)
    after = optimizer.register_load_state_dict_post_hook(restore, prepend=True)
    try:
        # A step outside of torch.inference_mode could not change tensors that were made within it.
        with torch.inference_mode(False), torch.no_grad():
            torch.optim.Optimizer.load_state_dict(optimizer, state_dict)
    finally:
        before.remove()
        after.remove()

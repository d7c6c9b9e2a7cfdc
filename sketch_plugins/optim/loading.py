"""Loads a state dict completely or not at all, and keeps the dtype of every tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


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
    """
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

"""Loading a state dict as a whole or not at all, with every tensor in its own dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def load(
    optimizer: torch.optim.Optimizer,
    state_dict: dict[str, Any],
    prepare: Callable[[dict[str, Any]], tuple[dict[str, Any], dict[Any, Any]]],
) -> None:
    """As torch's own ``load_state_dict``, but the state is what ``prepare`` makes of it: neither copied again nor cast.

    Args:
        optimizer: what loads it.
        state_dict: as the caller, and hooks of others, give it.
        prepare: looks at a state dict, changes nothing, and returns it as torch is to load its groups, and the state
            (parameter, or key of another's entry -> value). What it raises leaves the optimizer as it was.
    """
    made: dict[Any, Any] = {}

    def look(_: Any, incoming: dict[str, Any]) -> dict[str, Any]:
        incoming, state = prepare(incoming)
        made.update(state)
        return {**incoming, "state": {}}

    def restore(_: Any) -> None:
        optimizer.state.update(made)

    # The last to look before, the first to act after: hooks of others see the whole state on both sides.
    before = optimizer.register_load_state_dict_pre_hook(look)
    after = optimizer.register_load_state_dict_post_hook(restore, prepend=True)
    try:
        # Tensors made in inference mode could not be changed by a step outside of it.
        with torch.inference_mode(False), torch.no_grad():
            torch.optim.Optimizer.load_state_dict(optimizer, state_dict)
    finally:
        before.remove()
        after.remove()

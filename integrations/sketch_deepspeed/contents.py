"""The contents of the optimizers in a ZeRO checkpoint, for ``sketch-plugins report``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sketch_deepspeed.reading import MODEL, find, load, read
from sketch_plugins.checkpoints.saved import CannotReshard, SavedOptimizer
from sketch_plugins.sharding.names import names_of
from sketch_plugins.sharding.pieces import Fragment, Piece, is_key, pieces
from sketch_plugins.sharding.state_names import nested


def contents(
    checkpoint: Path, trust: bool
) -> tuple[Sequence[Mapping[str, Any]], list[tuple[str | None, int, Mapping[str, Any], int | None]]]:
    """Parameter groups; and the name, group, state and elements of each piece on each rank.

    Raises:
        ValueError: the checkpoint cannot be read.
    """
    root, tag = find(checkpoint)
    directory = root / tag
    if not any(directory.glob("*_optim_states.pt")) and (directory / MODEL).is_file():
        return _without_zero(directory, trust)
    old = read(directory, trust)
    groups = old.base(0)["param_groups"]
    try:
        cut: Callable[..., Sequence[Piece]] = SavedOptimizer(groups).pieces
    except CannotReshard:  # another optimizer, which sees a vector; its pieces are counted

        def cut(fragments: Sequence[Fragment], group: int) -> Sequence[Piece]:
            return list(pieces(fragments))

    found: list[tuple[str | None, int, Mapping[str, Any], int | None]] = []
    for rank in range(old.world):
        for number, buffer in enumerate(old.buffers):
            state = nested(old.base(rank)["state"].get(number) or {})
            held = cut(buffer.fragments(rank), buffer.group)
            ours = {key: inner for key, inner in state.items() if is_key(key) and isinstance(inner, Mapping)}
            if ours and len(ours) == len(held):
                for piece, inner in zip(held, ours.values(), strict=True):
                    name = f"{buffer.parameters[piece.index].name} (rank {rank})"
                    found.append((name, buffer.group, inner, piece.numel))
            elif state:  # another optimizer, with a vector
                name = f"partition {number} (rank {rank}) of {len(held)} pieces"
                found.append((name, buffer.group, state, sum(piece.numel for piece in held)))
    return groups, found


def _without_zero(
    directory: Path, trust: bool
) -> tuple[Sequence[Mapping[str, Any]], list[tuple[str | None, int, Mapping[str, Any], int | None]]]:
    saved: Any = load(directory / MODEL, trust).get("optimizer")
    while isinstance(saved, Mapping) and "param_groups" not in saved:  # a wrapper for float16
        saved = saved.get("optimizer_state_dict")
    if not isinstance(saved, Mapping):
        raise ValueError(f"{directory} holds no optimizer state: it was saved without")
    found: list[tuple[str | None, int, Mapping[str, Any], int | None]] = []
    for number, group in enumerate(saved["param_groups"]):
        names = names_of(group)
        for index, key in enumerate(group["params"]):
            state = saved["state"].get(key)
            if state:
                found.append((names[index] if names else f"{number}.{index}", number, state, None))
    return saved["param_groups"], found

"""The mark in a parameter group: which optimizer wrote the state of its parameters, and with which options.

It is a key of the group, so it goes wherever the group goes: into copies, pickles, state dicts, and whatever a
framework puts in place of the optimizer's own list of groups. No other code uses its name. It is a string, so copies do
not share it, and code that walks through state dicts does not take it apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sketch_plugins.optim.options import Option

#: The key of the mark.
MARK = "sketch_plugins"


def mark(optimizer: str, options: Mapping[str, Option], group: Mapping[str, Any]) -> str:
    """The mark of a group whose parameters have no state, or state with the group's present options."""
    values = {name: option.validate(group[name]) for name, option in structural(options, group).items()}
    found = {"optimizer": optimizer, "options": values}
    if isinstance(group.get("preset"), str):
        found["preset"] = group["preset"]
    return json.dumps(found, sort_keys=True)


def structural(options: Mapping[str, Option], group: Mapping[str, Any]) -> dict[str, Option]:
    """The options of a group that decide which state exists."""
    return {name: option for name, option in options.items() if option.structural and name in group}


def written_by(group: Mapping[str, Any]) -> str | None:
    """The class of ours that wrote a group of a state dict, or None if the group is not ours.

    Raises:
        ValueError: the mark is damaged.
    """
    if MARK in group:
        return str(_read(group)["optimizer"])
    # Groups of versions without the mark have a key "optimizer", and always "preset" with it.
    old = group.get("optimizer")
    return old if isinstance(old, str) and "preset" in group else None


def written_with(group: Mapping[str, Any]) -> dict[str, Any]:
    """The structural options with which the state was written. Empty for groups that are older than the mark.

    Raises:
        ValueError: the mark is damaged.
    """
    return dict(_read(group)["options"]) if MARK in group else {}


def built_with(group: Mapping[str, Any]) -> str | None:
    """The preset with which a group was added, or None if it is not known.

    Raises:
        ValueError: the mark is damaged.
    """
    return _read(group).get("preset") if MARK in group else None


def modernize(group: dict[str, Any]) -> None:
    """Remove the key that older versions had in place of the mark."""
    if MARK not in group and written_by(group) is not None:
        del group["optimizer"]


def renew(optimizer: str, options: Mapping[str, Option], group: dict[str, Any]) -> None:
    """Mark a group as this optimizer's, with its present options."""
    group[MARK] = mark(optimizer, options, group)


def _read(group: Mapping[str, Any]) -> dict[str, Any]:
    try:
        found = json.loads(group[MARK])
        if isinstance(found["optimizer"], str) and isinstance(found["options"], dict):
            return dict(found)
    except (TypeError, ValueError, KeyError):
        pass
    raise ValueError(
        f"a parameter group has {MARK}={group[MARK]!r}, but sketched optimizers use this key to record "
        "which optimizer wrote the state. Use another name for your own key"
    )

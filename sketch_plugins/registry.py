"""The optimizers by name, as every framework's configuration uses them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sketch_plugins import spelling
from sketch_plugins.optim import SketchOptimizer
from sketch_plugins.optim.options import Option, unknown_option


@dataclass(frozen=True)
class Entry:
    """One optimizer of the registry."""

    name: str
    cls: type[SketchOptimizer]

    @property
    def options(self) -> dict[str, Option]:
        """The optimizer's options by name, including ``preset``."""
        preset = Option("preset", str, "named set of options (default 'default')", choices=tuple(self.cls.PRESETS))
        return {"preset": preset, **self.cls.OPTIONS}


def _entry(name: str, place: str) -> Entry:
    module, _, cls = place.partition(":")
    return Entry(name, getattr(importlib.import_module(module), cls))


_ENTRIES = {name: _entry(name, place) for name, place in spelling.CLASSES.items()}


def names() -> tuple[str, ...]:
    """Every registered name."""
    return tuple(_ENTRIES)


def get(name: str) -> Entry:
    """The entry of a name.

    Raises:
        ValueError: there is no such optimizer. The message lists the names and suggests the one that may be meant.
    """
    spelling.check_name(name)
    return _ENTRIES[name]


def parse_options(
    name: str, values: Mapping[str, Any], also: Mapping[str, Option] = MappingProxyType({})
) -> dict[str, Any]:
    """Typed keyword arguments for the optimizer ``name`` from text (or values): ``{"compression": "0.05"}``.

    Arguments of torch's optimizers that have no effect here (``foreach=false``, ``amsgrad=false``) are left out.

    Args:
        name: name of the optimizer.
        values: options by name, as text or as values.
        also: further options that the caller reads itself and has removed from ``values``. They are only listed in the
            error about a misspelt name.

    Raises:
        ValueError: an option does not exist, has the wrong type or a value that is not allowed (the message lists what
            is allowed), or two options contradict each other.
    """
    entry = get(name)
    options = entry.options
    parsed = {}
    for key, value in values.items():
        if key not in options and key in entry.cls.NO_EFFECT:  # an argument of torch's optimizer without effect here
            entry.cls.NO_EFFECT[key].accept(value, name)
            continue
        if key not in options:
            raise ValueError(unknown_option(name, key, {**options, **also}))
        parsed[key] = options[key].parse(value)
    if parsed.get("width") and "compression" in parsed:
        raise ValueError(
            f"width={parsed['width']} and compression={parsed['compression']} both set the number of buckets: "
            "use one of them"
        )
    betas, momentum = parsed.get("betas"), parsed.get("momentum")
    if betas is not None and momentum is not None and betas[0] != momentum:
        raise ValueError(f"betas={betas} and momentum={momentum} both set the momentum: use one of them")
    return parsed

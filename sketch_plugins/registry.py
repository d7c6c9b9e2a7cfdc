"""Names of the optimizers, as every framework's configuration uses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sketch_plugins.optim import SM3, CSAdagrad, CSAdam, CSMomentum, CSRMSprop, SketchOptimizer, Sketchy
from sketch_plugins.optim.options import Option, unknown_option


@dataclass(frozen=True)
class Entry:
    """One optimizer of the registry."""

    name: str
    cls: type[SketchOptimizer]

    @property
    def options(self) -> dict[str, Option]:
        """Its options by name, ``preset`` included."""
        preset = Option("preset", str, "named set of options (default 'default')", choices=tuple(self.cls.PRESETS))
        return {"preset": preset, **self.cls.OPTIONS}


_ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("cs_adam", CSAdam),
        Entry("cs_adagrad", CSAdagrad),
        Entry("cs_momentum", CSMomentum),
        Entry("cs_rmsprop", CSRMSprop),
        Entry("sm3", SM3),
        Entry("sketchy", Sketchy),
    )
}


def names() -> tuple[str, ...]:
    """Every registered name."""
    return tuple(_ENTRIES)


def get(name: str) -> Entry:
    """The entry of a name.

    Raises:
        ValueError: no such optimizer; lists the names.
    """
    if name not in _ENTRIES:
        raise ValueError(f"unknown optimizer {name!r}; known are {', '.join(_ENTRIES)}")
    return _ENTRIES[name]


def parse_options(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Typed keyword arguments for the optimizer ``name`` from text (or values): ``{"compression": "0.05"}``.

    Arguments of torch's optimizers that change nothing (``foreach=false``, ``amsgrad=false``) are left out.

    Raises:
        ValueError: an option that does not exist (lists those that do), of the wrong type, or with a value that is
            not allowed (says what is); options that contradict each other.
    """
    entry = get(name)
    options = entry.options
    parsed = {}
    for key, value in values.items():
        if key not in options and key in entry.cls.NO_EFFECT:  # an argument of torch's that changes nothing
            entry.cls.NO_EFFECT[key].accept(value, name)
            continue
        if key not in options:
            raise ValueError(unknown_option(name, key, options))
        parsed[key] = options[key].parse(value)
    if parsed.get("width") and "compression" in parsed:
        raise ValueError(
            f"width={parsed['width']} and compression={parsed['compression']} both set the buckets: give one"
        )
    betas, momentum = parsed.get("betas"), parsed.get("momentum")
    if betas is not None and momentum is not None and betas[0] != momentum:
        raise ValueError(f"betas={betas} and momentum={momentum} both set the momentum: give one")
    return parsed

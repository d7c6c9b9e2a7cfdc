"""The optimizers by name, as every framework's configuration uses them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from sketch_plugins.optim import SM3, CSAdagrad, CSAdam, CSLion, CSMomentum, CSRMSprop, SketchOptimizer, Sketchy
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


_ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("cs_adam", CSAdam),
        Entry("cs_adagrad", CSAdagrad),
        Entry("cs_momentum", CSMomentum),
        Entry("cs_rmsprop", CSRMSprop),
        # The name is not "lion", because DeepSpeed has an optimizer of that name.
        Entry("cs_lion", CSLion),
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
        ValueError: there is no such optimizer. The message lists the names and suggests the one that may be meant.
    """
    if name not in _ENTRIES:
        raise ValueError(f"unknown optimizer {name!r}.{did_you_mean(name)} The optimizers are {', '.join(_ENTRIES)}")
    return _ENTRIES[name]


def did_you_mean(name: str, names: Iterable[str] = tuple(_ENTRIES)) -> str:
    """`` Did you mean 'cs_adam'?`` if a name (of an optimizer or a class) is nearly one of ``names``, else ""."""
    written = {other.replace("_", ""): other for other in names}
    close = difflib.get_close_matches(str(name).lower().replace("_", ""), written, n=1, cutoff=0.7)
    return f" Did you mean {written[close[0]]!r}?" if close else ""


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

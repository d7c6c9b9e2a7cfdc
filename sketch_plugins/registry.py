"""Names of the optimizers, as every framework's configuration uses them."""

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
        # Not "lion": DeepSpeed has an optimizer of that name.
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
        ValueError: no such optimizer; lists the names, and says which one may be meant.
    """
    if name not in _ENTRIES:
        raise ValueError(f"unknown optimizer {name!r}.{did_you_mean(name)} The optimizers are {', '.join(_ENTRIES)}")
    return _ENTRIES[name]


def did_you_mean(name: str, names: Iterable[str] = tuple(_ENTRIES)) -> str:
    """`` Did you mean 'cs_adam'?`` of a name (or the name of a class) that is nearly one of ``names``, or nothing."""
    written = {other.replace("_", ""): other for other in names}
    close = difflib.get_close_matches(str(name).lower().replace("_", ""), written, n=1, cutoff=0.7)
    return f" Did you mean {written[close[0]]!r}?" if close else ""


def parse_options(
    name: str, values: Mapping[str, Any], also: Mapping[str, Option] = MappingProxyType({})
) -> dict[str, Any]:
    """Typed keyword arguments for the optimizer ``name`` from text (or values): ``{"compression": "0.05"}``.

    Arguments of torch's optimizers that change nothing (``foreach=false``, ``amsgrad=false``) are left out. ``also``:
    what else could have been given, for the message about a name that is misspelt; the caller has taken it out.

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

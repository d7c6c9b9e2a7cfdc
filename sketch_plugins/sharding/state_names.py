"""Names in a parameter's state: one flat mapping from names to tensors, as in torch's own optimizers.

A store of a moment keeps several tensors, and a flat partition of ZeRO holds pieces of several parameters. The names
contain these levels, from the outside to the inside, with dots between them::

    step    first_moment.codes    first_moment.scales    second_moment.table
    3[0,0:64x32].step    3[0,0:64x32].first_moment.codes

Code that walks over a state, to count its bytes, to move it or to save it, then finds every tensor. The code of a step
works on one part of a parameter at a time, and reads its state as a mapping of mappings (`nested`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sketch_plugins.sharding.pieces import is_key

# Entry in the state of a piece that says which piece it is.
PLACE = "place"
# The bits of a weight beyond its parameter's dtype (``weight_bits``).
CORRECTION = "weight_correction"
#: Kinds of state that are ours. Wrappers of optimizers keep other tensors beside them.
STATE_NAMES = frozenset({"step", "first_moment", "second_moment", "preconditioner", "rms", CORRECTION, PLACE})
#: Kinds that consist of several tensors.
_GROUPS = STATE_NAMES - {"step", PLACE}


def is_ours(name: object) -> bool:
    """Whether a name in the state of a parameter is ours."""
    if not isinstance(name, str):
        return False
    first, dot, _ = name.partition(".")
    return first in (_GROUPS if dot else STATE_NAMES) or is_key(first)


def kind_of(name: object) -> object:
    """The kind in `STATE_NAMES` that a name has, in any piece: ``"first_moment"`` for ``first_moment.codes``."""
    if not isinstance(name, str):
        return name
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if is_key(first) else first


def is_step(name: str) -> bool:
    """Whether it is the name of the step count of a part."""
    return kind_of(name) == "step"


def flattened(state: Mapping[Any, Any], key: str | None = None) -> dict[Any, Any]:
    """A state with one level: ``{"first_moment": {"codes": x}}`` is ``{"first_moment.codes": x}``.

    Args:
        state: state of a part of a parameter, or of a whole flat partition. Other code's entries stay unchanged.
        key: key of the piece that the state belongs to; None for the whole parameter.
    """
    return dict(_entries(state, "" if key is None else f"{key}."))


def _entries(state: Mapping[Any, Any], before: str) -> Iterator[tuple[Any, Any]]:
    for name, value in state.items():
        if isinstance(value, Mapping) and is_ours(name):
            yield from _entries(value, f"{before}{name}.")
        else:
            yield (f"{before}{name}" if before else name), value


def nested(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Undo `flattened`. Checkpoints of older versions have these levels already. The values are the same.

    Other code's entries stay unchanged.
    """
    out: dict[Any, Any] = {}
    for name, value in state.items():
        first, dot, rest = name.partition(".") if isinstance(name, str) else (name, "", "")
        if dot and is_ours(name) and isinstance(there := out.setdefault(first, {}), dict):
            there[rest] = value
        elif isinstance(value, Mapping) and is_ours(name):
            out.setdefault(name, {}).update(value)
        else:
            out[name] = value
    for name, value in out.items():
        if is_key(name) and isinstance(value, Mapping):
            out[name] = nested(value)
    return out

"""The contents of one optimizer of a checkpoint: its parameters, and the tensors of their state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite, prod
from typing import Any

from torch import Tensor

from sketch_plugins.optim.written import MARK, written_by
from sketch_plugins.sharding.names import NAMES, names_of
from sketch_plugins.sharding.state_names import CORRECTION, PLACE, is_ours, nested


class CannotReport(ValueError):
    """Something is wrong with the checkpoint."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a parameter's state: store and key, e.g. ``second_moment`` and ``table``; AdamW has no key."""

    store: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class Entry:
    """State of one parameter, or of the part of it that a rank holds.

    Attributes:
        name: name of the parameter, or ``group.index`` if the checkpoint has no names.
        group: number of its parameter group.
        params: number of elements; None if the checkpoint does not say.
        step: number of steps taken; None if they are not counted.
        tensors: the tensors of its state.
    """

    name: str
    group: int
    params: int | None
    step: int | None
    tensors: list[Stored]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.nbytes for t in self.tensors)


@dataclass(frozen=True)
class Contents:
    """One optimizer of a checkpoint.

    Attributes:
        optimizer: name of its class, if known.
        groups: options of its parameter groups.
        entries: state of the parameters.
        weights: number of elements of the model's weights in the checkpoint; None if it has no weights.
    """

    optimizer: str
    groups: list[dict[str, Any]]
    entries: list[Entry] = field(repr=False)
    weights: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all state."""
        return sum(e.nbytes for e in self.entries)

    @property
    def params(self) -> int | None:
        """Elements of the parameters with state, or of all weights if the state does not say; None if unknown."""
        known = [e.params for e in self.entries]
        return self.weights if None in known else sum(n for n in known if n is not None)

    @property
    def adamw_bytes(self) -> int | None:
        """Bytes that AdamW keeps for as many float32 parameters."""
        return None if self.params is None else 8 * self.params

    def by_store(self) -> dict[str, int]:
        """Bytes of each store."""
        out: dict[str, int] = {}
        for entry in self.entries:
            for tensor in entry.tensors:
                out[tensor.store] = out.get(tensor.store, 0) + tensor.nbytes
        return out

    def to_dict(self) -> dict[str, Any]:
        """The contents as plain values, for JSON."""
        return {
            "optimizer": self.optimizer,
            "state_bytes": self.nbytes,
            "params": self.params,
            "adamw_bytes": self.adamw_bytes,
            "by_store": self.by_store(),
            "groups": self.groups,
            "parameters": [{**asdict(e), "nbytes": e.nbytes} for e in self.entries],
        }


#: A parameter: (name or None, group, state, elements or None).
Named = tuple[str | None, int, Mapping[str, Any], int | None]


def named_states(saved: Mapping[str, Any], weights: Mapping[str, tuple[int, ...]]) -> Iterator[Named]:
    """The parameters with state in a state dict; their names and sizes also from ``weights``, name -> shape."""
    members = [(number, group, key) for number, group in enumerate(saved["param_groups"]) for key in group["params"]]
    guessed: list[str | None] = [None] * len(members)
    # The names of the model's weights, if each parameter can be the weight of its position.
    if len(weights) == len(members) and len(saved["param_groups"]) == 1:
        pairs = zip(members, weights.values(), strict=True)
        if all(_elements(saved["state"].get(m[2]) or {}) in (None, prod(shape)) for m, shape in pairs):
            guessed = list(weights)
    counts: dict[int, int] = {}
    for (number, group, key), guess in zip(members, guessed, strict=True):
        index = counts[number] = counts.get(number, -1) + 1
        names = names_of(group)
        name: str | None = names[index] if names else key if isinstance(key, str) else guess
        state = saved["state"].get(key)
        if isinstance(state, Mapping) and state:
            elements = _elements(state)
            if elements is None and name is not None and name in weights:
                elements = prod(weights[name])
            yield name or f"{number}.{index}", number, state, elements


def _elements(state: Mapping[str, Any]) -> int | None:
    """Number of elements of the parameter, if its state determines it."""
    state = nested(state)
    place = state.get(PLACE)
    if isinstance(place, Tensor) and place.ndim == 2:  # the shards of a DTensor, with a row for each
        return prod(place[0, 2:].tolist())
    sizes = [t.numel() for name in ("exp_avg", "exp_avg_sq", "momentum_buffer", "variance")
             if isinstance(t := state.get(name), Tensor) and t.ndim]  # fmt: skip
    for moment in ("first_moment", "second_moment", CORRECTION):
        kept = state.get(moment)
        if isinstance(kept, Mapping):
            sizes += [t.numel() for key, t in kept.items() if key in ("dense", "codes") and isinstance(t, Tensor)]
            axes = [t.numel() for key, t in kept.items() if str(key).startswith("axis_") and isinstance(t, Tensor)]
            sizes += [prod(axes)] if axes else []
    # Adafactor of torch, and of transformers.
    for names in (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col")):
        rows, columns = map(state.get, names)
        if isinstance(rows, Tensor) and isinstance(columns, Tensor) and columns.ndim:
            sizes.append(rows.numel() * columns.shape[-1])
    return max(sizes, default=None)


def contents_of(groups: Sequence[Mapping[str, Any]], named: Iterator[Named] | Sequence[Named]) -> Contents:
    """The contents of an optimizer.

    Args:
        groups: its parameter groups.
        named: its parameters with state.

    Raises:
        CannotReport: the mark of a group is damaged.
    """
    entries = []
    try:
        kinds = {kind for group in groups if (kind := written_by(group)) is not None}
    except ValueError as error:
        raise CannotReport(str(error)) from error
    for name, number, state, elements in named:
        if kinds:  # state that wrappers keep beside that of our optimizer is not counted
            state = {key: value for key, value in nested(state).items() if is_ours(key)}
        step = state.get("step")
        number_of_steps = step.item() if isinstance(step, Tensor) and step.numel() == 1 else step
        count = (
            int(number_of_steps) if isinstance(number_of_steps, (int, float)) and isfinite(number_of_steps) else None
        )
        entries.append(
            Entry(name or "", number, _elements(state) if elements is None else elements, count, list(_tensors(state)))
        )
    # Checkpoints from before the mark identify our optimizers by the key "optimizer".
    ours = {"params", "param_names", NAMES, MARK}
    hidden = [ours | ({"optimizer"} if kinds and MARK not in g else set()) for g in groups]
    options = [{k: v for k, v in g.items() if k not in out} for g, out in zip(groups, hidden, strict=True)]
    return Contents(", ".join(sorted(kinds)) or _guess(entries), options, entries)


def _guess(entries: Sequence[Entry]) -> str:
    stores = {t.store for e in entries for t in e.tensors}
    if {"exp_avg", "exp_avg_sq"} <= stores:
        return "Adam or AdamW"
    if {"row_var", "exp_avg_sq_row"} & stores:
        return "Adafactor"
    return "an optimizer whose name the checkpoint does not contain"


def _tensors(state: Mapping[str, Any], store: str = "") -> Iterator[Stored]:
    for key, value in state.items():
        if key in ("step", PLACE) and not store:
            continue
        if isinstance(value, Mapping):
            yield from _tensors(value, f"{store}.{key}" if store else str(key))
        elif isinstance(value, Tensor):
            size = value.numel() * value.element_size()
            dtype = str(value.dtype).removeprefix("torch.")
            yield Stored(store or str(key), str(key) if store else "", tuple(value.shape), dtype, size)

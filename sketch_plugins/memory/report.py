"""Bytes of an optimizer's state: for each store, parameter and group, compared with AdamW's."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sketch_plugins.sharding.dtensors import local_of
from sketch_plugins.sharding.names import names_in, names_of
from sketch_plugins.sharding.state_names import PLACE, is_ours, nested

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class ParameterState:
    """State of one parameter.

    Attributes:
        name: the parameter's name, or ``group.index`` if the optimizer was given no names.
        group: number of its parameter group.
        shape: shape of the parameter.
        params: number of elements; if the parameter is spread over ranks, those of this rank.
        stores: bytes by store, e.g. ``{"first_moment": 608256, "second_moment": 119808}``.
        adamw_bytes: bytes that `torch.optim.AdamW` keeps: two tensors of the parameter's shape and dtype.
        planned: the state does not exist yet (no step so far); the bytes are what it will take.
    """

    name: str
    group: int
    shape: tuple[int, ...]
    params: int
    stores: dict[str, int]
    adamw_bytes: int
    planned: bool

    def plus(self, other: ParameterState) -> ParameterState:
        """The sum of this and another part of the same parameter."""
        stores = {key: self.stores.get(key, 0) + other.stores.get(key, 0) for key in {**self.stores, **other.stores}}
        return replace(
            self,
            params=self.params + other.params,
            stores=stores,
            adamw_bytes=self.adamw_bytes + other.adamw_bytes,
            planned=self.planned or other.planned,
        )

    @property
    def state_bytes(self) -> int:
        """Bytes of all stores."""
        return sum(self.stores.values())


@dataclass(frozen=True)
class StateReport:
    """The result of `state_report`; ``print(report)`` shows the table."""

    optimizer: str
    parameters: list[ParameterState] = field(repr=False)

    @property
    def params(self) -> int:
        """Number of parameters (elements)."""
        return sum(p.params for p in self.parameters)

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state."""
        return sum(p.state_bytes for p in self.parameters)

    @property
    def bytes_per_param(self) -> float:
        """Bytes of state for each parameter."""
        return self.state_bytes / self.params if self.params else 0.0

    @property
    def adamw_bytes(self) -> int:
        """Bytes that `torch.optim.AdamW` would keep for the same parameters."""
        return sum(p.adamw_bytes for p in self.parameters)

    @property
    def saved_bytes(self) -> int:
        """AdamW's bytes minus ours."""
        return self.adamw_bytes - self.state_bytes

    @property
    def planned(self) -> bool:
        """Whether some of the state does not exist yet."""
        return any(p.planned for p in self.parameters)

    @property
    def stateless(self) -> bool:
        """Whether there is no state, and its size is unknown: another library's optimizer before its first step."""
        return not self.planned and not self.state_bytes and bool(self.params)

    def by_store(self) -> dict[str, int]:
        """Bytes by store."""
        total: dict[str, int] = {}
        for p in self.parameters:
            for name, n in p.stores.items():
                total[name] = total.get(name, 0) + n
        return total

    def by_group(self) -> dict[int, int]:
        """Bytes by parameter group."""
        total: dict[int, int] = {}
        for p in self.parameters:
            total[p.group] = total.get(p.group, 0) + p.state_bytes
        return total

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {
            "optimizer": self.optimizer,
            "params": self.params,
            "state_bytes": self.state_bytes,
            "bytes_per_param": self.bytes_per_param,
            "adamw_bytes": self.adamw_bytes,
            "saved_bytes": self.saved_bytes,
            "planned": self.planned,
            "by_store": self.by_store(),
            "by_group": self.by_group(),
            "parameters": [{**asdict(p), "state_bytes": p.state_bytes} for p in self.parameters],
        }

    def table(self, rows: int = 12) -> Table:
        """A rich table: the ``rows`` parameters with the most state, a sum of the others, and totals."""
        stores = list(self.by_store())
        when = "state to be allocated, beside AdamW" if self.planned else "state, beside AdamW"
        if self.stateless:
            when = "there is no state before its first step"
        from rich.table import Table  # imported here, because optimizers import this file and do not need it

        table = Table(title=f"{self.optimizer}: {when}")
        table.add_column("parameter", overflow="fold")
        table.add_column("shape")
        table.add_column("group", justify="right")
        for store in stores:
            table.add_column(store.replace("_", " "), justify="right")
        for heading in ("state", "B/param", "AdamW", "saved"):
            table.add_column(heading, justify="right")
        ordered = sorted(self.parameters, key=lambda p: -p.params)

        def add(name: str, shape: str, group: str, of: list[ParameterState], style: str | None = None) -> None:
            state, adamw = sum(p.state_bytes for p in of), sum(p.adamw_bytes for p in of)
            params = sum(p.params for p in of)
            table.add_row(
                name,
                shape,
                group,
                *(format_bytes(sum(p.stores.get(s, 0) for p in of)) for s in stores),
                format_bytes(state),
                f"{state / params:.3f}" if params else "-",
                format_bytes(adamw),
                f"{1 - state / adamw:.1%}" if adamw and not self.stateless else "-",
                style=style,
            )

        for p in ordered[:rows]:
            add(p.name, "x".join(map(str, p.shape)) or "scalar", str(p.group), [p])
        if ordered[rows:]:
            add(f"{len(ordered) - rows} more", "", "", ordered[rows:])
        table.add_section()
        add("total", f"{self.params:,}", "", self.parameters, "bold")
        return table

    def __str__(self) -> str:
        """The table as text."""
        text = io.StringIO()
        from rich.console import Console

        Console(width=120, file=text, markup=False, emoji=False, force_jupyter=False).print(self.table())
        return text.getvalue()


def state_report(optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> StateReport:
    """Bytes of an optimizer's state, for each store, parameter and group, compared with AdamW.

    If parameters are sharded over ranks (FSDP2, DeepSpeed's ZeRO), the report counts the state of this rank.

    It works for any torch optimizer (each key of its state is a store), and for wrappers with an ``optimizer``
    attribute (accelerate, LR schedulers). Before the first step, a sketched optimizer reports what it will allocate;
    torch's optimizers have no state then, and the table says so. Frozen parameters (``requires_grad=False``) without
    state are left out. Tensors are counted by their size; scalar step counters are left out on both sides.

    Args:
        optimizer: the optimizer.
        model: the module with these parameters, for their names; not needed if the optimizer was built with
            ``named_parameters()``.

    Returns:
        A `StateReport`.

    Raises:
        TypeError: ``optimizer`` is no torch optimizer, or ``model`` is no module.
        ValueError: a parameter of a lazy module has no shape yet.
    """
    # Wrappers may be torch optimizers themselves (accelerate's), and nested (accelerate around DeepSpeed).
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"state_report takes a torch optimizer, not {type(optimizer).__name__}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"state_report needs a torch.nn.Module as model, to take names from it, not {type(model).__name__}"
        )
    known = {} if model is None else names_in(model)
    held = _parts(optimizer, known) if hasattr(optimizer, "held") else _parameters(optimizer, known)
    found: dict[tuple[int, int], ParameterState] = {}
    for number, index, name, owner, shape, params, stores, planned in held:
        one = ParameterState(
            name=name or f"{number}.{index}",
            group=number,
            shape=shape,
            params=params,
            stores=stores,
            adamw_bytes=2 * params * owner.element_size(),
            planned=planned,
        )
        other = found.get((number, index))
        found[number, index] = one if other is None else other.plus(one)
    return StateReport(type(optimizer).__name__, list(found.values()))


_Row = tuple[int, int, str | None, Tensor, tuple[int, ...], int, dict[str, int], bool]


def _parameters(optimizer: torch.optim.Optimizer, known: Mapping[int, str]) -> Iterator[_Row]:
    for number, group in enumerate(optimizer.param_groups):
        for index, p in enumerate(group["params"]):
            state = optimizer.state.get(p, {})
            if state or p.requires_grad:  # a frozen parameter will never have state
                name = _name(group, index, p, known)
                yield number, index, name, p, tuple(p.shape), local_of(p).numel(), _kept(nested(state)), False


def _parts(optimizer: Any, known: Mapping[int, str]) -> Iterator[_Row]:
    for number, group, part, state in optimizer.held():
        if not state and not part.owner.requires_grad and part.key is None:
            continue
        planned = not state and part.numel() > 0
        # Other code's keys in the state are not counted.
        stores = _kept({key: value for key, value in (state or {}).items() if is_ours(key)})
        if planned:
            stores = {name: n for name, (_, n) in optimizer.planned_state(part, group).items()}
        if part.key is not None:  # a flat partition holds pieces of several parameters
            name, index = optimizer._parts.name_of(part.piece, known), part.piece.index
        else:
            name, index = _name(group, part.index, part.owner, known), part.index
        yield number, index, name, part.data, part.whole, part.numel(), stores, planned


def _name(group: Mapping[str, Any], index: int, p: Tensor, known: Mapping[int, str]) -> str | None:
    names = names_of(group)
    return known.get(id(p)) or (names[index] if names else None)


def _kept(state: Mapping[str, Any]) -> dict[str, int]:
    """Bytes by store. Scalars are step counters, and places say which part of a parameter it is: neither is counted."""
    return {
        key: n
        for key, value in state.items()
        if key != PLACE and not (isinstance(value, Tensor) and value.ndim == 0) and (n := sum(_sizes(value)))
    }


def format_bytes(n: float) -> str:
    """Bytes for people: 1.5 KB, 2.3 MB (powers of 1000)."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(n) < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def _sizes(value: Any) -> Iterator[int]:
    if isinstance(value, Tensor):
        yield value.numel() * value.element_size()
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from _sizes(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _sizes(v)

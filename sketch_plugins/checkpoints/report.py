"""``sketch-plugins report``: the state of the optimizer in a checkpoint, by parameter, compared with AdamW's."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from math import isfinite, prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sketch_plugins.memory.report import format_bytes
from sketch_plugins.optim.written import MARK, written_by
from sketch_plugins.sharding.names import NAMES, names_of
from sketch_plugins.sharding.state_names import CORRECTION, PLACE, is_ours, nested

#: Names of optimizer files in directories of transformers' Trainer and of accelerate.
FILES = ("optimizer.pt", "optimizer.bin")


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


def main(checkpoint: str, rows: int, as_json: bool, trust: bool, program: str) -> int:
    """Run the command and return its exit status: 0, or 2 if there is nothing to report."""
    try:
        if rows < 0:
            raise CannotReport(f"--rows {rows} is not allowed: it must be 0 (all) or more")
        # DeepSpeed, for example, writes its log to stdout when it is imported.
        with redirect_stdout(sys.stderr):
            found = contents(checkpoint, trust=trust)
        if not any(one.entries for one in found):
            raise CannotReport(
                f"{checkpoint} holds an optimizer state dict without state: it was saved before the first step, or its "
                "optimizer keeps none, as SGD without momentum"
            )
    except ValueError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps({"checkpoint": checkpoint, "optimizers": [c.to_dict() for c in found]}, indent=2, default=str))
        return 0
    # Names and paths may contain brackets and colons, which are not meant as markup.
    out = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)
    for one in found:
        out.print(f"{checkpoint}: {one.optimizer}", soft_wrap=True, highlight=False)
        for number, group in enumerate(one.groups):
            out.print(f"group {number}: {folded(one.optimizer, group)}", soft_wrap=True, highlight=False, style="dim")
        out.print(table(one, rows))
        out.print(summary(one), soft_wrap=True, highlight=False)
    return 0


def contents(checkpoint: str | Path, *, trust: bool = False) -> list[Contents]:
    """The contents of the optimizers in a checkpoint.

    Args:
        checkpoint: directory of a Trainer's checkpoint (``optimizer.pt``); file of ``torch.save`` or of Lightning with
            a state dict of an optimizer at any depth; directory of DeepSpeed or of ``torch.distributed.checkpoint``.
        trust: unpickle objects that are neither tensors nor plain values.

    Raises:
        ValueError: the checkpoint does not exist, is damaged, or has no optimizer; it has objects that need ``trust``.
    """
    path = Path(checkpoint)
    if path.is_file():
        return _of_file(path, trust)
    if not path.is_dir():
        raise CannotReport(absent(path))
    for name in FILES:
        if (path / name).is_file():
            return [replace(one, weights=_saved_weights(path)) for one in _of_file(path / name, trust)]
    for place in (path, *sorted(path.glob("optimizer*"))):
        if (place / ".metadata").is_file():
            distributed = importlib.import_module("sketch_plugins.checkpoints.distributed")
            return _of_value(distributed._load(place, trust), place)
    if (path / "latest").is_file() or any(path.glob("*_states.pt")):
        try:
            deepspeed = importlib.import_module("sketch_deepspeed.contents")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "deepspeed":
                raise
            raise CannotReport(
                f"{path} is a DeepSpeed checkpoint, and reading it needs DeepSpeed: "
                "pip install 'sketch-plugins[deepspeed]'"
            ) from error
        groups, named = deepspeed.contents(path, trust)
        return [_contents(groups, named)]
    within = sorted(p.name for p in path.glob("checkpoint-*")) + sorted(p.name for p in path.glob("*.ckpt"))
    hint = f"; it contains {', '.join(within)}: give one of these" if within else ""
    raise CannotReport(
        f"{path} holds no optimizer checkpoint: none of {', '.join(FILES)}, '.metadata' or 'latest' is in it{hint}"
    )


def table(found: Contents, rows: int = 20) -> Table:
    """A rich table: the ``rows`` parameters with the most state (0: all), a sum of the others, and totals."""
    out = Table()
    for heading in ("parameter", "store", "shape", "dtype"):
        out.add_column(heading, overflow="fold")
    out.add_column("bytes", justify="right")
    ordered = sorted(found.entries, key=lambda e: -e.nbytes)
    shown = ordered[:rows] if rows else ordered
    for entry in shown:
        label = entry.name
        for tensor in entry.tensors:
            store = f"{tensor.store}.{tensor.key}" if tensor.key else tensor.store
            shape = "x".join(map(str, tensor.shape)) or "scalar"
            out.add_row(label, store, shape, tensor.dtype, format_bytes(tensor.nbytes))
            label = ""
        if not entry.tensors:
            out.add_row(label, "nothing", "", "", "")
    if len(ordered) > len(shown):
        rest = ordered[len(shown) :]
        out.add_row(f"{len(rest)} more", "", "", "", format_bytes(sum(e.nbytes for e in rest)))
    out.add_section()
    for store, size in found.by_store().items():
        out.add_row("all", store, "", "", format_bytes(size))
    out.add_row("total", "", "", "", format_bytes(found.nbytes), style="bold")
    return out


def folded(optimizer: str, group: Mapping[str, Any]) -> str:
    """The options of a group in a line: the learning rate, and those that differ from the optimizer's defaults.

    If the optimizer is not known here, the options that switch nothing on (None, False) are left out.
    """
    defaults = _defaults(optimizer, group)
    shown = {}
    for key, value in group.items():
        same = defaults[key] == _plain(value) if key in defaults else value is None or value is False
        if key == "lr" or not same:
            shown[key] = value
    said = ", ".join(f"{key}={value}" for key, value in shown.items()) or "nothing"
    left = len(group) - len(shown)
    kind = "option" if left == 1 else "options"
    return said if not left else f"{said}; {left} other {kind} at {'its default' if left == 1 else 'their defaults'}"


def _defaults(optimizer: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one of our optimizers if only the group's preset is given."""
    cls: Any = getattr(importlib.import_module("sketch_plugins.optim"), optimizer, None)
    if not hasattr(cls, "PRESETS"):
        return {}
    first = next(iter(cls.PRESETS))
    signature = inspect.signature(cls).parameters
    out = {name: p.default for name, p in signature.items() if p.default is not inspect.Parameter.empty}
    out |= {**cls.PRESETS[first], **cls.PRESETS.get(str(group.get("preset")), {}), **cls.FIXED, "preset": first}
    return {key: _plain(value) for key, value in out.items()}


def _plain(value: Any) -> Any:
    """The value in a form that can be compared, also after a checkpoint has changed its type."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def summary(found: Contents) -> str:
    """The totals in a line."""
    steps = sorted({e.step for e in found.entries if e.step is not None})
    said = f"{len(found.entries)} parameters with state"
    if steps:
        said += f", {steps[0]} steps" if len(steps) == 1 else f", {steps[0]} to {steps[-1]} steps"
    said += f", {format_bytes(found.nbytes)}"
    if found.params and found.adamw_bytes:
        said += (
            f": {found.nbytes / found.params:.3f} bytes for each of {found.params:,} elements, "
            f"{found.nbytes / found.adamw_bytes:.1%} of AdamW's {format_bytes(found.adamw_bytes)} (float32)"
        )
    elif found.entries:
        said += "; the checkpoint does not contain the sizes of the parameters, so there is no comparison with AdamW"
    return said


def load(file: Path, trust: bool) -> Any:
    """Load a file of ``torch.save``.

    Raises:
        ValueError: it cannot be read, or not without running code.
    """
    try:
        # Since torch 1.6 files are zip archives, so that not all tensors have to be read at once.
        return torch.load(file, map_location="cpu", mmap=_is_zip(file), weights_only=not trust)
    except UnpicklingError as error:
        others = _unsafe(file)
        if others:
            raise CannotReport(
                f"{file} contains Python objects other than tensors and plain values ({', '.join(others)}), and "
                "unpickling them can run code. If you trust the checkpoint, use --trust"
            ) from error
        raise CannotReport(
            f"{file} cannot be read as a file of torch.save; it is damaged, or of another format"
        ) from error
    except Exception as error:  # a damaged file may raise any error
        # Of others (a KeyError of the unpickler: 101) the text says nothing.
        why = f": {error}" if isinstance(error, (OSError, RuntimeError)) and str(error) else ""
        raise CannotReport(
            f"{file} cannot be read as a file of torch.save. It is damaged, or has another format{why}"
        ) from error


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _unsafe(file: Path) -> list[str]:
    try:
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:
        return []


def _of_file(file: Path, trust: bool) -> list[Contents]:
    return _of_value(load(file, trust), file)


def _of_value(value: Any, path: Path) -> list[Contents]:
    found = []
    for saved in state_dicts(value):
        found.append(_contents(saved["param_groups"], _named(saved, _weights(value))))
    if not found:
        raise CannotReport(without_optimizer(path, value))
    return found


def absent(path: Path) -> str:
    """The error message for a path that is neither a file nor a directory."""
    why = "is neither a file nor a directory" if path.exists() else "does not exist"
    return f"{path} {why}: give the directory or file of a checkpoint"


def without_optimizer(path: Path, value: Any) -> str:
    """The error message for a checkpoint that has no state dict of an optimizer."""
    if isinstance(value, Mapping) and "state" in value and "param_groups" in value:
        kinds = (type(value[key]).__name__ for key in ("state", "param_groups"))
        return (
            f"{path} holds no optimizer state dict: 'state' has to be a dict, and 'param_groups' a list of dicts with "
            f"the key 'params'; here they are {' and '.join(kinds)}"
        )
    said = ", ".join(map(str, list(value)[:8])) if isinstance(value, Mapping) else type(value).__name__
    return (
        f"{path} holds no optimizer state dict, which would have the keys 'state' and 'param_groups'; it "
        f"holds {said or 'nothing'}"
    )


def is_state_dict(value: Mapping[Any, Any]) -> bool:
    """Whether it is a state dict of an optimizer."""
    groups = value.get("param_groups")
    whole = isinstance(groups, (list, tuple)) and all(isinstance(g, Mapping) and "params" in g for g in groups)
    return whole and isinstance(value.get("state"), Mapping)


def state_dicts(value: Any) -> Iterator[Mapping[str, Any]]:
    """The state dicts of optimizers in a checkpoint, at any depth."""
    if isinstance(value, Mapping):
        if is_state_dict(value):
            yield value
            return
        for inner in value.values():
            yield from state_dicts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from state_dicts(inner)


def _weights(value: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's weights in the checkpoint, in the model's order."""
    for key in ("state_dict", "model", "model_state_dict", "module"):
        weights = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(weights, Mapping) and weights and all(isinstance(w, Tensor) for w in weights.values()):
            return {str(name): tuple(w.shape) for name, w in weights.items()}
    return {}


def _saved_weights(directory: Path) -> int | None:
    """Number of elements in the safetensors files of a directory; only their headers are read."""
    total = 0
    for file in directory.glob("*.safetensors"):
        try:
            with file.open("rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            total += sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (OSError, ValueError, KeyError, OverflowError, MemoryError):
            return None
    return total or None


def _named(saved: Mapping[str, Any], weights: Mapping[str, tuple[int, ...]]) -> Iterator[Named]:
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


def _contents(groups: Sequence[Mapping[str, Any]], named: Iterator[Named] | Sequence[Named]) -> Contents:
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

"""``sketch-plugins report``: the state of the optimizer in a checkpoint, by parameter, compared with AdamW's."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from sketch_plugins.checkpoints.contents import CannotReport, Contents
from sketch_plugins.checkpoints.reading import contents
from sketch_plugins.memory.report import format_bytes


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

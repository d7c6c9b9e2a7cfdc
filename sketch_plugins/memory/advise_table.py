"""The result of advice: a ladder of rungs, as a table and as a text."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from sketch_plugins.memory.plan_table import Row
from sketch_plugins.memory.report import format_bytes

#: Frameworks in the order in which their lines are shown.
FRAMEWORKS = {"trainer": "Trainer", "lightning": "Lightning", "accelerate": "accelerate", "deepspeed": "DeepSpeed"}


@dataclass(frozen=True)
class Rung:
    """One rung, together with all rungs below it.

    Attributes:
        name: the setting that it turns on.
        cost: cost of this setting in quality and time.
        plan: its bytes, and the largest batch (None with the wish ``"largest-model"``).
        fits: whether a batch of the requested size fits.
        largest_model: parameters of the largest model that fits, with the wish ``"largest-model"``.
        host: approximate bytes in host memory.
        lines: framework -> code, or for DeepSpeed its configuration in JSON.
        refused: framework -> the reason why it cannot have this rung.
        notes: framework -> what it keeps in memory beyond ``plan``.
    """

    name: str
    cost: str
    plan: Row
    fits: bool
    largest_model: int | None
    host: int
    lines: dict[str, str] = field(repr=False)
    refused: dict[str, str] = field(repr=False)
    notes: dict[str, str] = field(repr=False)


@dataclass(frozen=True)
class Advice:
    """The result of `advise`; ``print(advice)`` shows the ladder, the choice and the lines to write for it.

    Attributes:
        wish: the wish.
        model: name of the model.
        params: number of its parameters.
        batch_size: samples of a pass, for which the bytes are.
        budget: bytes of the device.
        reserve: bytes of it that torch cannot use.
        rungs: from the bottom; with the wish ``"least-change"`` up to the first one that fits.
        chosen: index in ``rungs`` of the one that grants the wish; None if none does.
        verdict: the choice in words.
        notes: the rungs that are left out and why, and the assumptions.
    """

    wish: str
    model: str
    params: int
    batch_size: int
    title: str
    budget: int
    reserve: int
    rungs: list[Rung]
    chosen: int | None
    verdict: str
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The advice as plain values, for JSON."""
        return asdict(self)

    def table(self) -> Table:
        """The ladder as a rich table."""
        table = Table(title=self.title)
        table.add_column("", justify="right")
        table.add_column("turn on", overflow="fold")
        for heading in ("weights", "gradients", "state", "activations", "peak"):
            table.add_column(heading, justify="right", no_wrap=True)
        largest = self.wish == "largest-model"
        table.add_column("largest model" if largest else "largest batch", justify="right")
        for number, rung in enumerate(self.rungs):
            row = rung.plan
            cells = [row.parameters, row.gradients, row.state, row.activations, row.peak]
            most = rung.largest_model if largest else row.largest_batch
            style = "bold" if number == self.chosen else None if rung.fits else "dim"
            said = "none" if not most else format_count(most) if largest else str(most)
            table.add_row(str(number), rung.name, *map(format_bytes, cells), said, style=style)
        return table

    @property
    def text(self) -> str:
        """The text below the table."""
        parts = [
            f"budget {format_bytes(self.budget)}"
            + (f", of which {format_bytes(self.reserve)} are left to the CUDA context" if self.reserve else ""),
            "",
            "Each rung keeps what those above it have turned on. What it costs:",
            *(f"  {number}  {rung.name}: {rung.cost}{_of_host(rung)}" for number, rung in enumerate(self.rungs)),
            "",
            self.verdict,
            *self.notes,
        ]
        if self.chosen is not None:
            rung = self.rungs[self.chosen]
            for key, framework in FRAMEWORKS.items():
                shown = rung.lines.get(key) or f"not with {framework}: {rung.refused[key]}"
                first = " (import sketch_deepspeed before deepspeed.initialize)" if framework == "DeepSpeed" else ""
                note = [f"({rung.notes[key]})"] if key in rung.notes else []
                parts += ["", f"--- {framework}{first if key in rung.lines else ''}", *note, shown]
        return "\n".join(parts)

    def __str__(self) -> str:
        """The table, and the text below it."""
        out = io.StringIO()
        Console(width=120, file=out, markup=False, emoji=False, force_jupyter=False).print(self.table())
        return out.getvalue() + self.text


def format_count(n: float) -> str:
    """Parameters for people: 1.5 K, 2.3 M, 7.0 B."""
    for unit in ("", " K", " M"):
        if abs(n) < 1000:
            return f"{n:.0f}{unit}" if not unit else f"{n:.1f}{unit}"
        n /= 1000
    return f"{n:.1f} B"


def _of_host(rung: Rung) -> str:
    return f". Host memory: about {format_bytes(rung.host)}" if rung.host else ""

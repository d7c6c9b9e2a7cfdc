"""The result of a plan: a row for each optimizer, as a table, as a chart and as plain values."""

from __future__ import annotations

import importlib
import io
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sketch_plugins.memory.report import format_bytes


@dataclass(frozen=True)
class Row:
    """One optimizer of a plan; all sizes in bytes.

    Attributes:
        optimizer: its name.
        parameters: the weights, both trained and frozen.
        gradients: their maximum over time.
        state: state of the optimizer.
        activations: the maximum of everything else: what backward needs, temporaries, buffers, the batch, workspace.
        peak: the maximum of the total; less than the sum, because gradients grow while activations are freed.
        at_peak: the four kinds at the time of the peak; they add up to ``peak``.
        when: the peak is in ``"forward and backward"`` or in the optimizer's ``"step"``.
        largest_batch: the largest batch whose peak is within the budget; 0: no batch fits; None: there is no budget.
        precision: precision of the weights and of autocast.
    """

    optimizer: str
    parameters: int
    gradients: int
    state: int
    activations: int
    peak: int
    at_peak: dict[str, int]
    when: str
    largest_batch: int | None
    precision: str


@dataclass(frozen=True)
class Plan:
    """The result of `plan`; ``print(plan)`` shows the table.

    Attributes:
        model: its name.
        params: number of its parameters (elements).
        batch_size: samples of a pass.
        seq_len: tokens of a sample; None if the caller makes the batches.
        precision: see `plan`.
        device: ``"cuda"`` or ``"cpu"``.
        gpu_memory: the budget in bytes; None: no budget was given.
        reserve: the part of it that torch's allocator cannot use.
        zero_stage: stage of DeepSpeed's ZeRO; 0: no ZeRO.
        world_size: its ranks; all figures are for one of them.
        gradient_checkpointing: whether backward recomputes activations.
        accumulation: passes of a step.
        rows: one for each optimizer.
    """

    model: str
    params: int
    batch_size: int
    seq_len: int | None
    precision: str
    device: str
    gpu_memory: int | None
    reserve: int
    zero_stage: int
    world_size: int
    gradient_checkpointing: bool
    accumulation: int
    rows: list[Row] = field(repr=False)

    def __getitem__(self, optimizer: str) -> Row:
        """The row of an optimizer."""
        for row in self.rows:
            if row.optimizer == optimizer:
                return row
        raise KeyError(f"{optimizer!r} is not in the plan; it has {', '.join(row.optimizer for row in self.rows)}")

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for JSON."""
        return asdict(self)

    @property
    def title(self) -> str:
        """A line that says what is planned."""
        length = "" if self.seq_len is None else f", sequences of {self.seq_len}"
        return f"{self.model}, {self.params:,} parameters, batch {self.batch_size}{length}, {self.precision}"

    @property
    def notes(self) -> str:
        """A line with the other circumstances."""
        parts = [f"on {'CUDA' if self.device == 'cuda' else 'a CPU'}"]
        if self.gpu_memory is not None:
            parts.append(f"budget {format_bytes(self.gpu_memory)}")
            if self.reserve:
                parts.append(f"of which {format_bytes(self.reserve)} are left to the CUDA context")
        if self.gradient_checkpointing:
            parts.append("gradient checkpointing")
        if self.accumulation > 1:
            parts.append(f"{self.accumulation} passes a step")
        if self.zero_stage:
            parts.append(f"ZeRO-{self.zero_stage} over {self.world_size} ranks, by formula")
        return ", ".join(parts)

    def table(self) -> Table:
        """A rich table with a row for each optimizer."""
        table = Table(title=self.title, caption=self.notes)
        table.add_column("optimizer", overflow="fold")
        for heading in ("parameters", "gradients", "state", "activations", "peak"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("peak in")
        if self.gpu_memory is not None:
            table.add_column("largest batch", justify="right")
        for row in self.rows:
            cells = [row.parameters, row.gradients, row.state, row.activations, row.peak]
            batch = [] if self.gpu_memory is None else [str(row.largest_batch) if row.largest_batch else "none"]
            fits = self.gpu_memory is None or row.peak <= self.gpu_memory - self.reserve
            when = "backward" if row.when != "step" else "step"
            table.add_row(row.optimizer, *map(format_bytes, cells), when, *batch, style=None if fits else "dim")
        return table

    def __str__(self) -> str:
        """The table as text."""
        text = io.StringIO()
        Console(width=120, file=text, markup=False, emoji=False, force_jupyter=False).print(self.table())
        return text.getvalue()

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw a bar for each optimizer with the memory at its peak, and the budget as a line.

        Args:
            path: file to write; its suffix selects the format (``.png``, ``.svg``, ``.pdf``).

        Raises:
            ValueError: another suffix, or matplotlib is not installed.
        """
        check_plot(path)
        figures = importlib.import_module("matplotlib.figure")
        figure = figures.Figure(figsize=(9, 1.6 + 0.36 * len(self.rows)), layout="constrained")
        axes = figure.subplots()
        names = [row.optimizer for row in self.rows]
        left = [0.0] * len(names)
        colours = {"parameters": "#4c72b0", "gradients": "#dd8452", "state": "#c44e52", "activations": "#bbbbbb"}
        for kind, colour in colours.items():
            sizes = [row.at_peak[kind] / 1e9 for row in self.rows]
            axes.barh(names, sizes, left=left, color=colour, label=kind)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        if self.gpu_memory is not None:
            axes.axvline((self.gpu_memory - self.reserve) / 1e9, color="black", linestyle="--", label="budget")
            for place, row in enumerate(self.rows):
                note = f" batch ≤ {row.largest_batch}" if row.largest_batch else " no batch fits"
                axes.text(left[place], place, note, va="center", fontsize=8)
            axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.set_xlabel("GB at the peak")
        axes.set_title(self.title, fontsize=10)
        figure.legend(loc="outside lower center", ncols=5, fontsize=8)
        figure.savefig(path, dpi=150)


def check_plot(path: str | os.PathLike[str]) -> None:
    """Check that `Plan.plot` can write to a path.

    Raises:
        ValueError: it cannot; the message says why.
    """
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{os.fspath(path)!r} cannot be the file of a plot: its name must end in .png, .svg or .pdf")
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"{os.fspath(path)!r} cannot be written: No such file or directory: {Path(path).parent}")
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ValueError(f"a plot needs matplotlib ({error}): pip install matplotlib") from error

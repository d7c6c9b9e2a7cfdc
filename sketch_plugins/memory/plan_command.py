"""``sketch-plugins plan``: shows the plan or the advice, writes the chart, and reports errors."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sketch_plugins.memory.advise import advise
from sketch_plugins.memory.advise_table import Advice
from sketch_plugins.memory.plan import plan
from sketch_plugins.memory.plan_table import Plan, check_plot


def main(arguments: argparse.Namespace, program: str) -> int:
    """Run the command and return its exit status: 0, or 2 if the arguments are wrong."""
    screen = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        if arguments.plot is not None:
            check_plot(arguments.plot)
        with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
            task = bar.add_task("reading", total=None)

            def show(done: int, of: int, what: str) -> None:
                bar.update(task, completed=done, total=of, description=what)

            found = _found(arguments, show)
        if arguments.plot is not None and isinstance(found, Plan):
            found.plot(arguments.plot)
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=2))
        return 0
    # Paths and names of optimizers may contain brackets and colons, which are not meant as markup.
    out = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)
    # Not the table's title or caption, because these are no wider than its columns.
    out.print(found.title, soft_wrap=True, highlight=False)
    table = found.table()
    table.title = table.caption = None
    # Columns without room would vanish, so lines are broken on a narrow terminal instead.
    needed = Measurement.get(out, out.options.update(max_width=1000), table).minimum
    out.width = max(out.width, needed)
    out.print(table)
    out.print(found.notes if isinstance(found, Plan) else found.text, soft_wrap=True, highlight=False)
    if arguments.plot is not None:
        out.print(f"chart: {arguments.plot}", soft_wrap=True, highlight=False)
    return 0


def _found(arguments: argparse.Namespace, progress: Any) -> Plan | Advice:
    common = {
        name: getattr(arguments, name)
        for name in (
            "batch_size", "seq_len", "gpu_memory", "precision", "task", "gradient_checkpointing", "accumulation",
            "device", "reserve",
        )
    }  # fmt: skip
    if arguments.advise is None:
        return plan(
            arguments.model,
            optimizers=arguments.optimizer or "all",
            zero_stage=arguments.zero_stage,
            world_size=arguments.world_size,
            progress=progress,
            **common,
        )
    if arguments.gpu_memory is None:
        raise ValueError(f"--advise {arguments.advise} needs a budget: add --gpu-memory, as in --gpu-memory 16GiB")
    for name, value, why in (
        ("--optimizer", arguments.optimizer, "the ladder has optimizers of its own"),
        ("--plot", arguments.plot, "there is no chart of a ladder"),
        ("--zero-stage", arguments.zero_stage or None, "24-bit weights and steps in backward are refused by DeepSpeed"),
        ("--world-size", arguments.world_size, "the ladder is for one process"),
    ):
        if value is not None:
            raise ValueError(f"{name} and --advise cannot be combined, because {why}: leave one of them out")
    return advise(arguments.model, wish=arguments.advise, progress=progress, **common)

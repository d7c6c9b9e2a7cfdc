"""``sketch-plugins plan``: shows the plan, writes the chart, and says what went wrong."""

from __future__ import annotations

import argparse
import json
import sys

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sketch_plugins.memory.plan import check_plot, plan


def main(arguments: argparse.Namespace, program: str) -> int:
    """Run the command; its exit status: 0, or 2 where the arguments are at fault."""
    screen = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        if arguments.plot is not None:
            check_plot(arguments.plot)
        with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
            task = bar.add_task("reading", total=None)

            def show(done: int, of: int, what: str) -> None:
                bar.update(task, completed=done, total=of, description=what)

            found = plan(
                arguments.model,
                batch_size=arguments.batch_size,
                seq_len=arguments.seq_len,
                gpu_memory=arguments.gpu_memory,
                precision=arguments.precision,
                optimizers=arguments.optimizer or "all",
                task=arguments.task,
                gradient_checkpointing=arguments.gradient_checkpointing,
                accumulation=arguments.accumulation,
                zero_stage=arguments.zero_stage,
                world_size=arguments.world_size,
                device=arguments.device,
                reserve=arguments.reserve,
                progress=show,
            )
        if arguments.plot is not None:
            found.plot(arguments.plot)
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(found.to_dict(), indent=2))
        return 0
    # Paths and names of optimizers may have brackets and colons, which are no markup.
    out = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)
    # Not the title and caption of the table, which is no wider than its columns.
    out.print(found.title, soft_wrap=True, highlight=False)
    table = found.table()
    table.title = table.caption = None
    # Columns that find no room would vanish; on a narrow terminal lines are broken instead.
    needed = Measurement.get(out, out.options.update(max_width=1000), table).minimum
    out.width = max(out.width, needed)
    out.print(table)
    out.print(found.notes, soft_wrap=True, highlight=False)
    if arguments.plot is not None:
        out.print(f"chart: {arguments.plot}", soft_wrap=True, highlight=False)
    return 0

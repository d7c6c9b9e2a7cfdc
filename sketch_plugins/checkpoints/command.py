"""``sketch-plugins reshard``: recognizes the framework of a checkpoint, reshards it, and reports what was done."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from sketch_plugins.checkpoints.saved import CannotReshard, Report
from sketch_plugins.memory.report import format_bytes


def main(checkpoint: str, world_size: int, output: str | None, trust: bool, program: str) -> int:
    """Run the command and return its exit status: 0, or 1 if nothing was written."""
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        reshard = _implementation(Path(checkpoint))
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("reading", total=None)

            def show(done: int, of: int, what: str) -> None:
                bar.update(task, completed=done, total=of, description=what)

            report = reshard(checkpoint, world_size, output, trust=trust, progress=show)
    except CannotReshard as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    before, after = map(format_bytes, report.nbytes)
    out = Console(markup=False, emoji=False)  # paths may contain brackets
    # Not the table's title or caption, because these are no wider than its columns.
    out.print(f"{report.output}: {report.before} -> {report.after} processes", soft_wrap=True, highlight=False)
    out.print(f"{report.framework}, {report.optimizer}, {report.parameters:,} parameters", highlight=False)
    out.print(table(report))
    out.print(f"state {before} -> {after} in all; weights bit for bit", highlight=False)
    return 0


def table(report: Report) -> Table:
    """A table of what was done, with a row for each kind of state."""
    out = Table()
    out.add_column("state")
    out.add_column("pieces", justify="right")
    out.add_column("bit for bit", justify="right")
    out.add_column("rebuilt", justify="right")
    for kind in sorted({*report.exact, *report.cut}):
        exact, cut = report.exact[kind], report.cut[kind]
        out.add_row(kind, str(exact + cut), str(exact), str(cut))
    if not report.exact and not report.cut:
        out.add_row("none: no step was taken", "", "", "")
    return out


def _implementation(path: Path) -> Callable[..., Report]:
    """The function for the framework that wrote the checkpoint. No framework is imported before it is known."""
    if (path / ".metadata").is_file():
        name, framework = "sketch_plugins.checkpoints.distributed", ""
    else:
        name, framework = "sketch_deepspeed.reshard", "deepspeed"
        if not path.is_dir():
            raise CannotReshard(f"{path} is not a directory")
        if not any(path.glob("latest")) and not any(path.glob("*_states.pt")):
            raise CannotReshard(
                f"{path} is no checkpoint of a sharded run: of DeepSpeed's it has neither 'latest' nor "
                "'*_model_states.pt', of torch.distributed.checkpoint's not '.metadata'"
            )
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not framework or (error.name or "").partition(".")[0] != framework:
            raise
        raise CannotReshard(
            f"{path} is a DeepSpeed checkpoint, and reading it needs DeepSpeed: pip install 'sketch-plugins[deepspeed]'"
        ) from error
    function: Callable[..., Report] = module.reshard
    return function

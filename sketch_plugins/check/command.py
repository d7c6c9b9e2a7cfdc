"""``sketch-plugins check``: selects the cases, shows their results, and reports what is wrong."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from sketch_plugins.check.cases import cases
from sketch_plugins.check.comparing import LEFT_OUT, Row, describe
from sketch_plugins.check.times import TIMED, Time, bert_base, measure
from sketch_plugins.check.workers import compare_all
from sketch_plugins.optim.fused import backend, interpreted

# Compilation is distributed over at most so many processes; each takes some hundred megabytes of the device.
_MOST_JOBS = 12


def main(arguments: argparse.Namespace, program: str) -> int:
    """Run the command and return its exit status: 0; 1 if a kernel is wrong; 2 if the arguments are wrong."""
    try:
        device = _device(arguments.device)
        chosen = [case for case in cases() if not arguments.only or arguments.only in case.name]
        if not chosen:
            raise ValueError(
                f"--only {arguments.only!r}: no case has this word in its name. Run the command without --only to "
                "see all names"
            )
        if arguments.jobs is not None and arguments.jobs < 0:
            raise ValueError(f"--jobs {arguments.jobs} is not allowed: it must be 0 or more")
    except (ValueError, RuntimeError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    jobs = arguments.jobs
    if jobs is None:
        jobs = min(_MOST_JOBS, os.cpu_count() or 1) if device.type == "cuda" else 0
    timed = [] if arguments.no_times or arguments.only or interpreted() else TIMED
    with _progress(len(chosen) + len(timed)) as show:
        rows = compare_all(chosen, device, jobs, lambda row: show(row.case))
        times = []
        for name, options, dtype in timed:
            times.append(measure(name, options, dtype, device, [*bert_base()]))
            show(times[-1].optimizer)
    wrong = [row for row in rows if row.wrong]
    if arguments.json:
        found = {
            **describe(device),
            "wrong": [row.case for row in wrong],
            "cases": [row.to_dict() for row in rows],
            "times": [one.to_dict() for one in times],
        }
        print(json.dumps(found, indent=2))
    else:
        _say(describe(device), rows, times)
    return 1 if wrong or any(one.error for one in times) else 0


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda") and not name.startswith("cuda:"):
        raise ValueError(f"--device {name!r} is not known: use cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {name}: torch {torch.__version__} finds no CUDA or ROCm device on this machine. Use "
            "--device cpu to check the kernels for the processor"
        )
    backend(device, True)  # raises an error with the reason if there are no kernels
    return device


def _say(what: dict[str, str], rows: Sequence[Row], times: Sequence[Time]) -> None:
    print(", ".join(f"{key} {value}" for key, value in what.items()))
    shown = [
        (row.case, row.result, ", ".join(row.kernels), f"{row.seconds:.1f}", row.note if not row.wrong else "see below")
        for row in rows
    ]
    _table(("case", "result", "kernels", "s", ""), shown)
    if times:
        figures = [
            (one.optimizer, one.dtype, one.error, "", "", "") if one.error else (
                one.optimizer, one.dtype, f"{one.step_ms:.2f}", f"{one.adamw_ms:.2f}",
                f"{one.step_ms / one.adamw_ms:.2f}", f"{one.first_s:.1f}",
            )
            for one in times
        ]  # fmt: skip
        _table(("a step on BERT-base", "dtype", "ms", "AdamW fused ms", "ratio", "first step s"), figures)
    wrong = [row for row in rows if row.wrong]
    for row in wrong:
        print(f"{row.result}: {row.case} ({', '.join(row.kernels) or 'no kernel was launched'}): {row.note}")
    left_out = sum(row.result == LEFT_OUT for row in rows)
    agreed = len(rows) - len(wrong) - left_out
    print(f"{agreed} of {len(rows)} cases agree with eager torch, {len(wrong)} do not, {left_out} were left out")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table; plain columns if rich is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for cells in (headings, *rows):
            print("  ".join(cell for cell in cells if cell))
        return
    table = Table()
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for cells in rows:
        table.add_row(*cells)
    # Names of cases contain brackets, which are not meant as markup.
    Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False).print(table)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], Any]]:
    """A progress bar on a terminal; call the result with the name of each finished case."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda what: None
        return
    screen = Console(stderr=True, markup=False)
    # The bar comes first, because names of cases vary in length.
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda what: bar.update(task, advance=1, description=what)

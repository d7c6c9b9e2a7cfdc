"""Repeat a part of the committed quality figures and say whether they hold: ten minutes on two cores.

    python benchmarks/quality_check.py --text FOLDER --jobs 2

It runs the language model of quality_run.py for 160 steps on seed 1: AdamW, Adafactor, Muon and ours, each at the rate
of docs/peers.md. A figure holds if the new loss is no further from the committed one of this seed than the committed
seeds are from their mean (one standard deviation, at least 0.01), and if the bytes of state are the same to 1 %. The
exit status is 1 if a figure does not hold.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from quality import records, sweep
from quality.records import Row
from quality.running import TASKS, Done, Plans, Run
from quality.summary import TITLES, Figure, figures
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

REPEATED = ("adamw", "adafactor", "muon", "cs_adam", "cs_adam:preset=lean", "sm3", "sketchy")
STEPS, SEED, LEAST, BYTES = 160, 1, 0.01, 0.01


def held(figure: Figure, committed: float, row: Row) -> tuple[bool, float]:
    """Whether a new run agrees with the committed ones, and how far the loss may be away."""
    tolerance = max(figure.spread or 0.0, LEAST)
    near = abs(float(row["value"]) - committed) <= tolerance
    same = abs(float(row["bytes_per_param"]) / figure.bytes_per_param - 1) <= BYTES
    return near and same, tolerance


def compared(rows: Iterable[Row], new: dict[str, Row], steps: int) -> tuple[Table, list[str]]:
    """A line for each optimizer, and the names of those whose figure does not hold."""
    rows = list(rows)
    found = figures(rows)
    shown = Table(title=f"language model, {steps} steps, seed {SEED}: committed figures and today's")
    for name in ("optimizer", "rate", "committed", "today", "may differ by", "state B/param", "today", ""):
        shown.add_column(name, justify="left" if name == "optimizer" else "right")
    failed = []
    for name, row in new.items():
        figure = found["lm", steps, name]
        committed = next(
            float(r["value"])
            for r in rows
            if records.key_of(r) == ("lm", str(steps), name, f"{figure.lr:g}", str(SEED))
        )
        good, tolerance = held(figure, committed, row)
        if not good:
            failed.append(TITLES[name])
        shown.add_row(
            TITLES[name], f"{figure.lr:g}", f"{committed:.3f}", f"{float(row['value']):.3f}", f"{tolerance:.3f}",
            f"{figure.bytes_per_param:.3g}", f"{float(row['bytes_per_param']):.3g}",
            "holds" if good else "does not hold",
        )  # fmt: skip
    return shown, failed


def repeat(args: argparse.Namespace, found: dict[tuple[str, int, str], Figure], names: list[str]) -> dict[str, Row]:
    """A run of each, at the committed rate."""
    new: dict[str, Row] = {}

    def done(run: Run, result: Done) -> None:
        if result.row is None:
            raise SystemExit(f"{run.optimizer} {result.reason}")
        new[run.optimizer] = result.row
        tqdm.write(f"{TITLES[run.optimizer]}: {result.row['value']} in {result.row['seconds']} s")

    def run_of(name: str) -> tuple:
        lr = found["lm", args.steps, name].lr
        return (lambda lr, seed: Run("lm", args.steps, name, lr, seed)), sweep.fixed([lr], [SEED])

    todo = Plans([run_of(name) for name in names], lambda run: None, done)
    if args.jobs > 1:
        todo.side_by_side(args, args.jobs)
    else:
        todo.one_by_one(TASKS["lm"].prepare(args))
    return {name: new[name] for name in names}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, metavar="FOLDER", help="valid.txt, test.txt of WikiText-2")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs side by side (%(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="(%(default)s)")
    parser.add_argument("--optimizers", default=",".join(REPEATED), metavar="LIST", help="(%(default)s)")
    parser.add_argument("--figures", type=Path, default=records.RUNS, metavar="CSV", help="the committed runs")
    args = parser.parse_args()
    args.task = "lm"
    for name in ("valid.txt", "test.txt"):
        if not (args.text / name).is_file():
            parser.error(f"--text {args.text} has no {name}: it is the folder of WikiText-2's raw words")
    rows = records.read(args.figures)
    found, names = figures(rows), args.optimizers.split(",")
    absent = [name for name in names if ("lm", args.steps, name) not in found]
    if absent:
        parser.error(f"{args.figures} has no run of {', '.join(absent)} with {args.steps} steps")
    torch.set_num_threads(1)
    shown, failed = compared(rows, repeat(args, found, names), args.steps)
    Console().print(shown)
    print("every figure holds" if not failed else f"these figures do not hold: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

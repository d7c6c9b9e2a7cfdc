#!/usr/bin/env python3
"""A model of the time of a training step, by bandwidth and number of workers: when does compression pay?

    python benchmarks/comm_simulation.py
    python benchmarks/comm_simulation.py --shapes llama-1b --forward 0.4 --backward 0.8 --throughput 1000

It is arithmetic, not a measurement. With n workers that have a bandwidth B and a latency alpha to each neighbour, a
gradient of S bytes in b buckets, and algorithms that use all of the bandwidth in log2(n) rounds,

    all-reduce of s bytes      2 (n - 1) / n * s / B + 2 log2(n) * alpha * messages
    all-gather of s bytes      (n - 1) * s / B + log2(n) * alpha * messages       (s: what one worker sends)

    step of a dense run        forward + max(backward, all-reduce of S in b messages)
    step of a compressed one   forward + max(backward + compress + tables, host, exchange in b messages) + decompress

That means that communication hides behind the backward pass as far as it can. Compression does not, because it uses the
same device. Each compressor has its own costs, counted from the code as it runs on a GPU (float32, memories in
float32):

    compress      bytes a parameter / throughput + launches * 5 us + bytes of sent entries / throughput

* Bytes a parameter. For all but the kernel of block_topk: memory += gradient 12 (two reads, a write). For top-k also
  magnitudes 8, and a radix selection (four passes of 4 to find the k-th, two to collect): 32 together.
      block_topk    12    one kernel: read gradient and memory, write memory
      topk          44    12 + 32
      randk         12
      count_sketch  208   12; adding runs to three tables, read x, read and write cells: 36; estimates, of each table
                          rotated (8) and signed (8), stacked (24), their median (48), copied (8): 128; 32
                    448   where a table has fewer than 8192 cells and rotations are by int64 indices: 12; for each table
                          indices 24, padding 8, gather 16, sign 8, sum 4: 180; for each table indices 24, gather 16,
                          sign 8, then 24 + 48 + 8: 224; 32
* Bytes an entry: entries are gathered from the memory and cleared there in sectors of 32 bytes (116), copied, clamped,
  and the part that the dtype cannot hold is put back (126); block_topk's kernel has done the first. topk sorts its
  positions: 104 more.
* Launches for each tensor: 15 for the hook; block_topk 5 more, topk 20, randk 6; count_sketch 5, and 18 for each run of
  its vector (1 / (width * density) runs), or 60 for each 2**20 entries if they are rotated by indices.
* host: randk draws its positions on the CPU, 65 ns each (measured on one core of a Xeon); it works ahead of the device.
* tables: count_sketch's all-reduce of each tensor's tables, which the hook waits for before it picks.
* decompress writes 4 bytes a parameter. Gathered entries of every worker are added: message 8, positions and shares
  48, and `index_put_` with duplicates (indices 48, three passes of a radix sort 104, sectors 64), 272 bytes each.
  Shared entries take 80 bytes, once.

The bytes that are sent are those of `Compressor.wire_bytes` for each tensor (count_sketch: with its tables); small
tensors are sent whole. The defaults are BERT-base on one GPU for each worker. Assumptions are 0.03 s forward, 0.06 s
backward, and 500 GB/s, which is below what one pass reaches on such a GPU. A density says nothing about how many more
steps a run needs.
"""

from __future__ import annotations

import argparse
import csv
import math
from pathlib import Path
from typing import NamedTuple

from bench_step import SHAPES, shapes
from rich.console import Console
from rich.table import Table

from sketch_plugins.comm.compressors import COMPRESSORS, make_compressor
from sketch_plugins.comm.count_sketch import BATCH, MANY, CountSketchTopK

RESULTS = Path(__file__).parent / "results"
FIELDS = (
    "method", "density", "workers", "gbit", "wire_over_dense", "compress_ms", "host_ms", "tables_ms", "exchange_ms",
    "decompress_ms", "step_ms", "dense_ms", "speedup",
)  # fmt: skip
WORKERS = tuple(2**i for i in range(1, 11))
GBIT = (0.1, 0.3, 1.0, 3.0, 10.0, 25.0, 50.0, 100.0, 200.0, 400.0)
METHODS = ("block_topk", "topk", "randk", "count_sketch")
SMALLEST = 1024
# Bytes a parameter, as the docstring explains.
PER_PARAMETER = {"block_topk": 12.0, "topk": 44.0, "randk": 12.0}
STREAMED, INDEXED = 208.0, 448.0
PER_ENTRY = {"block_topk": 126.0, "topk": 346.0, "randk": 242.0, "count_sketch": 242.0}
LAUNCHES = {"block_topk": 20, "topk": 35, "randk": 21, "count_sketch": 20}
LAUNCH = 5e-6
DRAW = 65e-9
ADDED, PLACED = 272.0, 80.0


class Setting(NamedTuple):
    """Independent of method, bandwidth and number of workers: entries of each tensor, seconds, bytes a second."""

    sizes: tuple[int, ...]
    forward: float
    backward: float
    latency: float
    buckets: int
    throughput: float

    @property
    def params(self) -> int:
        """Entries of all tensors."""
        return sum(self.sizes)


class Load(NamedTuple):
    """Work of one compressor at one density, in one step: bytes of its messages, seconds of its own computation."""

    gathered: bool
    message: float
    tables: float
    tensors: int
    entries: float
    compress: float
    host: float


def allreduce(size: float, n: int, bandwidth: float, messages: int, s: Setting) -> float:
    return 2 * (n - 1) / n * size / bandwidth + 2 * math.log2(n) * s.latency * messages


def allgather(size: float, n: int, bandwidth: float, messages: int, s: Setting) -> float:
    return (n - 1) * size / bandwidth + math.log2(n) * s.latency * messages


def dense(n: int, bandwidth: float, s: Setting) -> float:
    return s.forward + max(s.backward, allreduce(4 * s.params, n, bandwidth, s.buckets, s))


def load(method: str, density: float, s: Setting) -> Load:
    compressor = make_compressor(method)
    large = [size for size in s.sizes if size >= SMALLEST]
    counts = [compressor.count(size, density) for size in large]
    whole = 4.0 * sum(size for size in s.sizes if size < SMALLEST)
    wire = sum(compressor.wire_bytes(size, density) for size in large)
    traffic, launches, tables = PER_ENTRY[method] * sum(counts), float(LAUNCHES[method] * len(large)), 0.0
    if isinstance(compressor, CountSketchTopK):
        tables = wire - 4.0 * sum(counts)
        for size in large:
            cells = compressor.cells(size, density)
            traffic += (STREAMED if cells >= MANY else INDEXED) * size
            launches += 18 * math.ceil(size / cells) if cells >= MANY else 60 * math.ceil(size / BATCH)
    else:
        traffic += PER_PARAMETER[method] * sum(large)
    return Load(
        gathered=not compressor.shared,
        message=wire - tables + whole,
        tables=tables,
        tensors=len(large),
        entries=float(sum(counts)),
        compress=traffic / s.throughput + launches * LAUNCH,
        host=DRAW * sum(counts) if method == "randk" else 0.0,
    )


def compressed(work: Load, n: int, bandwidth: float, s: Setting) -> dict[str, float]:
    """Seconds of each part of a step."""
    exchange = (allgather if work.gathered else allreduce)(work.message, n, bandwidth, s.buckets, s)
    tables = allreduce(work.tables, n, bandwidth, work.tensors, s) if work.tables else 0.0
    placed = ADDED * n if work.gathered else PLACED
    decompress = (4 * s.params + placed * work.entries) / s.throughput
    step = s.forward + max(s.backward + work.compress + tables, work.host, exchange) + decompress
    return {
        "compress": work.compress, "host": work.host, "tables": tables, "exchange": exchange, "decompress": decompress,
        "step": step,
    }  # fmt: skip


def highest_bandwidth(work: Load, n: int, s: Setting) -> float:
    """Gbit/s up to which the compressed step is faster; 0 if it never is."""
    low, high = 1e-3, 1e4
    if not faster(work, n, low, s):
        return 0.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if faster(work, n, middle, s) else (low, middle)
    return low


def faster(work: Load, n: int, gbit: float, s: Setting) -> bool:
    return compressed(work, n, gbit * 1e9 / 8, s)["step"] < dense(n, gbit * 1e9 / 8, s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="bert-base", choices=tuple(SHAPES))
    parser.add_argument("--forward", type=float, default=0.03, help="seconds")
    parser.add_argument("--backward", type=float, default=0.06, help="seconds")
    parser.add_argument("--latency", type=float, default=20e-6, help="seconds for a message to a neighbour")
    parser.add_argument("--bucket-mb", type=float, default=25.0)
    parser.add_argument("--throughput", type=float, default=500.0, help="GB/s while compressing and decompressing")
    parser.add_argument("--densities", default="0.01,0.001")
    parser.add_argument("--out", type=Path, default=RESULTS / "comm_simulation.csv")
    args = parser.parse_args()
    sizes = tuple(math.prod(shape) for shape in shapes(args.shapes))
    buckets = max(1, round(4 * sum(sizes) / (args.bucket_mb * 2**20)))
    s = Setting(sizes, args.forward, args.backward, args.latency, buckets, args.throughput * 1e9)
    densities = [float(d) for d in args.densities.split(",")]
    assert set(METHODS) == set(COMPRESSORS), "a compressor has no costs here"
    loads = {(method, density): load(method, density, s) for method in METHODS for density in densities}
    rows = []
    for (method, density), work in loads.items():
        for n in WORKERS:
            for gbit in GBIT:
                a, b = compressed(work, n, gbit * 1e9 / 8, s), dense(n, gbit * 1e9 / 8, s)
                rows.append({
                    "method": method, "density": density, "workers": n, "gbit": gbit,
                    "wire_over_dense": round((work.message + work.tables) / (4 * s.params), 5),
                    **{f"{part}_ms": round(1e3 * seconds, 3) for part, seconds in a.items()},
                    "dense_ms": round(1e3 * b, 3), "speedup": round(b / a["step"], 4),
                })  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    costs = Table(title=f"{args.shapes}, {s.params / 1e6:.1f} M parameters: of one step, ms")
    for heading in ("method", "density", "bytes / dense", "compress", "host", "decompress, 2", "decompress, 64"):
        costs.add_column(heading)
    for (method, density), work in loads.items():
        two, many = (compressed(work, n, 1e9, s)["decompress"] for n in (2, 64))
        wire = (work.message + work.tables) / (4 * s.params)
        costs.add_row(
            method, f"{density:g}", f"{wire:.4f}", *(f"{1e3 * t:.1f}" for t in (work.compress, work.host, two, many))
        )
    table = Table(title="Gbit/s of each worker up to which a step is faster")
    table.add_column("workers")
    for method, density in loads:
        table.add_column(f"{method} {density:g}")
    for n in WORKERS:
        table.add_row(str(n), *(f"{highest_bandwidth(work, n, s):.2f}" for work in loads.values()))
    console = Console(width=160)
    console.print(costs)
    console.print(table)
    plot(rows, loads, s, args.out.with_suffix(".png"))


def plot(rows: list[dict], loads: dict[tuple[str, float], Load], s: Setting, path: Path) -> None:
    """Plot speed-ups by number of workers, and the bandwidth up to which there is one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    densities = list(dict.fromkeys(density for _, density in loads))
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
            limit = [highest_bandwidth(loads[method, density], n, s) or None for n in WORKERS]
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

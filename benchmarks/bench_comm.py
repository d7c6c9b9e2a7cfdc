#!/usr/bin/env python3
"""Time to compress and decompress the gradient of a model, compared with an all-reduce of it, and with a copy.

    python benchmarks/bench_comm.py                          # BERT-base, two gloo processes on this machine
    python benchmarks/bench_comm.py --shapes tiny --densities 0.01,0.001
    python benchmarks/bench_comm.py --device cuda --processes 1         # no all-reduce: ratios to the copy

`compress` is `Compressor.take` of every matrix: add to the memory, pick, clear. `decompress` adds the payloads of
`--ranks` ranks to one gradient, each of them as long as this rank's. Each turn times everything once, so that ratios
hold on a machine whose speed drifts: `x_allreduce` is the median of (compress + decompress) / (all-reduce of the whole
gradient, in messages of 25 MB), and `x_copy` is the same relative to a copy of it. `exchange_ms` is the time of the
collectives with the compressed payloads; it includes count_sketch's tables, which ranks sum for each parameter before
they pick.
"""

from __future__ import annotations

import argparse
import csv
import os
import socket
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench_step import RESULTS, hardware, shapes, timed
from rich.console import Console
from rich.table import Table

from sketch_plugins.comm.compressors import COMPRESSORS, make_compressor
from sketch_plugins.comm.count_sketch import CountSketchTopK

FIELDS = (
    "compressor", "density", "shapes", "params", "ranks", "processes", "device", "hardware", "threads", "turns",
    "compress_ms", "decompress_ms", "exchange_ms", "allreduce_ms", "copy_ms", "x_allreduce", "x_copy",
    "wire_over_dense", "torch",
)  # fmt: skip
BUCKET = 25 << 20
SMALLEST = 1024


def work(rank: int, args: argparse.Namespace, port: int, out: Any) -> None:
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.processes > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.processes)
    torch.manual_seed(rank)
    sizes = [torch.Size(shape).numel() for shape in shapes(args.shapes)]
    grads = [torch.randn(size, device=device) for size in sizes]
    matrices = [g for g in grads if len(g) >= SMALLEST]
    flat, target = torch.cat(grads), torch.cat(grads)
    for name in args.compressors.split(","):
        for density in map(float, args.densities.split(",")):
            compressor = make_compressor(name)
            memories = [torch.zeros_like(g) for g in matrices]
            payloads: list[Any] = []
            tables = []
            if isinstance(compressor, CountSketchTopK):
                tables = [torch.zeros(compressor.depth, compressor.cells(len(m), density)) for m in matrices]

            def compress(
                compressor: Any = compressor,
                payloads: Any = payloads,
                memories: Any = memories,
                density: float = density,
            ) -> None:
                payloads[:] = [
                    compressor.take(m, g, 1.0, density, step=1, key=i)
                    for i, (m, g) in enumerate(zip(memories, matrices, strict=True))
                ]

            def decompress(compressor: Any = compressor, payloads: Any = payloads, density: float = density) -> None:
                target.zero_()
                at = 0
                for payload, m in zip(payloads, matrices, strict=True):
                    piece = target[at : at + len(m)]
                    for _ in range(1 if compressor.shared else args.ranks):
                        piece.index_add_(0, compressor.positions(payload.at, len(m), density), payload.values)
                    at += len(m)

            def exchange(compressor: Any = compressor, payloads: Any = payloads, tables: Any = tables) -> None:
                for table in tables:
                    dist.all_reduce(table)
                values = torch.cat([p.values for p in payloads])
                if compressor.shared:
                    dist.all_reduce(values)
                    return
                message = torch.cat([values.view(torch.uint8), *(p.at.view(torch.uint8) for p in payloads)])
                dist.all_gather([torch.empty_like(message) for _ in range(args.processes)], message)

            def allreduce() -> None:
                for piece in flat.split(BUCKET // 4):
                    dist.all_reduce(piece)

            turns: list[dict[str, float]] = []
            for turn in range(args.turns + 1):
                times = {"compress": timed(compress, device), "decompress": timed(decompress, device)}
                times["copy"] = timed(lambda: target.copy_(flat), device)
                if args.processes > 1:
                    dist.barrier()
                    times["exchange"] = timed(exchange, device)
                    dist.barrier()
                    times["allreduce"] = timed(allreduce, device)
                    flat.div_(args.processes)
                if turn:
                    turns.append(times)

            def median(key: str, turns: list[dict[str, float]] = turns) -> float | str:
                return round(statistics.median(t[key] for t in turns), 2) if key in turns[0] else ""

            def ratio(key: str, turns: list[dict[str, float]] = turns) -> float | str:
                if key not in turns[0]:
                    return ""
                return round(statistics.median((t["compress"] + t["decompress"]) / t[key] for t in turns), 3)

            if rank == 0:
                wire = sum(compressor.wire_bytes(len(m), density) for m in matrices)
                wire += 4 * sum(len(g) for g in grads if len(g) < SMALLEST)
                out.put({
                    "compressor": name, "density": density, "shapes": args.shapes, "params": sum(sizes),
                    "ranks": args.ranks, "processes": args.processes, "device": args.device,
                    "hardware": hardware(device), "threads": args.threads if args.device == "cpu" else "",
                    "turns": args.turns, "compress_ms": median("compress"), "decompress_ms": median("decompress"),
                    "exchange_ms": median("exchange"), "allreduce_ms": median("allreduce"), "copy_ms": median("copy"),
                    "x_allreduce": ratio("allreduce"), "x_copy": ratio("copy"),
                    "wire_over_dense": round(wire / (4 * sum(sizes)), 5), "torch": torch.__version__,
                })  # fmt: skip
    if args.processes > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="bert-base")
    parser.add_argument("--compressors", default=",".join(COMPRESSORS))
    parser.add_argument("--densities", default="0.01,0.001")
    parser.add_argument("--ranks", type=int, default=2, help="payloads that are put together")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="of each process")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="CSV (default: benchmarks/results/comm_<device>.csv)")
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = mp.get_context("spawn").SimpleQueue()
    rows: list[dict[str, Any]] = []
    if args.processes > 1:
        context = mp.spawn(work, (args, port, out), args.processes, join=False)
        while len(rows) < len(args.compressors.split(",")) * len(args.densities.split(",")):
            # If a rank has died, this raises an error. The pipe is emptied, because the others would wait on a full
            # one.
            while out.empty():
                context.join(timeout=0.2)
            rows.append(out.get())
        while not context.join():
            pass
    else:
        work(0, args, port, out)
        while not out.empty():
            rows.append(out.get())
    path = args.out or RESULTS / f"comm_{args.device}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    table = Table(title=f"{args.shapes}, {args.processes} processes on {rows[0]['hardware']}")
    shown = (
        "compressor", "density", "compress_ms", "decompress_ms", "exchange_ms", "allreduce_ms", "copy_ms",
        "x_allreduce", "x_copy", "wire_over_dense",
    )  # fmt: skip
    for heading in shown:
        table.add_column(heading)
    for row in rows:
        table.add_row(*(str(row[heading]) for heading in shown))
    Console().print(table)


if __name__ == "__main__":
    main()

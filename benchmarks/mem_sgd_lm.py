#!/usr/bin/env python3
"""The language model of the demo on two processes: gradients averaged whole, and sparsified with memory.

The model, text and schedule are those of ``examples/demo_lm.py`` (but gradients are not clipped, unless ``--clip`` is
given), the batch is divided among the processes, which run on this machine. Bytes are counted at the process group
(`_wire.CountingGroup`): whatever anybody hands to a collective.

    python benchmarks/mem_sgd_lm.py                          # minutes for each run
    python benchmarks/mem_sgd_lm.py --runs cs_adam@1e-3,cs_adam+topk:density=0.01@1e-3 --steps 100

A run is ``optimizer[:options][+compressor[:options]]@rate``, options as key=value, separated by ``;``.
"""

from __future__ import annotations

import argparse
import csv
import math
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import demo_lm
from _wire import CountingGroup
from bench_step import hardware

from sketch_plugins import registry
from sketch_plugins.comm import attach

RESULTS = Path(__file__).parent / "results"
FIELDS = (
    "run", "optimizer", "lr", "compressor", "density", "processes", "steps", "eval_loss", "over_dense", "wire_mb",
    "dense_mb", "wire_over_dense", "wire_over_dense_steady", "memory_norm", "step_ms", "clip", "seed", "hardware",
    "torch",
)  # fmt: skip
LEAN = "cs_adam:preset=lean"
DEFAULT = f"{LEAN}@3e-2,{LEAN}+block_topk:density=0.01@3e-2,cs_adam@1e-3,cs_adam+block_topk:density=0.01@1e-3"


def options(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in text.split(";")) if text else {}


def parse(run: str) -> tuple[str, dict[str, str], str, dict[str, Any], float]:
    """``cs_adam:preset=lean+block_topk:density=0.01@3e-2`` in its parts."""
    head, _, rate = run.rpartition("@")
    optimizer, _, compressor = head.partition("+")
    name, _, own = optimizer.partition(":")
    kind, _, theirs = compressor.partition(":")
    numbers = {
        k: float(v) if "." in v or "e" in v else int(v) if v.isdigit() else v for k, v in options(theirs).items()
    }
    return name, options(own), kind, numbers, float(rate)


def work(rank: int, args: argparse.Namespace, run: str, folder: Path, port: int, out: Any) -> None:
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.processes)
    name, own, kind, theirs, lr = parse(run)
    torch.manual_seed(args.seed)
    experiment = demo_lm.build(args, folder)
    group = CountingGroup()
    ddp = torch.nn.parallel.DistributedDataParallel(experiment.model, process_group=group)
    state = attach(ddp, compressor=kind, **theirs) if kind else None
    decay = [p for p in ddp.parameters() if p.ndim > 1]
    groups = [{"params": decay, "weight_decay": 0.01}, {"params": [p for p in ddp.parameters() if p.ndim < 2]}]
    if name == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr, momentum=float(own.get("momentum", 0)))
    elif name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr, weight_decay=0.0)
    else:
        optimizer = registry.get(name).cls(groups, lr=lr, **registry.parse_options(name, own))
    warmup, steps = max(1, args.steps // 10), args.steps

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    rows = experiment.train.columns["input_ids"]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))
    each, at, seconds, marks = args.batch_size // args.processes, 0, [], []
    start = group.sent  # what the construction of DistributedDataParallel has sent
    for _ in range(steps):
        begin = time.perf_counter()
        batch = order[at + rank * each : at + (rank + 1) * each]
        at = (at + args.batch_size) % (len(order) - args.batch_size)
        ids = rows[batch].long()
        ddp(input_ids=ids, labels=ids).loss.backward()
        if args.clip:
            torch.nn.utils.clip_grad_norm_(ddp.parameters(), args.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
        marks.append(group.sent - start)
    held = experiment.eval.columns["input_ids"].long()
    ddp.module.eval()
    with torch.no_grad():
        parts = held.split(32)[rank :: args.processes]
        total = torch.tensor([sum(float(ddp.module(input_ids=p, labels=p).loss) * len(p) for p in parts),
                              sum(map(len, parts))], dtype=torch.float64)  # fmt: skip
    dist.all_reduce(total)
    flat = torch.cat([p.detach().flatten() for p in ddp.parameters()])
    copies = [torch.empty_like(flat) for _ in range(args.processes)]
    dist.all_gather(copies, flat)
    assert all(torch.equal(flat, other) for other in copies), "replicas differ"
    if rank == 0:
        dense = 4 * sum(p.numel() for p in ddp.parameters())
        out.put({
            "run": run, "optimizer": " ".join([name, *(f"{k}={v}" for k, v in own.items())]), "lr": lr,
            "compressor": kind or "none", "density": theirs.get("density", 0.01) if kind else 1.0,
            "processes": args.processes, "steps": steps, "eval_loss": round(float(total[0] / total[1]), 4),
            "wire_mb": round(marks[-1] / 1e6, 3), "dense_mb": round(dense * steps / 1e6, 3),
            "wire_over_dense": round(marks[-1] / (dense * steps), 5),
            "wire_over_dense_steady": round((marks[-1] - marks[steps // 2 - 1]) / (dense * (steps - steps // 2)), 5),
            "memory_norm": round(state.memory_norm(), 3) if state else "",
            "step_ms": round(1e3 * sorted(seconds)[steps // 2], 1), "clip": args.clip, "seed": args.seed,
            "hardware": hardware(torch.device("cpu")), "torch": torch.__version__,
        })  # fmt: skip
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default=DEFAULT)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("demo_out/comm"))
    parser.add_argument("--out", type=Path, default=RESULTS / "mem_sgd_lm.csv")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clip", type=float, default=0.0, help="bound of the gradient's norm; Trainer's is 1")
    for name, value in demo_lm.DEFAULTS.items():
        if name != "lr":
            parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    args = parser.parse_args()
    args.model = args.dataset = args.text = None
    args.quick = False
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "data.pt").exists():
        demo_lm.prepare(args, args.folder)
    results: list[dict[str, Any]] = []
    console = Console()
    for run in args.runs.split(","):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        out = mp.get_context("spawn").SimpleQueue()
        mp.spawn(work, (args, run, args.folder, port, out), args.processes)
        row = out.get()
        # The same optimizer and rate, averaged whole, that ran before.
        dense = [
            r for r in results if (r["optimizer"], r["lr"], r["compressor"]) == (row["optimizer"], row["lr"], "none")
        ]
        row["over_dense"] = round(row["eval_loss"] / dense[0]["eval_loss"] - 1, 5) if dense else ""
        results.append(row)
        console.print(f"{run}: {row['eval_loss']} {row['over_dense']} {row['wire_over_dense']}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(results)
    table = Table(title=f"{args.processes} processes, {args.steps} steps")
    shown = ("optimizer", "lr", "compressor", "eval_loss", "over_dense", "wire_over_dense", "wire_over_dense_steady")
    for heading in shown:
        table.add_column(heading)
    for row in results:
        table.add_row(*(str(row[heading]) for heading in shown))
    console.print(table)


if __name__ == "__main__":
    main()

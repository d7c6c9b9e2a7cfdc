#!/usr/bin/env python3
"""The language model of the examples on two processes, with gradients averaged whole or sparsified with memory.

Model, text and schedule are the ``DEFAULTS`` of ``examples/demo_lm.py``. The batch is divided among the processes,
which run on this machine. Bytes are counted at the process group (`_wire.CountingGroup`): everything that is given to a
collective.

    python benchmarks/mem_sgd_lm.py                          # minutes for each run
    python benchmarks/mem_sgd_lm.py --runs "cs_adam@1e-3,cs_adam+topk:density=0.01@1e-3" --steps 100 --seeds 0

A run is ``optimizer[:options][+compressor[:options]]@rate``, with options as key=value, separated by ``;``. The
optimizer's ``clip`` bounds the norm of the averaged gradient, as Trainer does (at 1 by default); here the default is 0,
no bound. A seed determines the initial parameters and the order of the batches.

`over_dense` compares with the best dense run of the same optimizer and preset, by its mean over the seeds, with any
rate and other options. So a compressed run with options of its own is not compared with a dense run that they harm.
Runs that are already in the CSV are not run again.
"""

from __future__ import annotations

import argparse
import csv
import math
import socket
import statistics
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
    "run", "seed", "optimizer", "lr", "compressor", "density", "processes", "steps", "eval_loss", "over_dense",
    "wire_mb", "dense_mb", "wire_over_dense", "wire_over_dense_steady", "memory_norm", "step_ms", "hardware", "torch",
)  # fmt: skip
# Rates relative to the weights, as in the committed figures.
LEAN = "cs_adam:preset=lean;reference_rms=1"
SPARSE = "block_topk:density=0.01"
DEFAULT = ",".join((f"{LEAN}@3e-2", f"{LEAN}+{SPARSE}@3e-2", "cs_adam@1e-3", f"cs_adam+{SPARSE}@1e-3"))


def options(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in text.split(";")) if text else {}


def parse(run: str) -> tuple[str, dict[str, str], str, dict[str, Any], float]:
    """Split ``cs_adam:preset=lean+block_topk:density=0.01@3e-2`` into its parts."""
    head, _, rate = run.rpartition("@")
    optimizer, _, compressor = head.partition("+")
    name, _, own = optimizer.partition(":")
    kind, _, theirs = compressor.partition(":")
    numbers = {
        k: float(v) if "." in v or "e" in v else int(v) if v.isdigit() else v for k, v in options(theirs).items()
    }
    return name, options(own), kind, numbers, float(rate)


def work(rank: int, args: argparse.Namespace, run: str, seed: int, folder: Path, port: int, out: Any) -> None:
    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=args.processes)
    name, own, kind, theirs, lr = parse(run)
    label, clip = " ".join([name, *(f"{k}={v}" for k, v in own.items())]), float(own.pop("clip", 0.0))
    torch.manual_seed(seed)
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
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    each, at, seconds, marks = args.batch_size // args.processes, 0, [], []
    start = group.sent  # without the bytes that the construction of DistributedDataParallel has sent
    for _ in range(steps):
        begin = time.perf_counter()
        batch = order[at + rank * each : at + (rank + 1) * each]
        at = (at + args.batch_size) % (len(order) - args.batch_size)
        ids = rows[batch].long()
        ddp(input_ids=ids, labels=ids).loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(ddp.parameters(), clip)
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
            "run": run, "seed": seed, "optimizer": label, "lr": lr, "compressor": kind or "none",
            "density": theirs.get("density", 0.01) if kind else 1.0,
            "processes": args.processes, "steps": steps, "eval_loss": round(float(total[0] / total[1]), 4),
            "wire_mb": round(marks[-1] / 1e6, 3), "dense_mb": round(dense * steps / 1e6, 3),
            "wire_over_dense": round(marks[-1] / (dense * steps), 5),
            "wire_over_dense_steady": round((marks[-1] - marks[steps // 2 - 1]) / (dense * (steps - steps // 2)), 5),
            "memory_norm": round(state.memory_norm(), 3) if state else "",
            "step_ms": round(1e3 * sorted(seconds)[steps // 2], 1), "hardware": hardware(torch.device("cpu")),
            "torch": torch.__version__,
        })  # fmt: skip
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default=DEFAULT)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("demo_out/comm"))
    parser.add_argument("--out", type=Path, default=RESULTS / "mem_sgd_lm.csv")
    parser.add_argument("--seeds", default="0,1,2")
    for name, value in demo_lm.DEFAULTS.items():
        if name != "lr":
            parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    args = parser.parse_args()
    args.model = args.dataset = args.text = None
    args.quick = False
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "data.pt").exists():
        demo_lm.prepare(args, args.folder)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    if args.out.exists():
        with args.out.open(newline="") as file:
            results = [row for row in csv.DictReader(file) if int(row["steps"]) == args.steps]
    console = Console()
    for seed in map(int, args.seeds.split(",")):
        for run in args.runs.split(","):
            if any(r["run"] == run and int(r["seed"]) == seed for r in results):
                continue
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            out = mp.get_context("spawn").SimpleQueue()
            mp.spawn(work, (args, run, seed, args.folder, port, out), args.processes)
            results.append(out.get())
            compare(results)
            row = results[-1]
            console.print(f"seed {seed}, {run}: {row['eval_loss']} {row['over_dense']} {row['wire_over_dense']}")
            with args.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                writer.writeheader()
                writer.writerows(results)
    console.print(table(args, results))


def losses(results: list[dict[str, Any]], run: str) -> dict[int, float]:
    """The losses of a run, by seed."""
    return {int(r["seed"]): float(r["eval_loss"]) for r in results if r["run"] == run}


def compare(results: list[dict[str, Any]]) -> None:
    """Add `over_dense` to the rows."""

    def family(row: dict[str, Any]) -> tuple[str, str]:
        name, own, *_ = parse(row["run"])
        return name, own.get("preset", "")

    for row in results:
        whole = {r["run"] for r in results if r["compressor"] == "none" and family(r) == family(row)}
        seeds = {run: losses(results, run) for run in whole}
        fair = [run for run in sorted(whole) if int(row["seed"]) in seeds[run]]
        if row["compressor"] == "none" or not fair:
            row["over_dense"] = ""
            continue
        best = min(fair, key=lambda run: statistics.mean(seeds[run].values()))
        row["over_dense"] = round(float(row["eval_loss"]) / seeds[best][int(row["seed"])] - 1, 5)


def table(args: argparse.Namespace, results: list[dict[str, Any]]) -> Table:
    out = Table(title=f"{args.processes} processes, {args.steps} steps, mean (and range) over the seeds")
    for heading in ("run", "seeds", "eval loss", "over dense, %", "wire / dense", "steady"):
        out.add_column(heading)
    for run in dict.fromkeys(row["run"] for row in results):
        rows = [r for r in results if r["run"] == run]
        found = [float(r["eval_loss"]) for r in rows]
        over = [100 * float(r["over_dense"]) for r in rows if r["over_dense"] != ""]
        out.add_row(
            run, str(len(rows)), f"{statistics.mean(found):.4f} ({min(found):.4f} to {max(found):.4f})",
            f"{statistics.mean(over):+.2f} ({min(over):+.2f} to {max(over):+.2f})" if over else "",
            f"{float(rows[0]['wire_over_dense']):.4f}", f"{float(rows[0]['wire_over_dense_steady']):.4f}",
        )  # fmt: skip
    return out


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Time of whole training steps (forward, backward, optimizer), compared with AdamW(fused), on BERT-base's layers.

Both optimizers train copies of one model on the same data, with alternating steps, so that the ratio holds on a machine
whose speed drifts. Work in every n-th step only (Sketchy's solves) counts, because means are over whole periods.

    python benchmarks/bench_training.py                       # Sketchy, 16 x 128 tokens, 2 layers
    python benchmarks/bench_training.py --layers 12 --device cuda --optimizers sketchy,sketchy:solver=power
    git worktree add ../old COMMIT; python benchmarks/bench_training.py --old ../old   # old and new code in one run
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from bench_step import build, hardware, timed

from sketch_plugins import state_report

if TYPE_CHECKING:
    from rich.table import Table

RESULTS = Path(__file__).parent / "results"
FIELDS = (
    "optimizer", "code", "layers", "batch", "length", "dtype", "device", "hardware", "threads", "torch", "steps",
    "training_ms", "adamw_training_ms", "x_adamw_training", "step_ms", "adamw_step_ms", "share", "bytes_per_param",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", default="sketchy,sketchy:solver=power,sketchy:rank=64,cs_adam:preset=lean")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="a multiple of update_freq")
    parser.add_argument("--out", type=Path, help="CSV (default: benchmarks/results/training_<device>_<dtype>.csv)")
    parser.add_argument("--old", type=Path, help="checkout of earlier code, whose optimizers are measured beside ours")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(measure(args.one, args, lambda: None)))
        return
    # Imported here, because `gpu.py` may run this with torch and Triton alone.
    from rich.console import Console
    from rich.progress import Progress

    rows = []
    names = args.optimizers.split(",")
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("training", total=len(names) * (args.warmup + args.steps))
        for name in names:
            progress.update(task, description=name)
            if args.old:
                rows.append({**of_old_code(name, args.old), "code": "old"})
            rows.append({**measure(name, args, lambda: progress.advance(task)), "code": "new"})
    out = args.out or RESULTS / f"training_{args.device}_{args.dtype}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as f:
        writer = csv.DictWriter(f, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    Console(width=None if sys.stdout.isatty() else 120).print(table(rows))
    print(f"written to {out}")


def of_old_code(name: str, checkout: Path) -> dict[str, object]:
    """What `measure` returns in a process that imports the package from another checkout."""
    if not (checkout / "sketch_plugins").is_dir():
        sys.exit(f"--old {checkout} has no folder sketch_plugins: it has to be a checkout of this repository")
    path = os.pathsep.join(str(checkout.resolve() / folder) for folder in ("", "integrations"))
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"the measurement of {name} with the code of {checkout} has failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, args: argparse.Namespace, tick) -> dict[str, object]:
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(768, 12, 3072, dropout=0.0, activation="gelu", batch_first=True)
    models = [torch.nn.TransformerEncoder(layer, args.layers, enable_nested_tensor=False).to(device, dtype)]
    models.append(copy.deepcopy(models[0]))
    optimizers = [
        build(name, list(models[0].parameters())),
        torch.optim.AdamW(models[1].parameters(), lr=1e-4, fused=True),
    ]
    data = torch.randn(args.batch, args.length, 768, device=device, dtype=dtype)
    target = torch.randn_like(data)

    def gradients(model: torch.nn.Module) -> None:
        model.zero_grad(set_to_none=False)
        torch.nn.functional.mse_loss(model(data), target).backward()

    times: list[tuple[float, ...]] = []
    for i in range(args.warmup + args.steps):
        row = []
        for model, optimizer in zip(models, optimizers, strict=True):
            row += [timed(lambda m=model: gradients(m), device), timed(optimizer.step, device)]
        times += [tuple(row)] if i >= args.warmup else []
        tick()
    passes, step, adamw_passes, adamw_step = (statistics.fmean(t[i] for t in times) for i in range(4))
    # Forward and backward are the same work for both, so both get their mean. Otherwise its noise would decide the
    # result.
    passes = adamw_passes = (passes + adamw_passes) / 2
    return {
        "optimizer": name,
        "layers": args.layers,
        "batch": args.batch,
        "length": args.length,
        "dtype": args.dtype,
        "device": args.device,
        "hardware": hardware(device),
        "threads": args.threads if device.type == "cpu" else "",
        "torch": torch.__version__,
        "steps": args.steps,
        "training_ms": round(passes + step, 1),
        "adamw_training_ms": round(adamw_passes + adamw_step, 1),
        "x_adamw_training": round((passes + step) / (adamw_passes + adamw_step), 3),
        "step_ms": round(step, 2),
        "adamw_step_ms": round(adamw_step, 2),
        "share": round(step / (passes + step), 3),
        "bytes_per_param": round(state_report(optimizers[0]).bytes_per_param, 3),
    }


def table(rows: list[dict[str, object]]) -> Table:
    from rich.table import Table

    first = rows[0]
    out = Table(
        title=f"training steps: {first['layers']} layers of BERT-base, {first['batch']} x {first['length']}, "
        f"{first['dtype']}",
        caption=f"{first['hardware']}, torch {first['torch']}; means of {first['steps']} steps",
    )
    out.add_column("optimizer")
    for heading in (
        "training step ms",
        "AdamW's",
        "ratio",
        "optimizer.step ms",
        "AdamW's",
        "state B/param",
    ):
        out.add_column(heading, justify="right")
    for row in rows:
        keys = ("training_ms", "adamw_training_ms", "x_adamw_training", "step_ms", "adamw_step_ms", "bytes_per_param")
        name = f"{row['optimizer']} ({row['code']} code)" if row["code"] == "old" else row["optimizer"]
        out.add_row(*map(str, (name, *(row[k] for k in keys))))
    return out


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Time of `optimizer.step()`, compared with fused AdamW and with a copy of the parameters, in one run.

Each optimizer runs in a process of its own. Every timed step is paired with a step of `AdamW(fused=True)` and with a
copy of as many numbers, so that the ratios hold on a machine whose speed drifts; medians are reported. `temporary` is
the peak of memory during a step minus the memory of parameters, gradients and state.

    python benchmarks/bench_step.py                        # every optimizer and preset, BERT-base shapes
    python benchmarks/bench_step.py --optimizers cs_adam,cs_adam:preset=lean --threads 1
    python benchmarks/bench_step.py --shapes bert-base,llama-1b --dtype bfloat16 --device cuda

Peers (`torch:`, `hf:`, `bnb:`, `ao:`) whose package cannot be imported are left out and named. `x limit` is the time
relative to that of the least traffic at the bandwidth of the copy in the same run. The least traffic is 12 bytes a
float32 parameter (6 in bfloat16: read p and g, write p), and the state read and written once.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sketch_plugins import registry, state_report

if TYPE_CHECKING:
    from rich.table import Table

RESULTS = Path(__file__).parent / "results"
DEFAULT = (
    "cs_adam,cs_adam:preset=lean,cs_adam:preset=lean;lagged_rms=true,sm3,sm3:preset=lean,"
    "cs_adam:first_moment=bf16,cs_adam:preset=exact,cs_rmsprop,cs_adagrad,cs_momentum,"
    "cs_adam:fused=false,sm3:fused=false,torch:AdamW,torch:AdamW-foreach,torch:Adafactor,"
    "hf:Adafactor,bnb:AdamW8bit,ao:AdamW8bit,ao:AdamW4bit"
)
# (layers, width, width of the feed-forward, vocabulary, positions)
SHAPES = {
    "bert-base": (12, 768, 3072, 30522, 512),
    "bert-large": (24, 1024, 4096, 30522, 512),
    "gpt2-medium": (24, 1024, 4096, 50257, 1024),
    "llama-1b": (16, 2048, 8192, 128256, 0),
    "tiny": (2, 128, 512, 1000, 512),
}
PEERS = {"hf": "transformers.optimization", "bnb": "bitsandbytes.optim", "ao": "torchao.optim"}
FIELDS = (
    "optimizer", "shapes", "params", "dtype", "device", "hardware", "threads", "torch", "steps", "step_ms", "adamw_ms",
    "copy_ms", "x_adamw", "x_copy", "x_limit", "first_step_s", "bytes_per_param", "temporary_mb",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", default=DEFAULT, help="comma-separated: name[:option=value[;option=value...]]")
    parser.add_argument("--shapes", default="bert-base", help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--out", type=Path, help="CSV (default: benchmarks/results/step_<device>_<shapes>_<dtype>.csv)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in args.shapes.split(","):
        if name not in SHAPES:
            parser.error(f"--shapes {name!r} is not one of {', '.join(SHAPES)}")
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return
    for name in args.shapes.split(","):
        compare(name, args)


def compare(shapes: str, args: argparse.Namespace) -> None:
    # Imported here, because `gpu.py` may run this with torch and Triton alone.
    from rich.console import Console
    from rich.progress import Progress

    out = args.out or RESULTS / f"step_{args.device}_{shapes}_{args.dtype}.csv"
    rows, missing = [], []
    names = args.optimizers.split(",")
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("timing", total=len(names))
        for name in names:
            progress.update(task, description=name)
            run = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--shapes", shapes, "--one", name],
                stdout=subprocess.PIPE,
                text=True,
            )
            if run.returncode:
                raise SystemExit(f"{name}: the benchmark's process ended with code {run.returncode}")
            row = json.loads(run.stdout.splitlines()[-1])
            if "missing" in row:
                missing.append(f"{name} ({row['missing']})")
            else:
                rows.append(row)
            progress.advance(task)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as f:
        writer = csv.DictWriter(f, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    Console(width=None if sys.stdout.isatty() else 120).print(table(rows))
    plot(rows, out.with_suffix(".png"))
    print(f"written to {out} and {out.with_suffix('.png')}")
    if missing:
        print("left out:", "; ".join(missing))


def measure(name: str, args: argparse.Namespace) -> dict[str, object]:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    params = [torch.nn.Parameter(torch.randn(s, device=device, dtype=dtype) * 0.02) for s in shapes(args.shapes)]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    count = sum(p.numel() for p in params)
    copies = [torch.empty_like(p) for p in params]
    reference = torch.optim.AdamW(params, lr=1e-4, fused=True)
    try:
        optimizer = build(name, params)
    except ImportError as error:
        return {"missing": str(error)}

    def copy() -> None:
        for target, p in zip(copies, params, strict=True):
            target.copy_(p.detach())

    runs: list[Callable[[], object]] = [optimizer.step, reference.step, copy]
    start = time.perf_counter()
    optimizer.step()  # allocates the state and compiles
    if device.type == "cuda":
        torch.cuda.synchronize()
    first = time.perf_counter() - start
    for _ in range(args.warmup):
        for run in runs:
            run()
    temporary = temporary_memory(optimizer.step, device)
    times = [[timed(run, device) for run in runs] for _ in range(args.steps)]
    report = state_report(optimizer)
    size = dtype.itemsize
    least = (3 * size + 2 * report.bytes_per_param) / (2 * size)  # relative to the traffic of the copy
    return {
        "optimizer": name,
        "shapes": args.shapes,
        "params": count,
        "dtype": args.dtype,
        "device": args.device,
        "hardware": hardware(device),
        "threads": args.threads if device.type == "cpu" else "",
        "torch": torch.__version__,
        "steps": args.steps,
        **{
            key: round(statistics.median(t[i] for t in times), 3)
            for i, key in enumerate(("step_ms", "adamw_ms", "copy_ms"))
        },
        "x_adamw": round(statistics.median(t[0] / t[1] for t in times), 3),
        "x_copy": round(statistics.median(t[0] / t[2] for t in times), 3),
        "x_limit": round(statistics.median(t[0] / t[2] for t in times) / least, 3),
        "first_step_s": round(first, 2),
        "bytes_per_param": round(report.bytes_per_param, 4),
        "temporary_mb": temporary,
    }


def build(name: str, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    name, _, text = name.partition(":")
    if name == "torch":
        text, _, how = text.partition("-")
        extra = {how or "fused": True} if text == "AdamW" else {}
        return getattr(torch.optim, text)(params, lr=1e-4, **extra)
    if name in PEERS:
        extra = {"relative_step": False, "scale_parameter": False} if name == "hf" else {}
        return getattr(importlib.import_module(PEERS[name]), text)(params, lr=1e-4, **extra)
    options = dict(pair.split("=", 1) for pair in text.split(";")) if text else {}
    return registry.get(name).cls(params, lr=1e-4, **registry.parse_options(name, options))


def shapes(name: str) -> Iterator[tuple[int, ...]]:
    layers, d, inner, vocabulary, positions = SHAPES[name]
    yield vocabulary, d
    if name.startswith("llama"):  # grouped queries: keys and values have a quarter of the width; embeddings are tied
        for _ in range(layers):
            yield from ((d, d), (d // 4, d), (d // 4, d), (d, d), (inner, d), (inner, d), (d, inner), (d,), (d,))
        yield (d,)
        return
    yield positions, d
    if name.startswith("gpt2"):
        for _ in range(layers):
            yield from ((d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,))
            yield from ((d, inner), (inner,), (inner, d), (d,))
        yield from ((d,), (d,))
        return
    yield from ((2, d), (d,), (d,))
    for _ in range(layers):
        yield from ((d, d), (d,)) * 4
        yield from ((d,), (d,), (inner, d), (inner,), (d, inner), (d,), (d,), (d,))
    yield from ((d, d), (d,))


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start_time = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start_time)


def temporary_memory(run: Callable[[], object], device: torch.device) -> float | str:
    """Megabytes that one call takes beyond the memory allocated before it; "" if this cannot be measured."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return round((torch.cuda.max_memory_allocated(device) - before) / 1e6, 2)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present resident memory
    except OSError:
        return ""
    before = resident("VmRSS")
    run()
    return round((resident("VmHWM") - before) / 1e6, 2)


def resident(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
        name = line.split(":", 1)[1].strip()
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def table(rows: list[dict[str, object]]) -> Table:
    from rich.table import Table

    first = rows[0]
    where = f"{first['hardware']}, {first['threads']} threads" if first["threads"] != "" else str(first["hardware"])
    out = Table(
        title=f"optimizer.step(), {first['shapes']} shapes, {int(str(first['params'])) / 1e6:.1f} M {first['dtype']}",
        caption=f"{where}, torch {first['torch']}; medians of {first['steps']} paired steps",
    )
    out.add_column("optimizer")
    for heading in ("step ms", "x AdamW fused", "x copy", "x limit", "state B/param", "temporary MB", "first step s"):
        out.add_column(heading, justify="right")
    for row in rows:
        out.add_row(
            str(row["optimizer"]), f"{row['step_ms']:.1f}", f"{row['x_adamw']:.2f}", f"{row['x_copy']:.2f}",
            f"{row['x_limit']:.2f}", f"{row['bytes_per_param']:.3f}", str(row["temporary_mb"]),
            f"{row['first_step_s']:.1f}",
        )  # fmt: skip
    return out


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Plot times relative to fused AdamW against bytes of state."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for row in rows:
        x, y = float(str(row["bytes_per_param"])), float(str(row["x_adamw"]))
        axes.plot(x, y, "o", color="tab:gray" if ":" in str(row["optimizer"])[:6] else "tab:blue")
        axes.annotate(str(row["optimizer"]), (x, y), fontsize=7, xytext=(4, 2), textcoords="offset points")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="state, bytes a parameter", ylabel="step time / AdamW(fused)")
    axes.set_title(f"{rows[0]['shapes']}, {rows[0]['dtype']}: {rows[0]['hardware']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

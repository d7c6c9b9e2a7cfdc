#!/usr/bin/env python3
"""A small convolution net on scikit-learn's digits: each optimizer at its own best learning rate.

Three convolutions of 3 x 3 and a linear head, 25,866 parameters, on 1,797 images of 8 x 8: 1,000 for training, 300 for
the choice of the learning rate, 497 for the test. Learning rates are swept by factors of 2 from each contender's centre
until the best one, by the mean validation loss of the seeds, has worse neighbours. There is a linear warm-up over 5 %
of the steps, then a cosine to 0, and no weight decay. Nothing is downloaded.

    python benchmarks/digits_cnn.py                         # every contender, 3 seeds, 20 epochs
    python benchmarks/digits_cnn.py --contenders adamw,sketchy:rank=8:0.05 --epochs 10 --out some.csv

A contender that is not in the list is ``name[:option=value[;option=value...]]:centre`` with a name of the registry.

`steps to AdamW` is the first evaluated step (they are 8 apart) at which the loss of the training set is at or below
AdamW's final loss, at AdamW's best rate and with the same seed. `steps to 0.01` is the same for a loss of 0.01. "-"
means that a seed does not reach it.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_step import hardware
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from sketch_plugins import registry, state_report

RESULTS = Path(__file__).parent / "results"
# Contender -> the learning rate at which its sweep starts.
CENTRES = {
    "adamw": 4e-3,
    "sgd": 0.1,
    "cs_adam": 4e-3,
    "cs_adam:preset=lean": 2e-3,
    "sm3:preset=ema": 2e-3,
    "sketchy": 2e-3,
    "sketchy:preset=paper": 4e-3,
    "sketchy:rank=16": 2e-3,
}
BATCH, LOOK = 50, 8
FIELDS = (
    "contender", "lr", "best", "seed", "epochs", "steps", "valid_loss", "test_loss_5", "test_accuracy_5", "test_loss",
    "test_accuracy", "train_loss", "steps_to_adamw", "steps_to_0.01", "bytes_per_param", "hardware", "threads", "torch",
)  # fmt: skip


class Data(NamedTuple):
    """Images ``(n, 1, 8, 8)`` in [-1, 1] and digits, in three parts."""

    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Run(NamedTuple):
    """One training run."""

    row: dict[str, Any]
    curve: list[tuple[int, float]]  # (step, loss of the training set)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", default=",".join(CENTRES), help="comma-separated")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "digits_cnn.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = digits()
    found: dict[str, dict[float, list[Run]]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        for contender in args.contenders.split(","):
            name, centre = (contender, CENTRES[contender]) if contender in CENTRES else named(contender)
            task = progress.add_task(name, total=None)

            def trained(lr: float, name: str = name, task: Any = task) -> list[Run]:
                progress.update(task, description=f"{name} lr={lr:g}")
                runs = [train(name, lr, seed, data, args.epochs) for seed in range(args.seeds)]
                progress.advance(task, len(runs))
                return runs

            found[name] = sweep(trained, centre)
            progress.update(task, description=name, total=args.seeds * len(found[name]))
    rows = finish(found, hardware(torch.device("cpu")), args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as f:
        writer = csv.DictWriter(f, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    Console(width=None if sys.stdout.isatty() else 180).print(table(rows))
    plot(found, rows, args.out.with_suffix(".png"))
    print(f"written to {args.out} and {args.out.with_suffix('.png')}")


def named(contender: str) -> tuple[str, float]:
    name, _, centre = contender.rpartition(":")
    try:
        return name, float(centre)
    except ValueError:
        raise SystemExit(f"{contender!r} is not one of {', '.join(CENTRES)}, and has no centre at its end") from None


def digits() -> Data:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    y = torch.tensor(labels)
    # The data are sorted by writer, so they are shuffled, in the same way for every seed.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return Data(*((x[part], y[part]) for part in order.split([1000, 300, 497])))


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def build(contender: str, params: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    name, _, text = contender.partition(":")
    if name == "adamw":
        return torch.optim.AdamW(params, lr, weight_decay=0.0, fused=True)
    if name == "sgd":
        return torch.optim.SGD(params, lr, momentum=0.9)
    options = dict(pair.split("=", 1) for pair in text.split(";")) if text else {}
    return registry.get(name).cls(params, lr=lr, weight_decay=0.0, **registry.parse_options(name, options))


def train(contender: str, lr: float, seed: int, data: Data, epochs: int) -> Run:
    model = net(seed)
    optimizer = build(contender, model.parameters(), lr)
    x, y = data.train
    per_epoch = len(x) // BATCH
    steps = epochs * per_epoch
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        return (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    order = torch.Generator().manual_seed(seed)
    row: dict[str, Any] = {"contender": contender, "lr": lr, "seed": seed, "epochs": epochs, "steps": steps}
    curve = []
    for step in range(1, steps + 1):
        if step % per_epoch == 1:
            batches = torch.randperm(len(x), generator=order).split(BATCH)
        batch = batches[(step - 1) % per_epoch]
        loss = functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        if not math.isfinite(loss.item()):
            break
        optimizer.step()
        schedule.step()
        if step % LOOK == 0 or step == steps:
            curve.append((step, evaluate(model, data.train)[0]))
        if step == 5 * per_epoch:
            row["test_loss_5"], row["test_accuracy_5"] = evaluate(model, data.test)
    row["train_loss"] = curve[-1][1] if curve and curve[-1][0] == steps else math.nan
    row["valid_loss"] = math.nan if math.isnan(row["train_loss"]) else evaluate(model, data.valid)[0]
    row["test_loss"], row["test_accuracy"] = evaluate(model, data.test)
    report = state_report(optimizer)
    row["bytes_per_param"] = report.bytes_per_param
    return Run(row, curve)


@torch.no_grad()
def evaluate(model: nn.Module, part: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Mean loss and accuracy."""
    x, y = part
    out = model(x)
    return functional.cross_entropy(out, y).item(), (out.argmax(1) == y).float().mean().item()


def sweep(trained: Callable[[float], list[Run]], centre: float) -> dict[float, list[Run]]:
    """Sweep rates by factors of 2 until the best one has a worse neighbour on both sides."""
    found = {centre * factor: trained(centre * factor) for factor in (0.5, 1.0, 2.0)}
    while len(found) < 12:
        best = chosen(found)
        if best == min(found):
            lr = best / 2
        elif best == max(found):
            lr = best * 2
        else:
            break
        found[lr] = trained(lr)
    return dict(sorted(found.items()))


def chosen(found: dict[float, list[Run]]) -> float:
    """The rate with the least mean validation loss; rates with losses that are not finite are not chosen."""

    def loss(lr: float) -> float:
        mean = statistics.fmean(run.row["valid_loss"] for run in found[lr])
        return mean if math.isfinite(mean) else math.inf

    return min(found, key=loss)


def finish(found: dict[str, dict[float, list[Run]]], where: str, threads: int) -> list[dict[str, Any]]:
    adamw = found.get("adamw")
    goals = [run.row["train_loss"] for run in adamw[chosen(adamw)]] if adamw else []
    rows = []
    for runs_of in found.values():
        best = chosen(runs_of)
        for lr, runs in runs_of.items():
            for run in runs:
                row = {**run.row, "best": lr == best, "steps_to_0.01": first(run.curve, 0.01)}
                row["steps_to_adamw"] = first(run.curve, goals[run.row["seed"]]) if goals else ""
                row |= {"hardware": where, "threads": threads, "torch": torch.__version__}
                rows.append({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    return rows


def first(curve: list[tuple[int, float]], goal: float) -> int | str:
    """The first step that reaches the goal."""
    return next((step for step, loss in curve if loss <= goal), "-")


def best_of(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    out: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["best"]:
            out.setdefault(row["contender"], []).append(row)
    return out


def table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    seeds = len({row["seed"] for row in rows})
    out = Table(
        title=f"scikit-learn's digits, a net of three convolutions, {first['epochs']} epochs ({first['steps']} steps)",
        caption=f"mean +- standard deviation of {seeds} seeds, test set of 497; {first['hardware']}, "
        f"{first['threads']} threads, torch {first['torch']}",
    )
    out.add_column("optimizer")
    for heading in (
        "best lr", "state B/param", "accuracy %, 5 epochs", "loss, 5 epochs", "accuracy %", "loss", "training loss",
        "steps to 0.01", "to AdamW",
    ):  # fmt: skip
        out.add_column(heading, justify="right")
    for contender, runs in best_of(rows).items():
        out.add_row(
            contender, runs[0]["lr"], f"{float(runs[0]['bytes_per_param']):.2f}",
            spread(runs, "test_accuracy_5", 100, 1), spread(runs, "test_loss_5", 1, 3),
            spread(runs, "test_accuracy", 100, 1), spread(runs, "test_loss", 1, 3), spread(runs, "train_loss", 1, 5),
            *(" ".join(str(run[key]) for run in runs) for key in ("steps_to_0.01", "steps_to_adamw")),
        )  # fmt: skip
    return out


def spread(runs: list[dict[str, Any]], key: str, unit: float, digits: int) -> str:
    values = [unit * float(run[key]) for run in runs if key in run]
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} +- {statistics.stdev(values):.{digits}f}"


def plot(found: dict[str, dict[float, list[Run]]], rows: list[dict[str, Any]], path: Path) -> None:
    """Plot training loss by step at the best rate, and validation loss by rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5))
    for contender, runs_of in found.items():
        best = chosen(runs_of)
        curves = [dict(run.curve) for run in runs_of[best]]
        shared = [s for s in curves[0] if all(s in c for c in curves)]
        (line,) = left.plot(shared, [statistics.fmean(c[s] for c in curves) for s in shared], label=contender)
        losses = [statistics.fmean(run.row["valid_loss"] for run in runs) for runs in runs_of.values()]
        right.plot([lr / best for lr in runs_of], losses, "o-", color=line.get_color(), label=f"{contender}: {best:g}")
    left.set(yscale="log", xlabel="step", ylabel="loss of the training set")
    right.set(xscale="log", yscale="log", xlabel="learning rate / the best one", ylabel="validation loss")
    right.set_xscale("log", base=2)
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    figure.suptitle(f"digits, three convolutions; mean of seeds: {rows[0]['hardware']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

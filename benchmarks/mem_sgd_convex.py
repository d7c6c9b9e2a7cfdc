#!/usr/bin/env python3
"""Logistic regression by SGD that applies one entry of each step, with and without memory (arXiv 1809.07599, fig. 2).

Two problems are generated, like the two of the paper:

* epsilon-like: 2,000 dense, correlated features, 10,000 samples;
* rcv1-like: 20,000 features, of which a sample has 75; their frequencies follow Zipf's law, with weights as in tf-idf;
  20,000 samples.

Samples have norm 1. A step takes one sample. The regulariser is 1 / n, and the learning rate is the paper's, gamma /
(lambda * (a + t)). gamma is swept for each method over one epoch, by factors of 2 until the best one has a worse
neighbour on both sides. The best one runs for all epochs, and also for 30 epochs for rand-1 with memory on the second
problem. The loss is that on all samples of the weighted average of the iterates (`MemSGD.averaged_parameters`); L-BFGS
finds the optimum. Runs that are already in the CSV are not run again.

    python benchmarks/mem_sgd_convex.py                      # a quarter of an hour
    python benchmarks/mem_sgd_convex.py --problems epsilon --epochs 1 --out convex.csv
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from bench_step import hardware
from rates import best_rate, sweep
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from sketch_plugins import MemSGD

RESULTS = Path(__file__).parent / "results"
FIELDS = (
    "problem", "method", "gamma", "best", "epochs", "epoch", "steps", "loss", "optimum", "sent_mb", "hardware", "torch",
)  # fmt: skip
CENTRE = 2.0  # start of the sweeps
MOST = 14  # maximum number of rates in a sweep
LONGER = {("rcv1-like", "rand-1, memory"): 30}  # after 12 epochs it has sent each of 20,000 entries 12 times on average
# Label -> options of MemSGD, and the bytes that a worker sends in each step, given d.
METHODS = {
    "SGD": ({"density": 1.0}, lambda d: 4 * d),
    "top-1, memory": ({"k": 1}, lambda d: 8),
    "rand-1, memory": ({"k": 1, "compressor": "randk"}, lambda d: 4),
    "top-1, no memory": ({"k": 1, "memory": False}, lambda d: 8),
    "rand-1, no memory": ({"k": 1, "compressor": "randk", "memory": False}, lambda d: 4),
}


class Problem(NamedTuple):
    """Samples as rows: positions and values of their features (all of them, if dense), labels of -1 and 1."""

    name: str
    size: int
    index: Tensor | None
    values: Tensor
    y: Tensor

    def scores(self, w: Tensor) -> Tensor:
        """<sample, w> of every sample."""
        return self.values @ w if self.index is None else (self.values * w[self.index]).sum(1)

    def loss(self, w: Tensor) -> Tensor:
        """The loss with the regulariser."""
        return functional.softplus(-self.y * self.scores(w)).mean() + w.square().sum() / (2 * len(self.y))


def epsilon(samples: int = 10_000, features: int = 2_000) -> Problem:
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(features, features, generator=g) * torch.arange(1, features + 1) ** -0.4
    x = torch.randn(samples, features, generator=g) @ mix.T
    x /= x.norm(dim=1, keepdim=True)
    w = torch.randn(features, generator=g)
    score = x @ w
    y = torch.rand(samples, generator=g) < torch.sigmoid(4 * score / score.std())
    return Problem("epsilon-like", features, None, x, y * 2.0 - 1.0)


def rcv1(samples: int = 20_000, features: int = 20_000, each: int = 75) -> Problem:
    g = torch.Generator().manual_seed(0)
    frequency = (torch.arange(features) + 20.0) ** -1.0
    topic = torch.rand(samples, generator=g) < 0.5
    # Words are more frequent in one of two topics.
    slant = torch.exp(0.8 * torch.randn(features, generator=g))
    index = torch.empty(samples, each, dtype=torch.int64)
    for rows, weights in ((topic, frequency * slant), (~topic, frequency / slant)):
        # In parts, because multinomial draws a random number for each of its classes.
        for part in rows.nonzero().squeeze(1).split(500):
            index[part] = torch.multinomial(weights.expand(len(part), -1), each, generator=g)
    values = (1 + torch.rand(samples, each, generator=g)) * (frequency.sum() / frequency)[index].log()
    values /= values.norm(dim=1, keepdim=True)
    flipped = torch.rand(samples, generator=g) < 0.03
    return Problem("rcv1-like", features, index, values, (topic ^ flipped) * 2.0 - 1.0)


def optimum(problem: Problem) -> float:
    w = torch.zeros(problem.size, requires_grad=True)
    lbfgs = torch.optim.LBFGS([w], max_iter=300, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-7)

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = problem.loss(w)
        loss.backward()
        return loss

    lbfgs.step(closure)
    return float(problem.loss(w.detach()))


def run(problem: Problem, options: dict, gamma: float, epochs: int, shift: float) -> Iterator[tuple[int, float]]:
    """(steps, loss of the average) at some points of a run."""
    n = len(problem.y)
    w = torch.nn.Parameter(torch.zeros(problem.size))
    w.grad = torch.zeros(problem.size)
    # gamma / (lambda * (a + t)) = lr * a / (a + t)
    optimizer = MemSGD([w], lr=gamma * n / shift, shift=shift, averaging=True, **options)
    order = torch.cat([
        torch.randperm(n, generator=torch.Generator().manual_seed(epoch)) for epoch in range(epochs)
    ])  # fmt: skip
    marks = {
        int(len(order) * part) for part in (0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
    }
    labels = problem.y.tolist()
    for step, i in enumerate(order.tolist(), 1):
        x, y = problem.values[i], labels[i]
        with torch.no_grad():
            score = x @ w if problem.index is None else x @ w[problem.index[i]]
            factor = -y * torch.sigmoid(-y * score)
            torch.div(w, n, out=w.grad)
            if problem.index is None:
                w.grad.add_(x * factor)
            else:
                w.grad.index_add_(0, problem.index[i], x * factor)
        optimizer.step()
        if step in marks:
            yield step, float(problem.loss(optimizer.averaged_parameters()[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", default="epsilon,rcv1")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "mem_sgd_convex.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    console, rows = Console(), read(args.out)
    for make in (globals()[name] for name in args.problems.split(",")):
        problem = make()
        best_possible = optimum(problem)
        console.print(f"{problem.name}: {len(problem.y)} x {problem.size}, optimum {best_possible:.4f}")
        # The paper's choice: the order of d / k, or ten times that if samples are sparse.
        shift = float(problem.size * (1 if problem.index is None else 10))
        for method, (options, message) in METHODS.items():
            for row in rows:  # rows of the file may have had another best rate
                if (row["problem"], row["method"]) == (problem.name, method):
                    row["best"] = 0

            def curve(
                gamma: float, epochs: int, best: int, problem: Problem = problem, method: str = method,
                options: dict = options, message: Callable[[int], int] = message, shift: float = shift,
                best_possible: float = best_possible,
            ) -> list[dict]:  # fmt: skip
                """Rows of one run; those of the file if it has them."""
                key = (problem.name, method, gamma, epochs)
                found = [r for r in rows if (r["problem"], r["method"], r["gamma"], r["epochs"]) == key]
                if not found:
                    for steps, loss in run(problem, options, gamma, epochs, shift):
                        found.append({
                            "problem": problem.name, "method": method, "gamma": gamma, "best": 0, "epochs": epochs,
                            "epoch": round(steps / len(problem.y), 3), "steps": steps, "loss": round(loss, 6),
                            "optimum": round(best_possible, 6),
                            "sent_mb": round(steps * message(problem.size) / 1e6, 4),
                            "hardware": hardware(torch.device("cpu")), "torch": torch.__version__,
                        })  # fmt: skip
                    rows.extend(found)
                    write(args.out, rows)
                for row in found:
                    row["best"] = best
                console.print(f"{method}, gamma {gamma:g}, epochs {epochs}: {found[-1]['loss']:.4f}")
                return found

            best = best_rate(
                sweep(lambda gamma, curve=curve: curve(gamma, 1, 0), lambda found: found[-1]["loss"], CENTRE, MOST),
                lambda found: found[-1]["loss"],
            )
            for epochs in (args.epochs, LONGER.get((problem.name, method), args.epochs)):
                curve(best, epochs, 1)
    order = list(METHODS)
    rows.sort(key=lambda r: (r["problem"], order.index(r["method"]), r["best"], r["epochs"], r["gamma"], r["steps"]))
    write(args.out, rows)
    console.print(table(rows))
    plot(rows, args.epochs, args.out.with_suffix(".png"))


def read(path: Path) -> list[dict]:
    """Rows of an earlier run; empty if there was none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        kinds = {"gamma": float, "best": int, "epochs": int, "epoch": float, "steps": int, "loss": float,
                 "optimum": float, "sent_mb": float}  # fmt: skip
        return [{key: kinds.get(key, str)(value) for key, value in row.items()} for row in csv.DictReader(file)]


def write(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)


def table(rows: list[dict]) -> Table:
    out = Table(title="loss of the averaged iterate after the last step")
    for heading in ("problem", "method", "gamma", "epochs", "loss", "optimum", "sent by a worker, MB"):
        out.add_column(heading)
    lasts = {(row["problem"], row["method"], row["epochs"]): row for row in rows if row["best"]}
    for last in lasts.values():
        out.add_row(
            last["problem"], last["method"], f"{last['gamma']:g}", str(last["epochs"]), f"{last['loss']:.4f}",
            f"{last['optimum']:.4f}", f"{last['sent_mb']:,.1f}",
        )  # fmt: skip
    return out


def plot(rows: list[dict], epochs: int, path: Path) -> None:
    """Plot the distance from the optimum by steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    problems = list(dict.fromkeys(row["problem"] for row in rows))
    figure, axes = pyplot.subplots(1, len(problems), figsize=(5.5 * len(problems), 4.2), squeeze=False)
    for axis, problem in zip(axes[0], problems, strict=True):
        for number, method in enumerate(METHODS):
            key = (problem, method, 1, epochs)
            curve = [r for r in rows if (r["problem"], r["method"], r["best"], r["epochs"]) == key]
            style = {"color": f"C{number}", "linestyle": "--" if "no memory" in method else "-"}
            axis.plot([r["epoch"] for r in curve], [r["loss"] for r in curve], label=method, marker=".", **style)
        axis.axhline(curve[0]["optimum"], color="black", linewidth=0.8, label="optimum")
        axis.set(title=problem, xlabel="epochs", ylabel="loss of the averaged iterate", ylim=(None, 0.8))
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Regret of S-AdaGrad in online logistic regression, compared with gradient descent, diagonal and full Adagrad.

This is the convex setting of "Sketchy" (arXiv 2302.03764), on generated data that resemble a9a (LIBSVM's binary form of
UCI Adult): 14 categorical attributes, one-hot, are 123 binary features, of which each sample has 14. There are 32,561
samples, and about 24 % of them are positive. The attributes depend on three hidden numbers, so features are correlated.

In round t the optimizer gets the loss of its weights on the next mini-batch, and takes one step. The regret after T
rounds is the sum of these losses minus that of the best fixed weights for the same T rounds, which L-BFGS finds
offline. Learning rates are swept by factors of 2 on the first seed until the best one, by the cumulative loss, has
worse neighbours. The other seeds (other data, same distribution) run at that rate.

One contender gets rotated features. Gradient descent, S-AdaGrad, full-matrix Adagrad and the best fixed weights do not
depend on the basis, but the diagonal method does, and binary features are its best basis.

    python benchmarks/regret.py                              # all 32,561 samples, four a round, 3 seeds
    python benchmarks/regret.py --samples 4000 --batch 1 --seeds 1 --out some.csv

`slope` is that of log(average regret) by log(T) over the last four doublings of T; the theory promises -1/2.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_step import hardware
from rates import best_rate, sweep
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from sketch_plugins import SAdagrad

RESULTS = Path(__file__).parent / "results"
# Numbers of values of a9a's attributes, with numeric ones in quantiles: age, workclass, fnlwgt, education, years of
# education, marital status, occupation, relationship, race, sex, capital gain and loss, hours, native country.
VALUES = (5, 8, 5, 16, 5, 7, 14, 6, 5, 2, 2, 2, 5, 41)
SAMPLES = 32_561
FIELDS = (
    "optimizer", "lr", "best", "seed", "samples", "batch", "rounds", "cumulative_loss", "best_fixed_loss",
    "average_regret", "bytes_per_param", "hardware", "threads", "torch",
)  # fmt: skip


class Stream(NamedTuple):
    """One-hot samples ``(n, 123)``, labels ``(n,)`` of 0 and 1, and the number of samples in a round."""

    x: Tensor
    y: Tensor
    batch: int

    @property
    def rounds(self) -> int:
        """Number of whole mini-batches."""
        return len(self.x) // self.batch


def stream(samples: int, seed: int = 0, batch: int = 1) -> Stream:
    """Samples of one distribution, for any seed."""
    model, g = torch.Generator().manual_seed(123), torch.Generator().manual_seed(seed)
    hidden = torch.randn(samples, 3, generator=g)
    parts, score = [], torch.zeros(samples)
    for values in VALUES:
        # Zipf's law (most people are from one country), changed by the hidden numbers.
        prior = -1.5 * torch.arange(1, values + 1).log()
        logits = prior + hidden @ torch.randn(3, values, generator=model)
        value = torch.multinomial(logits.softmax(1), 1, generator=g).squeeze(1)
        parts.append(functional.one_hot(value, values).float())
        score += torch.randn(values, generator=model)[value]
    # Of 100,000 labels, 24 % are positive.
    y = (torch.rand(samples, generator=g) < torch.sigmoid(0.7 * score - 0.6)).float()
    return Stream(torch.cat(parts, 1), y, batch)


class Descent(torch.optim.SGD):
    """Online gradient descent: lr / sqrt(t)."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Take the step of one round."""
        for group in self.param_groups:
            group["t"] = group.get("t", 0) + 1
            group["base"] = group.get("base", group["lr"])
            group["lr"] = group["base"] / group["t"] ** 0.5
        return super().step(closure)


class FullAdagrad(torch.optim.Optimizer):
    """Full-matrix Adagrad of one vector: the pseudo-inverse root of the sum of g g^T."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        """Take the step of one round."""
        (p,) = self.param_groups[0]["params"]
        # In float64, because LAPACK's eigh may not converge in float32 while the sum does not have full rank.
        total = self.state[p].setdefault("sum", torch.zeros(len(p), len(p), dtype=torch.float64))
        g = p.grad.double()
        total += torch.outer(g, g)
        values, vectors = torch.linalg.eigh(total)
        seen = values > len(p) * torch.finfo(values.dtype).eps * values[-1]
        root = torch.where(seen, values.clamp_min(1e-30).rsqrt(), 0.0)
        p.sub_(vectors @ (root * (vectors.mT @ g)), alpha=self.param_groups[0]["lr"])


class Contender(NamedTuple):
    """A function that builds it, the learning rate at which its sweep starts, and whether its features are rotated."""

    build: Callable[[Any, float], torch.optim.Optimizer]
    centre: float
    rotated: bool = False


CONTENDERS = {
    "gradient descent": Contender(Descent, 1.0),
    "diagonal Adagrad": Contender(torch.optim.Adagrad, 0.2),
    "diagonal Adagrad, rotated": Contender(torch.optim.Adagrad, 0.2, rotated=True),
    "S-AdaGrad, rank 10": Contender(lambda params, lr: SAdagrad(params, lr, rank=10), 0.4),
    "full-matrix Adagrad": Contender(FullAdagrad, 0.4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--batch", type=int, default=4, help="samples a round")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "regret_a9a_like.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    streams = [stream(args.samples, seed, args.batch) for seed in range(args.seeds)]
    at = checkpoints(streams[0].rounds)
    fixed = [best_fixed(s, at) for s in streams]
    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as progress:
        for name, contender in CONTENDERS.items():
            task = progress.add_task(name, total=None)

            def run(lr: float, seed: int = 0, name: str = name, task: Any = task) -> tuple[Tensor, int]:
                progress.update(task, description=f"{name}, lr {lr:g}, seed {seed}")
                out = play(CONTENDERS[name], lr, streams[seed])
                progress.advance(task)
                return out

            found = sweep(run, final, contender.centre)
            best = best_rate(found, final)
            runs = [(lr, 0, *out) for lr, out in found.items()]
            runs += [(best, seed, *run(best, seed)) for seed in range(1, args.seeds)]
            progress.update(task, description=name, total=len(runs))
            for lr, seed, losses, size in runs:
                total = losses.double().cumsum(0)
                for rounds, least in zip(at, fixed[seed], strict=True):
                    suffered = total[rounds - 1].item()
                    rows.append(
                        {
                            "optimizer": name, "lr": lr, "best": lr == best, "seed": seed, "samples": args.samples,
                            "batch": args.batch, "rounds": rounds, "cumulative_loss": round(suffered, 3),
                            "best_fixed_loss": round(least, 3), "average_regret": round((suffered - least) / rounds, 6),
                            "bytes_per_param": size / sum(VALUES), "hardware": hardware(torch.device("cpu")),
                            "threads": args.threads, "torch": torch.__version__,
                        }
                    )  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as f:
        writer = csv.DictWriter(f, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    Console(width=None if sys.stdout.isatty() else 120).print(table(rows))
    plot(rows, args.out.with_suffix(".png"))
    print(f"written to {args.out} and {args.out.with_suffix('.png')}")


def final(run: tuple[Tensor, int]) -> float:
    return run[0].double().sum().item()


def checkpoints(rounds: int) -> list[int]:
    """``rounds``, and its halves, quarters, ... down to 500: fewer samples can be separated without any loss."""
    out = [rounds]
    while out[0] // 2 >= 500:
        out.insert(0, out[0] // 2)
    return out


def rotated(data: Stream) -> Stream:
    """The same samples in another orthonormal basis."""
    d = data.x.shape[1]
    basis = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(7))).Q
    return data._replace(x=data.x @ basis)


def play(contender: Contender, lr: float, data: Stream) -> tuple[Tensor, int]:
    """The loss of every round, and the optimizer's bytes of state."""
    if contender.rotated:
        data = rotated(data)
    w = torch.nn.Parameter(torch.zeros(data.x.shape[1]))
    optimizer = contender.build([w], lr)
    margins = torch.empty(data.rounds, data.batch)
    with torch.no_grad():
        for t in range(data.rounds):
            part = slice(t * data.batch, (t + 1) * data.batch)
            x, y = data.x[part], data.y[part]
            torch.mv(x, w, out=margins[t])
            # The gradient of the mean loss, without a graph, which would take longer than most of the steps.
            w.grad = x.mT @ ((margins[t].sigmoid() - y) / data.batch)
            optimizer.step()
    y = data.y[: margins.numel()].view_as(margins)
    losses = functional.binary_cross_entropy_with_logits(margins, y, reduction="none").mean(1)
    return losses, nbytes(optimizer.state[w])


def nbytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.nbytes
    return sum(nbytes(value) for value in state.values())


def best_fixed(data: Stream, at: list[int]) -> list[float]:
    """The least sum of losses over the first T rounds with fixed weights, for every T of ``at``."""
    w = torch.zeros(data.x.shape[1], dtype=torch.float64, requires_grad=True)
    out = []
    for rounds in at:
        part = slice(0, rounds * data.batch)
        x, y = data.x[part].double(), data.y[part].double()
        solver = torch.optim.LBFGS(
            [w], max_iter=500, tolerance_grad=1e-8, tolerance_change=1e-12, history_size=30,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure(x: Tensor = x, y: Tensor = y, solver: torch.optim.LBFGS = solver) -> Tensor:
            solver.zero_grad()
            loss = functional.binary_cross_entropy_with_logits(x @ w, y)
            loss.backward()
            return loss

        solver.step(closure)
        out.append(closure().item() * rounds)
    return out


def slope(rounds: list[int], average: list[float]) -> float:
    """Slope of log(average regret) by log(T), by least squares."""
    x, y = torch.tensor(rounds).double().log(), torch.tensor(average).double().log()
    x -= x.mean()
    return (x @ y / (x @ x)).item()


def curves(rows: list[dict[str, Any]]) -> dict[str, dict[int, tuple[list[int], list[float]]]]:
    """Optimizer -> seed -> (T, average regret), at the best rate."""
    out: dict[str, dict[int, tuple[list[int], list[float]]]] = {}
    for row in rows:
        if row["best"]:
            rounds, average = out.setdefault(row["optimizer"], {}).setdefault(row["seed"], ([], []))
            rounds.append(row["rounds"])
            average.append(row["average_regret"])
    return out


def table(rows: list[dict[str, Any]]) -> Table:
    first = rows[0]
    out = Table(
        title=f"online logistic regression, {first['samples']} a9a-like samples, {first['batch']} a round",
        caption=f"mean +- standard deviation of {len({row['seed'] for row in rows})} seeds; {first['hardware']}, "
        f"{first['threads']} threads, torch {first['torch']}",
    )
    out.add_column("optimizer")
    for heading in ("best lr", "state B/param", "average loss", "of the best fixed", "average regret", "slope"):
        out.add_column(heading, justify="right")
    rounds = max(row["rounds"] for row in rows)
    for name, by_seed in curves(rows).items():
        last = [row for row in rows if row["optimizer"] == name and row["best"] and row["rounds"] == rounds]
        out.add_row(
            name, f"{last[0]['lr']:g}", f"{last[0]['bytes_per_param']:.1f}",
            spread([row["cumulative_loss"] / rounds for row in last]),
            spread([row["best_fixed_loss"] / rounds for row in last]),
            spread([row["average_regret"] for row in last], 5),
            spread([slope(r[-5:], a[-5:]) for r, a in by_seed.values()], 2),
        )  # fmt: skip
    return out


def spread(values: list[float], digits: int = 4) -> str:
    deviation = f" +- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the average regret by T, and the results of a sweep's rates."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5))
    end = max(row["rounds"] for row in rows)
    for name, by_seed in curves(rows).items():
        rounds = next(iter(by_seed.values()))[0]
        means = [statistics.fmean(values) for values in zip(*(a for _, a in by_seed.values()), strict=True)]
        (line,) = left.plot(rounds, means, "o-", label=name)
        swept = [row for row in rows if row["optimizer"] == name and row["seed"] == 0 and row["rounds"] == end]
        right.plot(
            [row["lr"] for row in swept], [row["average_regret"] for row in swept], "o-", color=line.get_color(),
            label=name,
        )  # fmt: skip
    left.plot(rounds, [means[-1] * (rounds[-1] / r) ** 0.5 for r in rounds], "k:", label="1 / sqrt(T)")
    left.set(xscale="log", yscale="log", xlabel="T, rounds", ylabel="average regret")
    right.set(xscale="log", yscale="log", xlabel="learning rate (seed 0)", ylabel=f"average regret after {end} rounds")
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    figure.suptitle(f"online logistic regression on a9a-like samples: {rows[0]['hardware']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()

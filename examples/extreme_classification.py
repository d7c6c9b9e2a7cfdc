"""Extreme classification with a sparse input layer: Adam against CS-V, which uses the saved memory for a larger batch.

    python examples/extreme_classification.py                  # about 4 minutes of one core
    python examples/extreme_classification.py --quick          # seconds; says nothing about quality
    python examples/extreme_classification.py --tune           # search every learning rate first
    python examples/extreme_classification.py --optimizers adam@0.08@0.002,cs_rmsprop@0.16@0.004 --memory 64MiB

This is the case of Spring et al. 2019 (https://arxiv.org/abs/1902.00179, section 7) at a small size, with generated
data. A query has a few hashed features, and its class is one of many products. MACH (https://arxiv.org/abs/1910.13830)
trains R classifiers, each over B *merged* classes; a universal hash assigns each class to a merged one. The score of a
class is the mean probability of its R merged classes. CS-V is Adam without a first moment, whose second moment is in a
count-min sketch of 1 % of its size: here `cs_rmsprop`, with `compression=0.01` in this package's form and
`preset=paper_cs_v` in the paper's.

The budget is the peak of the first optimizer at --batch-size, or --memory. Each other optimizer trains at --batch-size,
and also at the largest batch that fits into the budget, with its learning rate times the root of the batches' ratio.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _common as common
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from sketch_plugins import registry, state_report
from sketch_plugins.memory.meter import AllocatorMeter, CudaMeter, parse_budget, total_memory
from sketch_plugins.memory.report import format_bytes
from sketch_plugins.memory.search import largest

# Learning rates of the input layer and of the rest, found with --tune at the default sizes
# (docs/extreme_classification.md).
OPTIMIZERS = (
    "adam@0.08@0.001,cs_rmsprop:compression=0.01@0.32@0.001,cs_rmsprop:preset=paper_cs_v,compression=0.00333@0.32@0.01,"
    "cs_rmsprop:preset=exact@0.08@0.001,cs_adam@0.16@0.002"
)
DEFAULTS = {
    "classes": 20_000, "vocab": 50_000, "queries": 40_000, "held_out": 2_000, "models": 4, "buckets": 2_000,
    "hidden": 64, "epochs": 3, "batch_size": 256,
}  # fmt: skip
QUICK = {
    "classes": 500, "vocab": 2_000, "queries": 2_000, "held_out": 200, "models": 2, "buckets": 60, "hidden": 16,
    "epochs": 2, "batch_size": 32,
}  # fmt: skip
# A product has 24 features; a query has 8 of them, and 3 that belong to no product.
TITLE, KEPT, NOISE = 24, 8, 3
RANKS = (1, 10, 100)
PRIME = 2**31 - 1  # a * c + b stays below 2**63 for every class c below it
PROBE_STEPS = 3  # the first one allocates the state
FIELDS = (
    "optimizer", "batch", "batch_size", "lr", "output_lr", "seed", "epoch", "steps", "seconds", "train_loss",
    "recall@1", "recall@10", "recall@100", "state_bytes", "second_moment_bytes", "peak_bytes", "budget_bytes", "clock",
    "classes", "vocab", "queries", "models", "buckets", "hidden", "device", "threads", "torch",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Data and hashes


@dataclass(frozen=True)
class Part:
    """Queries: features ``(n, KEPT + NOISE)`` and classes ``(n,)``, int64."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """Queries for training, for the choice of learning rates, and for the test."""

    train: Part
    valid: Part
    test: Part


def generate(classes: int, vocab: int, queries: int, held_out: int, seed: int, device: torch.device) -> Data:
    """Queries for products: popularity of class k ~ 1 / (k + 10), of feature k ~ k^(-2/3), both in random order.

    The order of features is random, like that of hashed words, so the number of a row says nothing about its frequency.
    """
    rng = np.random.default_rng(seed)
    name_of = rng.permutation(vocab)

    def features(*shape: int) -> np.ndarray:
        return name_of[(vocab * rng.random(shape) ** 3).astype(np.int64)]

    titles = features(classes, TITLE)
    popularity = rng.permutation(1.0 / (np.arange(classes) + 10.0))
    popularity /= popularity.sum()

    def part(count: int) -> Part:
        labels = rng.choice(classes, count, p=popularity)
        kept = rng.random((count, TITLE)).argsort(1)[:, :KEPT]
        words = np.concatenate([np.take_along_axis(titles[labels], kept, 1), features(count, NOISE)], 1)
        return Part(torch.from_numpy(words).to(device), torch.from_numpy(labels).to(device))

    return Data(part(queries), part(held_out), part(held_out))


def merged_classes(classes: int, buckets: int, models: int, seed: int) -> Tensor:
    """The merged class of each class for each model ``(models, classes)``: ``((a * c + b) mod p) mod buckets``.

    Carter and Wegman's universal family: a in [1, p), b in [0, p), p a prime above the number of classes. Two classes
    share a merged class with a probability of at most 1 / buckets over the draw of (a, b).
    """
    rng = np.random.default_rng(seed)
    c = torch.arange(classes)
    drawn = [(int(rng.integers(1, PRIME)), int(rng.integers(0, PRIME))) for _ in range(models)]
    return torch.stack([(a * c + b) % PRIME % buckets for a, b in drawn])


def merge(probabilities: Tensor, merged: Tensor) -> Tensor:
    """Scores of all classes ``(queries, classes)``: the mean over models of the merged class's probability.

    MACH's unbiased estimate of the class's probability, ``B / (B - 1) * (mean - 1 / B)``, has the same order.

    Args:
        probabilities: ``(models, queries, buckets)``.
        merged: ``(models, classes)``, of `merged_classes`.
    """
    scores = probabilities[0].index_select(1, merged[0])
    for p, of_class in zip(probabilities[1:], merged[1:], strict=True):
        scores += p.index_select(1, of_class)
    return scores.div_(len(merged))


def hits(scores: Tensor, labels: Tensor, ranks: Sequence[int] = RANKS) -> list[float]:
    """For each k, how many queries have their class among the k best; ties count as in a random order."""
    own = scores.gather(1, labels[:, None])
    better = (~(scores <= own)).sum(1)  # if a score is not a number, every class counts as better
    equal = (scores == own).sum(1).clamp(min=1)
    return [((k - better) / equal).clamp(0, 1).sum().item() for k in ranks]


def recalls(probabilities: Tensor, merged: Tensor, labels: Tensor, chunk: int = 250) -> list[float]:
    """Recall over all classes at each of RANKS, in chunks of queries, whose scores are queries x classes numbers."""
    found = [
        hits(merge(p, merged), own) for p, own in zip(probabilities.split(chunk, 1), labels.split(chunk), strict=True)
    ]
    return [sum(of_rank) / len(labels) for of_rank in zip(*found, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# One of the R models


class Classifier(nn.Module):
    """Features -> hidden -> merged classes: an `EmbeddingBag` with row-sparse gradients, ReLU, a linear layer."""

    def __init__(self, vocab: int, hidden: int, buckets: int) -> None:
        super().__init__()
        self.input = nn.EmbeddingBag(vocab, hidden, mode="sum", sparse=True)
        nn.init.normal_(self.input.weight, std=(KEPT + NOISE) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.output = nn.Linear(hidden, buckets)

    def forward(self, features: Tensor) -> Tensor:
        return self.output(torch.relu(self.input(features) + self.bias))


@dataclass(frozen=True)
class Contender:
    """An optimizer, the learning rate of the input layer and that of the rest, at --batch-size."""

    optim: str
    optim_args: str | None
    lr: float
    output_lr: float

    @property
    def label(self) -> str:
        """The name in the table and the plot."""
        return f"{self.optim} {self.optim_args}" if self.optim_args else self.optim

    def optimizers(self, model: Classifier, factor: float = 1.0) -> list[torch.optim.Optimizer]:
        """The optimizers. Adam needs two, because torch's dense Adam takes no sparse gradients, and rows are lazy."""
        sparse = [model.input.weight]
        dense = [p for p in model.parameters() if p is not model.input.weight]
        rates = self.lr * factor, self.output_lr * factor
        if self.optim == "adam":
            return [torch.optim.SparseAdam(sparse, lr=rates[0]), torch.optim.Adam(dense, lr=rates[1], fused=True)]
        text = dict(pair.partition("=")[::2] for pair in (self.optim_args or "").split(",") if pair)
        options = {"weight_decay": 0.0, **registry.parse_options(self.optim, text)}
        cls: Any = registry.get(self.optim).cls
        groups = [{"params": params, "lr": lr} for params, lr in zip((sparse, dense), rates, strict=True)]
        return [cls(groups, lr=rates[0], **options)]


def parse_contenders(text: str, lr: float) -> list[Contender]:
    """Parse `name[:key=value,...][@lr[@output_lr]]`, several of them separated by commas; one rate is used for both."""
    found = []
    for run in common.parse_runs(text, lr):
        # The last rate has been parsed. If there are two, the first one is still at the end of the text before it.
        before, at, first = (run.optim_args or run.optim).partition("@")
        try:
            rate = common.positive_float(first) if at else run.learning_rate
        except (ValueError, argparse.ArgumentTypeError):
            raise ValueError(f"{before!r}: the first learning rate, {first!r}, is not a positive number") from None
        name, options = (run.optim, before) if run.optim_args else (before, None)
        found.append(Contender(name, options, rate, run.learning_rate))
    return found


class Trainer:
    """One model, its optimizer, and a learning rate that warms up over a twentieth of the steps and falls to 0."""

    def __init__(
        self, run: Contender, args: argparse.Namespace, data: Part, labels: Tensor, batch_size: int, seed: int
    ) -> None:
        self.data, self.labels, self.batch_size, self.seed = data, labels, batch_size, seed
        torch.manual_seed(seed)
        self.model = Classifier(args.vocab, args.hidden, args.buckets).to(data.features.device)
        self.factor = (batch_size / args.batch_size) ** args.lr_power
        self.optimizers = run.optimizers(self.model, self.factor)
        self.per_epoch = -(-len(data) // batch_size)
        steps = args.epochs * self.per_epoch
        warm = max(1, steps // 20)

        def factor(step: int) -> float:
            return min((step + 1) / warm, (steps - step) / max(1, steps - warm))

        self.schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in self.optimizers]

    def epoch(self, number: int, steps: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Train, and yield the size and the summed loss of each batch."""
        order = torch.Generator().manual_seed(self.seed * 1000 + number)
        batches = torch.randperm(len(self.data), generator=order).to(self.labels.device).split(self.batch_size)
        for batch in batches[:steps]:
            output = self.model(self.data.features[batch])
            loss = functional.cross_entropy(output, self.labels[batch])
            loss.backward()
            for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            yield len(batch), loss.detach() * len(batch)

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Probabilities of the merged classes."""
        return torch.cat([self.model(part).softmax(1) for part in features.split(1000)])


def state_bytes(optimizers: list[torch.optim.Optimizer]) -> tuple[int, int]:
    """Bytes of state, and of the second moment alone."""
    reports = [state_report(o) for o in optimizers]
    second = sum(r.by_store().get(name, 0) for r in reports for name in ("second_moment", "exp_avg_sq"))
    return sum(r.state_bytes for r in reports), second


def peak_bytes(run: Contender, args: argparse.Namespace, data: Part, labels: Tensor, batch_size: int) -> int:
    """Bytes at the peak of training one model: weights, gradients, state, activations, temporaries, but no data."""
    device = labels.device
    meter = CudaMeter(device) if device.type == "cuda" else AllocatorMeter()
    meter.start()
    before = meter.live if isinstance(meter, AllocatorMeter) else torch.cuda.memory_allocated(device)
    trainer = Trainer(run, args, data, labels, batch_size, args.seed)
    for _ in trainer.epoch(0, PROBE_STEPS):
        pass
    return meter.read() - before


# ---------------------------------------------------------------------------------------------------------------------
# All runs


@dataclass
class Result:
    """One optimizer at one batch: a row of figures for each seed and epoch."""

    run: Contender
    batch: str
    batch_size: int
    peak: int
    rows: list[dict[str, Any]]

    def last(self, key: str) -> list[float]:
        """The figures of the last epoch, one for each seed."""
        end = max(row["epoch"] for row in self.rows)
        return [row[key] for row in self.rows if row["epoch"] == end]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, train, print the table, write CSV and plot. The exit code is 1 if a run diverged."""
    # torch's profiler, which counts the allocator's memory, would print two lines for each measurement.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    args = parse(argv)
    torch.set_num_threads(args.threads)
    now, args.clock = clock_of(args.device, args.threads)
    data = generate(args.classes, args.vocab, args.queries, args.held_out, args.seed, args.device)
    merged = merged_classes(args.classes, args.buckets, args.models, args.seed).to(args.device)
    known = torch.isin(data.test.labels, data.train.labels).float().mean().item()
    print(
        f"{args.classes:,} classes merged into {args.models} x {args.buckets:,}, {args.vocab:,} features; "
        f"{args.queries:,} queries to train, {args.held_out:,} to test, of which {known:.1%} have a class that occurs "
        "in training",
        flush=True,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        if args.tune:
            args.runs = tune(args, data, merged, progress)
        planned, budget = plan(args, data.train, merged, progress)
        results = []
        task = progress.add_task("", total=len(planned) * args.seeds * args.models * args.epochs * args.queries)
        for run, batch, size, peak in planned:
            progress.update(task, description=f"{run.label}, batch {size}")
            result = Result(run, batch, size, peak, [])
            for seed in range(args.seed, args.seed + args.seeds):
                rows = train(run, size, seed, args, data, merged, now, lambda n: progress.advance(task, n))
                result.rows += rows
            results.append(result)
            # After each result, so that an interrupted run keeps them.
            write(args.out / "results.csv", results, budget, args)
    plot(args.out / "recall.png", results, args)
    wide = Console()
    # A log file has no width of its own, and the table must not be wrapped in it.
    (wide if wide.is_terminal else Console(width=max(wide.width, 170))).print(table(results, budget, args))
    print(f"figures: {args.out / 'results.csv'}   plot: {args.out / 'recall.png'}")
    return 0 if all(math.isfinite(loss) for r in results for loss in r.last("train_loss")) else 1


def plan(
    args: argparse.Namespace, data: Part, merged: Tensor, progress: Progress
) -> tuple[list[tuple[Contender, str, int, int]], int]:
    """The budget, and the runs as (optimizer, "base" or "fit", batch size, peak)."""
    labels = merged[0][data.labels]
    task = progress.add_task("", total=None)

    @functools.cache
    def peak(run: Contender, size: int) -> int:
        progress.update(task, description=f"measuring {run.label}, batch {size}")
        return peak_bytes(run, args, data, labels, size)

    def fits(run: Contender, size: int) -> bool:
        return peak(run, size) <= budget

    budget = args.budget or peak(args.runs[0], args.batch_size)
    planned = []
    for run in args.runs:
        sizes = {"base": args.batch_size}
        # If the budget is the memory of the first optimizer, no search is needed for it.
        if args.budget or (run != args.runs[0] and "fit" in args.batches):
            fit = largest(functools.partial(fits, run), args.batch_size, len(data))
            if not fit:
                common.fail(f"{run.label}: not even a batch of 1 fits into {format_bytes(budget)}")
            sizes = {batch: size for batch, size in (sizes | {"fit": fit}).items() if batch in args.batches}
            if fit <= args.batch_size:
                sizes = {"fit": fit}
        planned += [(run, batch, size, peak(run, size)) for batch, size in sizes.items()]
    progress.remove_task(task)
    return planned, budget


def train(
    run: Contender,
    batch_size: int,
    seed: int,
    args: argparse.Namespace,
    data: Data,
    merged: Tensor,
    now: Callable[[], float],
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    """Train the models one after the other, since they are independent; figures of each epoch, merged."""
    seconds, losses = [0.0] * args.epochs, [0.0] * args.epochs
    predicted: list[list[Tensor]] = [[] for _ in range(args.epochs)]
    for number, of_class in enumerate(merged):
        labels = of_class[data.train.labels]
        trainer = Trainer(run, args, data.train, labels, batch_size, seed * args.models + number)
        for epoch in range(args.epochs):
            total = torch.zeros((), device=labels.device)
            start = now()
            for count, loss in trainer.epoch(epoch):
                total += loss
                advance(count)
            seconds[epoch] += now() - start
            losses[epoch] += total.item() / len(data.train) / args.models
            predicted[epoch].append(trainer.predict(data.test.features))
    state, second = state_bytes(trainer.optimizers)
    rows = []
    for epoch in range(args.epochs):
        found = recalls(torch.stack(predicted[epoch]), merged, data.test.labels)
        rows.append(
            {
                "seed": seed,
                "epoch": epoch + 1,
                "steps": (epoch + 1) * trainer.per_epoch,
                "lr": run.lr * trainer.factor,
                "output_lr": run.output_lr * trainer.factor,
                "seconds": sum(seconds[: epoch + 1]),
                "train_loss": losses[epoch],
                **{f"recall@{k}": value for k, value in zip(RANKS, found, strict=True)},
                "state_bytes": state,
                "second_moment_bytes": second,
            }
        )
    return rows


def tune(args: argparse.Namespace, data: Data, merged: Tensor, progress: Progress) -> list[Contender]:
    """The best two learning rates of each optimizer at --batch-size, by the first model's loss on validation queries.

    The search starts at the given rates, and halves and doubles each of them until no neighbour is better. It writes
    rates.csv.
    """
    labels, valid = merged[0][data.train.labels], merged[0][data.valid.labels]
    task = progress.add_task("", total=None)

    @functools.cache
    def loss(run: Contender) -> float:
        progress.update(task, description=f"tuning {run.label}: {run.lr:g}, {run.output_lr:g}")
        trainer = Trainer(run, args, data.train, labels, args.batch_size, args.seed * args.models)
        for epoch in range(args.epochs):
            for _ in trainer.epoch(epoch):
                pass
        with torch.no_grad():
            value = functional.cross_entropy(trainer.model(data.valid.features), valid).item()
        with (args.out / "rates.csv").open("a", newline="") as f:
            csv.writer(f).writerow([run.label, f"{run.lr:.4g}", f"{run.output_lr:.4g}", f"{value:.4f}"])
        return value if math.isfinite(value) else math.inf

    best = []
    (args.out / "rates.csv").write_text("optimizer,lr,output_lr,valid_loss\n")
    for run in args.runs:
        while True:
            near = [
                dataclasses.replace(run, **{key: getattr(run, key) * by})
                for key in ("output_lr", "lr")
                for by in (0.5, 2.0)
            ]
            better = min(near, key=loss)
            if loss(better) >= loss(run):
                break
            run = better
        best.append(run)
    progress.remove_task(task)
    return best


def clock_of(device: torch.device, threads: int) -> tuple[Callable[[], float], str]:
    """A clock and its name. With one thread it is this process's own time, which other processes do not affect."""
    if device.type == "cuda":

        def synchronised() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return synchronised, "wall"
    return (time.process_time, "CPU") if threads == 1 else (time.perf_counter, "wall")


def hardware(device: torch.device) -> str:
    """The name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
        name = line.split(":", 1)[1].strip()
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


# ---------------------------------------------------------------------------------------------------------------------
# Options, table, plot


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    count = {"type": common.positive_int, "metavar": "N"}
    data = parser.add_argument_group("data and models")
    data.add_argument("--classes", **count, help="products (default: %(default)s)")
    data.add_argument("--vocab", **count, help="features, rows of the input layer (default: %(default)s)")
    data.add_argument("--queries", **count, help="queries to train on (default: %(default)s)")
    data.add_argument("--held-out", **count, help="to choose rates by, and to test with (default: %(default)s each)")
    data.add_argument("--models", **count, help="classifiers that are averaged, MACH's R (default: %(default)s)")
    data.add_argument("--buckets", **count, help="merged classes of each, MACH's B (default: %(default)s)")
    data.add_argument("--hidden", **count, help="units between the layers (default: %(default)s)")
    train = parser.add_argument_group("training")
    train.add_argument(
        "--optimizers",
        default=OPTIMIZERS,
        metavar="LIST",
        help="name[:key=value,...][@lr[@output-lr]], separated by commas: 'adam' (torch.optim.SparseAdam for the input "
        f"layer, Adam for the rest) or one of {', '.join(registry.names())} (default: %(default)s)",
    )
    train.add_argument(
        "--lr", type=common.positive_float, default=1e-2, help="where LIST has none (default: %(default)s)"
    )
    train.add_argument("--tune", action="store_true", help="search both learning rates first, from those given")
    train.add_argument("--epochs", **count, help="default: %(default)s")
    train.add_argument("--batch-size", **count, help="of the first optimizer (default: %(default)s)")
    train.add_argument(
        "--batches", choices=("both", "base", "fit"), default="both",
        help="batch of the others: --batch-size (if it fits), the largest that fits, or one after the other "
        "(default: %(default)s)",
    )  # fmt: skip
    train.add_argument(
        "--memory", metavar="SIZE", help="for one model's training, as 64MiB (default: the first optimizer's peak)"
    )
    train.add_argument(
        "--lr-power", type=float, default=0.5, metavar="P",
        help="a batch b times as large has b^P times the rate (default: %(default)s, arXiv 2205.10287)",
    )  # fmt: skip
    train.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of data, hashes, weights and order (default: %(default)s)"
    )
    train.add_argument("--seeds", **count, help="runs of each, with other weights and orders (default: %(default)s)")
    train.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    train.add_argument("--threads", **count, help="of torch on the CPU (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("extreme_out"), metavar="DIR", help="where results go (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: seconds, says nothing about quality")
    argv = list(sys.argv[1:] if argv is None else argv)
    parser.set_defaults(seeds=1, threads=1, **(QUICK if "--quick" in argv else DEFAULTS))
    args = parser.parse_args(argv)

    if args.classes < RANKS[-1] or args.classes >= PRIME:
        parser.error(f"--classes {args.classes}: recall@{RANKS[-1]} needs {RANKS[-1]} to {PRIME - 1} classes")
    if not 2 <= args.buckets <= args.classes:
        parser.error(f"--buckets {args.buckets}: allowed are 2 to {args.classes}, the number of classes")
    if args.batch_size > args.queries:
        parser.error(f"--batch-size {args.batch_size} is more than the {args.queries} queries to train on")
    if args.seed < 0:
        parser.error(f"--seed {args.seed} is negative")
    if not 0 <= args.lr_power <= 1:
        parser.error(f"--lr-power {args.lr_power} is not in [0, 1]")
    try:
        args.device = torch.device(args.device)
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    if args.device.type not in ("cpu", "cuda"):
        parser.error(f"--device {args.device}: its memory cannot be measured; allowed are cpu and cuda")
    try:
        args.budget = parse_budget(args.memory, total_memory(args.device), "--memory") if args.memory else None
        args.runs = parse_contenders(args.optimizers, args.lr)
        for run in args.runs:
            if run.optim == "adam" and run.optim_args:
                raise ValueError(f"--optimizers: {run.label!r}: adam takes no options here")
            run.optimizers(Classifier(8, 2, 2))  # an error for names and options that do not exist
    except ValueError as error:
        parser.error(str(error))
    args.batches = ("base", "fit") if args.batches == "both" else (args.batches,)
    return args


def table(results: list[Result], budget: int, args: argparse.Namespace) -> Table:
    """One row for each optimizer and batch, figures of the last epoch."""
    out = Table(
        title=f"{args.classes:,} classes, {args.models} models of {args.buckets:,} merged ones, {args.epochs} epochs "
        f"of {args.queries:,} queries; one model's budget {budget / 1e6:.1f} MB",
        caption=f"{hardware(args.device)}, {args.threads} thread(s), torch {torch.__version__}, {args.seeds} seed(s). "
        f"Learning rates: input layer, rest; seconds: {args.clock} time of all {args.models} models; "
        "state and peak: of one",
    )
    out.add_column("optimizer")
    headings = ("batch", "learning rates", "state MB", "second moment", "peak MB", "s/epoch")
    for heading in (*headings, *(f"recall@{k} %" for k in RANKS)):
        out.add_column(heading, justify="right")
    full = next((r.last("second_moment_bytes")[0] for r in results if r.run.optim == "adam"), None)
    for r in results:
        second = r.last("second_moment_bytes")[0]
        out.add_row(
            r.run.label,
            str(r.batch_size),
            f"{r.last('lr')[0]:.2g}, {r.last('output_lr')[0]:.2g}",
            f"{r.last('state_bytes')[0] / 1e6:.2f}",
            f"{second / full:.1%}" if full else f"{second / 1e6:.2f} MB",
            f"{r.peak / 1e6:.1f}",
            f"{statistics.fmean(r.last('seconds')) / args.epochs:.2f}",
            *(spread(r.last(f"recall@{k}")) for k in RANKS),
        )
    return out


def spread(shares: list[float]) -> str:
    """Mean, and with several seeds the standard deviation, in percent."""
    mean = f"{100 * statistics.fmean(shares):.1f}"
    return mean if len(shares) == 1 else f"{mean} +- {100 * statistics.stdev(shares):.1f}"


def write(path: Path, results: list[Result], budget: int, args: argparse.Namespace) -> None:
    """Write every optimizer, batch, seed and epoch; seconds are counted from the start of the training."""
    common_fields = {
        **{key: getattr(args, key) for key in ("classes", "vocab", "queries", "models", "buckets", "hidden", "clock")},
        "budget_bytes": budget,
        "device": hardware(args.device),
        "threads": args.threads,
        "torch": torch.__version__,
    }
    with path.open("w", newline="") as f:
        writer = csv.DictWriter(f, FIELDS)
        writer.writeheader()
        for r in results:
            head = {"optimizer": r.run.label, "batch": r.batch, "batch_size": r.batch_size, "peak_bytes": r.peak}
            for row in r.rows:
                figures = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
                writer.writerow({**head, **figures, **common_fields})


def plot(path: Path, results: list[Result], args: argparse.Namespace) -> None:
    """Plot recall by epochs and by seconds, as the mean of the seeds; lines of the larger batch are dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5), sharex="col", sharey="row", layout="constrained")
    labels = list(dict.fromkeys(r.run.label for r in results))
    for r in results:
        style: dict[str, Any] = {"color": f"C{labels.index(r.run.label)}", "marker": "o", "markersize": 3}
        style["linestyle"] = "--" if r.batch == "fit" else "-"
        epochs = range(1, args.epochs + 1)

        def mean(key: str, r: Result = r, epochs: range = epochs) -> list[float]:
            return [statistics.fmean(row[key] for row in r.rows if row["epoch"] == e) for e in epochs]

        for row, k in zip(axes, RANKS[1:], strict=True):
            row[0].plot(epochs, mean(f"recall@{k}"), label=f"{r.run.label}, batch {r.batch_size}", **style)
            row[1].plot(mean("seconds"), mean(f"recall@{k}"), **style)
            row[0].set_ylabel(f"recall@{k}")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    axes[1][0].set_xlabel("epoch")
    axes[1][1].set_xlabel(f"{args.clock} seconds of training, {args.models} models")
    axes[1][0].set_xticks(range(1, args.epochs + 1))
    figure.legend(
        *axes[0][0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        fontsize=8,
        frameon=False,
        handlelength=4,
    )
    figure.suptitle(f"{args.classes:,} classes; {hardware(args.device)}, {args.threads} thread(s)", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())

"""One run, and the processes in which several run side by side."""

from __future__ import annotations

import multiprocessing
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bench_step import hardware
from tqdm.auto import tqdm

from sketch_plugins import cast_model, registry, state_report

from . import fine_tune, language_model, peers
from .records import KEYS, Row, load
from .sweep import Plan
from .watching import Watch

TASKS: dict[str, Any] = {"lm": language_model, "fine_tune": fine_tune}
HALF = "bf16/"
#: Steps before those whose seconds are written.
WARM_UP = 3


@dataclass(frozen=True)
class Run:
    """What makes a run, and after how many steps each the loss is to be taken on the way."""

    task: str
    steps: int
    optimizer: str
    lr: float
    seed: int
    curve: int = 0

    def row(self) -> Row:
        """The first fields of its record."""
        return {**{key: getattr(self, key) for key in KEYS}, "lr": f"{self.lr:g}"}


@dataclass(frozen=True)
class Done:
    """Records of a run, or why a peer's optimizer could not do it."""

    row: Row | None = None
    curve: tuple[Row, ...] = ()
    reason: str = ""


def build(text: str, lr: float, model: torch.nn.Module) -> torch.optim.Optimizer:
    """A peer, or a name of the registry with options (``cs_adam:preset=lean;lagged_rms=true``). No weight decay.

    With ``bf16/`` before it, the model is cast first.
    """
    if text.startswith(HALF):
        cast_model(model, torch.bfloat16)
        text = text.removeprefix(HALF)
    if text in peers.PEERS:
        return peers.PEERS[text].build(model, lr)
    name, _, options = text.partition(":")
    given = dict(pair.split("=", 1) for pair in options.split(";")) if options else {}
    cls = registry.get(name).cls
    return cls(model.named_parameters(), lr=lr, weight_decay=0.0, **registry.parse_options(name, given))


def bytes_per_param(name: str, optimizer: torch.optim.Optimizer) -> float:
    """Of state."""
    if name.removeprefix(HALF) not in peers.PEERS:
        return state_report(optimizer).bytes_per_param
    return peers.state_bytes(optimizer) / sum(p.numel() for group in optimizer.param_groups for p in group["params"])


def do(run: Run, data: Any, place: int = 0) -> Done:
    """One run; ``place`` is the line of its progress bar."""
    peer = run.optimizer.removeprefix(HALF) in peers.PEERS
    start = time.perf_counter()
    description = f"{run.optimizer} {run.lr:g} seed {run.seed}"
    with tqdm(total=run.steps, desc=description, leave=False, position=place, disable=None) as bar:
        watch = Watch(bar.update, run.curve)
        make = partial(build, run.optimizer, run.lr)
        try:
            if run.curve:
                # What is compiled or loaded on first use would count for the first optimizer alone.
                TASKS[run.task].run(data, make, WARM_UP, run.seed, Watch())
            value, optimizer = TASKS[run.task].run(data, make, run.steps, run.seed, watch)
        except Exception as error:  # other people's optimizers fail in ways of their own
            if not peer:
                raise
            return Done(reason=f"does not run here: {peers.first_line(error)}")
    where = {"hardware": hardware(torch.device("cpu")), "torch": torch.__version__}
    row = run.row() | {
        "value": f"{value:.5f}", "bytes_per_param": f"{bytes_per_param(run.optimizer, optimizer):.4f}",
        "seconds": f"{time.perf_counter() - start:.0f}", **where,
    }  # fmt: skip
    points = tuple(
        run.row() | where | {
            "step": point.step, "train_seconds": f"{point.seconds:.2f}", "core_seconds": f"{point.core_seconds:.2f}",
            "value": f"{point.value:.5f}", "load": load(),
        }
        for point in watch.curve
    )  # fmt: skip
    return Done(row, points)


class _Child:
    """What a process keeps from one run to the next."""

    data: Any = None
    place: int = 0


def _begin(args: Namespace, lock: Any, places: Any) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(lock)
    _Child.place, _Child.data = places.get(), TASKS[args.task].prepare(args)


def _do(run: Run) -> Done:
    return do(run, _Child.data, _Child.place)


class Plans:
    """Plans that go on as their runs end.

    Args:
        plans: (what its runs have in common, the plan) each.
        known: the value of a run that is on file, or None.
        done: told of each run that was made.
    """

    def __init__(
        self,
        plans: list[tuple[Callable[[float, int], Run], Plan]],
        known: Callable[[Run], float | None],
        done: Callable[[Run, Done], None],
    ) -> None:
        self.known, self.done = known, done
        self.waiting: list[tuple[int, int, Run]] = []
        self.plans = plans
        self.values: list[list[float | None]] = [[] for _ in plans]
        self.dropped: set[int] = set()
        for number in range(len(plans)):
            self._advance(number, None)

    def _advance(self, number: int, values: list[float] | None) -> None:
        """Ask a plan for more, until it has runs to be made or has ended."""
        of, plan = self.plans[number]
        first = values is None
        while True:
            try:
                asked = next(plan) if values is None else plan.send(values)
            except StopIteration:
                return
            runs = [of(lr, seed) for lr, seed in asked]
            self.values[number] = [self.known(run) for run in runs]
            missing = [(number, place, run) for place, run in enumerate(runs) if self.values[number][place] is None]
            if missing:
                # One optimizer is finished before the next is begun.
                self.waiting = self.waiting + missing if first else missing + self.waiting
                return
            values = [value for value in self.values[number] if value is not None]

    def ended(self, number: int, place: int, run: Run, result: Done) -> None:
        """A run has ended."""
        if number in self.dropped:
            return
        self.done(run, result)
        if result.row is None:
            self.dropped.add(number)
            self.waiting = [item for item in self.waiting if item[0] != number]
            return
        self.values[number][place] = float(result.row["value"])
        if all(value is not None for value in self.values[number]):
            self._advance(number, [value for value in self.values[number] if value is not None])

    def one_by_one(self, data: Any) -> None:
        """In this process."""
        while self.waiting:
            number, place, run = self.waiting.pop(0)
            self.ended(number, place, run, do(run, data))

    def side_by_side(self, args: Namespace, jobs: int) -> None:
        """In processes with one thread each."""
        context = multiprocessing.get_context("spawn")
        places = context.Queue()
        for place in range(jobs):
            places.put(place)
        with ProcessPoolExecutor(jobs, context, _begin, (args, context.RLock(), places)) as pool:
            going: dict[Future[Done], tuple[int, int, Run]] = {}
            while self.waiting or going:
                for item in self._taken(jobs - len(going)):
                    going[pool.submit(_do, item[2])] = item
                for future in wait(going, return_when=FIRST_COMPLETED).done:
                    self.ended(*going.pop(future), future.result())

    def _taken(self, count: int) -> Iterator[tuple[int, int, Run]]:
        for _ in range(min(count, len(self.waiting))):
            yield self.waiting.pop(0)

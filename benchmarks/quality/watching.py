"""What looks at a run while it goes on: a progress bar, and the loss after every so many steps with its time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer


class Point(NamedTuple):
    """The value after some steps, the seconds until then, and those in which a core worked for this process."""

    step: int
    seconds: float
    core_seconds: float
    value: float


class Watch:
    """Called by a task around its loop.

    Args:
        said: called after each step.
        every: steps from one evaluation to the next, 0 for none but the last.

    Attributes:
        curve: a `Point` for each evaluation. Evaluation and what precedes the loop take no part in its seconds.
    """

    def __init__(self, said: Callable[[], Any] = lambda: None, every: int = 0) -> None:
        self.said, self.every = said, every
        self.curve: list[Point] = []
        self.step, self.seconds, self.core = 0, 0.0, 0.0
        self.begun = (0.0, 0.0)

    def start(self) -> None:
        """The clock runs from here."""
        self.begun = time.perf_counter(), time.process_time()

    def stepped(self, optimizer: Optimizer, evaluate: Callable[[], float]) -> None:
        """After each step."""
        self.step += 1
        self.said()
        if self.every and self.step % self.every == 0:
            self.seconds += time.perf_counter() - self.begun[0]
            self.core += time.process_time() - self.begun[1]
            self.curve.append(Point(self.step, self.seconds, self.core, evaluated(optimizer, evaluate)))
            self.start()


def evaluated(optimizer: Optimizer, evaluate: Callable[[], float]) -> float:
    """The value, at the averaged weights of an optimizer that has two sets of them (schedule-free)."""
    two = averages(optimizer)
    if two:
        optimizer.eval()  # type: ignore[attr-defined]
    try:
        with torch.no_grad():
            return evaluate()
    finally:
        if two:
            optimizer.train()  # type: ignore[attr-defined]


def averages(optimizer: Optimizer) -> bool:
    """Whether an optimizer averages the weights itself: a schedule that falls is not for it."""
    return hasattr(optimizer, "train") and hasattr(optimizer, "eval")

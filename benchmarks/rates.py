"""Sweeps of learning rates, which the benchmarks share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


def sweep(run: Callable[[float], T], loss: Callable[[T], float], centre: float, most: int = 12) -> dict[float, T]:
    """Runs by learning rate: factors of 2 from ``centre`` until the best one has a worse neighbour on both sides.

    Raises:
        RuntimeError: there is no such rate among the first ``most`` rates.
    """
    found = {centre * factor: run(centre * factor) for factor in (0.5, 1.0, 2.0)}
    while (best := best_rate(found, loss)) in (min(found), max(found)):
        if len(found) == most:
            raise RuntimeError(f"the best of {most} learning rates around {centre:g} is {best:g}, at the edge of them")
        lr = best / 2 if best == min(found) else best * 2
        found[lr] = run(lr)
    return dict(sorted(found.items()))


def best_rate(found: Mapping[float, T], loss: Callable[[T], float]) -> float:
    """The rate with the least loss; rates whose loss is not finite are not chosen."""

    def value(lr: float) -> float:
        x = loss(found[lr])
        return x if math.isfinite(x) else math.inf

    return min(found, key=value)

"""Search of a learning rate by factors of 2 until the best one has worse neighbours on both sides."""

from __future__ import annotations

import math
from collections.abc import Generator

#: What a plan asks for, (rate, seed) each; it is sent the values in the same order.
Asked = list[tuple[float, int]]
Plan = Generator[Asked, list[float], None]
MOST = 12


def rate(start: float, power: int) -> float:
    """``start * 2**power``, in the digits in which a record has it."""
    return float(f"{start * 2.0**power:g}")


def search(start: float, seed: int, most: int = MOST) -> Generator[Asked, list[float], float | None]:
    """Ask for runs of one seed and return the best rate; lower values are better.

    Args:
        start: the first rate; its two neighbours are asked for with it.
        seed: of all runs.
        most: the largest number of runs.

    Returns:
        The rate of the lowest value, or None if every run diverged. It has worse neighbours on both sides, unless
        ``most`` runs did not suffice.
    """
    values: dict[int, float] = {}
    asked = [-1, 0, 1]
    while asked and len(values) < most:
        got = yield [(rate(start, power), seed) for power in asked]
        values |= dict(zip(asked, got, strict=True))
        best = min(values, key=lambda power: (values[power], abs(power)))
        if not math.isfinite(values[best]):
            # All diverge: a lower rate may not.
            best = min(values)
        asked = [power for power in (best - 1, best + 1) if power not in values]
        if not math.isfinite(values[best]):
            asked = asked[:1]
    finite = {power: value for power, value in values.items() if math.isfinite(value)}
    return rate(start, min(finite, key=lambda power: finite[power])) if finite else None


def swept(start: float, seeds: list[int], most: int = MOST) -> Plan:
    """The search on the first seed, then the others at the best rate."""
    best = yield from search(start, seeds[0], most)
    if best is not None and seeds[1:]:
        yield [(best, seed) for seed in seeds[1:]]


def fixed(rates: list[float], seeds: list[int]) -> Plan:
    """Every seed at every rate."""
    yield [(lr, seed) for seed in seeds for lr in rates]


def ends_inside(values: dict[float, float]) -> bool:
    """Whether the best rate of one seed was run with half and with twice of it, and both are worse."""
    if not values:
        return False
    best = min(values, key=lambda lr: values[lr])
    sides = [[v for lr, v in values.items() if abs(lr / (best * f) - 1) < 0.02] for f in (0.5, 2.0)]
    return math.isfinite(values[best]) and all(side and min(side) > values[best] for side in sides)

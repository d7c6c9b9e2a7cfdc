"""The search for the largest batch that fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sketch_plugins.memory.meter import parse_budget

MODES = ("binsearch", "power")


def check_search(
    budget: int | float | str | None,
    mode: str,
    steps_per_trial: int,
    init_val: int | None,
    max_val: int,
    max_trials: int,
) -> None:
    """Raise ValueError unless these options of a search are allowed."""
    counts: dict[str, Any] = {"steps_per_trial": steps_per_trial, "max_val": max_val, "max_trials": max_trials}
    for name, value in (counts if init_val is None else {**counts, "init_val": init_val}).items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} is not allowed: {name} must be an integer >= 1")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not one of {', '.join(map(repr, MODES))}")
    if budget is not None:
        parse_budget(budget, 1)


def largest(fits: Callable[[int], bool], start: int, limit: int, mode: str = "binsearch", max_trials: int = 25) -> int:
    """The largest size <= ``limit`` that fits, or 0: doubles the size, then (binsearch) bisects the remaining range."""
    low, high, size = 0, 0, min(start, limit)
    for _ in range(max_trials):
        if fits(size):
            low = size
        else:
            high = size
        if low == limit or (high and high - low <= 1) or (mode == "power" and high and low):
            break
        if not high:
            size = min(2 * low, limit)
        elif mode == "power" or not low:
            size = max(1, high // 2)
        else:
            size = (low + high) // 2
    return low


def split(effective: int, largest: int) -> tuple[int, int]:
    """``(batch, accumulation)`` with the product ``effective``, ``batch <= largest``, and the least accumulation."""
    accumulate = -(-effective // largest)
    while effective % accumulate:
        accumulate += 1
    return effective // accumulate, accumulate

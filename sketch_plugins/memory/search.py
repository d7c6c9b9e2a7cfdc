"""The search for the largest batch that fits."""

from __future__ import annotations

from collections.abc import Callable


def largest(fits: Callable[[int], bool], start: int, limit: int, mode: str = "binsearch", max_trials: int = 25) -> int:
    """The largest size <= ``limit`` that fits, 0 if none was found: doubles it, then (binsearch) halves the rest."""
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
    """``(batch, accumulation)`` with that product and the least accumulation whose batch is at most ``largest``."""
    accumulate = -(-effective // largest)
    while effective % accumulate:
        accumulate += 1
    return effective // accumulate, accumulate

"""Shapes of preconditioners: which axes are merged, and where they are cut into blocks."""

from __future__ import annotations

from collections.abc import Sequence


def merged(shape: Sequence[int], most: int) -> tuple[int, ...]:
    """``shape`` with trailing axes merged while their product is at most ``most``; the first axis stays alone.

    Axes of length 1 are removed, except the second axis of a vector. A convolution ``(64, 32, 3, 3)`` becomes
    ``(64, 288)`` with ``most=1024``.
    """
    first, *rest = [n for n in shape if n != 1] or [1]
    out: list[int] = []
    for n in reversed(rest):
        if out and out[0] * n <= most:
            out[0] *= n
        else:
            out.insert(0, n)
    return (first, *out) if out else (first, 1)


def cut(n: int, most: int) -> tuple[int, ...]:
    """The bounds of the fewest blocks of at most ``most`` (0: any size), of sizes as equal as possible."""
    count = -(-n // most) if most else 1
    return tuple(round(i * n / count) for i in range(count + 1))

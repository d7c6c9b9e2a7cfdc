"""Loss against seconds: when each optimizer is where AdamW ends.

Seconds are those in which a core worked for the run. A run has one thread, so they are the seconds of the clock on a
machine that does nothing else, and they change less than those when it does.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from rich.table import Table

from .records import Row

#: (task, steps, hardware): what may be compared in seconds.
Setting = tuple[str, str, str]
#: (step, seconds of a core, value).
Curve = list[tuple[int, float, float]]
REFERENCE = "adamw"


def curves(rows: Iterable[Row]) -> dict[Setting, dict[str, Curve]]:
    """The mean curve over the seeds of each optimizer, apart for each machine."""
    points: dict[Setting, dict[str, dict[int, list[tuple[float, float]]]]] = {}
    for row in rows:
        setting = row["task"], row["steps"], row["hardware"]
        steps = points.setdefault(setting, {}).setdefault(row["optimizer"], {})
        steps.setdefault(int(row["step"]), []).append((float(row["core_seconds"]), float(row["value"])))
    return {
        setting: {
            name: [
                (step, statistics.fmean(s for s, _ in found), statistics.fmean(v for _, v in found))
                for step, found in sorted(steps.items())
            ]
            for name, steps in named.items()
        }
        for setting, named in points.items()
    }


def seconds_to(curve: Curve, level: float) -> float | None:
    """Seconds until the value is ``level`` or less, on straight lines between the points."""
    before: tuple[int, float, float] | None = None
    for point in curve:
        if point[2] <= level:
            if before is None:
                return point[1]
            return before[1] + (point[1] - before[1]) * (before[2] - level) / (before[2] - point[2])
        before = point
    return None


def compared(named: dict[str, Curve]) -> list[tuple[str, float, float, float | None]]:
    """(optimizer, seconds in all, last value, seconds to AdamW's last value), the quickest first."""
    level = named[REFERENCE][-1][2]
    found = [(name, curve[-1][1], curve[-1][2], seconds_to(curve, level)) for name, curve in named.items()]
    return sorted(found, key=lambda item: (item[3] is None, item[3] or item[1]))


def seconds_table(rows: Iterable[Row], task: str) -> Table:
    """For each number of steps and machine on which AdamW was run."""
    shown = Table(title=f"{task}: seconds of a core until AdamW's last value is reached")
    for name in ("steps", "optimizer", "seconds in all", "last value", "seconds to AdamW's", "hardware"):
        shown.add_column(name, justify="left" if name in ("optimizer", "hardware") else "right")
    for (of, steps, machine), named in curves(rows).items():
        if of == task and REFERENCE in named:
            for name, total, value, seconds in compared(named):
                reached = "not reached" if seconds is None else f"{seconds:.1f}"
                shown.add_row(steps, name, f"{total:.1f}", f"{value:.3f}", reached, machine)
    return shown

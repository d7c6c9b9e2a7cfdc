"""The files of runs: a line for each, written as a run ends, and never twice for the same run."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
RUNS, CURVES, SKIPPED = (RESULTS / name for name in ("quality.csv", "quality_curve.csv", "quality_skipped.csv"))
KEYS = ("task", "steps", "optimizer", "lr", "seed")
FIELDS = (*KEYS, "value", "bytes_per_param", "seconds", "hardware", "torch")
CURVE_FIELDS = (*KEYS, "step", "train_seconds", "core_seconds", "value", "load", "hardware", "torch")
SKIPPED_FIELDS = ("task", "optimizer", "reason", "hardware", "torch")
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """Lines that are there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, fields: Iterable[str], rows: Iterable[Row]) -> None:
    """Lines at the end, after a header if the file is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(fields))
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def key_of(row: Row) -> tuple[str, ...]:
    """What makes a run the same."""
    return str(row["task"]), str(row["steps"]), str(row["optimizer"]), f"{float(row['lr']):g}", str(row["seed"])


def load() -> str:
    """The number of processes that wanted a core in the last minute, where the system counts them."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""

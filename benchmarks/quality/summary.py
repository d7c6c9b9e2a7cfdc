"""One figure of each optimizer, of the many runs that are on file."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from . import sweep
from .peers import PEERS
from .records import Row

#: Names of the results -> names in tables and pictures. Other runs (options that were tried) are in the file only.
OURS = {
    "cs_adam": "cs_adam",
    "cs_adam:preset=lean": "cs_adam, lean",
    "sm3": "sm3",
    "sm3:preset=ema": "sm3, ema",
    "sketchy": "sketchy",
}
TITLES = {
    "adamw": "AdamW",
    "sgd": "SGD",
    "adafactor": "Adafactor",
    "muon": "Muon",
    "lion": "Lion",
    "soap": "SOAP",
    "kron": "PSGD Kron",
    "shampoo": "Shampoo",
    "came": "CAME",
    "schedule_free": "schedule-free AdamW",
    "galore": "GaLore",
    "adam_mini": "Adam-mini",
    "apollo": "APOLLO",
    "apollo_mini": "APOLLO-Mini",
    "adamw_8bit_bitsandbytes": "AdamW 8-bit, bitsandbytes",
    "adamw_8bit_torchao": "AdamW 8-bit, torchao",
    "adamw_4bit_torchao": "AdamW 4-bit, torchao",
    "flash_adamw": "FlashAdamW",
    **OURS,
}


#: AdamW's best rate, at which ours are shown, whatever other rates were tried.
ADAMW_RATES = {"lm": 1e-3, "fine_tune": 5e-5}


@dataclass(frozen=True)
class Figure:
    """An optimizer at its best rate, or at the only one.

    Attributes:
        values: of the seeds, in their order.
        inside: whether half and twice of the rate were run, too, and are worse.
    """

    task: str
    steps: int
    optimizer: str
    lr: float
    values: tuple[float, ...]
    bytes_per_param: float
    hardware: tuple[str, ...]
    inside: bool

    @property
    def title(self) -> str:
        return TITLES[self.optimizer]

    @property
    def ours(self) -> bool:
        return self.optimizer in OURS

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """The standard deviation over the seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


def figures(rows: Iterable[Row]) -> dict[tuple[str, int, str], Figure]:
    """(task, steps, optimizer) -> the rate with the most seeds, of those the one with the lowest mean.

    Ours are shown at AdamW's best rate, if they were run at it.
    """
    found: dict[tuple[str, int, str], dict[float, list[Row]]] = {}
    for row in rows:
        if row["optimizer"] in TITLES:
            rates = found.setdefault((row["task"], int(row["steps"]), row["optimizer"]), {})
            rates.setdefault(float(row["lr"]), []).append(row)
    return {key: figure for key, rates in found.items() if (figure := _best(*key, rates)) is not None}


def _best(task: str, steps: int, optimizer: str, rates: dict[float, list[Row]]) -> Figure | None:
    if optimizer in OURS and ADAMW_RATES.get(task) in rates:
        rates = {ADAMW_RATES[task]: rates[ADAMW_RATES[task]]}
    means = {lr: statistics.fmean(float(row["value"]) for row in runs) for lr, runs in rates.items()}
    finite = [lr for lr in rates if math.isfinite(means[lr])]
    if not finite:
        return None
    best = min(finite, key=lambda lr: (-len(rates[lr]), means[lr]))
    runs = sorted(rates[best], key=lambda row: int(row["seed"]))
    first = {lr: float(row["value"]) for lr, of in rates.items() for row in of if row["seed"] == runs[0]["seed"]}
    return Figure(
        task,
        steps,
        optimizer,
        best,
        tuple(float(row["value"]) for row in runs),
        float(runs[0]["bytes_per_param"]),
        tuple(sorted({row["hardware"] for row in runs})),
        sweep.ends_inside(first) and min(first, key=lambda lr: first[lr]) == best,
    )


def front(points: Iterable[Figure]) -> list[Figure]:
    """Those that no other beats with as little state: fewest bytes first, each with a lower value than the last."""
    kept: list[Figure] = []
    for figure in sorted(points, key=lambda f: (f.bytes_per_param, f.mean)):
        if not kept or figure.mean < kept[-1].mean:
            kept.append(figure)
    return kept


def skipped(rows: Iterable[Row], done: Iterable[str]) -> dict[str, str]:
    """Peers without a result -> why."""
    have = set(done)
    return {row["optimizer"]: row["reason"] for row in rows if row["optimizer"] not in have}


def machine(text: str) -> str:
    """Hardware in short: without trade marks."""
    return text.replace("(R)", "").replace(" Processor", "").replace("  ", " ")


assert set(PEERS) | set(OURS) == set(TITLES)

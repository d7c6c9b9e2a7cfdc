"""When `Sketchy` gathers statistics, when it solves, and how; which options of these contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check(group: Mapping[str, Any]) -> None:
    """Raise ValueError where options of a group contradict each other."""
    if group["statistics"] == "accumulate" and group["tail"] != "trace":
        raise ValueError(
            f"tail={group['tail']!r} needs statistics='sample': what escapes a sketch of gathered statistics is known "
            "from the trace only; allowed with 'accumulate' is tail='trace'"
        )
    if group["statistics"] == "sample" and group["statistics_freq"] != 1:
        raise ValueError(
            f"statistics_freq={group['statistics_freq']} goes with statistics='accumulate'; with 'sample' every "
            "update_freq-th gradient is the statistic, and allowed is 1"
        )
    if group["update_freq"] % group["statistics_freq"]:
        raise ValueError(
            f"statistics_freq={group['statistics_freq']} does not divide update_freq={group['update_freq']}"
        )


def due(step: int, every: int) -> bool:
    """At 1, 2, 4, 8, ... before the first whole period, so that a short run is not left without a preconditioner."""
    return step % every == 0 or (step < every and step & (step - 1) == 0)


def sampled(step: int, every: int) -> bool:
    """Whether a step adds a statistic."""
    return step % every == 0 or step == 1


def solver_of(step: int, group: Mapping[str, Any]) -> str:
    """The decomposition of this step's solve."""
    if group["solver"] != "power":
        return group["solver"]
    every, refresh = group["update_freq"], group["refresh_every"]
    # Before the first whole period directions still come in quickly.
    return "eigh" if step < every or (refresh and step // every % refresh == 0) else "power"

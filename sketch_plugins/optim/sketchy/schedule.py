"""When `Sketchy` gathers statistics, when and how it solves, and which of these options contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypedDict

from sketch_plugins.linalg.frequent_directions import SOLVERS, TAILS
from sketch_plugins.optim.declaring import count, option
from sketch_plugins.sharding.parts import Part

STATISTICS = ("accumulate", "sample")


class Statistics(TypedDict, total=False):
    """What the covariances gather, and when and how they are solved."""

    statistics: Annotated[str | None, option("accumulate", "see above.", choices=STATISTICS, structural=True)]
    statistics_freq: Annotated[
        int | None,
        count(
            1,
            'steps between statistics, with ``statistics="accumulate"``; it must divide update_freq. A solve that is '
            "due before the first whole period is left out if its step gathers no statistic.",
            1,
        ),
    ]
    shampoo_beta: Annotated[
        float | None,
        option(
            0.99,
            ":math:`\\beta_s`, decay of the covariances with each statistic. 1 is refused, because deflation would "
            "then drive the sketch to 0.",
            allowed="a number in (0, 1)",
            check=lambda v: 0 < v < 1,
        ),
    ]
    update_freq: Annotated[int | None, count(10, "steps between solves.", 1)]
    stagger_solves: Annotated[
        bool | None,
        option(
            False,
            "after the first whole period each tensor is solved at its own step of a period (by its number in the "
            "group; the experts of one tensor together), so that no step solves all of them. Before that, and with "
            "False, all are solved in the same steps.",
        ),
    ]
    solver: Annotated[
        str | None,
        option("eigh", "decomposition, see `sketch_plugins.linalg.frequent_directions.fold`.", choices=SOLVERS),
    ]
    refresh_every: Annotated[
        int | None,
        count(10, 'with ``solver="power"``, one in refresh_every solves uses ``"eigh"`` (0: none).', 0),
    ]
    tail: Annotated[
        str | None,
        option(
            "trace",
            "the eigenvalue that is assumed outside of the sketch, see "
            '`sketch_plugins.linalg.frequent_directions.fold`. ``"paper"`` and ``"sqrt"`` need '
            '``statistics="sample"``.',
            choices=TAILS,
        ),
    ]


def check(group: Mapping[str, Any]) -> None:
    """Raise ValueError if options of a group contradict each other."""
    if group["statistics"] == "accumulate" and group["tail"] != "trace":
        raise ValueError(
            f"tail={group['tail']!r} needs statistics='sample'. With statistics='accumulate' only the trace "
            "says what the sketch does not contain: use tail='trace'"
        )
    if group["statistics"] == "sample" and group["statistics_freq"] != 1:
        raise ValueError(
            f"statistics_freq={group['statistics_freq']} needs statistics='accumulate'. With "
            "statistics='sample' every update_freq-th gradient is used, and statistics_freq must be 1"
        )
    if group["update_freq"] % group["statistics_freq"]:
        raise ValueError(
            f"statistics_freq={group['statistics_freq']} does not divide update_freq={group['update_freq']}"
        )


def due(step: int, every: int, offset: int = 0) -> bool:
    """Whether a step solves. Steps that are ``offset`` after a whole period do.

    Before the first whole period steps 1, 2, 4, 8, ... do, so that a short run has a preconditioner, too.
    """
    return (step >= every and (step - offset) % every == 0) or (step < every and step & (step - 1) == 0)


def offset_of(p: Part, group: Mapping[str, Any]) -> int:
    """With `stagger_solves`, the steps from the first tensor's solve to this one's: tensors take the statistics' steps.

    The number of the parameter in its group decides, or its number in the flat partition that holds the piece.
    """
    if not group["stagger_solves"]:
        return 0
    every, number = group["statistics_freq"], p.index if p.key is None or p.piece is None else p.piece.index
    return number % (group["update_freq"] // every) * every


def sampled(step: int, every: int) -> bool:
    """Whether a step gathers a statistic."""
    return step % every == 0 or step == 1


def solver_of(step: int, group: Mapping[str, Any], offset: int = 0) -> str:
    """The decomposition of this step's solve. For ``offset`` see `due`."""
    if group["solver"] != "power":
        return group["solver"]
    every, refresh = group["update_freq"], group["refresh_every"]
    # Before the first whole period directions still change quickly.
    return "eigh" if step < every or (refresh and (step - offset) // every % refresh == 0) else "power"

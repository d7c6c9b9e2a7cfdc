"""When `Sketchy` gathers statistics, when it solves, and how; which options of these contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypedDict

from sketch_plugins.linalg.frequent_directions import SOLVERS, TAILS
from sketch_plugins.optim.declaring import count, option
from sketch_plugins.sharding.parts import Part

STATISTICS = ("accumulate", "sample")


class Statistics(TypedDict, total=False):
    """What a covariance gathers, and when and how it is solved."""

    statistics: Annotated[str | None, option("accumulate", "see above.", choices=STATISTICS, structural=True)]
    statistics_freq: Annotated[
        int | None,
        count(
            1,
            'steps between statistics, with ``statistics="accumulate"``; divides update_freq. A step in which a '
            "solve is due before the first whole period, and no statistic, has none.",
            1,
        ),
    ]
    shampoo_beta: Annotated[
        float | None,
        option(
            0.99,
            ":math:`\\beta_s`, decay of the covariances for each of their statistics. 1 is refused: deflation then "
            "drives the sketch to 0.",
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
            "group; the experts of one tensor together), so that no step solves all of them. Up to then, and with "
            "False, all are solved in the same steps.",
        ),
    ]
    solver: Annotated[str | None, option("eigh", "decomposition, ibid.", choices=SOLVERS)]
    refresh_every: Annotated[
        int | None,
        count(10, 'with ``solver="power"`` every so many solves are done by ``"eigh"`` (0: never).', 0),
    ]
    tail: Annotated[
        str | None,
        option(
            "trace",
            "what stands for the covariance outside of the sketch, see "
            '`sketch_plugins.linalg.frequent_directions.fold`. ``"paper"`` and ``"sqrt"`` go with '
            '``statistics="sample"``.',
            choices=TAILS,
        ),
    ]


def check(group: Mapping[str, Any]) -> None:
    """Raise ValueError where options of a group contradict each other."""
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
    """Whether a step solves: ``offset`` steps after every whole period.

    And at 1, 2, 4, 8, ... before the first one, so that a short run is not left without a preconditioner.
    """
    return (step >= every and (step - offset) % every == 0) or (step < every and step & (step - 1) == 0)


def offset_of(p: Part, group: Mapping[str, Any]) -> int:
    """Steps from the first tensor's solve to this one's (`stagger_solves`): those with statistics, in turn.

    The number of the parameter decides: in its group, or in the flat partition that holds pieces of several.
    """
    if not group["stagger_solves"]:
        return 0
    every, number = group["statistics_freq"], p.index if p.key is None or p.piece is None else p.piece.index
    return number % (group["update_freq"] // every) * every


def sampled(step: int, every: int) -> bool:
    """Whether a step adds a statistic."""
    return step % every == 0 or step == 1


def solver_of(step: int, group: Mapping[str, Any], offset: int = 0) -> str:
    """The decomposition of this step's solve; ``offset``: see `due`."""
    if group["solver"] != "power":
        return group["solver"]
    every, refresh = group["update_freq"], group["refresh_every"]
    # Before the first whole period directions still come in quickly.
    return "eigh" if step < every or (refresh and (step - offset) // every % refresh == 0) else "power"

"""The options of `Sketchy`, each declared once."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from sketch_plugins.linalg.frequent_directions import SOLVERS, TAILS
from sketch_plugins.optim.declaring import declared, option, unused
from sketch_plugins.optim.family import Buckets, Clipping, Decoupled, FirstMoment, Sketches, Steps
from sketch_plugins.optim.options import Option
from sketch_plugins.stores.kinds import FIRST_MOMENTS

# Graft -> how its second moment is kept.
GRAFTS = {"cs": "count_min", "rmsprop": "dense", "adagrad": "dense", "sm3": "cover", "none": "none"}
INPUTS = ("update", "gradient")
STATISTICS = ("accumulate", "sample")
PLACES = ("before", "after")


def _count(default: int, doc: str, least: int, structural: bool = False) -> Option:
    allowed = f"an integer >= {least}"
    return option(default, doc, allowed=allowed, check=lambda v: v >= least, structural=structural)


class Preconditioner(TypedDict, total=False):
    """What is preconditioned, and how."""

    rank: Annotated[
        float | None,
        option(
            32,
            "k: an integer, or a fraction (0, 1) of the axis. More than the axis is the axis: exact Shampoo.",
            allowed="an integer >= 1 or a fraction in (0, 1)",
            check=lambda v: 0 < v < 1 or (v >= 1 and v == int(v)),
            structural=True,
        ),
    ]
    budget: Annotated[
        float | None,
        option(
            0.0,
            "bytes of state a parameter, instead of ``rank`` (0: use ``rank``): each preconditioned tensor takes the "
            "largest rank, the same for its axes, with which its whole state stays within it; none at all where rank 1 "
            "does not. An error where that goes for every tensor of the group that would have one for every axis.",
            allowed="a number >= 0",
            check=lambda v: v >= 0,
            structural=True,
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
    update_freq: Annotated[int | None, _count(10, "steps between solves.", 1)]
    statistics_freq: Annotated[
        int | None,
        _count(
            1,
            'steps between statistics, with ``statistics="accumulate"``; divides update_freq. A step in which a '
            "solve is due before the first whole period, and no statistic, has none.",
            1,
        ),
    ]
    start_preconditioning_step: Annotated[
        int | None, _count(1, "the first step that is preconditioned (1: from the first solve on).", 0)
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
    solver: Annotated[str | None, option("eigh", "decomposition, ibid.", choices=SOLVERS)]
    refresh_every: Annotated[
        int | None,
        _count(10, 'with ``solver="power"`` every so many solves are done by ``"eigh"`` (0: never).', 0),
    ]
    statistics: Annotated[str | None, option("accumulate", "see above.", choices=STATISTICS, structural=True)]
    input: Annotated[
        str | None,
        option(
            "update",
            "what is preconditioned and whose covariance it is: the graft's update, or the gradient (the step then has "
            'the size of :math:`u_t`). With ``graft="none"`` they are the same.',
            choices=INPUTS,
        ),
    ]
    graft: Annotated[
        str | None,
        option(
            "cs",
            'whose size the step has. With ``"none"`` x itself is the step, whatever its size; update_clip and '
            "scale_parameter then concern x, and are on unless they are set to 0 and False.",
            choices=tuple(GRAFTS),
            structural=True,
        ),
    ]
    matrix_eps: Annotated[
        float | None,
        option(
            1e-6,
            ":math:`\\epsilon`, relative to the largest eigenvalue.",
            allowed="a number >= 0",
            check=lambda v: v >= 0,
        ),
    ]
    exponent: Annotated[
        float | None,
        option(
            0.0,
            "a of :math:`(L_i + \\epsilon)^{-a}`; 0: :math:`1 / (2 r)`.",
            allowed="a number in [0, 1]",
            check=lambda v: 0 <= v <= 1,
        ),
    ]
    momentum_placement: Annotated[
        str | None,
        option(
            "before",
            '``"before"``: the momentum is that of u (or g), and is preconditioned; ``"after"``: it is that of '
            "the grafted x, as in the paper's code.",
            choices=PLACES,
        ),
    ]
    nesterov: Annotated[
        bool | None,
        option(
            True,
            "the step uses :math:`\\beta_1 m_t + (1 - \\beta_1) u_t`. No effect where there is no first moment, as for "
            "momentum_placement.",
        ),
    ]
    momentum_of: Annotated[
        str | None,
        option(
            "preconditioned",
            "tensors that keep a first moment: those with a covariance for every axis, or embeddings, heads and "
            "vectors, too.",
            choices=("preconditioned", "all"),
            structural=True,
        ),
    ]
    merge_dims: Annotated[
        int | None, _count(1024, "trailing axes are merged while their product is at most this.", 1, structural=True)
    ]
    max_block_dim: Annotated[int | None, _count(8192, "longest axis of a block (0: no blocks).", 0, structural=True)]
    max_axis: Annotated[int | None, _count(16384, "longer axes have no covariance, see above.", 1, structural=True)]
    max_aspect_ratio: Annotated[
        float | None,
        option(
            16.0,
            "nor have axes longer than this times the rest of the tensor.",
            allowed="a number > 0",
            check=lambda v: v > 0,
            structural=True,
        ),
    ]
    precondition: Annotated[
        str | None,
        option(
            "auto",
            '``"auto"``: as above; ``"all"``: every axis, however long; ``"none"``: the graft alone (for a '
            "parameter group).",
            choices=("auto", "all", "none"),
            structural=True,
        ),
    ]
    nonfinite: Annotated[
        str | None,
        option(
            "error",
            "a NaN or an infinity in a gradient, or a norm from 1e18 on, of which float32 cannot keep a covariance: "
            "an error, or the whole step is skipped. Either way nothing has changed. The price is one number that the "
            "host waits for in each step.",
            choices=("error", "skip"),
        ),
    ]
    capturable: Annotated[bool, unused((False,), "decompositions cannot be captured in a CUDA graph")]


class SketchyOptions(Preconditioner, FirstMoment, Sketches, Buckets, Steps, Clipping, Decoupled, total=False):
    """Keywords of `Sketchy`."""


#: What is declared otherwise than for the family.
CHANGES: dict[str, dict[str, Any]] = {
    **{
        name: {"doc": f'of the graft ``"cs"``: {one.doc}'}
        for name, one in declared(Sketches).items()
        if name != "batch_dims"
    },
    "fused": {"doc": f"of tensors that are not preconditioned: {declared(Steps)['fused'].doc}"},
    "first_moment": {"choices": tuple(kind for kind in FIRST_MOMENTS if kind != "count_sketch")},
    "bucket": {"doc": 'what a bucket of the graft ``"cs"`` holds of its rows\' ``g * g``.'},
    "min_compress_size": {
        "doc": "tensors with fewer elements, and all vectors, keep the graft's second moment exactly."
    },
    "update_clip": {
        "default": 1.0,
        "doc": 'divide u by ``max(1, RMS(u) / update_clip)`` (0: off); with ``graft="none"`` x.',
    },
    "scale_parameter": {"default": True},
    "chunk_size": {
        "doc": "elements worked on at a time (0: 2**20 on a CPU, 2**24 on an accelerator). Beside tiles, a step takes "
        'memory for one preconditioned tensor at a time (``solver="svd"`` with ``statistics="sample"``: a few).'
    },
}

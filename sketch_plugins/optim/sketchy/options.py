"""The options of `Sketchy`: those that its parts declare, and those of the family."""

from __future__ import annotations

from typing import Any

from sketch_plugins.optim.declaring import declared
from sketch_plugins.optim.family import TYPICAL_RMS, Batches, Buckets, Clipping, Decoupled, FirstMoment, Sketches, Steps
from sketch_plugins.optim.sketchy.axes import Covariances
from sketch_plugins.optim.sketchy.graft import Graft
from sketch_plugins.optim.sketchy.momentum import Momentum
from sketch_plugins.optim.sketchy.schedule import Statistics
from sketch_plugins.optim.sketchy.stack import Preconditioned
from sketch_plugins.stores.kinds import FIRST_MOMENTS


class SketchyOptions(
    Covariances, Statistics, Graft, Momentum, Preconditioned,
    FirstMoment, Sketches, Batches, Buckets, Steps, Clipping, Decoupled, total=False,
):  # fmt: skip
    """Keywords of `Sketchy`."""


_FUSED = "applies to tensors that are not preconditioned, and to the elementwise parts of the others' steps"
#: Options of the family that are declared differently here.
CHANGES: dict[str, dict[str, Any]] = {
    **{
        name: {"doc": f'for the graft ``"cs"``: {one.doc}'}
        for name, one in declared(Sketches).items()
        if name != "batch_dims"
    },
    "fused": {"doc": f"{_FUSED}: {declared(Steps)['fused'].doc}"},
    "first_moment": {"choices": tuple(kind for kind in FIRST_MOMENTS if kind != "count_sketch")},
    "bucket": {"doc": 'what a bucket of the graft ``"cs"`` holds of its rows\' ``g * g``.'},
    "min_compress_size": {
        "doc": "tensors with fewer elements, and all vectors, keep the graft's second moment exactly."
    },
    "update_clip": {
        "default": 1.0,
        "doc": 'divide u by ``max(1, RMS(u) / update_clip)`` (0: off); with ``graft="none"``, divide x.',
    },
    "scale_parameter": {"default": True},
    "reference_rms": {"default": TYPICAL_RMS},
    "chunk_size": {
        "doc": "elements worked on at a time (0: 2**20 on a CPU, 2**24 on an accelerator). Beside tiles, a step takes "
        "memory for one stack of preconditioned tensors (``stack_bytes``), or for one tensor if that is larger "
        '(a few of them with ``solver="svd"`` and ``statistics="sample"``).'
    },
}

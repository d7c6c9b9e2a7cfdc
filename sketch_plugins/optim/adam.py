"""Adam and RMSprop with sketched moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.optim.options import (
    COMMON,
    DECOUPLES,
    FIRST_MOMENT,
    SECOND_MOMENT,
    TORCHS,
    NoEffect,
    Option,
    no_effect,
    rate,
)
from sketch_plugins.optim.rule import Denominator, Rule
from sketch_plugins.stores import Ema

_SHARED = {
    "maximize": False,
    "width": 0,
    "depth": 1,
    "hash": "strided",
    "batch_dims": "auto",
    "table_dtype": "fp32",
    "seed": 0,
    "min_compress_size": 4096,
    "row_sparse": False,
    "update_clip": 0.0,
    "scale_parameter": False,
    "lagged_rms": False,
    "chunk_size": 0,
    "compile": False,
    "fused": None,
    "capturable": False,
    "stochastic_rounding": False,
    "clean_every": 0,
    "clean_factor": 0.2,
}
_FIRST = {
    "first_moment": "int8",
    "first_moment_rounding": "nearest",
    "block_size": 128,
    "allow_dense_count_sketch": False,
}
_SECOND = {"second_moment": "count_min", "compression": 0.05, "bucket": "mean"}
# arXiv 1902.00179: 3 hashes over tables that together keep 20 % of the rows, min / median, V *= 0.2 every 125 steps.
PAPER_SKETCH = {"compression": 0.2 / 3, "depth": 3, "hash": "affine", "bucket": "sum", "clean_every": 125}
_EXACT = {"first_moment": "fp32", "second_moment": "dense", "update_clip": 0.0, "scale_parameter": False}
_ADAFACTOR_DEVICES = {"update_clip": 1.0, "scale_parameter": True}


class CSAdam(SketchOptimizer):
    r"""AdamW whose moments are compressed: by default 1.24 bytes of state a parameter instead of 8.

    Every parameter with 2 or more dimensions and at least ``min_compress_size`` elements is an :math:`R \times D`
    matrix (dimension 0 by the rest; the experts of a mixture, :math:`E \times R \times D`, are E such matrices).
    Vectors, scalars and small tensors keep exact float32 moments. At step :math:`t`

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) \, \mathrm{bucket}(g_t^2) \\
        \theta_t &= (1 - \gamma \lambda) \theta_{t-1}
            - \gamma \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    with :math:`\gamma` the learning rate and :math:`\lambda` the weight decay. By default :math:`m` is kept in int8
    blocks and :math:`v` in a count-min sketch of depth 1: rows :math:`i, i + w, i + 2w, \ldots` share one row of
    :math:`w = \lceil 0.05 R \rceil` buckets that averages their :math:`g^2`. AdamW's learning rate carries over.

    State bytes a parameter of an R x D matrix (float32 arithmetic; exact counts: `sketch_plugins.state_report`):
    ``first_moment`` fp32 4, bf16 2, int8 ``1 + 4 / min(block_size, D)``, count_sketch ``4 * depth * compression``,
    none 0; ``second_moment`` dense 4, log8 ``1 + 2 / min(block_size, D)``, count_min ``4 * depth * compression``,
    row_count_min ``4 / D`` more, cover ``4 * (sum of the dimensions) / (their product)``. With ``table_dtype="bf16"`` a
    sketch's 4 are 2.

    Presets (any option given explicitly wins over the preset):

    =============== ============== ============= ============ ============================================== ==========
    preset          first_moment   second_moment compression  further                                        B/param
    =============== ============== ============= ============ ============================================== ==========
    default         int8           count_min     0.05         depth 1, strided hash, bucket mean             1.24
    lean            none           count_min     0.05         + update_clip 1, scale_parameter: lr is        0.20
                                                              relative to the weights (try 1e-2 to 3e-2)
    paper_cs_mv     count_sketch   count_min     3 x 0.0667   depth 3, affine hash, bucket sum, median and   1.60
                                                              minimum, cleaning 0.2 every 125 steps; for
                                                              row-sparse gradients (embedding, softmax)
    paper_cs_v      fp32           count_min     3 x 0.0667   the same, first moment exact                   4.80
    exact           fp32           dense                      is torch.optim.AdamW                           8.00
    =============== ============== ============= ============ ============================================== ==========

    Sparse gradients (``nn.Embedding(sparse=True)``) and ``row_sparse``: *lazy* Adam, the semantics of
    `torch.optim.SparseAdam`. Only rows with a gradient change: the moments of other rows neither decay nor move them,
    weight decay reaches touched rows only, bias correction counts the steps of the whole parameter, epsilon is added
    before bias correction (:math:`\sqrt{1 - \beta_2^t} / (\sqrt{v} + \epsilon)`), and update_clip and
    scale_parameter look at the touched rows. ``row_sparse="auto"`` does this for dense gradients in those steps in
    which at least half of the rows are entirely zero (embeddings of models that were not built with ``sparse=True``);
    on an accelerator the search for such rows synchronises with the host. Where c rows of one bucket are touched in
    one step, the bucket takes c steps with the mean of their values: no order, bounded for every c.

    Args:
        params: parameters, (name, parameter) pairs or parameter groups; every option may be set for a group.
        lr: learning rate, float or tensor of one element (default 1e-3). What rounding leaves of 0 where a schedule
            ends (from -1e-10 on) is a rate of 0, in a step and in a checkpoint.
        betas: decay rates of the moments (default (0.9, 0.999)); ``betas[0]`` has no effect with
            ``first_moment="none"``.
        eps: added to the denominator (default 1e-8).
        weight_decay: decoupled weight decay (default 1e-2).
        preset: see above.
        first_moment: ``"int8"``, ``"fp32"``, ``"bf16"``, ``"count_sketch"`` or ``"none"``.
        second_moment: ``"count_min"``, ``"row_count_min"``, ``"cover"`` (SM3-II's maxima over the slices of each axis,
            as an average; see `SM3`), ``"log8"`` (8 bits for each number, within a sixteenth of it; see
            `sketch_plugins.stores.Log8`) or ``"dense"``. The options of a sketch mean nothing to the last three.
        compression: fraction of the rows kept as buckets in each of the ``depth`` tables, in (0, 1]. 1.0 gives every
            row its own bucket: the dense method.
        width: number of buckets, instead of ``compression``; more than R is R.
        depth: number of hashes; the estimate is the minimum (second moment) or median (first moment).
        hash: ``"strided"`` or ``"affine"`` (a seeded bijection); see `sketch_plugins.hashing`.
        batch_dims: how many of a tensor's first axes are a batch of matrices. With 1 a tensor of three or more
            dimensions is a batch of matrices, and each of them has buckets of its own (``compression`` and ``width``
            are those of one matrix): no expert shares a bucket with another one. With 0 dimension 0 is the rows.
            ``"auto"`` (default): 1 for a tensor ``(E, R, D)`` whose R and D are 16 or more, if E is at most R and D, or
            if D is 256 or more; 0 for all others, such as convolutions. Where no moment is kept in a sketch, nothing
            depends on it.
        table_dtype: numbers of the sketches' tables (``count_sketch``, ``count_min`` and the profiles of
            ``row_count_min``): ``"fp32"`` (default) or ``"bf16"``, half the bytes. A bfloat16 table is rounded
            stochastically at every write, so that its expected value is the float32 table's; the noise is a function
            of (seed, step, cell): runs repeat and resume bit for bit. To nearest is not offered: at ``betas[1]=0.999``
            a step without gradient lowers a cell by 1/1000, less than half a unit in the last place of bfloat16 (1/512
            or more): every such step would be rounded away, and no cell could ever decay.
        bucket: ``"mean"`` or ``"sum"`` of the rows of a bucket, for dense gradients.
        clean_every: every so many steps ...
        clean_factor: ... the sketched second moment is multiplied by this, before the update.
        block_size: columns that share one scale of the int8 first moment, which costs ``4 / block_size`` bytes a
            parameter, or one exponent of the log8 second moment (``2 / block_size``).
        first_moment_rounding: ``"nearest"`` or ``"stochastic"``, for int8.
        min_compress_size: smaller tensors are exact.
        row_sparse: False, True or ``"auto"``. The last two learn much more slowly where most rows are rare: 60 steps of
            a sentence-transformers model end at a loss of 1.90 with ``"auto"``, and at 0.12 with False.
        update_clip: divide the update by ``max(1, RMS(update) / update_clip)`` (Adafactor's d; 0: off).
        scale_parameter: multiply the step by ``max(1e-3, RMS(parameter))`` (Adafactor's relative step).
        lagged_rms: both RMS are those of the step before, measured while it was taken: of its update as it would have
            been without clipping, and of the parameter as it was read. A step then needs one sweep over gradient and
            parameter, not two (12 bytes a float32 parameter, not 20), and an update that grows is clipped one step
            late. Two more numbers of state for each parameter, written whether or not update_clip and scale_parameter
            are on. The first step of a parameter measures before it steps, as without this option, and so do row-sparse
            steps, whose rows are others every time; what they measured is what the next step finds.
        allow_dense_count_sketch: a signed sketch of a dense first moment does not train and is refused; True insists.
        chunk_size: elements worked on at a time: the step's temporaries are a few times this many numbers.
        compile: run the tiles of dense gradients through torch.compile: needs what it needs (a C++ compiler on a CPU)
            and some seconds in the first step; then faster on a CPU (docs/benchmarks.md). Bits differ from the eager
            path's. Not together with a scheduler that changes betas: every new value would be compiled anew.
        fused: one kernel that reads parameter and gradient once: None (default): Triton's on CUDA and ROCm, Numba's on
            a CPU (with the extra ``cpu`` installed, and a tensor of 32768 elements or more), else eager torch. True:
            an error where there is none; a tensor that the kernels cannot take still goes the eager way, with a
            warning. False: eager torch. The bits of the three differ; each of them repeats its own. Kernels that
            differ from eager torch on a GPU are not used there, with a warning (docs/check.md).
        capturable: keep step counters on the device, so that the step can be captured in a CUDA graph (Triton kernels
            only; not with clean_every or row-sparse gradients).
        stochastic_rounding: bfloat16 parameters are rounded up or down with probabilities that make the rounding
            unbiased, so that updates below half a unit in the last place are not lost and no float32 master copy is
            needed; the noise is a function of (seed, step, element).
        seed: of the hashes and of stochastic rounding; equal seeds, equal results.
        maximize: ascend.
        amsgrad: has no effect, as all that follow; accepted so that AdamW's arguments can be handed on. Only False.
        foreach: None or False.
        differentiable: only False.
        decoupled_weight_decay: only True.

    Raises:
        ValueError: an option has a value that is not allowed (named, with what is), an option does not exist, a
            parameter is complex or sparse; in `step`, a dense gradient meets ``first_moment="count_sketch"``.

    Sources: count-sketch Adam, https://arxiv.org/abs/1902.00179; update clipping and relative steps,
    https://arxiv.org/abs/1804.04235. Deviations from the first: buckets hold the mean rather than the sum; hashes are
    balanced bijections; rows are hashed for dense layers too (the reference hashes columns there); co-touched rows
    as above; each table keeps its own running value rather than one estimate fed back to all.
    """

    OPTIONS: ClassVar[dict[str, Option]] = {**COMMON, **FIRST_MOMENT, **SECOND_MOMENT}
    NO_EFFECT: ClassVar[dict[str, NoEffect]] = {**TORCHS, **DECOUPLES}
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {**_SHARED, **_FIRST, **_SECOND},
        "lean": {"first_moment": "none", **_ADAFACTOR_DEVICES},
        "paper_cs_mv": {"first_moment": "count_sketch", **PAPER_SKETCH},
        "paper_cs_v": {"first_moment": "fp32", **PAPER_SKETCH},
        "exact": _EXACT,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        preset: str = "default",
        first_moment: str | None = None,
        second_moment: str | None = None,
        compression: float | None = None,
        width: int | None = None,
        depth: int | None = None,
        hash: str | None = None,
        batch_dims: int | str | None = None,
        table_dtype: str | None = None,
        bucket: str | None = None,
        clean_every: int | None = None,
        clean_factor: float | None = None,
        block_size: int | None = None,
        first_moment_rounding: str | None = None,
        min_compress_size: int | None = None,
        row_sparse: bool | str | None = None,
        update_clip: float | None = None,
        scale_parameter: bool | None = None,
        lagged_rms: bool | None = None,
        allow_dense_count_sketch: bool | None = None,
        chunk_size: int | None = None,
        compile: bool | None = None,
        fused: bool | None = None,
        capturable: bool | None = None,
        stochastic_rounding: bool | None = None,
        seed: int | None = None,
        maximize: bool | None = None,
        amsgrad: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        decoupled_weight_decay: bool = True,
    ) -> None:
        super().__init__(params, self._arguments(locals()), preset)

    def _rule(self, group: Mapping[str, Any], step: float | Tensor, sparse: bool) -> Rule:
        return _adam(group, group["betas"][0] if group["first_moment"] != "none" else None, step, sparse)


class CSRMSprop(SketchOptimizer):
    r"""RMSprop with a sketched second moment: CS-V of the paper, Adam at :math:`\beta_1 = 0`. 0.20 bytes a parameter.

    .. math::
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) \, \mathrm{bucket}(g_t^2) \qquad
        \theta_t = (1 - \gamma \lambda) \theta_{t-1} - \gamma \frac{g_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    `CSAdam` without a first moment; its docstring explains the stores, options and row-sparse gradients. Unlike
    `torch.optim.RMSprop` it corrects the bias of v and decouples the weight decay (as the paper's Adam does).

    Args:
        params: parameters or parameter groups.
        lr: learning rate (default 1e-3).
        betas: (no effect, decay rate of the second moment); the first is accepted so that one configuration can name
            any optimizer of the family.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        preset: ``"default"``; ``"lean"`` (+ update_clip 1, scale_parameter); ``"paper_cs_v"`` (depth 3, 20 %, bucket
            sum, cleaning 0.2 every 125 steps); ``"exact"`` (dense second moment, 4 bytes).
        second_moment: see `CSAdam`, as for all that follow.
        compression: see `CSAdam`.
        width: see `CSAdam`.
        depth: see `CSAdam`.
        hash: see `CSAdam`.
        batch_dims: see `CSAdam`.
        table_dtype: see `CSAdam`.
        bucket: see `CSAdam`.
        clean_every: see `CSAdam`.
        clean_factor: see `CSAdam`.
        min_compress_size: see `CSAdam`.
        row_sparse: see `CSAdam`.
        update_clip: see `CSAdam`.
        scale_parameter: see `CSAdam`.
        lagged_rms: see `CSAdam`.
        chunk_size: see `CSAdam`.
        compile: see `CSAdam`.
        fused: see `CSAdam`.
        capturable: see `CSAdam`.
        stochastic_rounding: see `CSAdam`.
        seed: see `CSAdam`.
        maximize: see `CSAdam`.
        amsgrad: has no effect, as all that follow; accepted so that AdamW's arguments can be handed on. Only False.
        foreach: None or False.
        differentiable: only False.
        decoupled_weight_decay: only True.
        momentum: only 0, as `torch.optim.RMSprop` has it.
        centered: only False, likewise.

    Raises:
        ValueError: as `CSAdam`.

    Source: https://arxiv.org/abs/1902.00179, deviations as in `CSAdam`.
    """

    OPTIONS: ClassVar[dict[str, Option]] = {**COMMON, **SECOND_MOMENT}
    NO_EFFECT: ClassVar[dict[str, NoEffect]] = {
        **TORCHS,
        **DECOUPLES,
        **no_effect("momentum", (0,), "RMSprop's momentum is not kept; CSAdam and Sketchy have a first moment"),
        **no_effect("centered", (False,), "the mean of the gradients is not kept"),
    }
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {**_SHARED, **_SECOND},
        "lean": {**_ADAFACTOR_DEVICES},
        "paper_cs_v": PAPER_SKETCH,
        "exact": {k: v for k, v in _EXACT.items() if k != "first_moment"},
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.0, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        preset: str = "default",
        second_moment: str | None = None,
        compression: float | None = None,
        width: int | None = None,
        depth: int | None = None,
        hash: str | None = None,
        batch_dims: int | str | None = None,
        table_dtype: str | None = None,
        bucket: str | None = None,
        clean_every: int | None = None,
        clean_factor: float | None = None,
        min_compress_size: int | None = None,
        row_sparse: bool | str | None = None,
        update_clip: float | None = None,
        scale_parameter: bool | None = None,
        lagged_rms: bool | None = None,
        chunk_size: int | None = None,
        compile: bool | None = None,
        fused: bool | None = None,
        capturable: bool | None = None,
        stochastic_rounding: bool | None = None,
        seed: int | None = None,
        maximize: bool | None = None,
        amsgrad: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        decoupled_weight_decay: bool = True,
        momentum: float = 0.0,
        centered: bool = False,
    ) -> None:
        super().__init__(params, self._arguments(locals()), preset)

    def _rule(self, group: Mapping[str, Any], step: float | Tensor, sparse: bool) -> Rule:
        return _adam(group, None, step, sparse)


def _adam(group: Mapping[str, Any], beta1: float | None, step: float | Tensor, sparse: bool) -> Rule:
    lr, beta2, eps = rate(group), group["betas"][1], group["eps"]
    root2 = (1.0 - beta2**step) ** 0.5
    return Rule(
        first=None if beta1 is None else Ema(beta1, 1.0 - beta1, step),
        second=Ema(beta2, 1.0 - beta2, step),
        step_size=lr,
        correction=1.0 if beta1 is None else 1.0 / (1.0 - beta1**step),
        decay=lr * group["weight_decay"],
        lookahead=None,
        # SparseAdam adds epsilon to the uncorrected root; the same as epsilon / root2 after correction.
        denominator=Denominator(root2, eps / root2 if sparse else eps),
    )

"""Adam and RMSprop with sketched moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.optim.declaring import unused, with_options
from sketch_plugins.optim.family import (
    ADAFACTOR_DEVICES,
    Batches,
    Buckets,
    Clipping,
    Decoupled,
    FirstMoment,
    Kernels,
    Lagged,
    RowScales,
    SecondMoment,
    SignedSketch,
    Sketches,
    Steps,
    Vocabularies,
)
from sketch_plugins.optim.options import rate, step_rate
from sketch_plugins.optim.rule import Denominator, Rule
from sketch_plugins.optim.usual_rates import ADAMW
from sketch_plugins.stores import Ema

# arXiv 1902.00179: 3 hashes, tables that together keep 20 % of the rows, min / median, V *= 0.2 every 125 steps.
PAPER_SKETCH = {
    "compression": 0.2 / 3,
    "depth": 3,
    "hash": "affine",
    "bucket": "sum",
    "clean_every": 125,
    "embedding_rate": 1.0,
    "row_scales": False,
}
_EXACT = {"first_moment": "fp32", "second_moment": "dense", "update_clip": 0.0, "scale_parameter": False}


class _Sketched(
    SecondMoment, Sketches, Vocabularies, RowScales, Batches, Buckets, Steps, Clipping, Lagged, total=False
):
    """What both optimizers of this file share."""


class AdamOptions(FirstMoment, _Sketched, SignedSketch, Kernels, Decoupled, total=False):
    """Keywords of `CSAdam`."""


@with_options(
    AdamOptions,
    block_size={
        "doc": "columns that share one scale of an int8 first moment, which costs ``4 / block_size`` bytes a "
        "parameter, or one exponent of a log8 second moment (``2 / block_size``)."
    },
)
class CSAdam(SketchOptimizer):
    r"""AdamW whose moments are compressed: by default 1.24 bytes of state a parameter instead of 8.

    Every parameter with 2 or more dimensions and at least ``min_compress_size`` elements is an :math:`R \times D`
    matrix: dimension 0 by all others. (The experts of a mixture, :math:`E \times R \times D`, are E such matrices.)
    Vectors, scalars and small tensors keep exact float32 moments. At step :math:`t`

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) \, \mathrm{bucket}(g_t^2) \\
        \theta_t &= (1 - \gamma \lambda) \theta_{t-1}
            - \gamma \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    with the learning rate :math:`\gamma` and the weight decay :math:`\lambda`. By default :math:`m` is kept in int8
    blocks, and :math:`v` in a count-min sketch of depth 1: rows :math:`i, i + w, i + 2w, \ldots` share one row of
    :math:`w = \lceil 0.05 R \rceil` buckets, which averages their :math:`g^2`. AdamW's learning rate carries over.
    Rows with larger gradients than their bucket's mean take shorter steps (``row_scales``). Embeddings and output
    layers whose rows share buckets take ``embedding_rate`` times that rate.

    State bytes a parameter of an R x D matrix (float32 arithmetic; exact counts: `sketch_plugins.state_report`):
    ``first_moment`` fp32 4, bf16 2, int8 ``1 + 4 / min(block_size, D)``, count_sketch ``4 * depth * compression``,
    none 0; ``second_moment`` dense 4, log8 ``1 + 2 / min(block_size, D)``, count_min ``4 * depth * compression`` and
    ``4 / D`` for ``row_scales``, row_count_min as count_min with row_scales, cover ``4 * (sum of the dimensions) /
    (their product)``. With ``table_dtype="bf16"`` the 4 of a table becomes 2.

    Presets (an option that is given explicitly overrides the preset):

    =============== ============== ============= ============ ============================================== ==========
    preset          first_moment   second_moment compression  further                                        B/param
    =============== ============== ============= ============ ============================================== ==========
    default         int8           count_min     0.05         depth 1, strided hash, bucket mean             1.24
    lean            none           count_min     0.05         + update_clip 1, scale_parameter with          0.20
                                                              reference_rms 0.017: AdamW's rate
    paper_cs_mv     count_sketch   count_min     3 x 0.0667   depth 3, affine hash, bucket sum, median and   1.60
                                                              minimum, cleaning 0.2 every 125 steps; for
                                                              row-sparse gradients (embedding, softmax)
    paper_cs_v      fp32           count_min     3 x 0.0667   the same, first moment exact                   4.80
    exact           fp32           dense                      is torch.optim.AdamW                           8.00
    =============== ============== ============= ============ ============================================== ==========

    Sparse gradients (``nn.Embedding(sparse=True)``) and ``row_sparse`` take *lazy* steps, as `torch.optim.SparseAdam`
    does. Only rows with a gradient change: the moments of other rows neither decay nor move them. Weight decay applies
    to touched rows only, bias correction counts the steps of the whole parameter, epsilon is added before bias
    correction (:math:`\sqrt{1 - \beta_2^t} / (\sqrt{v} + \epsilon)`), and update_clip and scale_parameter measure the
    touched rows. ``row_sparse="auto"`` does this for dense gradients in those steps in which at least half of the rows
    are entirely zero (embeddings of models that were not built with ``sparse=True``). On an accelerator the search for
    such rows synchronises with the host. If a step touches c rows of one bucket, the bucket takes c steps with the mean
    of their values, so their order does not matter and the result is bounded for every c.

    Args:
        params: parameters, (name, parameter) pairs or parameter groups; every option may be set for a group.
        lr: learning rate, float or tensor of one element (default 1e-3). A rate between -1e-10 and 0 counts as 0, in a
            step and in a checkpoint: it is the rounding error of a schedule that ends at 0.
        betas: decay rates of the moments (default (0.9, 0.999)); ``betas[0]`` has no effect with
            ``first_moment="none"``.
        eps: added to the denominator (default 1e-8).
        weight_decay: decoupled weight decay (default 1e-2).
        preset: see above.
        {options}

    Raises:
        ValueError: an option has a value that is not allowed (the message says what is), an option does not exist, a
            parameter is complex or sparse; in `step`, a dense gradient meets ``first_moment="count_sketch"``.

    Sources: count-sketch Adam, https://arxiv.org/abs/1902.00179; update clipping and relative steps,
    https://arxiv.org/abs/1804.04235. Deviations from the first: buckets hold the mean, not the sum; hashes are balanced
    bijections; rows are hashed for dense layers, too (the reference hashes columns there); rows of one bucket that are
    touched together are handled as above; each table keeps its own running value, and no estimate is fed back to it.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "lean": {"first_moment": "none", **ADAFACTOR_DEVICES},
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
        **options: Unpack[AdamOptions],
    ) -> None:
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **options}
        super().__init__(params, given, preset)

    def _usual_rate(self, group: Mapping[str, Any]) -> float | None:
        return ADAMW

    def _rule(self, group: Mapping[str, Any], step: float | Tensor, sparse: bool) -> Rule:
        return _adam(group, group["betas"][0] if group["first_moment"] != "none" else None, step, sparse)


class RMSpropOptions(_Sketched, Kernels, Decoupled, total=False):
    """Keywords of `CSRMSprop`."""

    momentum: Annotated[float, unused((0.0,), "RMSprop's momentum is not kept; CSAdam and Sketchy have a first moment")]
    centered: Annotated[bool, unused((False,), "the mean of the gradients is not kept")]


@with_options(RMSpropOptions)
class CSRMSprop(SketchOptimizer):
    r"""RMSprop with a sketched second moment (the paper's CS-V, Adam with :math:`\beta_1 = 0`): 0.20 bytes a parameter.

    .. math::
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) \, \mathrm{bucket}(g_t^2) \qquad
        \theta_t = (1 - \gamma \lambda) \theta_{t-1} - \gamma \frac{g_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    This is `CSAdam` without a first moment; its docstring explains the stores, options and row-sparse gradients. Unlike
    `torch.optim.RMSprop`, it corrects the bias of v and decouples the weight decay (as the paper's Adam does).

    Args:
        params: parameters or parameter groups.
        lr: learning rate (default 1e-3).
        betas: (no effect, decay rate of the second moment). The first is accepted so that one configuration can name
            any optimizer of the family.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        preset: ``"default"``; ``"lean"`` (+ update_clip 1, scale_parameter); ``"paper_cs_v"`` (depth 3, 20 %, bucket
            sum, cleaning 0.2 every 125 steps); ``"exact"`` (dense second moment, 4 bytes).
        {options}

    Raises:
        ValueError: see `CSAdam`.

    Source: https://arxiv.org/abs/1902.00179, deviations as in `CSAdam`.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "lean": {**ADAFACTOR_DEVICES},
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
        **options: Unpack[RMSpropOptions],
    ) -> None:
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **options}
        super().__init__(params, given, preset)

    def _usual_rate(self, group: Mapping[str, Any]) -> float | None:
        return ADAMW

    def _rule(self, group: Mapping[str, Any], step: float | Tensor, sparse: bool) -> Rule:
        return _adam(group, None, step, sparse)


def _adam(group: Mapping[str, Any], beta1: float | None, step: float | Tensor, sparse: bool) -> Rule:
    lr, beta2, eps = rate(group), group["betas"][1], group["eps"]
    root2 = (1.0 - beta2**step) ** 0.5
    return Rule(
        first=None if beta1 is None else Ema(beta1, 1.0 - beta1, step),
        second=Ema(beta2, 1.0 - beta2, step),
        step_size=step_rate(group),
        correction=1.0 if beta1 is None else 1.0 / (1.0 - beta1**step),
        decay=lr * group["weight_decay"],
        lookahead=None,
        # SparseAdam adds epsilon to the uncorrected root, which equals epsilon / root2 after correction.
        denominator=Denominator(root2, eps / root2 if sparse else eps),
    )

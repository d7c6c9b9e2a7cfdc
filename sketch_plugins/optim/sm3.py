"""SM3: a second moment with one number for each slice of a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypedDict

from torch import Tensor
from typing_extensions import Unpack

from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.optim.declaring import option, with_options
from sketch_plugins.optim.family import (
    TYPICAL_RMS,
    Batches,
    Clipping,
    Decoupled,
    FirstMoment,
    Kernels,
    Lagged,
    Steps,
)
from sketch_plugins.optim.options import Option, rate, step_rate
from sketch_plugins.optim.rule import Denominator, Rule
from sketch_plugins.optim.usual_rates import ADAGRAD, ADAMW
from sketch_plugins.stores import Ema
from sketch_plugins.stores.cover import VARIANTS
from sketch_plugins.stores.kinds import FIRST_MOMENTS

_AVERAGES, _SUMS = (0.9, 0.999), (0.9, 1.0)
_PAPER = {"betas": _SUMS, "update_clip": 0.0, "scale_parameter": False, "reference_rms": 1.0}
_BETAS = Option(
    "betas",
    tuple,
    "decay rates of the momentum and of the covers, 1 for a sum; as text: 0.9:0.999 (default)",
    allowed="two numbers, the first in [0, 1), the second in [0, 1]",
    check=lambda v: len(v) == 2 and 0 <= v[0] < 1 and 0 <= v[1] <= 1,
)


class Accumulators(TypedDict, total=False):
    """How the second moment is kept."""

    variant: Annotated[
        str | None,
        option(
            "II",
            "variant of the paper. I has a looser bound and takes one more pass.",
            choices=VARIANTS,
            structural=True,
        ),
    ]
    second_moment: Annotated[
        str | None,
        option(
            "cover",
            '``"cover"``: maxima over slices; ``"dense"``: exact accumulators.',
            choices=("cover", "dense"),
            structural=True,
        ),
    ]


class SM3Options(Accumulators, Batches, FirstMoment, Steps, Clipping, Lagged, Kernels, Decoupled, total=False):
    """Keywords of `SM3`."""


@with_options(
    SM3Options,
    betas=_BETAS,
    # A count-sketch would have to be written with all of u before any of it is read.
    first_moment={"choices": tuple(kind for kind in FIRST_MOMENTS if kind != "count_sketch")},
    min_compress_size={
        "default": 0,
        "doc": "tensors with fewer elements keep exact second moments (0: covers are well defined at any size).",
    },
    chunk_size={
        "doc": "elements worked on at a time (0: 2**20 on a CPU, 2**22 compiled, 2**24 on an accelerator); the "
        "result does not depend on it."
    },
    scale_parameter={"default": True},
    reference_rms={"default": TYPICAL_RMS},
    update_clip={
        "default": 1.0,
        "doc": "divide u by ``max(1, RMS(u) / update_clip)`` *before* it enters the momentum (0: off). With "
        "``betas[1] = 1`` no element of u exceeds 1, so only values below 1 have an effect.",
    },
)
class SM3(SketchOptimizer):
    r"""A second moment of maxima over the slices of each axis: 1.03 bytes of state a parameter, or 0.005.

    A parameter of shape :math:`d_0 \times d_1 \times \ldots` keeps one number :math:`\mu_r` for each slice r of each
    axis (in a matrix: each row and each column), :math:`\sum_k d_k` in all. Let i be an element and :math:`r \ni i` the
    slices that contain it. At step :math:`t`

    .. math::
        \nu_t(i) &= \min_{r \ni i} \mu_{t-1}(r) + g_t(i)^2 \qquad \mu_t(r) = \max_{i \in r} \nu_t(i) \\
        u_t &= g_t / \sqrt{\nu_t + \epsilon} \qquad m_t = \beta_1 m_{t-1} + (1 - \beta_1) u_t \\
        \theta_t &= (1 - \gamma \lambda) \theta_{t-1} - \gamma m_t

    This is SM3-II with sums, the paper's form (``preset="paper"``), which bounds Adagrad's accumulators.
    ``variant="I"`` has :math:`\mu_t(r) = \mu_{t-1}(r) + \max_{i \in r} g_t(i)^2` and
    :math:`\nu_t(i) = \min_{r \ni i} \mu_t(r)`. It is looser and takes one more pass over the gradient; it is meant for
    comparison. In both variants :math:`\sum_s g_s(i)^2 \le \nu_t(i)`, which never falls, and
    :math:`\nu^{II} \le \nu^I`. Vectors and scalars keep exact accumulators, with which both variants are Adagrad.
    ``betas[1] < 1``, the default, turns the sums into averages,
    :math:`\nu_t = \beta_2 \min \mu_{t-1} + (1 - \beta_2) g_t^2` (I: the same for :math:`\mu`). The covers are
    overwritten, so they fall if gradients do. Neither moment has a bias correction.

    State bytes of a parameter with n elements and shape d: ``4 * sum(d)`` for the covers (0.005 a parameter for a
    1024 x 4096 matrix; 4 a parameter for vectors). Each matrix of a batch (``batch_dims``) has covers of its own. First
    moment, a parameter: int8 ``1 + 4 / min(block_size, D)``, fp32 4, bf16 2, none 0.

    Presets: ``"default"`` (int8 momentum, averages with ``betas[1] = 0.999``, update_clip 1, scale_parameter with
    ``reference_rms=0.017``: AdamW's learning rate carries over); ``"ema"`` (the same without momentum, the least
    state); ``"paper"`` (int8 momentum, sums, no clipping: the published optimizer); ``"lean"`` (sums, no momentum);
    ``"exact"`` (the default without compression: dense second moments, fp32 momentum, 8 bytes a parameter).
    docs/benchmarks.md compares them on a small language model.

    *Learning rate.* Averages take AdamW's (1e-3). Sums, which the presets "paper" and "lean" have, take that
    of `torch.optim.Adagrad` (1e-2), which they approximate. In the first steps u is nearly the sign of the gradient and
    moves every element by up to lr, and later :math:`\nu` grows until lr can be large. AdamW's rate is then too small
    (try 10 times as much), and 0.1 needs a warm-up. The authors warm up over 5 % of the steps, preferably
    quadratically, and then keep the rate, or let it fall to 0 in the last 10 %. `sketch_plugins.quadratic_warmup` does
    both. No other decay is needed, because Adagrad's steps decay by themselves.

    *Sparse gradients* (``nn.Embedding(sparse=True)``) and ``row_sparse``. Only touched rows change; untouched rows keep
    their bits. The row's cover alone decides, :math:`\nu(i) = \mu(row) + g(i)^2`, and becomes the new maximum of its
    row. The covers of the other axes only rise, to the maxima of the touched rows. So :math:`\sum g^2 \le \nu` holds in
    any mixture of dense and sparse steps. Momentum and weight decay are lazy, as in all optimizers here: they apply to
    touched rows only.

    Args:
        params: parameters, (name, parameter) pairs or parameter groups; every option may be set for a group.
        lr: learning rate, float or tensor (default 1e-3, or 1e-2 for the presets with sums; see above).
        betas: decay rates (default (0.9, 0.999), or the preset's). The first is that of the momentum and has no effect
            with ``first_moment="none"``. The second is that of the covers: 1 is the paper's sum, and 0.999 an average
            as in Adam.
        eps: added to :math:`\nu` under the root (default 1e-30), only to avoid 0 / 0. An element that had no gradient
            yet has u = 0, even with ``eps=0``.
        weight_decay: decoupled weight decay (default 0).
        preset: see above.
        {options}

    Raises:
        ValueError: see `CSAdam`.

    Source: https://arxiv.org/abs/1901.11150. Deviations: averages, clipping and relative steps by default
    (``preset="paper"`` has none of them); momentum in int8 (the paper's is dense); momentum for sparse gradients (the
    authors' code has none); the covers of other axes stay valid in sparse steps (their code does not update them);
    decoupled weight decay; epsilon as in the authors' TensorFlow code.
    """

    ADAM_SETTINGS: ClassVar[bool] = False
    # Whether no learning rate was given, so that a group's preset decides.
    _own_rates = False
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {"betas": _AVERAGES},
        "ema": {"first_moment": "none"},
        "paper": _PAPER,
        "lean": {**_PAPER, "first_moment": "none"},
        "exact": {"first_moment": "fp32", "second_moment": "dense"},
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-30,
        weight_decay: float = 0.0,
        *,
        preset: str = "default",
        **options: Unpack[SM3Options],
    ) -> None:
        self._own_rates = lr is None  # presets have no lr: a group's preset would overwrite the one that was given
        if lr is None:
            lr = _rate_of(preset, betas)
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **options}
        super().__init__(params, given, preset)

    def _add_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, see `SketchOptimizer.add_param_group`. Without a rate the group takes that of its preset."""
        if isinstance(param_group, dict) and "lr" not in param_group and self._own_rates:
            if "preset" in param_group or "betas" in param_group:
                rate_of_its_own = _rate_of(param_group.get("preset"), param_group.get("betas"))
                param_group = {**param_group, "lr": rate_of_its_own}
        super()._add_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_own_rates": self._own_rates}

    def _usual_rate(self, group: Mapping[str, Any]) -> float | None:
        return ADAGRAD if group["betas"][1] == 1.0 else ADAMW

    def _rule(self, group: Mapping[str, Any], step: float | Tensor, sparse: bool) -> Rule:
        (beta1, beta2), eps = group["betas"], group["eps"]

        return Rule(
            first=None if group["first_moment"] == "none" else Ema(beta1, 1.0 - beta1, step),
            second=Ema(1.0, 1.0, step) if beta2 == 1.0 else Ema(beta2, 1.0 - beta2, step),
            step_size=step_rate(group),
            correction=1.0,
            decay=rate(group) * group["weight_decay"],
            lookahead=None,
            denominator=Denominator(1.0, 0.0),
            floor=eps,
            precondition_first=True,
        )


def _rate_of(preset: Any, betas: Any) -> float:
    """The default learning rate: Adagrad's for sums, AdamW's for averages. Without betas those of the preset count."""
    if betas is None:
        betas = SM3.PRESETS.get(preset, {}).get("betas", _AVERAGES)
    sums = isinstance(betas, tuple | list) and len(betas) == 2 and betas[1] == 1
    return ADAGRAD if sums else ADAMW

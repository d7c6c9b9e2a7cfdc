"""Adagrad with a sketched accumulator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypedDict

from torch import Tensor
from typing_extensions import Unpack

from sketch_plugins.optim.adam import PAPER_SKETCH
from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.optim.declaring import option, with_options
from sketch_plugins.optim.family import (
    ADAFACTOR_DEVICES,
    Batches,
    Buckets,
    Clipping,
    CoupledDecay,
    Kernels,
    Lagged,
    SecondMoment,
    Sketches,
    Steps,
    Torchs,
)
from sketch_plugins.optim.options import rate, step_rate
from sketch_plugins.optim.rule import Denominator, Rule
from sketch_plugins.optim.usual_rates import ADAGRAD
from sketch_plugins.stores import Ema, Store


class Accumulator(TypedDict, total=False):
    """Options that torch.optim.Adagrad has, too."""

    lr_decay: Annotated[float, option(0.0, ":math:`\\eta` above.", allowed="a number >= 0", check=lambda v: v >= 0)]
    initial_accumulator_value: Annotated[
        float, option(0.0, "start value of every estimate.", allowed="a number >= 0", check=lambda v: v >= 0)
    ]


class AdagradOptions(
    Accumulator,
    SecondMoment,
    CoupledDecay,
    Sketches,
    Batches,
    Buckets,
    Steps,
    Clipping,
    Lagged,
    Kernels,
    Torchs,
    total=False,
):
    """Keywords of `CSAdagrad`."""


@with_options(
    AdagradOptions,
    bucket={"default": "sum"},
    second_moment={
        "doc": 'store of the accumulator. ``"cover"`` is SM3-II without momentum (see `SM3`); ``"log8"`` has 8 bits '
        "for each number, within a sixteenth of it (see `sketch_plugins.stores.Log8`). The options of a sketch have no "
        'effect on these two and on ``"dense"``.'
    },
)
class CSAdagrad(SketchOptimizer):
    r"""Adagrad whose sum of squared gradients is a count-min sketch: 0.20 bytes of state a parameter instead of 4.

    .. math::
        G_t = G_{t-1} + \mathrm{bucket}(g_t^2) \qquad
        \theta_t = \theta_{t-1} - \frac{\gamma}{1 + (t - 1) \eta} \frac{g_t}{\sqrt{G_t} + \epsilon}

    By default a bucket holds the *sum* of its rows' squares. That is the original count-min sketch, whose estimate is
    never below the true accumulator (with dense gradients, and with any mixture of dense and sparse ones). In dense
    layers the steps can then shrink to ``1 / sqrt(rows a bucket)`` of Adagrad's. ``bucket="mean"`` keeps Adagrad's
    learning rate and gives up that guarantee (``table_dtype="bf16"`` keeps it in expectation only). Sparse gradients
    add exactly the touched rows in either case.

    Args:
        params: parameters or parameter groups.
        lr: learning rate (default 1e-2).
        betas: no effect; accepted so that one configuration can name any optimizer of the family.
        eps: added to the root (default 1e-10).
        weight_decay: added to the gradient as ``weight_decay * p``, as in `torch.optim.Adagrad`; with sparse gradients,
            for touched rows only.
        preset: ``"default"``; ``"lean"`` (+ update_clip 1, scale_parameter); ``"paper"`` (depth 3, 20 %, cleaning 0.5
            every 125 steps); ``"exact"`` (dense, is `torch.optim.Adagrad`).
        {options}

    Raises:
        ValueError: see `CSAdam`.

    Source: https://arxiv.org/abs/1902.00179, Alg. 3; deviations as in `CSAdam`.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "lean": {**ADAFACTOR_DEVICES},
        "paper": {
            **{k: v for k, v in PAPER_SKETCH.items() if k not in ("embedding_rate", "row_scales")},
            "clean_factor": 0.5,
        },
        "exact": {"second_moment": "dense"},
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.0, 0.0),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        *,
        preset: str = "default",
        **options: Unpack[AdagradOptions],
    ) -> None:
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **options}
        super().__init__(params, given, preset)

    def _new_state(self, group: Mapping[str, Any], stores: Mapping[str, Store], state: dict[str, Any]) -> None:
        if group["initial_accumulator_value"]:
            stores["second_moment"].fill(state["second_moment"], group["initial_accumulator_value"])

    def _usual_rate(self, group: Mapping[str, Any]) -> float | None:
        return ADAGRAD

    def _rule(self, group: Mapping[str, Any], step: float | Tensor, sparse: bool) -> Rule:
        return Rule(
            first=None,
            second=Ema(1.0, 1.0, step),
            step_size=step_rate(group) / (1.0 + (step - 1) * group["lr_decay"]),
            correction=1.0,
            decay=rate(group) * group["weight_decay"] if group["decoupled_weight_decay"] else 0.0,
            lookahead=None,
            denominator=Denominator(1.0, group["eps"]),
        )

"""Lion with a compressed momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.optim.declaring import with_options
from sketch_plugins.optim.family import Decoupled, FirstMoment, Kernels, Steps
from sketch_plugins.optim.options import Option, rate
from sketch_plugins.optim.rule import Rule
from sketch_plugins.optim.usual_rates import LION
from sketch_plugins.stores import Ema

_BETAS = Option(
    "betas",
    tuple,
    "decay rates of the momentum as the sign and as the state see it; as text: 0.9:0.99 (default)",
    allowed="two numbers b1 and b2 with 0 < b1 <= b2 < 1",
    check=lambda v: len(v) == 2 and 0 < v[0] <= v[1] < 1,
)


class LionOptions(FirstMoment, Steps, Kernels, Decoupled, total=False):
    """Keywords of `CSLion`."""


@with_options(LionOptions, betas=_BETAS, first_moment={"choices": ("int8", "fp32", "bf16")})
class CSLion(SketchOptimizer):
    r"""Lion with its momentum in int8 blocks: 1.03 bytes of state a parameter instead of 4.

    .. math::
        c_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t \qquad m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t \\
        \theta_t = (1 - \gamma \lambda) \theta_{t-1} - \gamma \, \mathrm{sign}(c_t)

    Every number of a parameter moves by the learning rate. Use a rate that is 3 to 10 times smaller than AdamW's, and a
    weight decay that is 3 to 10 times larger. With row-sparse gradients only touched rows move, decay and average, as
    in `CSAdam`.

    Args:
        params: parameters or parameter groups.
        lr: learning rate (default 1e-4).
        betas: :math:`(\beta_1, \beta_2)`, with :math:`0 < \beta_1 \le \beta_2 < 1` (default (0.9, 0.99)).
        eps: no effect; accepted so that one configuration can name any optimizer of the family.
        weight_decay: decoupled weight decay (default 0).
        preset: ``"default"`` or ``"exact"`` (a float32 momentum: Lion as published, 4 bytes).
        {options}

    Raises:
        ValueError: see `CSAdam`.

    Source: https://arxiv.org/abs/2302.06675. Deviations: the momentum is in int8. The sign is that of
    :math:`g_t + \beta_1 / (\beta_2 - \beta_1) \, m_t`, which is :math:`c_t` times a positive number (with equal betas
    it is the sign of :math:`m_t`). Numbers below 1e-30 are divided by 1e-30 instead of having a sign. The sign of an
    infinity is NaN (as in AdamW).
    """

    ADAM_SETTINGS: ClassVar[bool] = False
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"exact": {"first_moment": "fp32"}}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        preset: str = "default",
        **options: Unpack[LionOptions],
    ) -> None:
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **options}
        super().__init__(params, given, preset)

    def _usual_rate(self, group: Mapping[str, Any]) -> float | None:
        return LION

    def _rule(self, group: Mapping[str, Any], step: float | Tensor, sparse: bool) -> Rule:
        beta1, beta2 = group["betas"]
        return Rule(
            first=Ema(beta2, 1.0 - beta2, step),
            second=None,
            step_size=rate(group),
            correction=1.0,
            decay=rate(group) * group["weight_decay"],
            lookahead=beta1 / (beta2 - beta1) if beta1 < beta2 else None,
            denominator=None,
            sign=True,
        )

"""Adagrad with a sketched accumulator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from sketch_plugins.optim.adam import _ADAFACTOR_DEVICES, _SECOND, _SHARED, PAPER_SKETCH
from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.optim.options import COMMON, DECOUPLED, SECOND_MOMENT, TORCHS, NoEffect, Option, rate
from sketch_plugins.optim.rule import Denominator, Rule
from sketch_plugins.stores import Ema, Store


class CSAdagrad(SketchOptimizer):
    r"""Adagrad whose sum of squared gradients is a count-min sketch: 0.20 bytes of state a parameter instead of 4.

    .. math::
        G_t = G_{t-1} + \mathrm{bucket}(g_t^2) \qquad
        \theta_t = \theta_{t-1} - \frac{\gamma}{1 + (t - 1) \eta} \frac{g_t}{\sqrt{G_t} + \epsilon}

    By default a bucket holds the *sum* of its rows' squares: the count-min sketch proper, whose estimate never falls
    below the true accumulator (with every gradient dense, and with any mixture of sparse ones). For dense layers the
    steps are then up to ``1 / sqrt(rows a bucket)`` of Adagrad's; ``bucket="mean"`` keeps Adagrad's learning rate and
    gives up that guarantee (``table_dtype="bf16"`` keeps it in expectation only). Sparse gradients add exactly the
    touched rows in either case.

    Args:
        params: parameters or parameter groups.
        lr: learning rate (default 1e-2).
        betas: no effect; accepted so that one configuration can name any optimizer of the family.
        eps: added to the root (default 1e-10).
        weight_decay: added to the gradient as ``weight_decay * p``, as in `torch.optim.Adagrad`; for sparse gradients
            to that of touched rows.
        preset: ``"default"``; ``"lean"`` (+ update_clip 1, scale_parameter); ``"paper"`` (depth 3, 20 %, cleaning 0.5
            every 125 steps); ``"exact"`` (dense, is `torch.optim.Adagrad`).
        lr_decay: :math:`\eta` above (default 0).
        initial_accumulator_value: what every estimate starts from (default 0).
        decoupled_weight_decay: decay the parameter by ``lr * weight_decay`` instead.
        second_moment: see `CSAdam`, as for all that follow (``"cover"`` here is SM3-II without momentum).
        compression: see `CSAdam`.
        width: see `CSAdam`.
        depth: see `CSAdam`.
        hash: see `CSAdam`.
        batch_dims: see `CSAdam`.
        table_dtype: see `CSAdam`.
        bucket: ``"sum"`` (default) or ``"mean"``.
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

    Raises:
        ValueError: as `CSAdam`.

    Source: https://arxiv.org/abs/1902.00179, Alg. 3; deviations as in `CSAdam`.
    """

    OPTIONS: ClassVar[dict[str, Option]] = {
        **COMMON,
        **SECOND_MOMENT,
        **DECOUPLED,
        "lr_decay": Option("lr_decay", float, "learning rate decay", allowed="a number >= 0", check=lambda v: v >= 0),
        "initial_accumulator_value": Option(
            "initial_accumulator_value",
            float,
            "what the accumulator starts from",
            allowed="a number >= 0",
            check=lambda v: v >= 0,
        ),
    }
    NO_EFFECT: ClassVar[dict[str, NoEffect]] = TORCHS
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {**_SHARED, **_SECOND, "bucket": "sum", "decoupled_weight_decay": False},
        "lean": {**_ADAFACTOR_DEVICES},
        "paper": {**PAPER_SKETCH, "clean_factor": 0.5},
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
        lr_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        decoupled_weight_decay: bool | None = None,
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
    ) -> None:
        super().__init__(params, self._arguments(locals()), preset)

    def _new_state(self, group: Mapping[str, Any], stores: Mapping[str, Store], state: dict[str, Any]) -> None:
        if group["initial_accumulator_value"]:
            stores["second_moment"].fill(state["second_moment"], group["initial_accumulator_value"])

    def _rule(self, group: Mapping[str, Any], step: float | Tensor, sparse: bool) -> Rule:
        return Rule(
            first=None,
            second=Ema(1.0, 1.0, step),
            step_size=rate(group) / (1.0 + (step - 1) * group["lr_decay"]),
            correction=1.0,
            decay=rate(group) * group["weight_decay"] if group["decoupled_weight_decay"] else 0.0,
            lookahead=None,
            denominator=Denominator(1.0, group["eps"]),
        )

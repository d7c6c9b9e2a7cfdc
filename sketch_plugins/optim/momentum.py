"""SGD with a compressed momentum buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from sketch_plugins.optim.adam import _FIRST, _SHARED, PAPER_SKETCH
from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.optim.options import COMMON, DECOUPLED, FIRST_MOMENT, TORCHS, NoEffect, Option, no_effect, rate
from sketch_plugins.optim.rule import Rule
from sketch_plugins.stores import Ema

_SHARED_FIRST = {k: v for k, v in _SHARED.items() if not k.startswith("clean_")}


class CSMomentum(SketchOptimizer):
    r"""SGD with momentum whose buffer is compressed: by default int8 blocks, 1.03 bytes a parameter instead of 4.

    .. math::
        b_t = \mu b_{t-1} + g_t \qquad
        \theta_t = \theta_{t-1} - \gamma \, (b_t \text{, or } g_t + \mu b_t \text{ with Nesterov})

    ``first_moment="count_sketch"`` is the paper's count-sketch momentum (signed, median); it is meant for row-sparse
    gradients and refused for dense ones, as in `CSAdam`. Row-sparse gradients move and decay touched rows only.

    Args:
        params: parameters or parameter groups.
        lr: learning rate (default 1e-3).
        betas: None, or (momentum, no effect): accepted so that one configuration can name any optimizer of the family.
        eps: no effect (there is no denominator); accepted for the same reason.
        weight_decay: added to the gradient as ``weight_decay * p``, as in `torch.optim.SGD`; for sparse gradients to
            that of touched rows.
        momentum: :math:`\mu` (default 0.9); or ``betas[0]``.
        nesterov: Nesterov's form (default False).
        decoupled_weight_decay: decay the parameter by ``lr * weight_decay`` instead.
        preset: ``"default"``; ``"paper"`` (count_sketch, depth 3, 20 %); ``"exact"`` (fp32, is `torch.optim.SGD`).
        first_moment: ``"int8"``, ``"fp32"``, ``"bf16"``, ``"count_sketch"`` or ``"none"`` (plain SGD).
        compression: see `CSAdam`, as for all that follow.
        width: see `CSAdam`.
        depth: see `CSAdam`.
        hash: see `CSAdam`.
        batch_dims: see `CSAdam`.
        table_dtype: see `CSAdam`.
        block_size: see `CSAdam`.
        first_moment_rounding: see `CSAdam`.
        min_compress_size: see `CSAdam`.
        row_sparse: see `CSAdam`.
        update_clip: see `CSAdam`.
        scale_parameter: see `CSAdam`.
        lagged_rms: see `CSAdam`.
        allow_dense_count_sketch: see `CSAdam`.
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
        dampening: only 0, as `torch.optim.SGD` has it.

    Raises:
        ValueError: as `CSAdam`; or momentum and betas contradict each other.

    Source: https://arxiv.org/abs/1902.00179, Alg. 2; deviations as in `CSAdam`.
    """

    OPTIONS: ClassVar[dict[str, Option]] = {
        **COMMON,
        **FIRST_MOMENT,
        **DECOUPLED,
        "momentum": Option(
            "momentum", float, "momentum (default 0.9)", allowed="a number in [0, 1)", check=lambda v: 0 <= v < 1
        ),
        "nesterov": Option("nesterov", bool, "Nesterov momentum (default False)"),
    }
    NO_EFFECT: ClassVar[dict[str, NoEffect]] = {
        **TORCHS,
        **no_effect("dampening", (0,), "the momentum buffer adds whole gradients"),
    }
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {
            **_SHARED_FIRST,
            **_FIRST,
            "compression": 0.05,
            "decoupled_weight_decay": False,
            "nesterov": False,
        },
        "paper": {
            "first_moment": "count_sketch",
            **{k: PAPER_SKETCH[k] for k in ("compression", "depth", "hash")},
        },
        "exact": {"first_moment": "fp32"},
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        preset: str = "default",
        momentum: float | None = None,
        nesterov: bool | None = None,
        decoupled_weight_decay: bool | None = None,
        first_moment: str | None = None,
        compression: float | None = None,
        width: int | None = None,
        depth: int | None = None,
        hash: str | None = None,
        batch_dims: int | str | None = None,
        table_dtype: str | None = None,
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
        dampening: float = 0.0,
    ) -> None:
        explicit = self._arguments(locals())
        del explicit["betas"]
        momentum = self._momentum(betas, momentum)
        super().__init__(params, {**explicit, "momentum": 0.9 if momentum is None else momentum}, preset)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `SketchOptimizer.add_param_group`; ``betas`` of a group set its momentum."""
        if isinstance(param_group, dict) and "betas" in param_group:
            momentum = self._momentum(param_group["betas"], param_group.get("momentum"))
            # Not kept: schedulers that cycle the momentum (OneCycleLR) would cycle a value that nothing reads.
            del param_group["betas"]
            param_group["momentum"] = momentum
        super().add_param_group(param_group)

    def _momentum(self, betas: Any, momentum: Any) -> Any:
        if betas is None:
            return momentum
        betas = self.OPTIONS["betas"].validate(betas)
        if momentum is not None and momentum != betas[0]:
            raise ValueError(f"momentum={momentum!r} and betas={betas!r} both set the momentum: give one")
        return betas[0]

    def _rule(self, group: Mapping[str, Any], step: float | Tensor, sparse: bool) -> Rule:
        momentum = group["momentum"]
        return Rule(
            first=Ema(momentum, 1.0, step) if group["first_moment"] != "none" else None,
            second=None,
            step_size=rate(group),
            correction=1.0,
            decay=rate(group) * group["weight_decay"] if group["decoupled_weight_decay"] else 0.0,
            lookahead=momentum if group["nesterov"] else None,
            denominator=None,
        )

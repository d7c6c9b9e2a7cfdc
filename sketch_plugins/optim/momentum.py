"""SGD with a compressed momentum buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypedDict

from torch import Tensor
from typing_extensions import Unpack

from sketch_plugins.optim.adam import PAPER_SKETCH
from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.optim.declaring import option, unused, with_options
from sketch_plugins.optim.family import (
    Batches,
    Clipping,
    CoupledDecay,
    FirstMoment,
    Kernels,
    Lagged,
    SignedSketch,
    Sketches,
    Steps,
    Torchs,
)
from sketch_plugins.optim.options import rate
from sketch_plugins.optim.rule import Rule
from sketch_plugins.stores import Ema


class Momentum(TypedDict, total=False):
    """Momentum, with the arguments of torch.optim.SGD."""

    momentum: Annotated[
        float | None,
        option(
            None,
            ":math:`\\mu`. By default it is ``betas[0]``, or 0.9 if that is not given either.",
            allowed="a number in [0, 1)",
            check=lambda v: 0 <= v < 1,
        ),
    ]
    nesterov: Annotated[bool | None, option(False, "Nesterov's form.")]
    dampening: Annotated[float, unused((0.0,), "the momentum buffer adds whole gradients")]


class MomentumOptions(
    Momentum,
    FirstMoment,
    CoupledDecay,
    Sketches,
    Batches,
    Steps,
    Clipping,
    Lagged,
    SignedSketch,
    Kernels,
    Torchs,
    total=False,
):
    """Keywords of `CSMomentum`."""


@with_options(MomentumOptions, first_moment={"doc": 'store of the momentum; ``"none"`` is plain SGD.'})
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
        betas: None, or (momentum, no effect). It is accepted so that one configuration can name any optimizer of the
            family.
        eps: no effect (there is no denominator); accepted for the same reason.
        weight_decay: added to the gradient as ``weight_decay * p``, as in `torch.optim.SGD`; with sparse gradients, for
            touched rows only.
        preset: ``"default"``; ``"paper"`` (count_sketch, depth 3, 20 %); ``"exact"`` (fp32, is `torch.optim.SGD`).
        {options}

    Raises:
        ValueError: see `CSAdam`; also if momentum and betas contradict each other.

    Source: https://arxiv.org/abs/1902.00179, Alg. 2; deviations as in `CSAdam`.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
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
        **options: Unpack[MomentumOptions],
    ) -> None:
        momentum = self._momentum(betas, options.pop("momentum", None))
        given = {"lr": lr, "eps": eps, "weight_decay": weight_decay, **options}
        super().__init__(params, {**given, "momentum": 0.9 if momentum is None else momentum}, preset)

    def _add_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, see `SketchOptimizer.add_param_group`. A group's ``betas`` set its momentum."""
        if isinstance(param_group, dict) and "betas" in param_group:
            momentum = self._momentum(param_group["betas"], param_group.get("momentum"))
            # The key is removed, because schedulers that cycle the momentum (OneCycleLR) would cycle it without effect.
            del param_group["betas"]
            param_group["momentum"] = momentum
        super()._add_group(param_group)

    def _momentum(self, betas: Any, momentum: Any) -> Any:
        if betas is None:
            return momentum
        betas = self.OPTIONS["betas"].validate(betas)
        if momentum is not None and momentum != betas[0]:
            raise ValueError(f"momentum={momentum!r} and betas={betas!r} both set the momentum: use one of them")
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

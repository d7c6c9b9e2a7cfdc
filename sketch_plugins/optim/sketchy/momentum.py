"""The momentum of a preconditioned step: an average of updates or gradients, before or after preconditioning."""

from __future__ import annotations

from typing import Annotated, TypedDict

from torch import Tensor

from sketch_plugins.kernels.tile import numerator_of
from sketch_plugins.optim.declaring import option
from sketch_plugins.optim.pending import Pending
from sketch_plugins.sharding.blocks import Matrix
from sketch_plugins.stores import Ema

PLACES = ("before", "after")


class Momentum(TypedDict, total=False):
    """Where the momentum is, and which tensors have one."""

    momentum_placement: Annotated[
        str | None,
        option(
            "before",
            '``"before"``: the momentum averages u (or g) and is then preconditioned; ``"after"``: it averages the '
            "grafted x, as in the paper's code.",
            choices=PLACES,
        ),
    ]
    nesterov: Annotated[
        bool | None,
        option(
            True,
            "the step uses :math:`\\beta_1 m_t + (1 - \\beta_1) u_t`. Like momentum_placement, it has no effect "
            "without a first moment.",
        ),
    ]
    momentum_of: Annotated[
        str | None,
        option(
            "preconditioned",
            "which tensors keep a first moment: those with a covariance for every axis, or all (embeddings, heads and "
            "vectors, too).",
            choices=("preconditioned", "all"),
            structural=True,
        ),
    ]


def debiased(beta1: float, step: float | Tensor, nesterov: bool) -> tuple[float | Tensor, float | None]:
    """``(size, lookahead)``: ``size * m``, or ``size * (x + lookahead * m)``, is a weighted mean of all x so far."""
    if nesterov and beta1 > 0:
        # The weights of beta1 * m + (1 - beta1) * x add up to 1 - beta1 ** (step + 1).
        return (1.0 - beta1) / (1.0 - beta1 ** (step + 1)), beta1 / (1.0 - beta1)
    return 1.0 / (1.0 - beta1**step), None


def average(one: Pending, whole: Matrix, ema: Ema, lookahead: float | None) -> None:
    """``whole <- m``, or Nesterov's ``whole + lookahead * m``, where m averages ``whole``, tile by tile."""
    first, state = one.named["first_moment"], one.state["first_moment"]
    for at in one.grad.batches(align=first.align):
        x = first.view(whole.get(at))
        slices = first.slices(state, at, ema.step)
        x.copy_(numerator_of(x, first.blend(slices, x, ema), lookahead))
        first.write_back(state, at, slices)

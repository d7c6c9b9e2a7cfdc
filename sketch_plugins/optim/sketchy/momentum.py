"""The momentum of a preconditioned step: an average of updates, or of gradients, before or after the preconditioner."""

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
    """Where the momentum comes, and what has one."""

    momentum_placement: Annotated[
        str | None,
        option(
            "before",
            '``"before"``: the momentum is that of u (or g), and is preconditioned; ``"after"``: it is that of '
            "the grafted x, as in the paper's code.",
            choices=PLACES,
        ),
    ]
    nesterov: Annotated[
        bool | None,
        option(
            True,
            "the step uses :math:`\\beta_1 m_t + (1 - \\beta_1) u_t`. No effect where there is no first moment, as for "
            "momentum_placement.",
        ),
    ]
    momentum_of: Annotated[
        str | None,
        option(
            "preconditioned",
            "tensors that keep a first moment: those with a covariance for every axis, or embeddings, heads and "
            "vectors, too.",
            choices=("preconditioned", "all"),
            structural=True,
        ),
    ]


def debiased(beta1: float, step: float | Tensor, nesterov: bool) -> tuple[float | Tensor, float | None]:
    """``(size, lookahead)``: ``size * m``, or ``size * (x + lookahead * m)``, is an average of all x so far."""
    if nesterov and beta1 > 0:
        # beta1 * m + (1 - beta1) * x: its weights add up to 1 - beta1 ** (step + 1).
        return (1.0 - beta1) / (1.0 - beta1 ** (step + 1)), beta1 / (1.0 - beta1)
    return 1.0 / (1.0 - beta1**step), None


def average(one: Pending, whole: Matrix, ema: Ema, lookahead: float | None) -> None:
    """``whole <- m``, or Nesterov's ``whole + lookahead * m``, with m averaging it, tile by tile."""
    first, state = one.named["first_moment"], one.state["first_moment"]
    for at in one.grad.batches(align=first.align):
        x = first.view(whole.get(at))
        slices = first.slices(state, at, ema.step)
        x.copy_(numerator_of(x, first.blend(slices, x, ema), lookahead))
        first.write_back(state, at, slices)

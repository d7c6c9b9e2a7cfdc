"""Full-matrix Adagrad of a vector, with its outer products sketched by Frequent Directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.linalg import frequent_directions as fd
from sketch_plugins.linalg.kronecker import Kronecker
from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.optim.declaring import without_effect
from sketch_plugins.optim.family import FAMILY, Decoupled
from sketch_plugins.optim.finite import check_finite, warn_of
from sketch_plugins.optim.options import NoEffect, Option, rate
from sketch_plugins.optim.pending import Pending
from sketch_plugins.optim.rule import Further, Rule
from sketch_plugins.optim.sketchy.write_back import take
from sketch_plugins.optim.taking import StepOfAll
from sketch_plugins.sharding.blocks import Matrix
from sketch_plugins.sharding.parts import Shaped
from sketch_plugins.stores import Gradient

_COMMON = ("lr", "eps", "weight_decay", "maximize", "chunk_size", "weight_bits")


class SAdagrad(SketchOptimizer):
    r"""S-AdaGrad: online convex optimization with a rank-k sketch of the sum of :math:`g g^\top`.

    Each parameter is one vector of d numbers. Let B be the Frequent Directions sketch of :math:`\sum_s g_s g_s^\top`,
    and :math:`\rho` the mass that has escaped it. Then

    .. math::
        \theta_{t+1} = (1 - \gamma \lambda) \theta_t
            - \gamma \left( B_t^\top B_t + \rho_{1:t} I + \epsilon I \right)^{-1/2} g_t

    Its regret is bounded by that of full-matrix Adagrad plus a term in the root of the sum of the spectrum beyond rank
    k (the paper's section 4). With a rank of d or more it is full-matrix Adagrad. Like that, and unlike the diagonal
    method, it does not depend on the basis. It is meant for convex problems, such as a linear model; use `Sketchy` for
    the matrices of a network. State of a parameter: ``rank * (d + 1) + 2`` numbers of 4 bytes (8 for float64), with a
    rank of at most d. Sparse gradients are made dense, one parameter at a time, so every row moves. A gradient without
    any rows changes nothing.

    Args:
        params: parameters, (name, parameter) pairs or parameter groups; every option may be set for a group.
        lr: learning rate, float or tensor (default 0.1).
        eps: added to the eigenvalues (default 0). They are at least rank + 1 units in the last place of the largest.
        weight_decay: decoupled weight decay (default 0).
        rank: k, the number of directions (default 10). The paper's sketch has ``rank + 1`` rows, one of them empty.
        solver: ``"eigh"`` (default) or ``"svd"``; see `sketch_plugins.linalg.frequent_directions.fold`.
        maximize: ascend instead of descend.
        chunk_size: elements worked on at a time (default 0: 2**20 on a CPU, 2**24 on an accelerator). Beside tiles, a
            step takes memory for one parameter at a time: several times that of its sketch.
        weight_bits: 24 or 32 keeps the bits that a bfloat16 or float16 weight lacks among the state, see `CSAdam`
            (default None: they are rounded away).
        preset: ``"default"``.
        amsgrad, foreach, differentiable, decoupled_weight_decay, fused, capturable: accepted for compatibility with
            torch's optimizers; only the defaults (``foreach`` and ``fused`` may be False).

    Raises:
        ValueError: see `CSAdam`; in `step`, a gradient is not finite. Nothing has been changed then.

    Warns:
        RuntimeWarning: see `Sketchy`.

    Source: https://arxiv.org/abs/2302.03764, Alg. 1 and 2. Deviations: there is no projection onto a bounded set; each
    parameter has a sketch of its own; if the sum is singular, eigenvalues have a floor at round-off in place of the
    pseudo-inverse (both agree up to the root of the precision, because the gradient is in the sketch before it is
    multiplied); weight decay is decoupled.
    """

    ADAM_SETTINGS: ClassVar[bool] = False
    OPTIONS: ClassVar[dict[str, Option]] = {
        **{name: FAMILY[name] for name in _COMMON},
        "rank": Option(
            "rank",
            int,
            "directions kept (default 10)",
            allowed="an integer >= 1",
            check=lambda v: v >= 1,
            structural=True,
        ),
        "solver": Option("solver", str, "decomposition (default 'eigh')", choices=("eigh", "svd")),
    }
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {"maximize": False, "chunk_size": 0, "solver": "eigh", "weight_bits": None}
    }
    NO_EFFECT: ClassVar[dict[str, NoEffect]] = {
        **without_effect(Decoupled),
        "fused": NoEffect("fused", bool, "it has no kernels", choices=(None, False)),
        "capturable": NoEffect(
            "capturable", bool, "decompositions cannot be captured in a CUDA graph", choices=(False,)
        ),
    }
    FIXED: ClassVar[dict[str, Any]] = {
        "min_compress_size": 0,
        "row_sparse": False,
        "compile": False,
        "fused": False,
        "capturable": False,
        "stochastic_rounding": False,
        "seed": 0,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.1,
        eps: float = 0.0,
        weight_decay: float = 0.0,
        *,
        preset: str = "default",
        rank: int = 10,
        solver: str | None = None,
        maximize: bool | None = None,
        chunk_size: int | None = None,
        weight_bits: int | None = None,
        amsgrad: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        decoupled_weight_decay: bool = True,
        fused: bool | None = None,
        capturable: bool = False,
    ) -> None:
        super().__init__(params, self._arguments(locals()), preset)

    def _further(self, p: Shaped, group: Mapping[str, Any]) -> Mapping[str, Further]:
        return {"preconditioner": _vector(p.numel(), group["rank"])} if p.numel() else {}

    def _rule(self, group: Mapping[str, Any], step: float | Tensor, sparse: bool) -> Rule:
        return Rule(
            first=None,
            second=None,
            step_size=rate(group),
            correction=1.0,
            decay=rate(group) * group["weight_decay"],
            lookahead=None,
            denominator=None,
        )

    def _may_step(self, taking: StepOfAll, among: Sequence[Mapping[str, Any]]) -> bool:
        return check_finite(self, taking.members, among)

    def _eager(self, one: Pending) -> None:
        grad, state, group = one.grad, one.state, one.group
        side = _vector(one.p.numel(), group["rank"]).sides[0]
        x = scratch.empty("preconditioned", grad.shape, grad.dtype, grad.device)
        whole = Matrix(x)
        if grad.rows is not None:
            x.zero_()
        for at in grad.batches():
            whole.put(at, grad.get(at))
        vector = x.view(-1, 1)
        if grad.rows is not None:
            # The inverse root mixes all numbers, so all of them take a step.
            one = replace(one, grad=Gradient(whole, None, grad.dtype, grad.chunk, grad.shape))
        covariance = fd.fold(side.get(state["preconditioner"]), vector, 1.0, tail="paper", solver=group["solver"])
        if all(fd.finite(covariance)):
            side.replace(state["preconditioner"], covariance)
        else:
            covariance = side.get(state["preconditioner"])
            warn_of([(one.p, group)], self)
        # The resolution of a decomposition of rank + 1 columns. With d = 100,000 it would be 0.6 % of the largest.
        units = 2.0 * (side.rank + 1)
        inside, outside = fd.inverse_root(covariance, -0.5, group["eps"], "paper", relative=False, units=units)
        fd.multiply(vector, covariance.vectors, inside, outside)
        take(one, whole, rate(group))


def _vector(size: int, rank: int) -> Kronecker:
    return Kronecker((size, 1), ((0, size), (0, 1)), (min(rank, size), 0), buffered=False)

"""Shampoo whose covariances are Frequent Directions sketches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from sketch_plugins import scratch
from sketch_plugins.kernels.tile import joined, numerator_of, root_mean_square
from sketch_plugins.linalg.kronecker import Due, Kronecker, cut, merged, solve
from sketch_plugins.notices import warn
from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.optim.declaring import with_options
from sketch_plugins.optim.eager import Factors, number, update, write_tile
from sketch_plugins.optim.options import rate
from sketch_plugins.optim.pending import Pending
from sketch_plugins.optim.rule import SCALE_FLOOR, Denominator, Further, Rule
from sketch_plugins.optim.sketchy_options import CHANGES, GRAFTS, SketchyOptions
from sketch_plugins.optim.taking import Members
from sketch_plugins.sharding.blocks import Matrix, matrix_shape
from sketch_plugins.sharding.parts import Part, Shaped, agree, local_grad, whole_shape
from sketch_plugins.sharding.pieces import is_lazy
from sketch_plugins.stores import Ema, Gradient, Store

FIXED = {"compile": False, "capturable": False, "lagged_rms": False}


@with_options(SketchyOptions, **CHANGES)
class Sketchy(SketchOptimizer):
    r"""Shampoo with sketched covariances: a diagonal method's update, turned by low-rank inverse roots, its size kept.

    A parameter with r axes (a matrix: 2) keeps for each of them a sketch of rank k of the covariance
    :math:`L_i` of what it preconditions. At step :math:`t`

    .. math::
        u_t &= \mathrm{graft}(g_t) \qquad m_t = \beta_1 m_{t-1} + (1 - \beta_1) u_t \\
        x_t &= m_t \times_1 (L_1 + \epsilon)^{-1/2r} \cdots \times_r (L_r + \epsilon)^{-1/2r} \\
        \theta_t &= (1 - \gamma \lambda) \theta_{t-1} - \gamma \, \frac{\|m_t\|}{\|x_t\|} \, x_t \\
        L_i &\leftarrow \beta_s L_i + u_t^{(i)} u_t^{(i)\top} \quad (u^{(i)}: \text{unfolded on axis } i)

    The graft decides the size of the step, the covariances its direction. By default the graft is the lean count-sketch
    update (`CSAdam`, ``preset="lean"``): clipped and relative to the size of the weights, so **lr is relative**: try
    2e-2 to 2e-1 where AdamW takes 1e-3.

    *What is preconditioned.* Tensors of 2 or more dimensions. Small trailing axes are merged (``merge_dims``), an axis
    longer than ``max_block_dim`` is cut into equal blocks with covariances of their own. An axis longer than
    ``max_axis``, or than ``max_aspect_ratio`` times the rest of the tensor, has none: the vocabulary of an embedding or
    a language model's head is left to the graft's diagonal, and the tensor is preconditioned along its other axis
    alone. Vectors and scalars take the graft's update as it is, and so do row-sparse gradients
    (``nn.Embedding(sparse=True)``), whose rows are no sample of the covariance. ``row_sparse`` concerns only tensors
    that are not preconditioned along every axis, and leaves those rows unpreconditioned.

    *When.* ``statistics="accumulate"``: every ``statistics_freq``-th step adds to a buffer as large as the sketch, and
    every ``update_freq``-th step (before the first one at steps 1, 2, 4, 8, ...) ends with a solve, for equal shapes in
    one batched call: the preconditioner of a step is made of the steps before it, as in SOAP. ``"sample"``: every
    ``update_freq``-th gradient enters the sketch by itself, before it is used, as in the paper.

    State bytes of a matrix m x n: covariances ``4 * k * (m + n)``, twice that with ``statistics="accumulate"``; first
    moment, of tensors preconditioned along every axis, as in `CSAdam`; the graft's second moment ("cs" as `CSAdam`'s,
    "rmsprop" and "adagrad" 4 a parameter, "sm3" ``4 * (m + n)``).

    Presets (any option given explicitly wins):

    ========== =========================================================================================================
    preset     options
    ========== =========================================================================================================
    default    graft "cs", update_clip 1, scale_parameter, input "update", momentum before, Nesterov, tail "trace",
               statistics "accumulate", solver "eigh", update_freq 10, rank 32
    exact      no covariances, graft "rmsprop", no momentum: the same size of step at 4 bytes a parameter. For parameter
               groups
    paper      graft "rmsprop", no clipping, lr absolute, input "gradient", momentum after, tail "paper", statistics
               "sample", solver "svd", update_freq 10, rank 256, shampoo_beta 0.999, Nesterov, fp32 momentum: the form
               of the paper and of its code
    ========== =========================================================================================================

    Args:
        params: parameters, (name, parameter) pairs or parameter groups; every option may be set for a group.
        lr: learning rate, float or tensor (default 5e-2, for the preset "paper" 1e-3; see above).
        betas: decay rates of momentum and of the graft's second moment (default (0.9, 0.999)); the second has no effect
            with the grafts "adagrad" and "sm3", which sum.
        eps: added to the graft's denominator (default 1e-8).
        weight_decay: decoupled weight decay (default 0).
        preset: see above.
        {options}

    Raises:
        ValueError: as `CSAdam`; options that contradict each other; in `step`, a gradient that is not finite.

    Warns:
        RuntimeWarning: a covariance could not be decomposed, in float64 neither. The step has been taken with the last
            preconditioner, which stays; the warning names the parameter.

    Source: https://arxiv.org/abs/2302.03764. Deviations of the default from it, each measured (docs/benchmarks.md): the
    trace-matched tail; covariances of the graft's update rather than of the gradient, gathered in every step; momentum
    before preconditioning; a graft that costs 0.2 bytes a parameter. The preset "paper" has none of these; momentum and
    grafting there follow the authors' code. One-sided treatment of vocabularies, and solves at steps 1, 2, 4, 8, ...
    before the first whole period, are additions to both.
    """

    # Decompositions are neither compiled nor captured; what preconditions a tensor is a sweep of its own anyway.
    FIXED: ClassVar[dict[str, Any]] = FIXED
    # Until `_complete`: part of a parameter, its group, (tail, solver), what is to be decomposed.
    _solves: tuple[tuple[Part, Mapping[str, Any], tuple[str, str], list[Due]], ...] = ()
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {
            "update_clip": 0.0,
            "scale_parameter": False,
            "first_moment": "fp32",
            "momentum_of": "all",
            "rank": 256,
            "shampoo_beta": 0.999,
            "max_block_dim": 1024,
            "tail": "paper",
            "solver": "svd",
            "statistics": "sample",
            "input": "gradient",
            "graft": "rmsprop",
            "momentum_placement": "after",
        },
        "exact": {"precondition": "none", "graft": "rmsprop"},
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        preset: str = "default",
        **options: Unpack[SketchyOptions],
    ) -> None:
        if lr is None:
            lr = 1e-3 if preset == "paper" else 5e-2  # no option of the presets, or a group's preset would reset it
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **options}
        super().__init__(params, given, preset)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `SketchOptimizer.add_param_group`.

        Raises:
            ValueError: also where options contradict each other, or the budget is too small.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check(group)
            if group["budget"]:
                self._check_budget(group)
        except Exception:
            self.param_groups.pop()
            raise

    def _check_budget(self, group: Mapping[str, Any]) -> None:
        shaped = [p for p in group["params"] if not is_lazy(p)]
        axes = {p: _axes(tuple(p.shape), *(group[name] for name in _AXES))[1] for p in shaped}
        # Tables of a vocabulary are easily kept; what matters are the others, where there are any.
        eligible = [p for p in axes if axes[p] and all(axes[p])] or [p for p in axes if any(axes[p])]
        if eligible and all(self.preconditioner_of(p, group) is None for p in eligible):
            raise ValueError(
                f"budget={group['budget']:g} bytes of state a parameter is too small for a covariance of any tensor "
                f"that has one for every axis, beside first_moment={group['first_moment']!r} and "
                f"graft={group['graft']!r}; allowed is more, or a smaller store, or rank= in place of budget="
            )

    # -- for the base ---------------------------------------------------------------------------------------------

    def _stores(self, p: Shaped, group: Mapping[str, Any]) -> tuple[Store | None, Store | None]:
        return self._moments(p, group, group["momentum_of"] == "all" or self._whole(p, group))

    def _sketches(self, group: Mapping[str, Any]) -> bool:
        return GRAFTS[group["graft"]] == "count_min"

    def _moments(self, p: Shaped, group: Mapping[str, Any], first: bool) -> tuple[Store | None, Store | None]:
        kinds = {"second_moment": GRAFTS[group["graft"]], "first_moment": group["first_moment"] if first else "none"}
        return super()._stores(p, {**group, **kinds})

    def _whole(self, p: Shaped, group: Mapping[str, Any]) -> bool:
        """Whether every axis has a covariance."""
        preconditioner = self.preconditioner_of(p, group)
        return preconditioner is not None and all(preconditioner.ranks)

    def _further(self, p: Shaped, group: Mapping[str, Any]) -> Mapping[str, Further]:
        preconditioner = self.preconditioner_of(p, group)
        return {} if preconditioner is None else {"preconditioner": preconditioner}

    def preconditioner_of(self, p: Shaped, group: Mapping[str, Any]) -> Kronecker | None:
        """Axes, blocks and ranks of a parameter's covariances; None where it has none."""
        shape = tuple(p.shape)
        dims, preconditioned = _axes_of(shape, whole_shape(p), *(group[name] for name in _AXES))
        if not any(preconditioned):
            return None
        dtype, others = torch.float64 if p.dtype == torch.float64 else torch.float32, 0
        if group["budget"]:
            stores = self._moments(p, group, group["momentum_of"] == "all" or all(preconditioned))
            matrix = matrix_shape(shape, self._batch(p, group))
            others = sum(store.nbytes(matrix, dtype) for store in stores if store is not None)
        return _kronecker(
            dims, preconditioned, group["rank"], group["budget"], others, group["max_block_dim"],
            group["statistics"] == "accumulate", dtype,
        )  # fmt: skip

    def _check_incoming(self, incoming: Mapping[str, Any]) -> None:
        super()._check_incoming(incoming)
        for saved in incoming["param_groups"]:
            _check(saved)

    def _row_sparse(self, p: Shaped, group: Mapping[str, Any]) -> Any:
        # Rows of what is preconditioned along them are no rows of an embedding.
        return False if self._whole(p, group) else super()._row_sparse(p, group)

    def _rule(self, group: Mapping[str, Any], step: float | Tensor, sparse: bool) -> Rule:
        (beta1, beta2), graft, lr = group["betas"], group["graft"], rate(group)
        second, denominator, floor = Ema(1.0, 1.0, step), Denominator(1.0, group["eps"]), 0.0
        if graft in ("cs", "rmsprop"):
            root2 = (1.0 - beta2**step) ** 0.5
            second = Ema(beta2, 1.0 - beta2, step)
            denominator = Denominator(root2, group["eps"] / root2 if sparse else group["eps"])
        elif graft == "sm3":
            denominator, floor = Denominator(1.0, 0.0), 1e-30
        # What is not preconditioned has a momentum only where everything has.
        momentum = group["first_moment"] != "none" and group["momentum_of"] == "all"
        size, lookahead = _momentum(beta1, step, group["nesterov"]) if momentum else (1.0, None)
        # With a denominator the momentum comes after it, and `update_clip` looks at what enters there.
        after = graft != "none"
        return Rule(
            first=Ema(beta1, 1.0 - beta1, step) if momentum else None,
            second=second if after else None,
            step_size=lr * size if after else lr,
            correction=1.0 if after else size,
            decay=lr * group["weight_decay"],
            lookahead=lookahead,
            denominator=denominator if after else None,
            floor=floor,
            precondition_first=after,
        )

    # -- the step -------------------------------------------------------------------------------------------------

    def _may_step(self, members: Members, among: Sequence[Mapping[str, Any]]) -> bool:
        for group in among:
            _check(group)
        return check_finite(self, members, among)

    def _why_not_alone(self, group: Mapping[str, Any]) -> str | None:
        if group.get("nonfinite") == "skip":
            return "nonfinite='skip' leaves out the whole step, which has begun by then; allowed is nonfinite='error'"
        return None

    def _adopt(self, one: Pending) -> None:
        super()._adopt(one)
        preconditioner = self.preconditioner_of(one.p, one.group)
        if preconditioner is None or one.grad.rows is not None or one.idle or one.group["statistics"] == "sample":
            return
        if _due(one.step, one.group["update_freq"]) and _sampled(one.step, one.group["statistics_freq"]):
            solver = one.group["tail"], _solver(one.step, one.group)
            sides: list[Due] = [(side, one.state["preconditioner"], None) for side in preconditioner.sides]
            self._solves = (*self._solves, (one.p, one.group, solver, sides))

    def _complete(self) -> None:
        if not self._solves:
            return
        solves, self._solves = self._solves, ()
        # Those who came in another order, during backward, are decomposed in the same batches all the same.
        members = [p for group in self.param_groups for p in group["params"]]
        order = {id(p): number for number, p in enumerate(members)}
        due: dict[tuple[str, str], list[Due]] = {}
        whose: dict[int, tuple[Part, Mapping[str, Any]]] = {}
        for p, group, solver, sides in sorted(solves, key=lambda one: order.get(id(one[0].owner), 0)):
            due.setdefault(solver, []).extend(sides)
            whose |= {id(state): (p, group) for _, state, _ in sides}
        for (tail, how), sides in due.items():
            failed = solve(sides, 1.0, tail, how)
            warn_of([whose[id(state)] for _, state, _ in failed], self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What was to be decomposed belonged to other state."""
        super().__setstate__(state)
        self.__dict__.pop("_solves", None)

    def _eager(
        self,
        p: Part,
        grad: Gradient,
        rule: Rule,
        state: Mapping[str, Any],
        named: Mapping[str, Store],
        group: Mapping[str, Any],
    ) -> None:
        preconditioner = self.preconditioner_of(p, group)
        if preconditioner is None or grad.rows is not None:
            if rule.first is None:  # of touched rows: a momentum that is there belongs to preconditioned steps
                named = {name: store for name, store in named.items() if name != "first_moment"}
            super()._eager(p, grad, rule, state, named, group)
            return
        step, beta1, first = int(state["step"].item()), group["betas"][0], named.get("first_moment")
        covariances, grafted, of_gradient = state["preconditioner"], group["graft"] != "none", _of_gradient(group)
        before, started = group["momentum_placement"] == "before", step >= group["start_preconditioning_step"]
        if of_gradient and before and not started:
            first = None  # which averages gradients, and no step is made of those yet
        size, lookahead = _momentum(beta1, step, group["nesterov"]) if first is not None else (1.0, None)
        ema = Ema(beta1, 1.0 - beta1, step)
        x = scratch.empty("preconditioned", grad.shape, grad.dtype, grad.device)
        whole = Matrix(x)

        if of_gradient:
            self._gather(p, preconditioner, covariances, _full(grad, whole).view(p.shape), step, group)
        rms, root = self._graft(grad, rule, state, named, whole, not of_gradient or not started), p.numel() ** 0.5
        if grafted:
            scale = self._scale(p, grad, rms, group)
            norm = rms * scale * root
            if not of_gradient or not started:
                x.mul_(scale)
        if not of_gradient:
            self._gather(p, preconditioner, covariances, x.view(p.shape), step, group)
        if first is not None and before:
            _average(whole, grad, first, state["first_moment"], ema, lookahead)
            if not of_gradient and grafted:
                norm = _norm(whole, grad) * size  # that of the averaged update
        missing = None
        if started:
            exponent = -(group["exponent"] or 0.5 / len(preconditioner.dims))
            missing = preconditioner.turn(
                covariances, x, exponent, group["matrix_eps"], group["tail"], sizes=not grafted
            )
        now = _norm(whole, grad)
        if not grafted:
            # As a logarithm: roots of covariances have any size, and what is left of it is up to `update_clip`.
            length = now.to(torch.float64 if missing is None else missing[0].dtype).log()
            if missing is not None:
                length = length + missing[0] - missing[1] * math.log(2.0)
            if before:
                length = length + math.log(size)
            if group["update_clip"]:
                length = length.clamp(max=math.log(group["update_clip"]) + math.log(p.numel()) / 2)
            norm = length.clamp(max=math.log(torch.finfo(x.dtype).max) / 2).exp().to(x.dtype)
            norm = norm * self._scale(p, grad, torch.zeros_like(norm), group)
        x.mul_(torch.where(now > 0, norm / now, 0.0))
        if first is not None and not before:
            _average(whole, grad, first, state["first_moment"], ema, lookahead)
            x.mul_(size)
        take(p.data, grad, whole, rate(group), rule, state, group)

    def _gather(
        self,
        p: Part,
        preconditioner: Kronecker,
        state: dict[str, Tensor],
        x: Tensor,
        step: int,
        group: Mapping[str, Any],
    ) -> None:
        if group["statistics"] == "accumulate":
            if _sampled(step, group["statistics_freq"]):
                preconditioner.gather(state, x, group["shampoo_beta"])
        elif _due(step, group["update_freq"]):
            sides = [(side, state, columns) for side, columns in preconditioner.columns(x).items()]
            failed = solve(sides, group["shampoo_beta"], group["tail"], _solver(step, group))
            warn_of([(p, group)] if failed else [], self)

    def _graft(
        self,
        grad: Gradient,
        rule: Rule,
        state: Mapping[str, Any],
        named: Mapping[str, Store],
        whole: Matrix,
        of_update: bool,
    ) -> Tensor:
        """Write the second moment, and into ``whole`` the update (or the gradient); returns the update's RMS."""
        second, count = named.get("second_moment"), grad.shape[0] * grad.shape[1]
        if second is None or rule.second is None:
            for at in grad.batches():
                whole.put(at, grad.get(at))
            return torch.zeros((), dtype=grad.dtype, device=grad.device)  # of no use without a graft
        if second.write_first:
            second.write(state["second_moment"], grad, rule.second)
        working = dict(state)
        if not second.write_first:
            working["second_moment"] = second.begin(state["second_moment"], grad)
        period = second.period(grad.shape[0])
        factors, parts = Factors(second, rule, working, period), []
        for at in grad.batches(period, second.align):
            g = grad.get(at)
            u = torch.mul(g, factors.get(at, g), **scratch.out("update", g))
            whole.put(at, u if of_update else g)
            parts.append(root_mean_square(u, None, count))  # which may change ``u``
        if not second.write_first:
            second.finish(state["second_moment"], working["second_moment"], grad)
        return joined(parts)

    def _scale(self, p: Part, grad: Gradient, rms: Tensor, group: Mapping[str, Any]) -> Tensor:
        """What `update_clip` and `scale_parameter` multiply an update of this RMS by, 0-d."""
        size = torch.ones_like(rms)
        if group["update_clip"]:
            size /= (rms / group["update_clip"]).clamp_(min=1.0)
        if group["scale_parameter"]:
            matrix, count = grad.like(p.data), p.numel()
            # Contiguous: the same bits for any layout.
            parts = [root_mean_square(matrix.get(at).to(grad.dtype).contiguous(), None, count) for at in grad.batches()]
            size *= joined(parts).clamp(min=SCALE_FLOOR)
        return size


_AXES = ("precondition", "merge_dims", "max_axis", "max_aspect_ratio")


@lru_cache(maxsize=1024)
def _axes(
    shape: tuple[int, ...], precondition: str, merge: int, longest: int, ratio: float
) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """The tensor's axes, small ones merged, and which of them have a covariance."""
    size = 1
    for n in shape:
        size *= n
    if len(shape) < 2 or size == 0 or precondition == "none":
        return shape, ()
    dims = merged(shape, merge)
    if min(dims) == 1:
        return dims, ()
    return dims, tuple(precondition == "all" or (d <= longest and d <= ratio * (size // d)) for d in dims)


@lru_cache(maxsize=1024)
def _axes_of(shape: tuple[int, ...], whole: tuple[int, ...], *options: Any) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """`_axes` of a part of a parameter: those axes have a covariance that have one in the whole.

    But a part that is a single row, or column, of what was more has none.
    """
    dims, own = _axes(shape, *options)
    if shape == whole or not own:
        return dims, own
    others, preconditioned = _axes(whole, *options)
    narrow = any(n == 1 != m for n, m in zip(shape, whole, strict=False))
    if narrow or len(shape) != len(whole) or len(others) != len(dims):
        return dims, ()
    return dims, preconditioned


@lru_cache(maxsize=1024)
def _kronecker(
    dims: tuple[int, ...],
    preconditioned: tuple[bool, ...],
    rank: float,
    budget: float,
    others: int,
    longest: int,
    buffered: bool,
    dtype: torch.dtype,
) -> Kronecker | None:
    cuts = tuple(cut(d, longest) if on else (0, d) for d, on in zip(dims, preconditioned, strict=True))

    def of_rank(rank: float) -> Kronecker:
        ranks = [
            0 if not on else min(d, max(1, round(rank * d) if rank < 1 else int(rank)))
            for d, on in zip(dims, preconditioned, strict=True)
        ]
        return Kronecker(dims, cuts, tuple(ranks), buffered)

    if not budget:
        return of_rank(rank)
    size = 1
    for d in dims:
        size *= d
    low, high = 0, max(dims)
    while low < high:  # the largest rank that fits
        middle = (low + high + 1) // 2
        fits = of_rank(middle).nbytes(dtype) + others <= budget * size
        low, high = (middle, high) if fits else (low, middle - 1)
    if low == 0:
        return None
    return of_rank(low)


def _check(group: Mapping[str, Any]) -> None:
    if group["statistics"] == "accumulate" and group["tail"] != "trace":
        raise ValueError(
            f"tail={group['tail']!r} needs statistics='sample': what escapes a sketch of gathered statistics is known "
            "from the trace only; allowed with 'accumulate' is tail='trace'"
        )
    if group["statistics"] == "sample" and group["statistics_freq"] != 1:
        raise ValueError(
            f"statistics_freq={group['statistics_freq']} goes with statistics='accumulate'; with 'sample' every "
            "update_freq-th gradient is the statistic, and allowed is 1"
        )
    if group["update_freq"] % group["statistics_freq"]:
        raise ValueError(
            f"statistics_freq={group['statistics_freq']} does not divide update_freq={group['update_freq']}"
        )


def _of_gradient(group: Mapping[str, Any]) -> bool:
    """Whether the gradient is preconditioned, and not an update made of it. Without a graft the two are the same."""
    return group["input"] == "gradient" and group["graft"] != "none"


def _momentum(beta1: float, step: float | Tensor, nesterov: bool) -> tuple[float | Tensor, float | None]:
    """``(size, lookahead)``: ``size * m``, or ``size * (x + lookahead * m)``, is an average of all x so far."""
    if nesterov and beta1 > 0:
        # beta1 * m + (1 - beta1) * x: its weights add up to 1 - beta1 ** (step + 1).
        return (1.0 - beta1) / (1.0 - beta1 ** (step + 1)), beta1 / (1.0 - beta1)
    return 1.0 / (1.0 - beta1**step), None


def _due(step: int, every: int) -> bool:
    """At 1, 2, 4, 8, ... before the first whole period, so that a short run is not left without a preconditioner."""
    return step % every == 0 or (step < every and step & (step - 1) == 0)


def _sampled(step: int, every: int) -> bool:
    return step % every == 0 or step == 1


def _solver(step: int, group: Mapping[str, Any]) -> str:
    if group["solver"] != "power":
        return group["solver"]
    every, refresh = group["update_freq"], group["refresh_every"]
    # Before the first whole period directions still come in quickly.
    return "eigh" if step < every or (refresh and step // every % refresh == 0) else "power"


# Norms from here on, covariances would overflow: sums of a hundred squares, in float32.
LARGEST = 1e18


def _small(grads: Iterable[Tensor]) -> bool:
    """One look at everything: the norm, which in float16 may overflow where nothing is wrong."""
    values = [_values(g) for g in grads]
    return not values or bool(torch.nn.utils.get_total_norm(values) < LARGEST)


def _all_finite(grad: Tensor) -> bool:
    if grad.numel() == 0:
        return True
    norm = torch.linalg.vector_norm(_values(grad), dtype=torch.float64)
    return bool(norm < LARGEST if grad.dtype != torch.float64 else torch.isfinite(norm))


def _values(grad: Tensor) -> Tensor:
    return grad.coalesce().values() if grad.layout == torch.sparse_coo else grad


def _norm(whole: Matrix, grad: Gradient) -> Tensor:
    return joined([root_mean_square(whole.get(at), None, 1) for at in grad.batches()])


def _full(grad: Gradient, whole: Matrix) -> Tensor:
    """The gradient as one contiguous tensor: itself, or a copy in ``whole``."""
    tensor = grad.matrix._flat
    if tensor is not None and tensor.is_contiguous() and tensor.dtype == grad.dtype and not grad.negate:
        return tensor
    for at in grad.batches():
        whole.put(at, grad.get(at))
    return whole.tensor


def _average(
    whole: Matrix, grad: Gradient, first: Store, state: dict[str, Tensor], ema: Ema, lookahead: float | None
) -> None:
    """``whole <- m``, or Nesterov's ``whole + lookahead * m``, with m averaging it, tile by tile."""
    for at in grad.batches(align=first.align):
        x = first.view(whole.get(at))
        slices = first.slices(state, at, ema.step)
        x.copy_(numerator_of(x, first.blend(slices, x, ema), lookahead))
        first.write_back(state, at, slices)


def take(
    p: Tensor,
    grad: Gradient,
    whole: Matrix,
    size: float | Tensor,
    rule: Rule,
    state: Mapping[str, Any],
    group: Mapping[str, Any],
) -> None:
    """``p <- (1 - decay) * p - size * whole``."""
    shrink = None
    if isinstance(rule.decay, Tensor) or rule.decay != 0:
        shrink = number(1.0 - rule.decay, grad)
    factor = number(size, grad)
    matrix = grad.like(p)
    for at in grad.batches():
        part, in_place = matrix.get(at), matrix.views(at) and p.dtype == grad.dtype
        if not in_place:
            part = scratch.cast("parameter", part, grad.dtype)
        update(part, whole.get(at), {}, factor, shrink, None, None, None)
        if not in_place:
            write_tile(matrix, at, part, group, state)


def warn_of(failed: Sequence[tuple[Part, Mapping[str, Any]]], optimizer: SketchOptimizer) -> None:
    """One warning of the parts, with their groups, whose covariances could not be decomposed."""
    if not failed:
        return
    labels = list(dict.fromkeys(optimizer._label(group, part).rstrip(",") for part, group in failed))
    more = f" and of {len(labels) - 1} other parameters" if len(labels) > 1 else ""
    warn(
        f"no decomposition of the covariance of {labels[0]}{more} is finite, neither in its own precision nor in "
        "float64: the last preconditioner stays in use. If this comes again, the gradients may be too large (their "
        "squares add up beyond the numbers of float32): scale the loss or clip",
        RuntimeWarning,
    )


def check_finite(optimizer: SketchOptimizer, members: Members, among: Sequence[Mapping[str, Any]]) -> bool:
    """Whether parameters may take a step (see `_may_step`): decompositions of what is not finite do not end.

    Where parameters are spread over ranks, all of them come to the same answer: each asks the others.

    Raises:
        ValueError: a gradient is not finite, on this rank or on another that has a part of the same parameters, and its
            group does not say ``nonfinite="skip"``.
    """
    parts = optimizer._parts
    grads = [(group, index, local_grad(group["params"][index])) for group, index in members]
    by_device: dict[torch.device, list[Tensor]] = {}
    for _, _, grad in grads:
        if grad.numel() > 0:
            by_device.setdefault(grad.device, []).append(grad)
    others = parts.process_groups(among)
    # One number for each device is waited for.
    if agree(all([_small(of) for of in by_device.values()]), others):
        return True
    skip = "nonfinite" in optimizer.OPTIONS
    wrong = [(group, index) for group, index, grad in grads if not _all_finite(grad)]
    refused = [(group, index) for group, index in wrong if not (skip and group["nonfinite"] == "skip")]
    if not agree(not refused, others):
        whose, what = "a parameter, on another rank,", "nothing has been changed"
        if refused:
            group, index = refused[0]
            of = parts.of(index, group["params"][index])
            part = next((part for part in of if part.grad is not None and not _all_finite(part.grad)), of[0])
            whose = optimizer._label(group, part)
            if part.key is not None:  # ZeRO steps its groups (stage 3: sub-groups) one by one
                what = "nothing of its group has been changed"
        raise ValueError(
            f"{whose} has a gradient that is not finite, or whose squares are not; {what}. Scale the loss or clip"
            + (", or use nonfinite='skip'" if skip else "")
        )
    return agree(not wrong, others)

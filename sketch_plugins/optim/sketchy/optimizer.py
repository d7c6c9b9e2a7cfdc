"""Shampoo whose covariances are Frequent Directions sketches."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from sketch_plugins.linalg import kronecker
from sketch_plugins.linalg.solving import Due, solve
from sketch_plugins.optim.declaring import with_options
from sketch_plugins.optim.deferred import Late, defer, is_deferred
from sketch_plugins.optim.finite import check_finite, warn_of
from sketch_plugins.optim.options import rate, step_rate
from sketch_plugins.optim.pending import Batch, Pending
from sketch_plugins.optim.rule import Denominator, Rule
from sketch_plugins.optim.sketchy import axes
from sketch_plugins.optim.sketchy.kernels import kernels_for
from sketch_plugins.optim.sketchy.layout import PreconditionedLayout
from sketch_plugins.optim.sketchy.momentum import debiased
from sketch_plugins.optim.sketchy.options import CHANGES, SketchyOptions
from sketch_plugins.optim.sketchy.schedule import check, due, offset_of, sampled, solver_of
from sketch_plugins.optim.sketchy.stack import Stack
from sketch_plugins.optim.sketchy.stacking import share_roots, stacked
from sketch_plugins.optim.taking import StepOfAll
from sketch_plugins.optim.usual_rates import ADAGRAD, ADAMW
from sketch_plugins.sharding.parts import Part
from sketch_plugins.stores import Ema


@with_options(SketchyOptions, **CHANGES)
class Sketchy(PreconditionedLayout):
    r"""Shampoo with sketched covariances: low-rank inverse roots turn a diagonal method's update and keep its size.

    A parameter with r axes (2 for a matrix) keeps, for each axis, a sketch of rank k of the covariance :math:`L_i` of
    what is preconditioned. At step :math:`t`

    .. math::
        u_t &= \mathrm{graft}(g_t) \qquad m_t = \beta_1 m_{t-1} + (1 - \beta_1) u_t \\
        x_t &= m_t \times_1 (L_1 + \epsilon)^{-1/2r} \cdots \times_r (L_r + \epsilon)^{-1/2r} \\
        \theta_t &= (1 - \gamma \lambda) \theta_{t-1} - \gamma \, \frac{\|m_t\|}{\|x_t\|} \, x_t \\
        L_i &\leftarrow \beta_s L_i + u_t^{(i)} u_t^{(i)\top} \quad (u^{(i)}: \text{unfolded on axis } i)

    The graft decides the size of the step, and the covariances decide its direction. By default the graft is the lean
    count-sketch update (`CSAdam`, ``preset="lean"``): clipped, and relative to the size of the weights divided by
    ``reference_rms``. So AdamW's learning rate carries over. The same holds for the graft "rmsprop"; with "adagrad" and
    "sm3" it is Adagrad's rate. With ``reference_rms=1`` lr itself is relative: 2e-2 to 2e-1.

    *What is preconditioned.* Tensors of 2 or more dimensions. The experts of a mixture, one parameter ``(E, R, D)``,
    are E matrices: each has its own covariances and the norm of its own graft, and is clipped and scaled by itself
    (``batch_dims``). Small trailing axes are merged (``merge_dims``), and an axis longer than
    ``max_block_dim`` is cut into equal blocks with covariances of their own. An axis longer than ``max_axis``, or than
    ``max_aspect_ratio`` times the rest of the tensor, has no covariance. So the vocabulary of an embedding or of a
    language model's head is left to the graft's diagonal, and the tensor is preconditioned along its other axis alone.
    Such tensors have ``embedding_rate`` times the learning rate.
    Vectors and scalars take the graft's update unchanged. So do row-sparse gradients (``nn.Embedding(sparse=True)``),
    whose rows are no sample of the covariance. ``row_sparse`` only applies to tensors that are not preconditioned along
    every axis, and leaves touched rows unpreconditioned.

    *When.* With ``statistics="accumulate"`` every ``statistics_freq``-th step adds to a buffer as large as the sketch.
    Every ``update_freq``-th step (before the first of these, steps 1, 2, 4, 8, ...) ends with a solve, in one batched
    call for equal shapes. The preconditioner of a step is therefore made of the steps before it, as in SOAP. With
    ``"sample"`` every ``update_freq``-th gradient enters the sketch by itself, before it is used, as in the paper.

    State bytes of a matrix m x n: covariances ``4 * k * (m + n)``, twice that with ``statistics="accumulate"``; the
    first moment, for tensors that are preconditioned along every axis, as in `CSAdam`; the graft's second moment ("cs"
    as in `CSAdam`, "rmsprop" and "adagrad" 4 a parameter, "sm3" ``4 * (m + n)``).

    Presets (an option that is given explicitly overrides them):

    ========== =========================================================================================================
    preset     options
    ========== =========================================================================================================
    default    graft "cs", update_clip 1, scale_parameter with reference_rms 0.017, input "update", momentum before,
               Nesterov, tail "trace", statistics "accumulate", solver "eigh", update_freq 10, rank 32,
               embedding_rate 2
    exact      no covariances, graft "rmsprop", no momentum: steps of the same size at 4 bytes a parameter. For
               parameter groups
    paper      graft "rmsprop", no clipping, lr absolute, input "gradient", momentum after, tail "paper", statistics
               "sample", solver "svd", update_freq 10, rank 256, shampoo_beta 0.999, Nesterov, fp32 momentum,
               embedding_rate 1: the form of the paper and of its code
    ========== =========================================================================================================

    Args:
        params: parameters, (name, parameter) pairs or parameter groups; every option may be set for a group.
        lr: learning rate, float or tensor (default 1e-3, which is AdamW's; see above).
        betas: decay rates of the momentum and of the graft's second moment (default (0.9, 0.999)). The second has no
            effect with the grafts "adagrad" and "sm3", which sum.
        eps: added to the graft's denominator (default 1e-8).
        weight_decay: decoupled weight decay (default 0).
        preset: see above.
        {options}

    Raises:
        ValueError: see `CSAdam`; also if options contradict each other, or, in `step`, if a gradient is not finite (see
            ``nonfinite``).

    Warns:
        RuntimeWarning: a covariance could not be decomposed, even in float64. The step was taken with the last
            preconditioner, which stays. The warning names the parameter. Also, once, that ``nonfinite="deferred_skip"``
            has taken a step without moving a weight.

    Source: https://arxiv.org/abs/2302.03764. The default deviates from it as follows, each measured
    (docs/benchmarks.md): the trace-matched tail; covariances of the graft's update, not of the gradient, gathered in
    every step; momentum before preconditioning; a graft that costs 0.2 bytes a parameter. The preset "paper" has none
    of these, and its momentum and grafting follow the authors' code. Both have two additions: vocabularies are
    preconditioned on one side, and solves take place at steps 1, 2, 4, 8, ... before the first whole period.
    """

    # Decompositions are neither compiled nor captured, and `lagged_rms` would gain nothing: the sweep is needed anyway.
    FIXED: ClassVar[dict[str, Any]] = {"compile": False, "capturable": False, "lagged_rms": False}
    # Until `_complete`: a part of a parameter, its group, (tail, solver), and the sides to be solved.
    _solves: tuple[tuple[Part, Mapping[str, Any], tuple[str, str], list[Due]], ...] = ()
    # What is sent to the host with `nonfinite="deferred"`. It is neither copied nor pickled.
    _late_flags: Late | None = None
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
            "embedding_rate": 1.0,
        },
        "exact": {"precondition": "none", "graft": "rmsprop"},
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        preset: str = "default",
        **options: Unpack[SketchyOptions],
    ) -> None:
        given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **options}
        super().__init__(params, given, preset)

    def _add_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, see `SketchOptimizer.add_param_group`.

        Raises:
            ValueError: also if options contradict each other, or the budget is too small.
        """
        super()._add_group(param_group)
        group = self.param_groups[-1]
        try:
            check(group)
            is_deferred(self.param_groups)
            if group["budget"]:
                self._check_budget(group)
        except Exception:
            self.param_groups.pop()
            raise

    # -- what the base class asks for -----------------------------------------------------------------------------

    def _check_incoming(self, incoming: Mapping[str, Any]) -> None:
        super()._check_incoming(incoming)
        for saved in incoming["param_groups"]:
            check(saved)

    def _usual_rate(self, group: Mapping[str, Any]) -> float | None:
        if group["graft"] == "none" and not group["update_clip"]:
            return None
        return ADAGRAD if group["graft"] in ("adagrad", "sm3") else ADAMW

    def _rule(self, group: Mapping[str, Any], step: float | Tensor, sparse: bool) -> Rule:
        (beta1, beta2), graft, lr = group["betas"], group["graft"], step_rate(group)
        second, denominator, floor = Ema(1.0, 1.0, step), Denominator(1.0, group["eps"]), 0.0
        if graft in ("cs", "rmsprop"):
            root2 = (1.0 - beta2**step) ** 0.5
            second = Ema(beta2, 1.0 - beta2, step)
            denominator = Denominator(root2, group["eps"] / root2 if sparse else group["eps"])
        elif graft == "sm3":
            denominator, floor = Denominator(1.0, 0.0), 1e-30
        # Tensors that are not preconditioned only have a momentum if all tensors have one.
        momentum = group["first_moment"] != "none" and group["momentum_of"] == "all"
        size, lookahead = debiased(beta1, step, group["nesterov"]) if momentum else (1.0, None)
        # With a denominator the momentum follows it, and `update_clip` measures the input of the average.
        after = graft != "none"
        return Rule(
            first=Ema(beta1, 1.0 - beta1, step) if momentum else None,
            second=second if after else None,
            step_size=lr * size if after else lr,
            correction=1.0 if after else size,
            decay=rate(group) * group["weight_decay"],
            lookahead=lookahead,
            denominator=denominator if after else None,
            floor=floor,
            precondition_first=after,
        )

    # -- the step -------------------------------------------------------------------------------------------------

    def _may_step(self, taking: StepOfAll, among: Sequence[Mapping[str, Any]]) -> bool:
        self._gate = None
        for group in among:
            check(group)
        self._late.check()
        if is_deferred(among):
            self._gate = defer(self, taking, among, self._late)
            return True
        may = check_finite(self, taking.members, among)
        self._late.skipped += not may
        return may

    def _why_not_alone(self, group: Mapping[str, Any]) -> str | None:
        chosen = group.get("nonfinite", "error")
        if chosen == "error":
            return None
        return f"nonfinite={chosen!r} would leave out the whole step, which has already begun; use nonfinite='error'"

    @property
    def skipped_steps(self) -> int:
        """Number of steps in which no weight moved, because of ``nonfinite="skip"`` or ``"deferred_skip"``.

        They are counted in this object, and not saved. With ``"deferred_skip"`` the host waits for the last step.
        """
        self._late.look()
        return self._late.skipped

    def check_last_step(self) -> None:
        """Look now whether the gradients of the last step were finite (``nonfinite="deferred"``, ``"deferred_skip"``).

        The host waits for that step. Call this after the last step of a training that does not save the state.

        Raises:
            ValueError: they were not finite, with ``nonfinite="deferred"``. The next call raises no error.
        """
        self._late.check()

    def state_dict(self) -> dict[str, Any]:
        """The state dict, see `SketchOptimizer.state_dict`.

        Raises:
            ValueError: see `check_last_step`.
        """
        self.check_last_step()
        return super().state_dict()

    @property
    def _late(self) -> Late:
        if self._late_flags is None:
            self._late_flags = Late()
            weakref.finalize(self, self._late_flags.end)
        return self._late_flags

    def _adopt(self, one: Pending) -> None:
        super()._adopt(one)
        preconditioner = self.preconditioner_of(one.p, one.group)
        if preconditioner is None or one.grad.rows is not None or one.idle or one.group["statistics"] == "sample":
            return
        offset = offset_of(one.p, one.group)
        if due(one.step, one.group["update_freq"], offset) and sampled(one.step, one.group["statistics_freq"]):
            solver = one.group["tail"], solver_of(one.step, one.group, offset)
            sides: list[Due] = [(side, one.state["preconditioner"], None) for side in preconditioner.sides]
            self._solves = (*self._solves, (one.p, one.group, solver, sides))

    def _complete(self) -> None:
        if not self._solves:
            return
        solves, self._solves = self._solves, ()
        # Steps in backward come in another order. Sorted, they are solved in the same batches.
        members = [p for group in self.param_groups for p in group["params"]]
        order = {id(p): number for number, p in enumerate(members)}
        batches: dict[tuple[str, str], list[Due]] = {}
        whose: dict[int, tuple[Part, Mapping[str, Any]]] = {}
        for p, group, solver, sides in sorted(solves, key=lambda one: order.get(id(one[0].owner), 0)):
            batches.setdefault(solver, []).extend(sides)
            whose |= {id(state): (p, group) for _, state, _ in sides}
        for (tail, how), sides in batches.items():
            failed = solve(sides, 1.0, tail, how)
            warn_of([whose[id(state)] for _, state, _ in failed], self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle. Pending solves and flags are dropped, because they belong to other state."""
        super().__setstate__(state)
        self.__dict__.pop("_solves", None)
        if self._late_flags is not None:
            self._late_flags.forget()

    def _together(self, eager: Sequence[Pending]) -> list[Batch]:
        def preconditioned(one: Pending) -> bool:
            return one.grad.rows is None and self.preconditioner_of(one.p, one.group) is not None

        stacks = [self._stack(members) for members in stacked(filter(preconditioned, eager), self.OPTIONS)]
        share_roots(stacks)
        return [*(Batch(self._eager, [one]) for one in eager if not preconditioned(one)), *stacks]

    def _stack(self, members: list[Pending]) -> Stack:
        assert self._step_cache is not None
        one, cache = members[0], self._step_cache
        preconditioner = self.preconditioner_of(one.p, one.group)
        assert preconditioner is not None
        programs = cache.stacks.setdefault(tuple([member.p.identity for member in members]), {})
        kernels, marks = kernels_for(members, self._has_large()), cache.marks(self.OPTIONS, one.group)
        return Stack(members, preconditioner, self._gather, kernels, programs, marks)

    def _eager(self, one: Pending) -> None:
        preconditioner = self.preconditioner_of(one.p, one.group)
        if one.rule is not None and preconditioner is not None:
            # Touched rows are not preconditioned.
            rule = replace(one.rule, step_size=one.rule.step_size * axes.factor_of(preconditioner, one.group))
            named = one.named
            if rule.first is None:  # the existing momentum belongs to preconditioned steps
                named = {name: store for name, store in named.items() if name != "first_moment"}
            one = replace(one, rule=rule, named=named)
        super()._eager(one)

    def _gather(self, members: Sequence[Pending], covariances: kronecker.Stack, x: Tensor) -> bool:
        """Add what is preconditioned to the covariances or buffers; return whether the covariances have changed."""
        group, step = members[0].group, members[0].step
        if group["statistics"] == "accumulate":
            if sampled(step, group["statistics_freq"]):
                covariances.gather(x, group["shampoo_beta"])
            return False
        solves: dict[str, list[Due]] = {}
        for one, place in zip(members, x, strict=True):
            offset = offset_of(one.p, group)
            if due(step, group["update_freq"], offset):
                columns = covariances.kronecker.columns(place)
                state = one.state["preconditioner"]
                sides = solves.setdefault(solver_of(step, group, offset), [])
                sides += [(side, state, new) for side, new in columns.items()]
        if not solves:
            return False
        failed = [
            item for how, sides in solves.items() for item in solve(sides, group["shampoo_beta"], group["tail"], how)
        ]
        wrong = {id(state) for _, state, _ in failed}
        warn_of([(one.p, one.group) for one in members if id(one.state["preconditioner"]) in wrong], self)
        covariances.forget()
        return True

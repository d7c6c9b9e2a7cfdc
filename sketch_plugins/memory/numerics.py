"""The share of weights that a step does not move, because rounding to their dtype removes the update."""

from __future__ import annotations

import math
import sys
import weakref
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.hashing import derive
from sketch_plugins.kernels.weight_code import HALF
from sketch_plugins.memory.numerics_report import NumericsReport, Unmoved
from sketch_plugins.memory.weight_sample import (
    Sample,
    by_chance,
    gradient_of,
    in_numbers,
    parts_of,
    precision_of,
    sampled,
    steps_of,
    values_of,
)
from sketch_plugins.notices import warn
from sketch_plugins.optim import MemSGD
from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.sharding.pieces import is_lazy

#: Default number of steps from one check to the next.
EVERY = 100


class NumericsProbe:
    r"""The share of weights with a gradient that a step did not move.

    A weight w does not move if its update is below half a unit in its last place. In bfloat16 at 1.0, this is an update
    below :math:`2^{-8}` upwards or :math:`2^{-9}` downwards. With ``weight_bits`` the weight is the stored one and its
    correction together, as `sketch_plugins.full_precision_state_dict` returns it::

        probe = NumericsProbe(optimizer, every=100)
        for batch in batches:  # the loop does not change
            ...
        probe.share, probe.last.groups

    In steps 1, 1 + every, 1 + 2 * every, ... a sample of the weights is compared with its values before the step. The
    sample is the same for the same seed; it has one place in each of equally long stretches of a parameter. A share is

    .. math:: \sum_p n_p\, u_p / k_p \;\Big/\; \sum_p n_p\, g_p / k_p

    over parameters p of n elements, of which k are sampled, g have a finite gradient other than zero and u of these
    did not move. Groups whose learning rate is 0 are not counted, nor are parameters that took no step (skipped by
    GradScaler or ``nonfinite="skip"``) or one that moves no weight (``nonfinite="deferred"``). The training computes
    the same bits as without the probe. Between checks a step costs two calls of Python, and a check some small
    operations for each parameter and one wait for the device.

    A warning, once for each probe, says if more than ``bound`` of a group's weights, or of all weights, did not move in
    ``looks`` checks in a row. Weights with stochastic rounding (``stochastic_rounding`` in bfloat16,
    ``weight_bits=24``) are counted but cause no warning, because a weight that stays has lost nothing on average.

    *Supported*: sketched optimizers with eager, Numba's and Triton's steps, including row-sparse ones; any optimizer of
    torch except LBFGS, and subclasses that call ``super().step()``; DTensors (FSDP2), whose local shards are checked
    without communication; steps with a closure, whose first evaluation gives the gradients; steps in backward
    (`InBackward`); GradScaler. *Not checked*: tensors that compute their numbers (quantized ones), gradients of
    DTensors whose layout differs from their parameter's, and steps within a CUDA graph.

    Args:
        optimizer: an optimizer, or a wrapper with an ``optimizer`` attribute.
        every: number of steps from one check to the next.
        elements: size of the sample, but at least one weight of each parameter; each takes about 16 bytes in a check.
        seed: seed of the sample, any integer.
        bound: share above which a check counts for the warning.
        looks: number of such checks in a row that cause the warning.

    Attributes:
        last: the `NumericsReport` of the last check; None before the first one.

    Raises:
        TypeError: ``optimizer`` is not an optimizer.
        ValueError: an argument is not allowed; the optimizer already has such a probe; it is `MemSGD`, which moves only
            the entries that it sends and keeps the part that rounding removes; it is LBFGS, which moves the weights
            back and forth within a step and may end it without a move; it steps flat partitions of DeepSpeed's ZeRO
            (noticed in the first step for stage 3), which are float32 for any model.
    """

    def __init__(
        self,
        optimizer: Any,
        every: int = EVERY,
        elements: int = 1 << 16,
        seed: int = 0,
        bound: float = 0.5,
        looks: int = 3,
    ) -> None:
        for name, value in (("every", every), ("elements", elements), ("looks", looks)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} is not allowed: {name} must be an integer >= 1")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seed={seed!r} is not allowed: seed must be an integer")
        if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not 0 <= bound <= 1:
            raise ValueError(f"bound={bound!r} is not allowed: bound must be a number in [0, 1]")
        optimizer = _unwrapped(optimizer)
        if isinstance(optimizer, MemSGD):
            raise ValueError(
                "NumericsProbe does not support MemSGD: it moves only the entries that it sends, and what rounding "
                "leaves of an update stays in its memory, so that a weight that does not move has lost nothing"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "NumericsProbe does not support LBFGS: its line search moves the weights back and forth within a step, "
                "and it stops without a move where the gradient is small, so that a weight that does not move need not "
                "have lost an update to rounding"
            )
        if getattr(optimizer, "_numerics", None) is not None:
            raise ValueError(f"this {type(optimizer).__name__} has a NumericsProbe already: call its remove() first")
        self.every, self.elements, self.seed, self.bound, self.looks = every, elements, seed, float(bound), looks
        self.last: NumericsReport | None = None
        # The optimizer keeps this object, not the other way round, so that it is freed together with the optimizer.
        self._optimizer = weakref.ref(optimizer)
        self._steps = 0
        self._looking = True  # whether the cycle that ends with the next step() is checked
        self._before: list[Sample] = []
        self._counts: list[tuple[Sample, Tensor]] = []
        # Number of a group, or None for all groups -> number of checks in a row in which it was above the bound.
        self._above: dict[int | None, int] = {}
        self._warned = False
        self._rates: dict[int, bool] = {}  # number of a group -> whether it moves its weights in this cycle
        # torch calls the hooks for the `step` of a class, and again for that of its base if the class calls it.
        self._nests = (
            sum("step" in vars(one) for one in type(optimizer).__mro__ if one is not torch.optim.Optimizer) > 1
        )
        for group in optimizer.param_groups:
            for index, p in enumerate(group["params"]):
                if not is_lazy(p):
                    parts_of(optimizer, index, p)  # raises an error for parameters that cannot be checked
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        optimizer._numerics = self

    @property
    def share(self) -> float:
        """Share of all weights in the last check; NaN before the first one, or if it saw no gradient."""
        return math.nan if self.last is None else self.last.total.share

    def figures(self, prefix: str = "numerics") -> dict[str, float]:
        """Figures for a logger: ``numerics/unmoved``; with several groups also ``numerics/unmoved_group_0``, ..."""
        if self.last is None or math.isnan(self.share):
            return {}
        each = self.last.groups if len(self.last.groups) > 1 else {}
        named = {f"{prefix}/unmoved_group_{number}": one.share for number, one in sorted(each.items())}
        return {f"{prefix}/unmoved": self.share, **{name: v for name, v in named.items() if not math.isnan(v)}}

    def remove(self) -> None:
        """Remove the hooks, so that nothing is checked any more."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._before, self._counts = [], [], []
        optimizer: Any = self._optimizer()
        if optimizer is not None and getattr(optimizer, "_numerics", None) is self:
            optimizer._numerics = None

    def __enter__(self) -> NumericsProbe:
        """``with NumericsProbe(optimizer) as probe: ...`` removes it at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove it at the end of the block."""
        self.remove()

    # -- before and after ----------------------------------------------------------------------------------------

    def before_parameter(self, number: int, index: int) -> None:
        """Read the weights of one parameter. `SketchOptimizer.step_parameter` calls it before a step in backward."""
        optimizer = self._optimizer()
        if self._looking and optimizer is not None and not _capturing():
            self._look(optimizer, [(number, index)])

    def after_parameter(self) -> None:
        """Compare these weights after the step."""
        optimizer = self._optimizer()
        if self._before and optimizer is not None:
            self._compare(optimizer)

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._looking or _capturing() or (self._nests and _within_a_step(optimizer)):
            return None
        self._rates = {}

        def look() -> None:
            self._look(
                optimizer,
                [(n, i) for n, group in enumerate(optimizer.param_groups) for i, _ in enumerate(group["params"])],
            )

        # A closure computes the gradients, and with steps in backward it moves weights, too.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            look()
            return None

        evaluated = False

        def then() -> Any:
            nonlocal evaluated
            loss = closure()
            if not evaluated:  # the weights that the step starts from
                evaluated = True
                look()
            return loss

        return ((args[0], then, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": then})

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        if self._nests and _within_a_step(optimizer):
            return
        self._steps += 1
        if self._looking and not _capturing():
            self._compare(optimizer)
            self._conclude(optimizer)
        self._counts, self._rates = [], {}
        self._looking = self._steps % self.every == 0

    @torch.no_grad()
    def _look(self, optimizer: Any, members: list[tuple[int, int]]) -> None:
        """Store the sampled weights of some parameters, and which of them have a gradient."""
        self._before = []
        each = max(1, self.elements // max(1, sum(len(group["params"]) for group in optimizer.param_groups)))
        for number, index in members:
            group = optimizer.param_groups[number]
            owner = group["params"][index]
            if owner.grad is None or owner.numel() == 0:
                continue
            if number not in self._rates:  # to read a tensor on a GPU is to wait for it
                self._rates[number] = float(group.get("lr", 1.0)) > 0
            if not self._rates[number]:
                continue
            if isinstance(optimizer, SketchOptimizer) and group.get("weight_bits"):
                optimizer._check_weights([{**group, "params": [owner]}])  # as the step is about to do
            state = optimizer.state.get(owner)
            for part in parts_of(optimizer, index, owner):
                gradient = gradient_of(part)
                if gradient is None or part.numel() == 0:
                    continue
                seed = derive(self.seed, number, index)
                here, g, standing_for = sampled(gradient, part.shape, each, seed)
                mask = g.isfinite() & (g != 0)
                self._before.append(
                    Sample(number, index, part, here, mask, values_of(part, state, here), steps_of(state), standing_for)
                )

    @torch.no_grad()
    def _compare(self, optimizer: Any) -> None:
        """Count the weights that have not moved. This does not wait for the device."""
        for one in self._before:
            state = optimizer.state.get(one.part.owner)
            now = values_of(one.part, state, one.places)
            stays = one.mask & (now == one.values.to(now.dtype))
            counts = torch.stack([one.mask.sum(), stays.sum()])
            steps = steps_of(state)
            if steps is None:  # ours count; others may not
                taken: bool | Tensor = not isinstance(optimizer, SketchOptimizer)
            else:
                taken = steps != (0.0 if one.steps is None else one.steps)
            gate = getattr(optimizer, "_gate", None)
            if gate is not None:  # the device may have held all weights
                taken = gate.on(counts.device, counts.dtype) * taken
            self._counts.append((one, counts * taken))
        self._before = []

    def _conclude(self, optimizer: Any) -> None:
        groups: dict[int, Unmoved] = {}
        lasting: dict[int, Unmoved] = {}
        where: list[tuple[float, Sample]] = []
        for (one, _), (seen, stay) in zip(
            self._counts, in_numbers([counts for _, counts in self._counts]), strict=True
        ):
            found = Unmoved(seen, seen * one.standing_for, stay * one.standing_for)
            group = optimizer.param_groups[one.number]
            groups[one.number] = groups.get(one.number, Unmoved()) + found
            if not by_chance(one.part, group):
                lasting[one.number] = lasting.get(one.number, Unmoved()) + found
                where.append((found.unmoved, one))
        self.last = NumericsReport(self._steps, groups, lasting)
        self._judge(optimizer, lasting, where)

    def _judge(self, optimizer: Any, lasting: dict[int, Unmoved], where: list[tuple[float, Sample]]) -> None:
        watched: dict[int | None, Unmoved] = {None: sum(lasting.values(), Unmoved())}
        watched.update((number, one) for number, one in lasting.items())
        for key, one in watched.items():
            if not one.weights:  # nothing is known of this step
                continue
            self._above[key] = self._above.get(key, 0) + 1 if one.share > self.bound else 0
        high = [key for key, count in self._above.items() if count >= self.looks and key in watched]
        if self._warned or not high:
            return
        self._warned = True
        numbers = sorted(key for key in high if key is not None)
        share = watched[None if None in high else numbers[0]].share
        said = "the weights" if None in high else f"the weights of parameter group {numbers[0]}"
        # Stable: those of equal size in their order.
        most = sorted(
            (one for one in where if one[0] and (None in high or one[1].number in numbers)), key=lambda o: -o[0]
        )
        labels = [_label(optimizer, one) for _, one in most[:3]]
        dtypes = {precision_of(one.part, optimizer.param_groups[one.number]) for _, one in most}
        times = f"in each of the last {self.looks} checks" if self.looks > 1 else "in the last check"
        more = f" and {len(most) - 3} more" if len(most) > 3 else ""
        warn(
            f"check_numerics: {times}, more than {self.bound:.0%} of {said} with a gradient did not move "
            f"({share:.0%} in step {self._steps}), because their updates are below half a unit "
            f"in the last place of {', '.join(sorted(str(dtype) for dtype in dtypes))}. "
            f"Most of them are in {'; '.join(labels)}{more}. {_advice(optimizer, dtypes)}"
        )


def _unwrapped(optimizer: Any) -> Any:
    """The optimizer inside wrappers."""
    found = optimizer
    while True:
        inner = getattr(found, "optimizer", None)
        if isinstance(inner, torch.optim.Optimizer) or (inner is not None and not _is_one(found)):
            found = inner
        elif _is_one(found):
            return found
        else:
            raise TypeError(f"NumericsProbe takes an optimizer, not {type(optimizer).__name__}")


def _is_one(optimizer: Any) -> bool:
    return isinstance(optimizer, torch.optim.Optimizer)


def _label(optimizer: Any, one: Sample) -> str:
    if isinstance(optimizer, SketchOptimizer):
        return optimizer._label(optimizer.param_groups[one.number], one.part).rstrip(",")
    names = optimizer.param_groups[one.number].get("param_names")
    name = f" ({names[one.index]})" if names else ""
    return f"parameter {one.index}{name} of group {one.number}, shape {tuple(one.part.owner.shape)}"


def _advice(optimizer: Any, dtypes: set[torch.dtype]) -> str:
    if not dtypes & set(HALF):
        return "Use a larger learning rate" + (", or float64 parameters" if dtypes != {torch.float64} else "")
    which = "" if isinstance(optimizer, SketchOptimizer) else " of an optimizer of sketch-plugins"
    return (
        f"Use weight_bits=24{which}, keep these parameters in float32 (sketch_plugins.cast_model has keep=), or use a "
        "larger learning rate"
    )


def _within_a_step(optimizer: Any) -> bool:
    """Whether the hook that asks was called within another step of the same optimizer.

    This reads the stack. A counter would be wrong after a step that failed, whose post hooks torch does not call.
    """
    caller = sys._getframe(2)  # torch's wrapper of `step`, which calls the hooks
    frame: FrameType | None = caller.f_back
    while frame is not None:
        if frame.f_code is caller.f_code and frame.f_locals.get("self") is optimizer:
            return True
        frame = frame.f_back
    return False


def _capturing() -> bool:
    """Whether a CUDA graph is being captured, during which nothing may be read."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_setting(value: Any) -> int:
    """Number of steps between checks for an option ``check_numerics``: False is 0 (off), True is `EVERY`.

    Raises:
        ValueError: it is neither a bool nor an integer >= 0.
    """
    if isinstance(value, bool):
        return EVERY if value else 0
    if not isinstance(value, int) or value < 0:
        raise ValueError(
            f"check_numerics={value!r} is not allowed: check_numerics must be False, True (every {EVERY} steps), or "
            "the number of steps from one check to the next, an integer >= 0"
        )
    return value

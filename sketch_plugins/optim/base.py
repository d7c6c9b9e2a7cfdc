"""The base of all optimizers but `MemSGD`: parameter groups, and a step from the gradients to the kernels.

A concrete optimizer declares its options and its update rule. Everything else is done by classes that build on each
other: `groups` (options), `layout` (what state consists of), `state_checks`, `state_dicts`, `gradients`, `resolved` (a
part's step before anything changes) and `taking` (prepares and takes all steps).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.optim.ambient import neutral, outside_graphs
from sketch_plugins.optim.family import BEFORE
from sketch_plugins.optim.groups import OWN_KEY, check_compiler, check_parameter, one_of_width_and_compression
from sketch_plugins.optim.introduction import introduce
from sketch_plugins.optim.options import unknown_option, validate
from sketch_plugins.optim.step_cache import StepCache, is_sparse
from sketch_plugins.optim.taking import StepOfAll, Taking
from sketch_plugins.optim.unknown_keys import misspelt
from sketch_plugins.optim.usual_rates import RateWatch
from sketch_plugins.optim.written import MARK, modernize, renew, written_with
from sketch_plugins.sharding.state_names import flattened, nested


class SketchOptimizer(Taking):
    """Base of the sketched optimizers. `CSAdam` describes the options.

    Subclasses set ``OPTIONS`` and ``PRESETS`` (option values by name; the first preset holds every default) and
    implement ``_rule``. A group's option is its own key if it has one, else its ``preset``'s value, else the
    constructor's.
    """

    # The `InBackward` that uses this optimizer, if there is one. It belongs to this object alone.
    _in_backward: Any = None
    # The `NumericsProbe` that watches this optimizer, if there is one. It belongs to this object alone.
    _numerics: Any = None

    # It is neither copied nor pickled.
    _rate_watch: RateWatch | None = None

    # The groups to add instead of one that `add_param_group` is given: of that group and its number. It is set if the
    # user has not built this optimizer (`counterpart`). Copies and pickles keep it, so it must not hold the optimizer.
    _arriving: Callable[[Mapping[str, Any], int], Sequence[dict[str, Any]]] | None = None

    def __init__(self, params: Any, explicit: Mapping[str, Any], preset: str) -> None:
        """Validate and resolve the options. A value of None in ``explicit`` leaves the option to the preset."""
        unknown = [name for name in explicit if name not in self.OPTIONS and name not in self.NO_EFFECT]
        if unknown:  # Python raises TypeError for an unknown argument, too
            raise TypeError(unknown_option(type(self).__name__, unknown[0], self.OPTIONS))
        self._accept_without_effect(explicit)
        explicit = {name: value for name, value in explicit.items() if name not in self.NO_EFFECT}
        given = {name: value for name, value in explicit.items() if value is not None}
        defaults = {**self._preset(next(iter(self.PRESETS))), **self._preset(preset), **given}
        for name in explicit:
            if name not in defaults:  # it is None, and no preset sets it
                raise ValueError(f"{name}=None is not allowed: {name} must be {self.OPTIONS[name].describe()}")
        one_of_width_and_compression(given)
        self.__dict__.pop("_arriving", None)  # whoever builds it a second time writes our options
        fixed = {**self.FIXED, "preset": preset}
        super().__init__(params, {**validate(self.OPTIONS, defaults, type(self).__name__), **fixed})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it may set any option, and ``preset``. Unknown keys are kept, unless they look misspelt.

        Raises:
            ValueError: an option's value is not allowed (even if the user meant the key as one of their own), a key
                looks like a misspelt option, or a parameter is complex.
        """
        if self._arriving is None or not isinstance(param_group, dict) or "params" not in param_group:
            self._add_group(param_group)
        else:
            for group in self._arriving(param_group, len(self.param_groups)):
                self._add_group(group)

    def _add_group(self, param_group: dict[str, Any]) -> None:
        """Add a group that has our options. Subclasses extend this method, because `add_param_group` may translate."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, not {type(param_group).__name__}")
        self._accept_without_effect(param_group)
        written_with(param_group)  # raises if the key of the mark has a value of the user's
        own = {name: value for name, value in param_group.items() if name in self.OPTIONS}
        for name, value in param_group.items():
            if name in self.FIXED and value == self.FIXED[name]:  # a group of such an optimizer
                continue
            meant = misspelt(name, {**self.OPTIONS, **self.NO_EFFECT, "preset": None, "params": None})  # type: ignore[dict-item]
            if meant is not None and name != "params":
                said = unknown_option(f"a parameter group of {type(self).__name__}", name, self.OPTIONS)
                raise ValueError(f"{said}. {OWN_KEY}")
        one_of_width_and_compression(own)
        if "preset" in param_group:
            own = {**self._group_preset(param_group["preset"]), **own}
        if "compression" in own:
            own.setdefault("width", 0)
        own = {name: self._group_value(name, value) for name, value in own.items()}
        param_group.update(own)
        with warnings.catch_warnings():
            # torch only warns of duplicates, and says that this will be an error.
            warnings.filterwarnings("error", message=".*duplicate parameters.*", category=UserWarning)
            try:
                super().add_param_group(param_group)
            except UserWarning as warning:
                raise ValueError(
                    f"a parameter group of {type(self).__name__} contains a parameter more than once: give each "
                    "parameter once"
                ) from warning
        try:
            renew(type(self).__name__, self.OPTIONS, self.param_groups[-1])
            for index, p in enumerate(self.param_groups[-1]["params"]):
                check_parameter(p, partial(self._label, self.param_groups[-1], index), type(self).__name__)
                if self.param_groups[-1]["compile"] and p.device.type == "cpu":
                    check_compiler()
                self._check_kernels(p, self.param_groups[-1], partial(self._label, self.param_groups[-1], index))
        except Exception:
            self.param_groups.pop()
            raise
        self._parts.add(self.param_groups[-1], len(self.param_groups) - 1, self.batch_axes)
        self._rates.add(self.param_groups[-1])
        if self._step_cache is not None:
            self._step_cache.forget_eager()

    @outside_graphs
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step. Every gradient is checked before the first parameter changes, so an error changes nothing.

        Args:
            closure: re-evaluates the model with gradients enabled and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: a gradient cannot be used (its layout, or a dense gradient of a signed sketch).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            self._check_capture()
        cache = self._step_cache = self._step_cache or StepCache()
        cache.large = None
        taking, recall, state = StepOfAll(), cache.recall, self.state
        asks = type(self)._may_step is not SketchOptimizer._may_step
        with neutral(), self._parts.looking(), self._weights_kept(self.param_groups):
            for place, group in enumerate(self.param_groups):
                self._check_options(cache.options, place, group)
                options = cache.marks(self.OPTIONS, group)
                given = group["params"]
                grads = [owner.grad for owner in given]
                alike = cache.dense(grads, group)  # gradients that may look as they did in the last step
                present = [grad for grad in alike if grad is not None]
                if len(present) < len(given):
                    given = [owner for owner, grad in zip(given, alike, strict=True) if grad is not None]
                found = bool(given) and cache.recall_group(taking.again, given, present, group, options, state)
                if found:
                    taking.groups.append((group, alike))
                    if alike is grads:
                        continue
                recalled, whole = [], not found
                for index, (owner, grad) in enumerate(zip(group["params"], grads, strict=True)):
                    if grad is None or owner.numel() == 0 or (found and alike[index] is not None):
                        continue
                    if is_sparse(grad):
                        cache.see_sparse(group)
                        self._look_at(taking, group, index, owner, options)
                        continue
                    if recall(taking.again, id(owner), owner, owner, grad, group, options, state.get(owner)):
                        taking.single.append((group, index))
                    else:
                        whole = self._look_at(taking, group, index, owner, options) and whole
                    recalled.append((index, owner))
                if whole and len(recalled) == len(given) and cache.may_learn(given, group):
                    parts = [part for index, owner in recalled for part in self._parts.of(index, owner)]
                    cache.learn_group(given, parts, group, state)
            if self._watches_rates and not self._numbers_are_answered:  # a plan does not train
                self._rates.step(self)
            with scratch.scratch():
                try:
                    if not asks or self._may_step(taking, self.param_groups):
                        self._update(taking.work, taking.again)
                finally:
                    self._complete()
        cache.trim()
        if not self._introduced:
            self._introduced = introduce(self)
        return loss

    @outside_graphs
    @torch.no_grad()
    def step_parameter(self, number: int, index: int) -> None:
        """Take the step of one parameter, whose gradient is complete: parameter ``index`` of group ``number``.

        It computes the same bits as `step` (for `Sketchy` with ``stack_bytes=0``; otherwise equal up to rounding). Its
        cost does not grow with the number of parameters. When all parameters have taken their steps, `step` has to
        follow, as `sketch_plugins.InBackward` ensures: it takes the steps of parameters that still have a gradient, and
        does what waits for all of them (Sketchy's decompositions, in one batch for equal shapes). The caller has to
        free the gradient, or `step` would use it again.

        Raises:
            ValueError: see `step`. The parameter has not changed then.
        """
        group = self.param_groups[number]
        owner = group["params"][index]
        why = self._why_not_alone(group)
        if why is not None:
            raise ValueError(f"{self._label(group, index)} cannot take its step before the other parameters: {why}")
        if owner.grad is None or owner.numel() == 0:
            return
        cache = self._step_cache = self._step_cache or StepCache()
        self._check_options(cache.options, number, group)
        taking = StepOfAll()
        probe = self._numerics
        if probe is not None:
            probe.before_parameter(number, index)
        with neutral(), self._parts.looking(), self._weights_kept([{**group, "params": [owner]}]):
            self._look_at(taking, group, index, owner, cache.marks(self.OPTIONS, group))
            with scratch.scratch():
                if self._may_step(taking, [{**group, "params": [owner]}]):
                    self._update(taking.work, taking.again, id(owner))
        if probe is not None:
            probe.after_parameter()

    def _look_at(
        self, taking: StepOfAll, group: dict[str, Any], index: int, owner: Tensor, options: tuple[Any, ...] | None
    ) -> bool:
        """Add a parameter that has a gradient to a step; return whether all its parts look as in the last one."""
        assert self._step_cache is not None
        taking.single.append((group, index))
        same, state = True, self.state.get(owner)
        for p in self._parts.of(index, owner):
            grad = p.grad
            taking.outliving.append(grad)
            if not self._step_cache.recall(taking.again, p.identity, p.data, owner, grad, group, options, state):
                one = self._step_cache.repeated(p, grad, group, options, state)
                taking.work.append(one or (p, group, self._gradient(p, grad, group)))
                same = same and p.numel() == 0  # other ranks have elements of it, so an empty shard counts steps, too
        return same

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # torch's has groups, defaults and state only
        return state if self._arriving is None else {**state, "_arriving": self._arriving}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle, without what was remembered of the last step: its groups were others."""
        super().__setstate__(state)
        self.__dict__.pop("_step_cache", None)
        self.__dict__.pop("_written", None)
        self.__dict__.pop("_bits_are_known", None)
        self.__dict__.pop("_unmeasured", None)
        for p, own in self.state.items():
            if isinstance(p, Tensor) and isinstance(own, Mapping):  # pickles of older versions have nested state
                self.state[p] = flattened(nested(own))
        for group in self.param_groups:
            for name, value in BEFORE.items():  # the pickle may be older than an option
                if name in self.OPTIONS:
                    group.setdefault(name, value)
                    self.defaults.setdefault(name, value)
            if MARK not in group:  # the pickle is older than the mark
                modernize(group)
                renew(type(self).__name__, self.OPTIONS, group)
        if self._parts_of is None:  # a copy, whose parameters are those that it was given
            for number, group in enumerate(self.param_groups):
                self._parts.add(group, number, self.batch_axes)
        for group in self.param_groups:
            for part, _ in self._parts_with_state([group]):
                if own := self._state_of(part):  # pickles of older versions shared state among experts
                    self.state[part.owner].update(flattened(self.spread_part(own, part, group), part.key))
        self._find_unmeasured()

    @property
    def _rates(self) -> RateWatch:
        if self._rate_watch is None:
            self._rate_watch = RateWatch()
        return self._rate_watch

    # -- for subclasses ------------------------------------------------------------------------------------------

    def _may_step(self, taking: StepOfAll, among: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a step is taken at all. This is asked before anything changes.

        Args:
            taking: the step, with the parameters that would take it.
            among: all groups; in `step_parameter` one group that contains only that parameter.
        """
        return True

    def _complete(self) -> None:
        """The last part of a step, after all parameters have taken theirs, also those of `step_parameter`."""

    def _why_not_alone(self, group: Mapping[str, Any]) -> str | None:
        """Why `step_parameter` is not possible with the options of a group, or None."""
        return None

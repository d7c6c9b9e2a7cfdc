"""The only Optimizer logic: parameter groups, state, the step in tiles, saving and loading.

A concrete optimizer names its options, its stores' averages and its update rule; everything else is here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sketch_plugins import scratch
from sketch_plugins.kernels.tile import joined, numerator_of, root_mean_square, round_to_bf16, update
from sketch_plugins.kernels.work import Work
from sketch_plugins.optim.ambient import neutral, outside_graphs, uninterrupted
from sketch_plugins.optim.checks import (
    copied,
    described,
    exact_step,
    has_numbers,
    is_fake,
    why_impossible,
    why_not_plain,
)
from sketch_plugins.optim.fused import CPU_MIN_SIZE, Backend, choose, describe, numbers, vector
from sketch_plugins.optim.fused import backend as fused_backend
from sketch_plugins.optim.introduction import introduce
from sketch_plugins.optim.options import NoEffect, Option, misspelt, unknown_option, validate
from sketch_plugins.optim.plan import Again, Counters, Plan, group_marks
from sketch_plugins.optim.self_check import confirm
from sketch_plugins.optim.written import MARK, modernize, renew, written_by, written_with
from sketch_plugins.sharding.blocks import At, Matrix, Rows, is_batch, matrix_shape, tiles
from sketch_plugins.sharding.names import NAMES, names_of
from sketch_plugins.sharding.parts import (
    PLACE,
    Part,
    Parts,
    Shaped,
    check_writable,
    has_address,
    is_dtensor,
    is_freed,
    is_ours,
    largest,
    leading,
    opened,
    trim,
    unwrap,
    whole_shape,
    wrap,
)
from sketch_plugins.sharding.pieces import is_key, is_lazy
from sketch_plugins.stores import CountMin, CountSketch, Cover, Dense, Ema, Gradient, Int8, RowCountMin, Store

# Adafactor's floor of the parameter's root mean square (arXiv 1804.04235): a bias that starts at 0 still moves.
SCALE_FLOOR = 1e-3
# Elements of a tile: large enough to hide the calls, small enough for a CPU's cache (measured, docs/architecture.md).
CPU_CHUNK, COMPILED_CHUNK, ACCELERATOR_CHUNK = 1 << 20, 1 << 22, 1 << 24
# Elements of a parameter whose eager step is undone by an error: what is copied for that has to be next to nothing.
UNDO = 1 << 14
# "auto" takes the row-sparse path in steps where at most this fraction of the rows has a gradient.
AUTO_DENSITY = 0.5


# In the place of an option that a group does not have.
NO_OPTION = object()

# Options that torch's optimizers have, too: nobody means something else by them.
COMMON_NAMES = frozenset({
    "lr", "betas", "eps", "weight_decay", "maximize", "momentum", "nesterov", "fused", "capturable", "lr_decay",
    "initial_accumulator_value",
})  # fmt: skip
_OWN_KEY = "A key of your own in a parameter group needs another name"
_CONVERT = (
    "State of torch.optim's AdamW, Adam, SGD or Adagrad is converted by sketch_plugins.convert_state(state_dict, "
    "optimizer), whose result can be loaded"
)

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
# (group, number in the group) of parameters with a gradient.
Members = Sequence[tuple[dict[str, Any], int]]


class Further(Protocol):
    """State of a parameter beside its moments."""

    def layout(self, dtype: torch.dtype) -> Layout:
        """Name -> (shape, dtype) of every tensor; ``dtype`` is the arithmetic dtype."""

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of all of them."""

    def allocate(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a parameter's first step."""


class LastRms:
    """``lagged_rms``: RMS of the last step's update before it was clipped, and of the parameter before it moved."""

    def layout(self, dtype: torch.dtype) -> Layout:
        """Two numbers."""
        return {"last": ((2,), dtype)}

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of both."""
        return 2 * dtype.itemsize

    def allocate(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Zeros: the first step measures before anybody reads them."""
        return {"last": torch.zeros(2, dtype=dtype, device=device)}


class Denominator(NamedTuple):
    """``max(root / divisor + shift, floor)`` of the root of a second moment: bias correction and epsilon."""

    divisor: float | Tensor
    shift: float | Tensor

    def floor(self, dtype: torch.dtype) -> float:
        """The least denominator: 1e-30 in float32, 0 (none) where epsilon is larger.

        A gradient of 0 over a second moment of 0 is no step, whatever epsilon is. Without an epsilon, or with a tiny
        one, the quotient of the learning rate and the denominator would be infinite, and 0 times that NaN. The root of
        a second moment that is not 0 is 3e-23 or more.
        """
        least = 1e8 * torch.finfo(dtype).tiny
        return least if isinstance(self.shift, Tensor) or self.shift < least else 0.0

    def of(self, root: Tensor) -> Tensor:
        """In place of the root."""
        if isinstance(self.divisor, Tensor) or self.divisor != 1.0:
            root.div_(self.divisor)
        if isinstance(self.shift, Tensor) or self.shift != 0:
            root.add_(self.shift)
        floor = self.floor(root.dtype)
        return root.clamp_(min=floor) if floor else root


@dataclass(frozen=True)
class Rule:
    """One parameter's update in one step: ``p <- (1 - decay) * p - step_size * correction * numerator / denominator``.

    Attributes:
        first: average of the first moment, None where there is none.
        second: average of the second moment, None where there is none.
        step_size: the learning rate; a float or a 0-d tensor.
        correction: bias correction of the numerator; part of the update that ``update_clip`` measures.
        decay: decoupled weight decay times the learning rate.
        denominator: from the root of the second moment's estimate; None where there is none.
        floor: added to that estimate under the root.
        precondition_first: the first moment averages ``g / denominator`` in place of g and is not divided any more:
            ``p <- (1 - decay) * p - step_size * numerator``. ``update_clip`` then measures ``g / denominator``, and
            scales it before it is averaged; ``correction`` has to be 1.
        lookahead: Nesterov's momentum: the numerator is then ``g + lookahead * m``; else m, or g where there is no m.
    """

    first: Ema | None
    second: Ema | None
    step_size: float | Tensor
    correction: float | Tensor
    decay: float | Tensor
    lookahead: float | None
    denominator: Denominator | None
    floor: float = 0.0
    precondition_first: bool = False


@dataclass(eq=False)
class Pending:
    """One part's step, resolved before anything changes.

    Attributes:
        p: the part.
        group: its options.
        grad: its gradient.
        state: its state, with the number of steps before this one.
        fresh: the state is made for this step, and no part of the optimizer's yet.
        named: the stores of its moments, by name.
        step: number of this step; with ``capturable`` it is on the device, and so is everything that depends on it.
        rule: the update; None with ``capturable``, and where no row has a gradient.
        backend: kernels that take the step; None: it is eager.
        work: the step as the kernels are given it.
        idle: nothing but the number of steps changes: the part has no elements, or no row of it has a gradient.
    """

    p: Part
    group: dict[str, Any]
    grad: Gradient
    state: dict[str, Any]
    fresh: bool
    named: dict[str, Store]
    step: Any = 0
    rule: Rule | None = None
    backend: Backend | None = None
    work: Work | None = None
    idle: bool = False

    @property
    def undone(self) -> list[Tensor]:
        """All that an eager step changes, to be put back after an error; nothing of more than a tile."""
        if self.p.numel() > min(UNDO, self.grad.chunk):
            return []
        changed = [self.p.data] if has_address(self.p.data) or is_fake(self.p.data) else []
        return changed + list(_tensors({name: value for name, value in self.state.items() if name != "step"}))

    @property
    def cleans(self) -> bool:
        """Whether the second moment is cleaned in this step (the paper's ``clean_every``)."""
        every = self.group.get("clean_every", 0)
        return bool(every) and "second_moment" in self.named and self.step % every == 0


class _Taking:
    """What takes part in a step, looked at before anything changes.

    Attributes:
        groups: (group, gradients of all its parameters, None where there is none) of those recalled as a whole.
        single: (group, index) of each other parameter.
        work: those of their parts that have to be described,
        again: and those that look as they did in the last step, by backend.
        kept: kernels know addresses only: gradients that were made for this step have to outlive it.
    """

    def __init__(self) -> None:
        self.groups: list[tuple[dict[str, Any], list[Any]]] = []
        self.single: list[tuple[dict[str, Any], int]] = []
        self.work: list[tuple[Part, dict[str, Any], Gradient]] = []
        self.again: dict[Backend, Again] = {}
        self.kept: list[Tensor | None] = []

    @property
    def members(self) -> Members:
        """(group, index) of each parameter."""
        whole = [(group, i) for group, grads in self.groups for i, grad in enumerate(grads) if grad is not None]
        return [*whole, *self.single]


class SketchOptimizer(torch.optim.Optimizer):
    """Base of the sketched optimizers; see `CSAdam` for the options.

    Subclasses set ``OPTIONS``, ``PRESETS`` (name -> option values; the first one holds every default) and implement
    ``_rule``. Group options are resolved when a group is added: its own keys, else its ``preset``'s, else the
    constructor's.
    """

    OPTIONS: ClassVar[dict[str, Option]] = {}
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    #: Arguments of torch's optimizers that are accepted where they change nothing; they are no options.
    NO_EFFECT: ClassVar[dict[str, NoEffect]] = {}
    #: A framework's settings for Adam (betas, epsilon) mean the same here, defaults included.
    ADAM_SETTINGS: ClassVar[bool] = True
    #: Keys of a parameter group that are no options of this optimizer, but have a value that is read here.
    FIXED: ClassVar[dict[str, Any]] = {}
    # Of the last step; copies and pickles go without.
    _plan: Plan | None = None
    _parts_of: Parts | None = None
    # Whether somebody answers for the numbers of fake tensors, as `sketch_plugins.plan` does for its own steps.
    _numbers_are_answered = False
    # An `InBackward`, where there is one; it stays with this object.
    _in_backward: Any = None
    # Whether the line of the first step has been logged; who logs it, where a framework does.
    _introduced = False
    _introduces_to: Any = None

    def __init__(self, params: Any, explicit: Mapping[str, Any], preset: str) -> None:
        """Validate and resolve the options; ``explicit`` values of None are left to the preset."""
        self._accept_without_effect(explicit)
        explicit = {name: value for name, value in explicit.items() if name not in self.NO_EFFECT}
        given = {name: value for name, value in explicit.items() if value is not None}
        defaults = {**self._preset(next(iter(self.PRESETS))), **self._preset(preset), **given}
        for name in explicit:
            if name not in defaults:  # None, and no preset knows better
                raise ValueError(f"{name}=None is not allowed: {name} must be {self.OPTIONS[name].describe()}")
        _one_of_width_and_compression(given)
        fixed = {**self.FIXED, "preset": preset}
        super().__init__(params, {**validate(self.OPTIONS, defaults, type(self).__name__), **fixed})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; any option may be given in it, and ``preset``. Unknown keys that are no slip of the pen stay.

        Raises:
            ValueError: an option's value is not allowed (also where the key was meant as one of the user's own), a key
                looks like a misspelt option, a parameter is complex.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, not {type(param_group).__name__}")
        self._accept_without_effect(param_group)
        own = {name: value for name, value in param_group.items() if name in self.OPTIONS}
        for name in param_group:
            meant = misspelt(name, {**self.OPTIONS, **self.NO_EFFECT, "preset": None, "params": None})  # type: ignore[dict-item]
            if meant is not None and name != "params":
                said = unknown_option(f"a parameter group of {type(self).__name__}", name, self.OPTIONS)
                raise ValueError(f"{said}. {_OWN_KEY}")
        _one_of_width_and_compression(own)
        if "preset" in param_group:
            own = {**self._group_preset(param_group["preset"]), **own}
        if "compression" in own:
            own.setdefault("width", 0)
        own = {name: self._group_value(name, value) for name, value in own.items()}
        param_group.update(own)
        with warnings.catch_warnings():
            # torch warns that this will be an error, and goes on.
            warnings.filterwarnings("error", message=".*duplicate parameters.*", category=UserWarning)
            try:
                super().add_param_group(param_group)
            except UserWarning as warning:
                raise ValueError(
                    f"a parameter group of {type(self).__name__} holds a parameter more than once; give each parameter "
                    "once (torch.optim warns here, and takes a step for each time)"
                ) from warning
        try:
            renew(type(self).__name__, self.OPTIONS, self.param_groups[-1])
            for index, p in enumerate(self.param_groups[-1]["params"]):
                _check_parameter(p, partial(self._label, self.param_groups[-1], index), type(self).__name__)
                if self.param_groups[-1]["compile"] and p.device.type == "cpu":
                    _check_compiler()
                self._check_kernels(p, self.param_groups[-1], partial(self._label, self.param_groups[-1], index))
        except Exception:
            self.param_groups.pop()
            raise
        self._parts.add(self.param_groups[-1], len(self.param_groups) - 1, self.batch_axes)
        if self._plan is not None:
            self._plan.large = None

    @outside_graphs
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. Every gradient is looked at before the first parameter changes: an error leaves all as it was.

        Args:
            closure: re-evaluates the model with gradients enabled and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: a gradient cannot be used (layout, or a dense gradient of a signed sketch); nothing has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            self._check_capture()
        plan = self._plan = self._plan or Plan()
        plan.large = None
        taking, recall, state = _Taking(), plan.recall, self.state
        asks = type(self)._may_step is not SketchOptimizer._may_step
        with neutral(), self._parts.looking():
            for place, group in enumerate(self.param_groups):
                self._check_options(plan.options, place, group)
                options = plan.marks(self.OPTIONS, group)
                given = group["params"]
                grads = [owner.grad for owner in given]
                present = [grad for grad in grads if grad is not None]
                if len(present) < len(given):
                    given = [owner for owner, grad in zip(given, grads, strict=True) if grad is not None]
                if given and plan.recall_group(taking.again, given, present, group, options, state):
                    taking.groups.append((group, grads))
                    continue
                recalled = 0
                for index, (owner, grad) in enumerate(zip(group["params"], grads, strict=True)):
                    if grad is None:
                        continue
                    if recall(taking.again, id(owner), owner, owner, grad, group, options, state.get(owner)):
                        taking.single.append((group, index))
                        recalled += 1
                    elif owner.numel() > 0:
                        self._look_at(taking, group, index, owner, options)
                if given and recalled == len(given):
                    plan.learn_group(given, group, state)
            with scratch.scratch():
                try:
                    if not asks or self._may_step(taking.members, self.param_groups):
                        self._update(taking.work, taking.again)
                finally:
                    self._complete()
        plan.trim()
        if not self._introduced:
            self._introduced = introduce(self)
        return loss

    @outside_graphs
    @torch.no_grad()
    def step_parameter(self, number: int, index: int) -> None:
        """The step of one parameter, whose gradient is complete: of its group's number and its own in the group.

        The same bits as in `step`, at a cost that does not grow with the number of parameters. `step` has to follow
        when all have taken theirs, as `sketch_plugins.InBackward` sees to: it takes the steps of those that still have
        a gradient, and does what waits for all of them (Sketchy's decompositions, equal shapes in one batch). The
        gradient is left to the caller, who has to free it, or `step` would use it again.

        Raises:
            ValueError: as `step`, of this parameter: it has not changed then.
        """
        group = self.param_groups[number]
        owner = group["params"][index]
        why = self._why_not_alone(group)
        if why is not None:
            raise ValueError(f"{self._label(group, index)} cannot take its step before the others': {why}")
        if owner.grad is None or owner.numel() == 0:
            return
        plan = self._plan = self._plan or Plan()
        self._check_options(plan.options, number, group)
        taking = _Taking()
        with neutral(), self._parts.looking():
            self._look_at(taking, group, index, owner, plan.marks(self.OPTIONS, group))
            with scratch.scratch():
                if self._may_step(taking.members, [{**group, "params": [owner]}]):
                    self._update(taking.work, taking.again, id(owner))

    def _look_at(
        self, taking: _Taking, group: dict[str, Any], index: int, owner: Tensor, options: tuple[Any, ...] | None
    ) -> None:
        """Add a parameter that has a gradient to a step."""
        assert self._plan is not None
        taking.single.append((group, index))
        for p in self._parts.of(index, owner):
            grad = p.grad
            taking.kept.append(grad)
            if not self._plan.recall(taking.again, p.identity, p.data, owner, grad, group, options, self._state_of(p)):
                taking.work.append((p, group, self._gradient(p, grad, group)))

    def held(self) -> Iterator[tuple[int, dict[str, Any], Part, dict[str, Any] | None]]:
        """``(group's number, group, part, state)`` of everything that takes a step of its own on this rank.

        A parameter is one part, and so is the local shard of a DTensor; a flat partition (DeepSpeed's ZeRO) has a few
        for each of its parameters. State is None before the first step.
        """
        seen = set()
        for number, group in enumerate(self.param_groups):
            for index, owner in enumerate(group["params"]):
                seen.add(id(owner))
                if is_lazy(owner):
                    raise ValueError(
                        f"{self._label(group, index)} has no shape yet, as its lazy module has seen no input: run a "
                        "batch first"
                    )
                for part in self._parts.of(index, owner):
                    yield number, group, part, self._state_of(part)
        # ZeRO-3 leaves groups empty between steps, and puts one flat partition after the other in for a step.
        for owner in [p for p in self.state if isinstance(p, Tensor) and id(p) not in seen]:
            for part in self._parts.of(0, owner):
                if part.piece is not None and part.key is not None:
                    number = min(self._parts.group_of(part.piece), len(self.param_groups) - 1)
                    yield number, self.param_groups[number], part, self._state_of(part)

    def planned_state(self, p: Shaped, group: Mapping[str, Any]) -> dict[str, tuple[Store | Further, int]]:
        """Name -> (store, bytes) of the state of a parameter (or part), whether or not it exists yet."""
        first, second = self._stores(p, group)
        shape, dtype = self._matrix_shape(p, group), _arithmetic(p)
        named = {"first_moment": first, "second_moment": second}
        return {
            **{name: (store, store.nbytes(shape, dtype)) for name, store in named.items() if store is not None},
            **{name: (part, part.nbytes(dtype)) for name, part in self._beside(p, group).items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned. State keeps its own dtypes, whatever the parameter's.

        (torch casts every state tensor to the parameter's dtype: tables, codes and scales would not survive bf16.)

        Raises:
            ValueError: the state was written with other options (compression, depth, seed, ...; both values are
                named), by another kind of optimizer, or for other shapes. Nothing has been changed then.
        """
        made: dict[Any, Any] = {}

        def look(_: Any, incoming: dict[str, Any]) -> dict[str, Any]:
            for key in ("state", "param_groups"):
                if key not in incoming:
                    found = ", ".join(map(str, incoming)) or "nothing"
                    raise ValueError(f"the state dict has no {key!r}; it has {found}")
            # The caller's groups stay as they are; the copies get the values of options younger than they.
            groups = [dict(group) for group in incoming["param_groups"]]
            incoming = {**incoming, "param_groups": groups, "state": self._local_state(incoming["state"], groups)}
            self._check_incoming(incoming)
            # Copies are made before anything changes: a tensor that cannot be copied, or that no memory is left for,
            # leaves the optimizer as it was.
            made.update(self._copies(incoming))
            return {**incoming, "state": {}}  # torch would copy and cast what is restored below

        def restore(_: Any) -> None:
            self.state.update(made)

        # The last to look before, the first to act after: hooks of others see the whole state on both sides.
        before = self.register_load_state_dict_pre_hook(look)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            # Tensors made in inference mode could not be changed by a step outside of it.
            with torch.inference_mode(False), torch.no_grad():
                super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _copies(self, incoming: Mapping[str, Any]) -> dict[Any, Any]:
        """The state of a state dict that was found good, as this optimizer keeps it."""
        out, known = {}, set()
        for group, saved in zip(self.param_groups, incoming["param_groups"], strict=True):
            for p, key in zip(group["params"], saved["params"], strict=True):
                known.add(key)
                if key in incoming["state"]:
                    device = p.to_local().device if is_dtensor(p) else p.device
                    out[p] = _restored(incoming["state"][key], device, saved["capturable"])
        # What belongs to no parameter is another's.
        return {**out, **{key: value for key, value in incoming["state"].items() if key not in known}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Whatever is remembered of the last step was about other groups."""
        super().__setstate__(state)
        self.__dict__.pop("_plan", None)
        for group in self.param_groups:
            if MARK not in group:  # a pickle that is older than the mark
                modernize(group)
                renew(type(self).__name__, self.OPTIONS, group)
        if self._parts_of is None:  # a copy: its parameters are those that it was given
            for number, group in enumerate(self.param_groups):
                self._parts.add(group, number, self.batch_axes)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`; what belongs to the shard of a DTensor is a DTensor, too.

        A state tensor of size s is saved as one of size (W, *s) over the W shards: `sharding.parts.wrap`.
        """

        def finish(_: Any, out: dict[str, Any]) -> None:
            for group, saved in zip(self.param_groups, out["param_groups"], strict=True):
                for index, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
                    if is_dtensor(p) and leading(p):
                        own, others = self._split(out["state"].get(key, {}), group, index, p)
                        if own:
                            (part,) = self._parts.of(index, p)
                            layout = self._layout(largest(p), group, part)
                            out["state"][key] = {"step": own["step"], **wrap(p, own, layout), **others}

        # The first to act after: hooks of others may return what they like, and see what is saved.
        after = self.register_state_dict_post_hook(finish, prepend=True)
        try:
            return super().state_dict()
        finally:
            after.remove()

    def _packed_groups(self) -> list[dict[str, Any]]:
        """The groups as in a state dict, whatever the hooks of others make of that."""
        out, first = [], 0
        for group in self.param_groups:
            last = first + len(group["params"])
            out.append({**{k: v for k, v in group.items() if k != "params"}, "params": list(range(first, last))})
            first = last
        return out

    def _split(
        self, state: Mapping[str, Any], group: Mapping[str, Any], index: int, p: Tensor
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is ours in the state of a parameter, and what is another's."""
        names = {name for part in self._parts.of(index, p) for name in self._expected(part, group)}
        own = {name: value for name, value in state.items() if is_ours(name) or name in names}
        return own, {name: value for name, value in state.items() if name not in own}

    def _expected(self, part: Part, group: Mapping[str, Any]) -> set[str]:
        """Names in the state of a part."""
        names = zip(("first_moment", "second_moment"), self._stores(part, group), strict=True)
        out = {"step", *(name for name, store in names if store is not None), *self._beside(part, group)}
        return out if part.piece is None else out | {PLACE}

    def _layout(self, p: Shaped, group: Mapping[str, Any], part: Part) -> dict[str, Any]:
        """Name -> layout of the state of a tensor of this shape, as a shard of the part's parameter."""
        if not isinstance(p, Part):
            p = Part(p, p, part.index, part.whole, part.piece)
        dtype = _arithmetic(p)
        stores = dict(zip(("first_moment", "second_moment"), self._stores(p, group), strict=True))
        layout: dict[str, Any] = {
            name: store.layout(self._matrix_shape(p, group), dtype)
            for name, store in stores.items()
            if store is not None
        }
        layout |= {name: further.layout(dtype) for name, further in self._beside(p, group).items()}
        if part.piece is not None:
            layout[PLACE] = ((2 + len(part.whole),), torch.int64)
        return layout

    def _local_state(self, saved: Mapping[Any, Any], groups: Sequence[Mapping[str, Any]]) -> dict[Any, Any]:
        """The state of a state dict as this rank keeps it: of DTensors the local part, cut to the shard's size."""
        state = dict(saved)
        for group, saved_group in zip(self.param_groups, groups, strict=False):
            for index, (p, key) in enumerate(zip(group["params"], saved_group.get("params", ()), strict=False)):
                if is_dtensor(p) and leading(p) and isinstance(state.get(key), Mapping) and state[key]:
                    own, others = self._split(state[key], group, index, p)
                    (part,) = self._parts.of(index, p)
                    local = unwrap(own, leading(p))
                    step = {"step": local["step"]} if "step" in local else {}
                    state[key] = {**step, **trim(local, self._layout(part, group, part)), **others}
        return state

    # -- for subclasses ------------------------------------------------------------------------------------------

    def _rule(self, group: Mapping[str, Any], step: float | Tensor, sparse: bool) -> Rule:
        """The update in this step: a number, or with ``capturable`` a tensor with the steps of several parameters."""
        raise NotImplementedError

    def _new_state(self, group: Mapping[str, Any], stores: Mapping[str, Store], state: dict[str, Any]) -> None:
        """Called once for freshly allocated state."""

    def _further(self, p: Shaped, group: Mapping[str, Any]) -> Mapping[str, Further]:
        """State beside the two moments. A parameter that has any takes its step in `_eager`, not in a fused kernel."""
        return {}

    def _beside(self, p: Shaped, group: Mapping[str, Any]) -> Mapping[str, Further]:
        """All state beside the two moments: the further one, and what kernels keep, too."""
        return {**self._further(p, group), **({"rms": LastRms()} if group.get("lagged_rms") else {})}

    def _row_sparse(self, p: Shaped, group: Mapping[str, Any]) -> Any:
        """The option ``row_sparse``, as far as it goes for this parameter: False, True or ``"auto"``."""
        return group["row_sparse"]

    def _may_step(self, members: Members, among: Sequence[Mapping[str, Any]]) -> bool:
        """Asked before anything changes: whether a step is taken at all.

        Args:
            members: who would take it.
            among: all groups; in `step_parameter` one group, with that parameter alone.
        """
        return True

    def _complete(self) -> None:
        """What a step does last, when all parameters have taken theirs: those of `step_parameter`, too."""

    def _why_not_alone(self, group: Mapping[str, Any]) -> str | None:
        """Why `step_parameter` is not possible with the options of a group; None: it is."""
        return None

    # -- the step ------------------------------------------------------------------------------------------------

    @outside_graphs
    def _update(
        self, work: list[tuple[Part, dict[str, Any], Gradient]], again: dict[Backend, Again], only: int | None = None
    ) -> None:
        """Change state and parameters; ``only``: id of the one parameter that all of it belongs to.

        Whatever can fail comes first: until `_commit` nothing has changed.
        """
        large = self._has_large() if work else False
        rules: dict[tuple[int, int, bool], Rule] = {}
        pending = [self._resolve(p, group, grad, rules, large) for p, group, grad in work]
        if pending:
            confirm(self, pending)
        fused: dict[Backend, list[Pending]] = {backend: [] for backend in again}
        eager: list[Pending] = []
        for one in pending:
            if one.backend is not None:
                fused.setdefault(one.backend, []).append(one)
            elif not one.idle:
                eager.append(one)
        takes: list[tuple[list[Pending], list[Tensor], Callable[[], None]]] = []
        for backend, members in fused.items():
            self._fill_numbers(members)
            takes += self._prepare(backend, members, again.get(backend), only)
        slots = self._reserve(eager)
        changed = [tensor for one in pending for tensor in (one.p.owner, one.p.data)]
        for those in again.values():
            changed += those.changed
        # Kernels write to addresses, and shards are written in place of their parameter: autograd has to be told, or a
        # backward through a graph that needs the old weights would be silently wrong.
        torch.autograd.graph.increment_version(changed)
        with uninterrupted():
            self._commit([one for one in pending if one.idle], eager, takes)
        if slots is not None:
            slots.update(scratch.used())

    def _resolve(
        self,
        p: Part,
        group: dict[str, Any],
        grad: Gradient,
        rules: dict[tuple[int, int, bool], Rule],
        large: bool,
    ) -> Pending:
        """Everything that a part's step needs; nothing has changed afterwards, not even the optimizer's state."""
        first, second = self._stores(p, group)
        named = {n: s for n, s in (("first_moment", first), ("second_moment", second)) if s is not None}
        state = self._state_of(p)
        fresh = not state or "step" not in state
        if fresh:
            state = self._allocate(p, group, grad, named)
        assert state is not None
        if not all(map(is_ours, state)):  # what others keep beside it takes no part in a step
            own = self._expected(p, group)
            state = {name: value for name, value in state.items() if name in own}
        one = Pending(p, group, grad, state, fresh, named)
        if p.numel() == 0:  # the shard of another rank is not: all have the same state
            one.idle = True
            return one
        sparse = grad.rows is not None
        if group["capturable"]:
            # The graph's replays take the number of the step from the device; nothing here may look at it.
            one.step = state["step"]
            one.backend, one.work = choose(
                p.data, group, grad, self._rule(group, 1, sparse), (first, second), state, large, fresh
            )
            assert one.backend is not None and one.work is not None
            return one
        one.step = step = int(state["step"].item()) + 1  # a CPU tensor: no synchronisation
        if grad.rows is not None and len(grad.rows) == 0:
            one.idle = True
            return one
        key = (id(group), step, sparse)
        if key not in rules:
            rules[key] = self._rule(group, step, sparse)
        one.rule = rules[key]
        if not self._further(p, group):
            one.backend, one.work = choose(p.data, group, grad, one.rule, (first, second), state, large, step == 1)
        return one

    def _allocate(
        self, p: Part, group: Mapping[str, Any], grad: Gradient, named: Mapping[str, Store]
    ) -> dict[str, Any]:
        # Inference tensors could not be changed by a step outside of torch.inference_mode.
        with torch.inference_mode(False):
            place = p.device if group["capturable"] else torch.device("cpu")
            state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device=place)}
            for name, store in named.items():
                state[name] = store.allocate(grad.shape, p.device, grad.dtype)
            for name, part in self._beside(p, group).items():
                state[name] = part.allocate(p.device, grad.dtype)
            if p.piece is not None:
                state[PLACE] = p.piece.place
            self._new_state(group, named, state)
        return state

    def _commit(
        self,
        idle: Sequence[Pending],
        eager: Sequence[Pending],
        takes: Sequence[tuple[list[Pending], list[Tensor], Callable[[], None]]],
    ) -> None:
        """Take the steps. A part's number of steps changes with its state: after an error, each has stepped or not."""
        for one in idle:
            one.state["step"] += 1
            if one.p.numel():
                self._clean(one)
            if one.group.get("lagged_rms") and one.step == 1:  # no row to measure, and the next step is not the first
                one.state["rms"]["last"][1] = _rms(one.grad.like(one.p.data), one.grad)
            self._keep(one)
        for one in eager:
            with self._undone_by_an_error(one):
                assert one.rule is not None
                one.state["step"] += 1
                self._clean(one)
                with opened(one.p) as p:
                    grad = one.grad if p is one.p else one.grad.of(one.grad.like(p.data))
                    self._eager(p, grad, one.rule, one.state, one.named, one.group)
            self._keep(one)
        for members, counters, take in takes:
            for one in members:
                self._clean(one)
            take()
            if counters:
                torch._foreach_add_(counters, 1.0)
            for one in members:
                self._keep(one)

    @contextmanager
    def _undone_by_an_error(self, one: Pending) -> Iterator[None]:
        """An error in the block leaves the part as it was before, as far as `Pending.undone` goes."""
        copies = [(tensor, scratch.cast(f"undo {i}", tensor, tensor.dtype)) for i, tensor in enumerate(one.undone)]
        step = one.state["step"].clone()
        try:
            yield
        except BaseException:
            one.state["step"].copy_(step)
            for tensor, copy in copies:
                tensor.copy_(copy)
            raise

    def _clean(self, one: Pending) -> None:
        if not one.group["capturable"] and one.cleans:
            one.named["second_moment"].clean(one.state["second_moment"], one.group["clean_factor"], one.step)

    def _keep(self, one: Pending) -> None:
        """State that was made for this step becomes the optimizer's."""
        if one.fresh:
            state = self.state[one.p.owner]
            (state if one.p.key is None else state.setdefault(one.p.key, {})).update(one.state)

    def _reserve(self, eager: Sequence[Pending]) -> dict[scratch.Slot, int] | None:
        """Allocate the temporaries of the eager steps; returns where to note what they have really used."""
        if not eager:
            return None
        assert self._plan is not None
        key = tuple([one.p.identity for one in eager])
        slots = self._plan.temporaries.get(key)
        if slots is None:
            slots = {}
            for one in eager:
                copies = {(f"undo {i}", t.dtype, t.device): t.numel() for i, t in enumerate(one.undone)}
                for slot, n in (*self._rehearse(one).items(), *copies.items()):
                    slots[slot] = max(n, slots.get(slot, 0))
            if len(self._plan.temporaries) > 1000:  # parameters that are replaced all the time leave entries
                self._plan.temporaries.clear()
            self._plan.temporaries[key] = slots
        scratch.reserve(slots)
        return slots

    def _rehearse(self, one: Pending) -> dict[scratch.Slot, int]:
        """The temporaries of an eager step, found by taking it with tensors that have no memory.

        With ``compile=True`` it is taken with copies instead: that compiles it. Touched rows are looked at by the host,
        which such tensors have nothing to show to: their temporaries are allocated in the step itself.
        """
        if one.grad.rows is not None or one.rule is None:
            return {}
        device = one.p.device if one.grad.compile else torch.device("meta")
        fake = is_fake(one.p.data)
        with _disable_current_modes() if fake else contextlib.nullcontext():
            return self._take_without_memory(one, device, fake)

    def _take_without_memory(self, one: Pending, device: torch.device, fake: bool) -> dict[scratch.Slot, int]:
        assert one.rule is not None
        p = dataclasses.replace(one.p, data=_twin(one.p.data, device))
        p.owner = p.data
        gradient, state = one.grad.like(_twin(one.grad.matrix.tensor, device)), _twins(one.state, device)
        grad = one.grad.of(one.grad.like(p.data), gradient)
        # Nobody can ask a fake tensor for its number; `sketch_plugins.plan` answers for it that this is no first step.
        state["step"] = torch.full((), 2.0) if fake else one.state["step"] + 1
        with scratch.scratch():
            try:
                self._eager(p, grad, one.rule, state, one.named, one.group)
            except NotImplementedError:  # an operation that has no form without memory
                return {}
            return {(name, dtype, one.p.device): n for (name, dtype, _), n in scratch.used().items()}

    def _check_options(
        self, seen: dict[int, tuple[Any, dict[str, Any]]], number: int, group: Mapping[str, Any]
    ) -> None:
        """Whoever changes a group between steps is told at once; only what is new is looked at."""
        # Not by number: DeepSpeed takes the steps of its groups one by one, each as the optimizer's only group.
        known, last = seen.get(id(group), (None, {}))
        last = last if known is group else {}
        if last and self._only_the_rate_changed(group, last):
            self._accept_without_effect(group)
            return
        now = {}
        changed, missing = not last, None
        for name, option in self.OPTIONS.items():
            if name not in group:
                # Groups of old pickles lack what is younger than they, and so do their defaults.
                missing = name if missing is None and name in self.defaults else missing
                continue
            value = now[name] = group[name]
            if name in last:
                before = last[name]
                if isinstance(value, Tensor):
                    # It may have been changed in place; reading it where it is on a device would wait for that.
                    if value is before and value.device.type != "cpu":
                        continue
                elif value is before or (type(value) is type(before) and value == before):
                    continue
            self._group_value(name, value)
            changed = changed or option.structural
        self._accept_without_effect(group)
        if changed or now.keys() != last.keys():
            self._check_structure(number, group)
        if missing is not None:
            raise ValueError(
                f"{missing} of group {number} is missing: somebody has taken the key out of the group, and no step can "
                f"be taken without it. Put it back: param_groups[{number}][{missing!r}] = "
                f"{self.defaults[missing]!r} is what the optimizer was built with"
            )
        if last and any(last.get(name) is not now.get(name) for name in ("fused", "compile", "capturable")):
            for index, p in enumerate(group["params"]):
                self._check_kernels(p, group, partial(self._label, group, index))
        seen[id(group)] = group, now

    def _only_the_rate_changed(self, group: Mapping[str, Any], last: dict[str, Any]) -> bool:
        """Whether everything else is the same object as in the last step: so it is in nearly all of them."""
        new = [
            name for name in self.OPTIONS
            if (value := group.get(name, NO_OPTION)) is not last.get(name, NO_OPTION) or isinstance(value, Tensor)
        ]  # fmt: skip
        if not new:
            return True
        if new != ["lr"] or type(group["lr"]) is not float or "lr" not in last:
            return False
        self._group_value("lr", group["lr"])
        last["lr"] = group["lr"]
        return True

    def _check_structure(self, number: int, group: Mapping[str, Any]) -> None:
        """Refuse options that describe another state than the one that the group's parameters have."""
        assert isinstance(group, dict)
        if MARK not in group or not any(self._has_state(p) for p in group["params"]):
            renew(type(self).__name__, self.OPTIONS, group)
            return
        for name, before in written_with(group).items():
            if name not in self.OPTIONS:
                continue
            if name not in group:
                raise ValueError(
                    f"{name} of group {number} was {before!r} and is missing: its parameters have state, which cannot "
                    "be used without it"
                )
            if self.OPTIONS[name].validate(group[name]) != before:
                raise ValueError(
                    f"{name} of group {number} was {before!r} and is {group[name]!r}: its parameters have state, and "
                    f"the group's options describe another state. Set it back, or build a new optimizer. {_OWN_KEY}"
                )

    def _has_state(self, owner: Tensor) -> bool:
        """Whether a tensor in a parameter group has state of ours."""
        return any(map(is_ours, self.state.get(owner, ())))

    def _has_large(self) -> bool:
        """Small tensors follow the large ones into the kernels: compiling for their sake alone would not pay."""
        assert self._plan is not None
        if self._plan.large is None:
            self._plan.large = any(
                not is_lazy(p) and p.numel() >= CPU_MIN_SIZE for group in self.param_groups for p in group["params"]
            )
        return self._plan.large

    def _prepare(
        self, backend: Backend, pending: list[Pending], known: Again | None, only: int | None
    ) -> list[tuple[list[Pending], list[Tensor], Callable[[], None]]]:
        """(parts, the counters of their steps, what takes the steps) for each launch."""
        alone, described = [], []
        for new in pending:
            assert new.work is not None
            # Steps that will not come again like this are not described for the next ones.
            likely = backend.prepare is None or (new.rule is not None and group_marks(self.OPTIONS, new.group))
            task = backend.task(new.work) if likely else None
            if task is None:
                alone.append(new)
            else:
                described.append((new, task))
        takes = []
        if known or described:
            takes += self._prepare_tasks(backend, described, known or Again(), only)
        if alone:
            assert backend.prepare is not None
            for places, take in backend.prepare([one.work for one in alone if one.work is not None]):
                members = [alone[i] for i in places]
                takes.append((members, [one.state["step"] for one in members], take))
        return takes

    def _prepare_tasks(
        self, backend: Backend, described: list[tuple[Pending, Any]], known: Again, only: int | None
    ) -> list[tuple[list[Pending], list[Tensor], Callable[[], None]]]:
        assert self._plan is not None
        plan = self._plan
        rows: list[list[float]] = []
        for group, step in known.rules:
            l2 = group["weight_decay"] if self._couples(group) else None
            row, _ = vector(numbers(self._rule(group, step, False), group, step, l2), torch.device("cpu"))
            rows.append(row.tolist() if isinstance(row, Tensor) else row)
        tasks, which = list(known.tasks), list(known.which)
        gradients, counters = list(known.gradients), list(known.counters)
        before = len(tasks)
        given: dict[int, int] = {}  # parts of one group share their numbers
        for new, task in described:
            assert new.work is not None
            values = new.work.numbers
            if id(values) not in given:
                given[id(values)] = len(rows)
                rows.append(values.tolist() if isinstance(values, Tensor) else values)
            tasks.append(task)
            which.append(given[id(values)])
            gradients.append(new.work.g.data_ptr())
            counters.append(new.state["step"])
        program, takes = backend.prepare_tasks(tasks, rows, which, gradients, plan.programs.get((backend, only)))

        marks = {id(new.group): plan.marks(self.OPTIONS, new.group) for new, _ in described}

        def learning(take: Callable[[], None], members: list[tuple[Pending, Any]], count: int) -> None:
            take()
            plan.programs[backend, only] = program
            plan.used += count
            for new, task in members:
                assert new.work is not None
                if new.work.last is not None and not new.work.once:
                    continue  # a first step with lagged_rms is unlike those that follow
                options = marks[id(new.group)]
                # Not `new.p.grad`: it may take communication, for which the other ranks do not wait.
                # With what others keep beside it; state that was made for this step is not there yet.
                state = self._state_of(new.p) or new.state
                plan.learn(new.p.identity, new.p.data, new.grad.matrix.tensor, options, state, backend, task)

        out: list[tuple[list[Pending], list[Tensor], Callable[[], None]]] = []
        again = not described and program is plan.programs.get((backend, only))
        for number, (places, take) in enumerate(takes):
            members = [described[i - before] for i in places if i >= before] if described else []
            run = partial(learning, take, members, len(places))
            steps = [counters[i] for i in places]
            if again and len(steps) > 1:
                steps = self._counted_at_once((backend, only, number), steps)
            out.append(([new for new, _ in members], steps, run))
        return out

    def _counted_at_once(self, launch: Any, counters: list[Tensor]) -> list[Tensor]:
        """One tensor in place of the counters of a launch that comes again and again."""
        assert self._plan is not None
        known = self._plan.counters.get(launch)
        if known is None or not known.holds(counters):
            known = self._plan.counters[launch] = Counters(counters)
        return [known.all]

    def _fill_numbers(self, pending: list[Pending]) -> None:
        shared: dict[tuple[int, Any, bool, torch.device], tuple[list[float] | Tensor, int]] = {}
        on_device: dict[tuple[int, bool], list[Pending]] = {}
        for one in pending:
            assert one.work is not None
            sparse = one.grad.rows is not None
            if one.rule is None:
                on_device.setdefault((id(one.group), sparse), []).append(one)
                continue
            key = (id(one.group), one.step, sparse, one.work.p.device)
            if key not in shared:
                shared[key] = vector(numbers(one.rule, one.group, one.step, _l2(one.grad)), one.work.p.device)
            one.work.numbers, one.work.flags = shared[key]
        for (_, sparse), members in on_device.items():
            group, steps = members[0].group, torch.stack([one.step for one in members]) + 1
            rule = self._rule(group, steps.double(), sparse)
            rows, flags = vector(numbers(rule, group, steps, _l2(members[0].grad)), steps.device, len(members))
            for one, row in zip(members, rows, strict=True):
                assert one.work is not None
                one.work.numbers, one.work.flags = row, flags

    def _eager(
        self,
        p: Part,
        grad: Gradient,
        rule: Rule,
        state: Mapping[str, Any],
        named: Mapping[str, Store],
        group: Mapping[str, Any],
    ) -> None:
        first, second = named.get("first_moment"), named.get("second_moment")
        for name, store in named.items():
            ema = rule.first if name == "first_moment" else rule.second
            if store.write_first and ema is not None:
                store.write(state[name], grad, ema)
        self._apply(grad.like(p.data), grad, rule, state, first, second, group)

    def _apply(
        self,
        p: Matrix,
        grad: Gradient,
        rule: Rule,
        state: Mapping[str, Any],
        first: Store | None,
        second: Store | None,
        group: Mapping[str, Any],
    ) -> None:
        period = max((s.period(p.shape[0]) for s in (first, second) if s is not None), default=0)
        align = max((s.align for s in (first, second) if s is not None), default=1)
        step_size: float | Tensor = rule.step_size * rule.correction
        # What the tiles' factors hold: without a first moment the order of the two makes no difference.
        before = rule.precondition_first and first is not None
        inner_scale: float | Tensor = 1.0
        lagged = group.get("lagged_rms", False)
        # A first step has nothing to go by, and touched rows are others in every step.
        once = lagged and grad.rows is None and int(state["step"]) > 1
        looks = Factors(second, rule, state, period, peek=True, slot="peeked factor" if once else "factor")

        # Of touched rows only, where they are given.
        count = (grad.shape[0] if grad.rows is None else len(grad.rows)) * grad.shape[1]

        def size_of_update(at: At, g: Tensor) -> Tensor:
            m = None
            if first and rule.first and not before:
                m = first.peek(state["first_moment"], at, g, rule.first)
            numerator = numerator_of(g, m, rule.lookahead)
            return root_mean_square(numerator, looks.get(at, g) if rule.denominator else None, count, grad.run)

        updates: list[Tensor] = []
        sizes: list[Tensor] = []
        rms: Any
        size: Any
        rms, size = state["rms"]["last"].unbind() if once else (None, None)
        if not once and (lagged or group.get("scale_parameter")):
            sizes = [root_mean_square(p.get(at).to(grad.dtype), None, count) for at in grad.batches()]
            size = joined(sizes)
        if not once and (lagged or group.get("update_clip")):
            updates = [size_of_update(at, grad.get(at)) for at in grad.batches(period, align)]
            rms = joined(updates) * rule.correction
        if group.get("scale_parameter"):
            step_size = size.clamp(min=SCALE_FLOOR) * step_size
        if group.get("update_clip"):
            clip = (rms / group["update_clip"]).clamp_(min=1.0)
            if before:
                inner_scale = clip.reciprocal_()
            else:
                step_size = step_size / clip
        keep = None
        if isinstance(rule.decay, Tensor) or rule.decay != 0:
            keep = number(1.0 - rule.decay, grad)
        ema = rule.first and rule.first._replace(step=0)  # a step number would be compiled anew every step
        working = dict(state)
        if second and not second.write_first:
            working["second_moment"] = second.begin(state["second_moment"], grad)
        factors = Factors(second, rule, working, period, step_size=inner_scale if before else step_size)
        factor = number(step_size, grad)
        run = grad.run(update)
        for at in grad.batches(period, align):
            g = grad.get(at)
            slices = first.slices(state["first_moment"], at, rule.first.step) if first and rule.first else {}
            part, in_place = p.get(at), p.views(at) and p.dtype == grad.dtype
            if not in_place:
                part = scratch.cast("parameter", part, grad.dtype)
            if once:
                updates.append(size_of_update(at, g))
                sizes.append(root_mean_square(part, None, count))
            scaled = factors.get(at, g) if rule.denominator else factor
            if first:
                scaled = first.view(scaled) if scaled.ndim else scaled
                scaled, inner = (factor, scaled) if before else (scaled, None)
                run(first.view(part), first.view(g), slices, scaled, keep, first, ema, rule.lookahead, inner)
            else:
                run(part, g, slices, scaled, keep, None, None, None)
            if first and slices:
                first.keep(state["first_moment"], at, slices)
            if not in_place:
                write_tile(p, at, part, group, state)
        if second and not second.write_first:
            second.finish(state["second_moment"], working["second_moment"], grad)
        if lagged:
            torch.stack([joined(updates) * rule.correction, joined(sizes)], out=state["rms"]["last"])

    def _gradient(self, p: Part, g: Tensor | None, group: Mapping[str, Any]) -> Gradient:
        assert g is not None
        label = self._label(group, p)
        if is_freed(p.data) or is_freed(g):
            which = "the parameter" if is_freed(p.data) else "its gradient"
            raise ValueError(
                f"{label}: {which} has lost its memory (its storage has 0 bytes), as FSDP does between the uses of a "
                "parameter. Take the step when it is there again"
            )
        if not g.is_floating_point():
            kind = "complex" if g.is_complex() else "not of floating point numbers"
            raise ValueError(
                f"{label} has a gradient that is {kind} ({g.dtype}); allowed are gradients of a floating point dtype"
            )
        check_writable(p.data, label)
        _refuse_fsdp1(p.owner, lambda: label, type(self).__name__)  # a model may be wrapped after the optimizer is made
        if not self._numbers_are_answered:
            _refuse_fake(p.data, g, label)
        rows, packed, values, batch = None, False, g, self._batch(p, group)
        if g.layout == torch.sparse_coo:
            if g.sparse_dim() != 1 or p.ndim < 1:
                raise ValueError(
                    f"{label} has a sparse gradient with {g.sparse_dim()} sparse dimensions; only row-sparse "
                    "gradients (1 sparse dimension, as from nn.Embedding(sparse=True)) are supported"
                )
            g = g.coalesce()
            rows, packed, values = g.indices()[0], True, g.values()
            if batch:  # a touched matrix has touched rows
                height = math.prod(p.shape[1 : batch + 1])
                rows = (rows.unsqueeze(-1) * height + torch.arange(height, device=rows.device)).flatten()
        elif g.layout != torch.strided:
            raise ValueError(f"{label} has a gradient of layout {g.layout}; allowed are strided and sparse_coo")
        shape, dtype = matrix_shape(p.shape, batch), _arithmetic(p)
        state = self._state_of(p)
        if state:
            self._check_state(p, group, state, label, "present")
        chunk = group["chunk_size"] or (CPU_CHUNK if p.device.type == "cpu" else ACCELERATOR_CHUNK)
        l2 = (Matrix(p.data, batch), group["weight_decay"]) if self._couples(group) else None
        # Vectors and small tensors cost calls, not arithmetic: compiled, they would only cost more. Ragged blocks fuse
        # badly.
        ragged = shape[1] > group.get("block_size", 1) and shape[1] % group.get("block_size", 1) != 0
        compile = group["compile"] and g.layout == torch.strided and not _exact(p, group) and not ragged
        if compile and not group["chunk_size"]:
            chunk = COMPILED_CHUNK
        matrices = math.prod(p.shape[:batch])
        grad = Gradient(
            Matrix(values, batch), rows, dtype, chunk, shape, packed, group["maximize"], l2, compile, matrices
        )
        row_sparse = False if rows is not None or p.ndim < 2 else self._row_sparse(p, group)
        if row_sparse is not False:
            touched = _touched_rows(grad)
            if row_sparse is True or len(touched) <= AUTO_DENSITY * shape[0]:
                grad.rows, grad.compile = touched, False
        first = self._stores(p, group)[0]
        if group["fused"] and not group["compile"]:
            fused_backend(p.device, True)  # a loaded group, or a model that was moved: there may be no kernels here
        if group["capturable"]:
            self._check_capturable(p, group, grad, label)
        if isinstance(first, CountSketch) and grad.rows is None and not group["allow_dense_count_sketch"]:
            raise ValueError(
                f"{label} has a dense gradient, and first_moment='count_sketch' of a dense gradient does not train: "
                "the rows that share a bucket are as large as the row itself (measured: divergence at depth 1, far "
                "behind at depth 3). Use first_moment='int8', 'bf16', 'fp32' or 'none' for this parameter; or row-"
                "sparse gradients (nn.Embedding(sparse=True), row_sparse='auto'); or allow_dense_count_sketch=True "
                "to insist"
            )
        return grad

    def _check_kernels(self, p: Tensor, group: Mapping[str, Any], label: Callable[[], str]) -> None:
        """Raise ValueError where the options ask for kernels that are not there."""
        if group["fused"] and group["compile"]:
            raise ValueError("fused=True and compile=True are two ways to speed up a step: give one")
        backend = fused_backend(p.device, group["fused"])
        if group["capturable"]:
            if backend is None or backend.name != "triton":
                raise ValueError(
                    f"capturable=True needs the Triton kernels, which {label()} on {p.device} with "
                    f"fused={group['fused']!r} does not use: move it to a CUDA device before building the optimizer"
                )
            if group.get("clean_every"):
                raise ValueError(
                    f"capturable=True and clean_every={group['clean_every']}: a captured step is the same every time; "
                    "clean_every must be 0"
                )

    def _check_capture(self) -> None:
        """Raise ValueError within the capture of a graph, unless every group is made for that."""
        for number, group in enumerate(self.param_groups):
            if not group["capturable"]:
                raise ValueError(
                    f"step() of {type(self).__name__} is being captured in a CUDA graph, and group {number} has "
                    "capturable=False: replays would repeat the numbers of this step (its learning rate and bias "
                    "correction). Build the optimizer with capturable=True, or leave the step out of the capture"
                )

    def _check_capturable(self, p: Part, group: Mapping[str, Any], grad: Gradient, label: str) -> None:
        if grad.rows is not None:
            raise ValueError(f"{label} has a row-sparse gradient, whose rows a captured step cannot know")
        if group.get("lagged_rms") and not self._state_of(p) and _capturing(p.device):
            raise ValueError(
                f"{label} has no state yet, and its first step with lagged_rms=True is unlike those that a graph would "
                "replay: it measures before it steps. Take one step (or load a state) before the capture"
            )
        stores = self._stores(p, group)
        named: dict[str, Any] = {
            n: {} for n, s in zip(("first_moment", "second_moment"), stores, strict=True) if s is not None
        }
        task = describe(p.data, group, grad, self._rule(group, 1, False), stores, self._state_of(p) or named)
        backend = fused_backend(p.device, group["fused"])
        why = backend.unsupported(task) if backend and task else "a layout or a dtype that no kernel takes"
        if why is not None:
            raise ValueError(f"{label} cannot be captured: {why}")

    def _couples(self, group: Mapping[str, Any]) -> bool:
        return group.get("decoupled_weight_decay", True) is False and group["weight_decay"] != 0

    @property
    def _parts(self) -> Parts:
        if self._parts_of is None:
            self._parts_of = Parts()
        return self._parts_of

    def _state_of(self, part: Part) -> dict[str, Any] | None:
        """The state of a part, where it has one: keys of others alone are none."""
        state = self.state.get(part.owner)
        if part.key is not None and state is not None:
            state = state.get(part.key)
        return state if state and ("step" in state or any(map(is_ours, state))) else None

    def _stores(self, p: Shaped, group: Mapping[str, Any]) -> tuple[Store | None, Store | None]:
        """(first, second) moment stores of a parameter, or of a part of one."""
        exact, batch = _exact(p, group), self._batch(p, group)
        matrix = matrix_shape(p.shape, batch)
        # An optimizer that offers no sketch has no options for one.
        sketch = (
            group.get("compression", 1.0),
            group.get("width", 0),
            group.get("depth", 1),
            group.get("hash", "strided"),
            group["seed"],
            group.get("table_dtype", "fp32") == "bf16",
            max(1, math.prod(p.shape[:batch])),  # a shard may have none of the matrices
        )
        second_moment = group.get("second_moment", "none")
        # Only what a store depends on: other stores are the same object for every shape.
        dims = matrix if batch else tuple(p.shape)
        cover = (dims, group.get("variant", "II")) if second_moment == "cover" and not exact else ((), "II")
        return (
            _first_store(
                group.get("first_moment", "none"),
                exact,
                matrix[1],
                group.get("block_size", 128),
                group.get("first_moment_rounding", "nearest") == "stochastic",
                sketch,
            ),
            _second_store(second_moment, exact, group.get("bucket", "mean"), sketch, cover),
        )

    def batch_axes(self, whole: tuple[int, ...], group: Mapping[str, Any]) -> int:
        """How many of the first axes of a parameter of this shape are a batch of matrices: see ``batch_dims``.

        It is asked of the whole parameter: shards and pieces of it follow. Only sketches depend on it; without one a
        parameter has dimension 0 for rows.
        """
        option = group.get("batch_dims", 0)
        if option == 0 or len(whole) < 3 or math.prod(whole) < group["min_compress_size"] or not self._sketches(group):
            return 0
        return int(option == 1 or is_batch(whole))

    def _sketches(self, group: Mapping[str, Any]) -> bool:
        """Whether a moment of the group's parameters is kept in a sketch."""
        return (
            group.get("second_moment") in ("count_min", "row_count_min") or group.get("first_moment") == "count_sketch"
        )

    def _batch(self, p: Shaped, group: Mapping[str, Any]) -> int:
        """The same of a parameter, or of a part of one; a piece of one matrix of a batch is no batch."""
        whole = whole_shape(p)
        return self.batch_axes(whole, group) if len(p.shape) == len(whole) else 0

    def _matrix_shape(self, p: Shaped, group: Mapping[str, Any]) -> tuple[int, int]:
        return matrix_shape(p.shape, self._batch(p, group))

    # -- options and state dicts ---------------------------------------------------------------------------------

    @classmethod
    def _preset(cls, name: str) -> dict[str, Any]:
        if name not in cls.PRESETS:
            raise ValueError(f"preset={name!r} is not one of {', '.join(map(repr, cls.PRESETS))} ({cls.__name__})")
        return cls.PRESETS[name]

    @classmethod
    def _arguments(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Of the local variables of a constructor those that are options, or are accepted without effect."""
        return {name: value for name, value in given.items() if name in cls.OPTIONS or name in cls.NO_EFFECT}

    @classmethod
    def _accept_without_effect(cls, given: Mapping[str, Any]) -> None:
        for name, argument in cls.NO_EFFECT.items():
            if name in given:
                argument.accept(given[name], cls.__name__)

    @classmethod
    def _group_value(cls, name: str, value: Any) -> Any:
        """The value of an option in a parameter group, where users have keys of their own, too."""
        try:
            return cls.OPTIONS[name].validate(value)
        except ValueError as error:
            if name in COMMON_NAMES:
                raise
            raise ValueError(f"{error}. {name!r} is an option of {cls.__name__}. {_OWN_KEY}") from None

    @classmethod
    def _group_preset(cls, name: str) -> dict[str, Any]:
        """What a preset means in a group: every option that any preset sets; the others stay the constructor's."""
        base, *others = (cls._preset(n) for n in cls.PRESETS)
        return {key: base[key] for preset in others for key in preset if key in base} | {
            key: value for key, value in cls._preset(name).items() if name != next(iter(cls.PRESETS))
        }

    def _label(self, group: Mapping[str, Any], p: int | Part) -> str:
        """How messages name a parameter, by its number in the group, or a part of one."""
        names = names_of(group)
        part, index = (p, p.index) if isinstance(p, Part) else (None, p)
        if part is not None and part.key is not None:
            return f"parameter {part.name!r} of shape {part.whole} (its part {tuple(part.shape)} on this rank)"
        if part is None:
            owner = group["params"][index]
            said = "not known yet" if is_lazy(owner) else str(tuple(owner.shape))
        else:
            said = str(part.whole)
        at = next((i for i, other in enumerate(self.param_groups) if other is group), len(self.param_groups))
        name = names[index] if index < len(names) else None
        label = f"parameter {index} of group {at}," if name is None else f"parameter {name!r}"
        label += f" of shape {said}"
        if part is not None and part.piece is not None and not part.piece.complete:
            label += f" (its part {tuple(part.shape)} on this rank)"
        return label if name is not None else label + ","

    def _check_incoming(self, incoming: Mapping[str, Any]) -> None:
        kind = type(self).__name__
        saved_groups = incoming["param_groups"]
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(
                f"the state dict has {len(saved_groups)} parameter groups, this {kind} {len(self.param_groups)}"
            )
        for number, (group, saved) in enumerate(zip(self.param_groups, saved_groups, strict=True)):
            if len(saved.get("params", ())) != len(group["params"]):
                raise ValueError(
                    f"group {number} of the state dict has {len(saved.get('params', ()))} parameters, this {kind}'s "
                    f"{len(group['params'])}"
                )
            writer = written_by(saved)
            if writer != kind:
                raise ValueError(
                    f"the state dict was not written by {kind}, but by {writer or 'another optimizer'} (group {number})"
                    + (f". Build {writer}, or load the weights alone" if writer else f". {_CONVERT}")
                )
            for name, value in self.FIXED.items():
                saved.setdefault(name, value)
            if NAMES in group:  # the present model's, and a checkpoint may have none
                saved[NAMES] = group[NAMES]
            with_state = any(
                isinstance(state := incoming["state"].get(key), Mapping) and any(map(is_ours, state))
                for key in saved["params"]
            )
            written = written_with(saved) if with_state else {}
            for name, option in self.OPTIONS.items():
                if name not in group:
                    continue
                if name not in saved:  # an option that is younger than the checkpoint
                    if name == "batch_dims":
                        self._check_batches(group, saved, incoming["state"])
                    saved[name] = group[name]
                saved[name] = self._group_value(name, saved[name])
                if option.structural and saved[name] != group[name]:
                    raise ValueError(
                        f"the state dict was written with {name}={saved[name]!r} and group {number} of this {kind} has "
                        f"{name}={group[name]!r}: the state cannot be used. Build the optimizer with the saved value"
                    )
                if option.structural and written.get(name, saved[name]) != saved[name]:
                    raise ValueError(
                        f"group {number} of the state dict has {name}={saved[name]!r}, but its state was written with "
                        f"{name}={written[name]!r}: the option was changed before it was saved, and the state cannot "
                        "be used with it. Build the optimizer with the value that the state was written with, and "
                        "write that into the group of the state dict"
                    )
            modernize(saved)
            renew(kind, self.OPTIONS, saved)
            for index, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
                if saved["capturable"] and not group["capturable"]:  # a checkpoint from a machine with kernels
                    self._check_kernels(p, saved, partial(self._label, group, index))
                state = incoming["state"].get(key)
                if key not in incoming["state"] or (isinstance(state, Mapping) and not state):
                    continue
                if is_lazy(p):
                    raise ValueError(
                        f"{self._label(group, index)} has no shape yet, as its lazy module has seen no input, and the "
                        "state dict has state for it: run a batch before it is loaded"
                    )
                parts = self._parts.of(index, p)
                if parts and parts[0].key is None:
                    self._check_state(parts[0], group, state, self._label(group, parts[0]))
                    continue
                ours = set(filter(is_ours, state)) if isinstance(state, Mapping) else {"no mapping"}
                if ours and ours != {part.key for part in parts}:
                    raise ValueError(
                        f"the saved state of group {number} does not hold what its flat partition on this rank holds "
                        f"({len(parts)} pieces of parameters): it was written with another number of processes, "
                        "another ZeRO stage or other settings of it. Load it as it was saved, or convert the "
                        "checkpoint: sketch-plugins reshard CHECKPOINT --world-size N"
                    )
                for part in parts if ours else ():
                    self._check_state(part, group, state[part.key], self._label(group, part))

    def _check_batches(self, group: Mapping[str, Any], saved: Mapping[str, Any], state: Mapping[Any, Any]) -> None:
        """Raise ValueError where state is from the time when all the matrices of a batch shared their buckets."""
        for index, (p, key) in enumerate(zip(group["params"], saved["params"], strict=True)):
            for part in self._parts.of(index, p) if state.get(key) else ():
                if self.batch_axes(part.whole, group):
                    raise ValueError(
                        "the state dict was written before the option batch_dims existed: in its state of "
                        f"{self._label(group, part)} the {part.whole[0]} matrices share their buckets. With "
                        f"batch_dims={group['batch_dims']!r} each matrix has buckets of its own. Build the optimizer "
                        "with batch_dims=0 (in this group at least) to continue with the old layout, or start with "
                        "new state"
                    )

    def _check_state(self, p: Part, group: Mapping[str, Any], saved: Any, label: str, which: str = "saved") -> None:
        """Raise ValueError unless ``saved`` is the state that the group's options describe; others may have keys in it.

        Args:
            p: whose state it is.
            group: its group.
            saved: the state.
            label: what to call the part.
            which: "saved", of a state dict, every number of which is looked at; or "present".
        """
        stores = dict(zip(("first_moment", "second_moment"), self._stores(p, group), strict=True))
        further = self._beside(p, group)
        expected = self._expected(p, group)
        if isinstance(saved, Mapping):
            ours = {name for name in saved if is_ours(name) or name in expected}
            if not ours:
                return
        if not isinstance(saved, Mapping) or ours != expected:
            found = ", ".join(map(str, ours)) if isinstance(saved, Mapping) else repr(saved)
            raise ValueError(f"the {which} state of {label} holds {found}; expected {', '.join(sorted(expected))}")
        step = saved["step"]
        if which == "saved":
            if exact_step(step) is None:
                raise ValueError(
                    f"the saved step of {label} is {described(step)}; expected a tensor of one whole number >= 0 "
                    "that float32 holds exactly"
                )
        elif not (
            isinstance(step, Tensor)
            and step.numel() == 1
            and step.dtype == torch.float32
            and step.device.type != "meta"
            # What lives on a device (capturable) is looked at when it is loaded, not in every step.
            and (step.device.type != "cpu" or is_fake(step) or 0 <= float(step) < 1e18)
        ):
            raise ValueError(
                f"the {which} step of {label} is {described(step)}; expected a float32 tensor of one number >= 0"
            )
        if p.piece is not None and (
            not isinstance(saved[PLACE], Tensor)
            or why_not_plain(saved[PLACE]) is not None
            or saved[PLACE].tolist() != p.piece.place.tolist()
        ):
            raise ValueError(
                f"the {which} state of {label} belongs to another part of it (row, column and the whole shape are "
                f"{_listed(saved[PLACE])}; expected {p.piece.place.tolist()}): it was written with another number of "
                "processes or another layout. Convert a sharded checkpoint: sketch-plugins reshard CHECKPOINT "
                "--world-size N"
            )
        dtype = _arithmetic(p)
        for name, store in stores.items():
            if store is not None:
                layout = store.layout(self._matrix_shape(p, group), dtype)
                _check_tensors(saved.get(name), layout, f"the {which} {name}", label)
                if which == "saved":
                    _check_numbers(p, saved[name], name, label)
        for name, part in further.items():
            _check_tensors(saved.get(name), part.layout(dtype), f"the {which} {name}", label)
            if which == "saved":
                _check_numbers(p, saved[name], name, label)


def number(value: float | Tensor, grad: Gradient) -> Tensor:
    """0-d, in the arithmetic dtype and on the device of a gradient.

    A Python number is filled in, not copied: a device would have to be waited for.
    """
    if isinstance(value, Tensor):
        return value.to(device=grad.device, dtype=grad.dtype)
    return torch.full((), float(value), dtype=grad.dtype, device=grad.device)


def write_tile(p: Matrix, at: At, part: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a tile of the new parameter, ``part`` in the arithmetic dtype, rounded as the group asks for."""
    if group["stochastic_rounding"] and p.dtype == torch.bfloat16:
        part = round_to_bf16(part, at, p.shape[1], group["seed"], int(state["step"]))
    p.put(at, part)


def _check_tensors(have: Any, layout: Layout, what: str, label: str) -> None:
    if not isinstance(have, Mapping) or set(have) != set(layout):
        found = ", ".join(map(str, have)) if isinstance(have, Mapping) else "none"
        raise ValueError(f"{what} of {label} holds {found}; expected {', '.join(layout)}")
    for key, (size, kind) in layout.items():
        tensor = have[key]
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{what} of {label} has {key!r} = {tensor!r}; expected a tensor")
        if tuple(tensor.shape) != tuple(size) or tensor.dtype != kind:
            raise ValueError(
                f"{what} of {label} has {key!r} of shape {tuple(tensor.shape)}, {tensor.dtype}; "
                f"expected {tuple(size)}, {kind}: its group's options describe another state, or its shape or dtype "
                "has changed since"
            )


def _check_numbers(p: Part, have: Mapping[str, Tensor], name: str, label: str) -> None:
    """Raise ValueError where a saved tensor cannot be copied, or holds numbers that no step leaves behind."""
    for key, tensor in have.items():
        why = why_not_plain(tensor)
        if why is not None:
            # Parameters without numbers have state without numbers.
            if (tensor.device.type == "meta" and p.device.type == "meta") or (is_fake(tensor) and is_fake(p.data)):
                continue
            raise ValueError(
                f"the saved {name} of {label} has {key!r} {why}; expected a plain tensor: strided, and with its numbers"
            )
        if not tensor.is_floating_point() or not has_numbers(tensor):
            continue
        squares = name in ("second_moment", "rms")
        # Squares of large gradients overflow, and such a run goes on. What they are multiplied by may not be infinite:
        # infinity times 0 is NaN.
        least, infinite = (0.0 if squares or key == "scales" else None), squares and key != "row"
        wrong = why_impossible(tensor, least, infinite)
        if wrong is not None:
            allowed = "finite numbers" if not infinite else "numbers"
            raise ValueError(
                f"the saved {name} of {label} has {key!r} with numbers that are not allowed: {wrong}; allowed are "
                f"{allowed}"
                f"{'' if least is None else ' >= 0'}. A checkpoint of a run that had diverged is not loaded: take an "
                "earlier one"
            )


class Factors:
    """``step_size / denominator`` of each tile; consecutive tiles over the same buckets share one."""

    def __init__(
        self,
        second: Store | None,
        rule: Rule,
        state: Mapping[str, Any],
        period: int,
        step_size: float | Tensor = 1.0,
        peek: bool = False,
        slot: str = "factor",
    ) -> None:
        self.second, self.rule, self.state, self.period, self.slot = second, rule, state, period, slot
        self.step_size, self.peek = step_size, peek
        self._factor: Tensor | None = None
        self._place: tuple[int, int, int] | None = None

    def get(self, at: At, g: Tensor) -> Tensor:
        """For one tile; the second moment is read, and written where its store has cells of its own."""
        assert self.second is not None and self.rule.second is not None and self.rule.denominator is not None
        place = None
        if self.second.by_bucket and self.period and not isinstance(at, Rows):
            place = (self.second.bucket_of(at), at.rows, at.lo)
        if self._factor is None or place is None or place != self._place:
            look = self.second.peek if self.peek else self.second.advance
            v = look(self.state["second_moment"], at, g, self.rule.second)
            if self.rule.floor:
                root = torch.add(v, self.rule.floor, **scratch.out(self.slot, v)).sqrt_()
            else:
                root = torch.sqrt(v, **scratch.out(self.slot, v))
            self._factor, self._place = self.rule.denominator.of(root).reciprocal_(), place
            if isinstance(self.step_size, Tensor) or self.step_size != 1.0:
                self._factor.mul_(self.step_size)
        return self._factor


# compression, width, depth, hash, seed, whether tables are bfloat16, and how many matrices have buckets of their own
_SketchOptions = tuple[float, int, int, str, int, bool, int]


@lru_cache(maxsize=1024)
def _first_store(
    kind: str, exact: bool, columns: int, block_size: int, stochastic: bool, sketch: _SketchOptions
) -> Store | None:
    compression, width, depth, hash, seed, bf16, matrices = sketch
    if kind == "none":
        return None
    # One column: code and scale of a block of one element would take more than the number itself.
    if exact or kind == "fp32" or (kind == "int8" and columns == 1):
        return Dense(order=1)
    if kind == "int8":
        return Int8(block_size=block_size, stochastic=stochastic, seed=seed)
    if kind == "bf16":
        return Dense(order=1, bf16=True)
    return CountSketch(
        compression=compression, width=width, depth=depth, hash=hash, seed=seed, bf16=bf16, matrices=matrices
    )


@lru_cache(maxsize=1024)
def _second_store(
    kind: str,
    exact: bool,
    bucket: str,
    sketch: _SketchOptions,
    cover: tuple[tuple[int, ...], str],
) -> Store | None:
    if kind == "none":
        return None
    if exact or kind == "dense":
        return Dense(order=2)
    if kind == "cover":
        return Cover(dims=cover[0], variant=cover[1])
    store = RowCountMin if kind == "row_count_min" else CountMin
    compression, width, depth, hash, seed, bf16, matrices = sketch
    return store(
        compression=compression, width=width, depth=depth, hash=hash, bucket=bucket, seed=seed, bf16=bf16,
        matrices=matrices,
    )  # fmt: skip


def _one_of_width_and_compression(given: Mapping[str, Any]) -> None:
    if given.get("width") and given.get("compression") is not None:
        raise ValueError(
            f"width={given['width']!r} and compression={given['compression']!r} both set the buckets: give one"
        )


def _check_parameter(p: Any, label: Callable[[], str], kind: str) -> None:
    if is_dtensor(p):
        odd = [str(one) for one in p.placements if one.is_partial()]
        if odd:
            raise ValueError(
                f"{label()} is a DTensor placed {', '.join(odd)}; {kind} takes Shard and Replicate: redistribute it"
            )
    _refuse_fsdp1(p, label, kind)
    if p.is_complex():
        raise ValueError(
            f"{label()} is complex ({p.dtype}); {kind} takes real parameters: pass torch.view_as_real of it"
        )
    if not p.is_floating_point():
        raise ValueError(f"{label()} has dtype {p.dtype}; {kind} takes floating point parameters")
    if p.layout != torch.strided:
        raise ValueError(f"{label()} has layout {p.layout}; {kind} takes strided parameters")


def _refuse_fsdp1(p: Tensor, label: Callable[[], str], kind: str) -> None:
    # Also with use_orig_params=True: the tensors are then the model's own, with a piece of one dimension in each.
    if getattr(p, "_fsdp_flattened", False):
        raise ValueError(
            f"{label()} is a piece of a flat parameter of FSDP1 (FullyShardedDataParallel): {kind} would not know the "
            "shapes in it. Use FSDP2, torch.distributed.fsdp.fully_shard"
        )


def _refuse_fake(p: Tensor, g: Tensor, label: str) -> None:
    if is_fake(p) or is_fake(g):
        raise ValueError(
            f"{label} or its gradient is a fake tensor (FakeTensorMode), which has no numbers, and a step reads some. "
            "What a step takes in memory is found out without numbers by sketch_plugins.plan (sketch-plugins plan)"
        )


def _check_compiler() -> None:
    # Before the first step, which would otherwise fail half-way with a page of torch's internals.
    wanted = os.environ.get("CXX", "g++")
    if not any(shutil.which(name) for name in (wanted, "clang++", "cl")):
        raise ValueError(
            f"compile=True needs a C++ compiler on a CPU, and {wanted} is not to be found: install one, set CXX, "
            "or use compile=False"
        )


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) and why_not_plain(value) is None else described(value)


def _arithmetic(p: Shaped) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _exact(p: Shaped, group: Mapping[str, Any]) -> bool:
    whole = whole_shape(p)  # or all but a few ranks' parts would be small
    return len(whole) < 2 or math.prod(whole) < group["min_compress_size"]


def _l2(grad: Gradient) -> float | None:
    return None if grad.l2 is None else grad.l2[1]


def _touched_rows(grad: Gradient) -> Tensor:
    """Rows with an element that is not zero (NaN is not), ascending."""
    touched = torch.zeros(grad.shape[0], 1, dtype=torch.bool, device=grad.device)
    l2, grad.l2 = grad.l2, None
    for at in grad.batches():
        assert not isinstance(at, Rows)
        at.get(touched, 0, 1).logical_or_((grad.get(at) != 0).any(-1, keepdim=True))
    grad.l2 = l2
    return touched.squeeze(-1).nonzero().squeeze(-1)


def _rms(p: Matrix, grad: Gradient) -> Tensor:
    """Of a whole parameter, whichever rows have a gradient."""
    count = grad.shape[0] * grad.shape[1]
    return joined([root_mean_square(p.get(at).to(grad.dtype), None, count) for at in tiles(*grad.shape, grad.chunk)])


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _twin(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the same layout: without memory on the meta device, with the same numbers elsewhere."""
    if device.type != "meta":
        return tensor.detach().clone()
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _tensors(state: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in state.values():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value


def _twins(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: _twins(value, device) if isinstance(value, Mapping) else value if name == "step" else _twin(value, device)
        for name, value in state.items()
    }


def _restored(saved: Mapping[str, Any], device: torch.device, capturable: bool) -> dict[str, Any]:
    """A copy of a state that was found good: or one state dict would tie two optimizers together."""
    out: dict[str, Any] = {}
    # The step counter lives on the CPU, or reading it would wait for a device; with capturable nobody reads it.
    cpu = torch.device("cpu")
    for key, value in saved.items():
        if is_key(key):
            out[key] = _restored(value, device, capturable)
        elif key == "step":
            out[key] = exact_step(value)
            assert out[key] is not None
            out[key] = out[key].to(device if capturable else cpu)
        else:
            out[key] = copied(value, cpu if key == PLACE else device)
    return out

"""A part's step, resolved before anything changes: its stores, its state, its rule, and the kernels that take it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.optim import eager
from sketch_plugins.optim.checks import steps_taken
from sketch_plugins.optim.fused import CPU_MIN_SIZE, choose
from sketch_plugins.optim.gate import Gate
from sketch_plugins.optim.gradients import Gradients
from sketch_plugins.optim.layout import arithmetic
from sketch_plugins.optim.pending import Batch, Pending, undo_slots
from sketch_plugins.optim.rehearsal import rehearse
from sketch_plugins.optim.rule import Rule
from sketch_plugins.optim.step_cache import StepCache
from sketch_plugins.sharding.parts import Part
from sketch_plugins.sharding.pieces import is_lazy
from sketch_plugins.sharding.state_names import PLACE, flattened, is_ours
from sketch_plugins.stores import Gradient, Store

#: The rules of a step, by group, number of the step, whether it is row-sparse, and factor of the learning rate.
Rules = dict[tuple[int, int, bool, float], Rule]


class Resolution(Gradients):
    """Finds everything that a step needs, and raises its errors. Nothing has changed afterwards."""

    # What is remembered of the last step. It is neither copied nor pickled.
    _step_cache: StepCache | None = None
    # Decides on the device whether the weights move in the last step that was taken; None: they do.
    _gate: Gate | None = None

    def _new_state(self, group: Mapping[str, Any], stores: Mapping[str, Store], state: dict[str, Any]) -> None:
        """Called once for freshly allocated state."""

    def _eager(self, one: Pending) -> None:
        """Take the step of one part without kernels."""
        eager.take(one)

    def _together(self, eager: Sequence[Pending]) -> list[Batch]:
        """The batches of eager steps that are taken together."""
        return [Batch(self._eager, [one]) for one in eager]

    def _resolve(
        self,
        p: Part,
        group: dict[str, Any],
        grad: Gradient,
        rules: Rules,
        large: bool,
    ) -> Pending:
        """Everything that a part's step needs. Nothing has changed afterwards, not even the optimizer's state."""
        first, second = self._stores(p, group)
        named = {n: s for n, s in (("first_moment", first), ("second_moment", second)) if s is not None}
        state = self._state_of(p)
        fresh = not state or "step" not in state
        if fresh:
            state = self._allocate(p, group, grad.shape, grad.dtype, named)
        assert state is not None
        if not all(map(is_ours, state)):  # entries of other code take no part in a step
            own = self._expected(p, group)
            state = {name: value for name, value in state.items() if name in own}
        sparse = grad.rows is not None
        factor = 1.0 if sparse else self._rate_factor(p, group)
        one = Pending(p, group, grad, state, fresh, named, factor=factor)
        if p.numel() == 0:  # the shards of other ranks are not empty, and all ranks have the same state
            one.idle = True
            return one
        if group["capturable"]:
            # The replays of a graph take the step number from the device, so nothing here may read it.
            one.step = state["step"]
            one.backend, one.work = choose(
                p.data, group, grad, self._rule(group, 1, sparse), (first, second), state, large,
                fresh or p.identity in self._unmeasured,
            )  # fmt: skip
            assert one.backend is not None and one.work is not None
            return one
        one.step = step = int(steps_taken(state["step"])) + 1
        if grad.rows is not None and len(grad.rows) == 0:
            one.idle = True
            return one
        one.rule = self._rule_of(one, sparse, rules)
        if not self._further(p, group):
            one.backend, one.work = choose(p.data, group, grad, one.rule, (first, second), state, large, step == 1)
            one.refused = one.backend is None and bool(group["fused"])
        return one

    def _repeat(self, one: Pending, rules: Rules) -> Pending:
        """Set the number and the rule of a step that is like the last one."""
        one.step, one.repeated = int(steps_taken(one.state["step"])) + 1, True
        one.factor = self._rate_factor(one.p, one.group)
        one.rule = self._rule_of(one, False, rules)
        return one

    def _rule_of(self, one: Pending, sparse: bool, rules: Rules) -> Rule:
        key = (id(one.group), one.step, sparse, one.factor)
        if key not in rules:
            rule = self._rule(one.group, one.step, sparse).times(one.factor)
            rules[key] = rule if self._gate is None else replace(rule, gate=self._gate)
        return rules[key]

    @property
    def _moves(self) -> Callable[[torch.device], Tensor] | None:
        """The gate as kernels get it."""
        return None if self._gate is None else self._gate.moves

    def _start(self, p: Part, group: Mapping[str, Any]) -> None:
        """Make state for a part that has taken no step, so that it can be written. Existing state stays."""
        if self._state_of(p):
            return
        first, second = self._stores(p, group)
        named = {n: s for n, s in (("first_moment", first), ("second_moment", second)) if s is not None}
        state = self._allocate(p, group, self._matrix_shape(p, group), arithmetic(p), named)
        self.state[p.owner].update(flattened(state, p.key))
        self._find_unmeasured()

    def _allocate(
        self, p: Part, group: Mapping[str, Any], shape: tuple[int, int], dtype: torch.dtype, named: Mapping[str, Store]
    ) -> dict[str, Any]:
        # A step outside of torch.inference_mode could not change inference tensors.
        with torch.inference_mode(False):
            place = p.device if group["capturable"] else torch.device("cpu")
            state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32, device=place)}
            for name, store in named.items():
                state[name] = store.allocate(shape, p.device, dtype)
            for name, part in self._beside(p, group).items():
                state[name] = part.allocate(p.device, dtype)
            if p.piece is not None:
                state[PLACE] = p.piece.place
            self._new_state(group, named, state)
        return state

    def _has_large(self) -> bool:
        """Whether a tensor is large enough to compile kernels for. Small tensors then use the same kernels."""
        assert self._step_cache is not None
        if self._step_cache.large is None:
            self._step_cache.large = any(
                not is_lazy(p) and p.numel() >= CPU_MIN_SIZE for group in self.param_groups for p in group["params"]
            )
        return self._step_cache.large

    def _reserve(self, batches: Sequence[Batch]) -> dict[scratch.Slot, int] | None:
        """Allocate the temporaries of the eager steps; return the dictionary that records what they really used."""
        if not batches:
            return None
        assert self._step_cache is not None
        # With lagged_rms the first step has other temporaries than later ones.
        eager = [one for batch in batches for one in batch.members]
        key = (
            tuple([(one.p.identity, one.step == 1 and one.group.get("lagged_rms", False)) for one in eager]),
            tuple([(len(batch.members), batch.way) for batch in batches]),
        )
        slots = self._step_cache.temporaries.get(key)
        if slots is None:
            slots = {}
            for batch in batches:
                needed = [*rehearse(batch, type(self)).items()]
                for slot, n in (*needed, *undo_slots(batch.members).items()):
                    slots[slot] = max(n, slots.get(slot, 0))
            if len(self._step_cache.temporaries) > 1000:  # parameters that are replaced all the time add entries
                self._step_cache.temporaries.clear()
            self._step_cache.temporaries[key] = slots
        scratch.reserve(slots)
        return slots

"""The steps of all parameters of a group, remembered together and compared in columns: one list for each fact.

There are three kinds of groups, in which different tensors are compared: the parameters themselves, DTensors (their
local shards), and flat partitions of ZeRO, which hold many parts in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain, count
from operator import itemgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from sketch_plugins.optim.alike import Alike
from sketch_plugins.optim.remembered import ADDRESS, Again, Counters, Factors, Remembered
from sketch_plugins.sharding.dtensors import gradients_of_shards, local_shards
from sketch_plugins.sharding.parts import Part

_ITEM, _VALUES = Tensor.item, dict.values
# How often `Alike` is made anew. Gradients that differ only in what `Alike` compares would make it in each step.
COMPARED = 4
# Up to so many step counters that lie in no known allocation are read one by one.
FEW = 8


class RememberedGroup:
    """The steps of all parameters of a group that have a gradient, after each of their parts was recalled by itself.

    It compares what `Remembered.holds` compares, but in columns: one list for each fact, and one comparison of lists.
    """

    def __init__(self, owners: Sequence[Tensor], parts: Sequence[Part], found: list[Remembered], state: Any) -> None:
        """Remember the parts of some parameters.

        Args:
            owners: the parameters.
            parts: the parts of these parameters, in the same order.
            found: the remembered step of each part that has elements.
            state: the optimizer's state, by parameter.
        """
        # Ranks that hold nothing of a small parameter still count its steps.
        everything, parts = parts, [part for part in parts if part.numel()]
        self.options, self.backend = found[0].options, found[0].backend
        self.tasks, self.aligned = [one.task for one in found], not all(one.task.fits(1) for one in found)
        self.owners, factors = list(map(id, owners)), [one.factor for one in found]
        self.factors = None
        if any(factor != 1.0 for factor in factors):
            distinct = list(dict.fromkeys(factors))
            self.factors = Factors(factors, distinct, _picking(list(map(distinct.index, factors))))
        # For each part, the number of its parameter, and the names of its tensors in that parameter's state.
        numbers = {id(owner): i for i, owner in enumerate(owners)}
        self.where = [numbers[id(part.owner)] for part in parts]
        self.empty = [numbers[id(part.owner)] for part in everything if part.numel() == 0]
        self.names = [(i, name) for i, one in zip(self.where, found, strict=True) for name, _, _ in one.tensors]
        self.steps = [(i, one.step) for i, one in zip(self.where, found, strict=True)]
        states = [state[owner] for owner in owners]
        # The place of each tensor when all states are traversed, and the place of each parameter's state.
        places = {place: at for at, place in enumerate((i, name) for i, one in enumerate(states) for name in one)}
        self._entries = len(places) if all(type(one) is dict for one in states) else -1
        self._moments = _picking([places[place] for place in self.names])
        self._counters = _picking([places[place] for place in self.steps])
        self._keys, self._states = list(map(id, state)), None
        if 2 * len(owners) >= len(state):  # with many groups each of them would have to traverse all states
            order = {key: at for at, key in enumerate(self._keys)}
            self._states = _picking([order[key] for key in self.owners])
        tensors, counters = self._tensors(states)
        self.tensors, self.addresses = list(map(id, [*tensors, *counters])), list(map(ADDRESS, tensors))
        self.counted: list[int] = []
        self.order: list[int] = []
        self.pieces: list[Counters] = []
        self.alone: list[int] = []
        # The identity of a tensor that is gone means nothing, because another tensor may have it now.
        self.gone: list[Any] = []
        self.times = 0  # how often the group was recalled
        self.alive = [ref(tensor, self.gone.append) for tensor in [*tensors, *counters]]
        self._alike: Alike | None = None
        self._compared = 0  # how often `Alike` was made
        self._look(owners, parts, found)

    def _look(self, owners: Sequence[Tensor], parts: Sequence[Part], found: list[Remembered]) -> None:
        """Note how the parts look."""
        tensors = [part.data for part in parts]
        self.places, self.parts, self.types = list(map(ADDRESS, tensors)), _facts(tensors), list(map(type, tensors))
        self.gradients = [
            (shape, one.gradient, cpu, True, False) for (shape, _, cpu, _), one in zip(self.parts, found, strict=True)
        ]

    def _gradients(self, given: Sequence[Tensor], grads: list[Any]) -> tuple[list[int], Sequence[Tensor]] | None:
        """The addresses of all parts' gradients, and the tensors that a step writes; None if something has changed."""
        return self._same(given, grads)

    def _same(self, parts: Sequence[Tensor], grads: list[Any]) -> tuple[list[int], Sequence[Tensor]] | None:
        try:
            if self._alike is None or not self._alike.holds([*parts, *grads]):
                if set(map(type, grads)) != {Tensor} or list(map(type, parts)) != self.types:
                    return None
                facts = [(g.shape, g.dtype, g.is_cpu, g.is_contiguous(), g.is_neg()) for g in grads]
                if facts != self.gradients or _facts(parts) != self.parts:
                    return None
                if self._compared < COMPARED:
                    self._alike = Alike([*parts, *grads])  # these are as they should be, and so is anything like them
                    self._compared += 1
            if list(map(ADDRESS, parts)) != self.places:
                return None
            return list(map(ADDRESS, grads)), parts
        except RuntimeError:  # sparse tensors lack some of these facts
            return None

    def recall(
        self,
        again: Again,
        given: Sequence[Tensor],
        grads: list[Any],
        group: dict[str, Any],
        options: Any,
        state: Any,
        pieces: Sequence[Counters],
    ) -> bool:
        """Add the steps of the group to those that are taken again, if everything looks as it did.

        Args:
            again: the steps that are taken again.
            given: the parameters that have a gradient.
            grads: their gradients.
            group: the group.
            options: what `StepCache.marks` returns for it.
            state: the optimizer's state, by parameter.
            pieces: allocations that counters may lie in.
        """
        if options is not self.options or self.gone or list(map(id, given)) != self.owners:
            return False
        found = self._gradients(given, grads)
        if found is None:
            return False
        places, changed = found
        if 0 in places or (self.aligned and any([place & 15 for place in places])):
            return False
        try:
            if self._states is not None and list(map(id, state)) == self._keys:
                states = self._states(list(state.values()))
            else:  # this takes longer, because each key's hash is computed in Python
                states = list(map(state.__getitem__, given))
            tensors, counters = self._tensors(states)
            idle = [states[i]["step"] for i in self.empty]
            if not all(is_counter(one, group) for one in idle) or list(map(id, [*tensors, *counters])) != self.tensors:
                return False
        except (KeyError, TypeError, AttributeError):  # the state has another layout now
            return False
        if list(map(ADDRESS, tensors)) != self.addresses:
            return False
        steps = None  # with capturable they are on a device, where reading waits, and this is no first step
        if not group["capturable"]:
            steps = self._steps(counters, pieces)
            if min(steps) < 1 or max(steps) >= 1e18:
                return False
        again.extend(self.tasks, places, counters, steps, group, changed, [*grads, *tensors], self.factors)
        again.idle += idle
        self.times += 1
        return True

    def _steps(self, counters: Sequence[Tensor], pieces: Sequence[Counters]) -> list[float]:
        """The numbers of steps. Counters in a known allocation are read together."""
        places = list(map(ADDRESS, counters))
        if places != self.counted:
            at = {place: (piece, i) for piece in pieces for i, place in enumerate(piece.addresses)}
            found = [at.get(place) for place in places]
            # The counters of a launch with one part are in no allocation.
            alone = [i for i, one in enumerate(found) if one is None]
            if len(alone) > FEW:
                return list(map(_ITEM, counters))
            used = [piece for piece in pieces if any(one is not None and one[0] is piece for one in found)]
            starts = dict(zip(map(id, used), accumulate([0, *(len(piece.addresses) for piece in used)]), strict=False))
            size = sum(len(piece.addresses) for piece in used)
            behind = count(size)
            self.counted, self.pieces, self.alone = places, used, alone
            self.order = [next(behind) if one is None else starts[id(one[0])] + one[1] for one in found]
            # An allocation may hold the counters of other groups, too.
            if self.order == list(range(size + len(alone))):
                self.order = []  # they already lie in this order
        steps = [step for piece in self.pieces for step in piece.all.tolist()]
        steps += [counters[i].item() for i in self.alone]
        return [steps[i] for i in self.order] if self.order else steps

    def _tensors(self, states: Sequence[dict[str, Any]]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """The tensors of the moments, and the step counters."""
        found = list(chain.from_iterable(map(_VALUES, states)))
        if len(found) == self._entries:
            return self._moments(found), self._counters(found)
        # Other code keeps entries of its own in these states.
        return [states[i][name] for i, name in self.names], [states[i][name] for i, name in self.steps]


class RememberedShards(RememberedGroup):
    """DTensors, whose local shards take the steps. The layout says where a shard lies, so layouts are compared, too.

    A gradient may be another DTensor in each step. It must have the placements of its parameter, because otherwise
    ranks would have to communicate first.
    """

    def _look(self, owners: Sequence[Tensor], parts: Sequence[Part], found: list[Remembered]) -> None:
        super()._look(owners, parts, found)
        self.layouts, self.owner_types = local_shards(owners)[1], list(map(type, owners))

    def _gradients(self, given: Sequence[Tensor], grads: list[Any]) -> tuple[list[int], Sequence[Tensor]] | None:
        if list(map(type, given)) != self.owner_types:
            return None
        shards, layouts = local_shards(given)
        if list(map(id, layouts)) != list(map(id, self.layouts)):  # the layouts are kept alive, so ids are unique
            return None
        local = gradients_of_shards(grads, layouts)
        if local is None:
            return None
        if self.empty:
            if any(shards[i].numel() for i in self.empty):
                return None
            shards, local = [shards[i] for i in self.where], [local[i] for i in self.where]
        same = self._same(shards, local)
        return None if same is None else (same[0], [*shards, *given])


class RememberedPieces(RememberedGroup):
    """Flat partitions: each is one tensor, in which the parts, and the parts of its gradient, have fixed offsets."""

    def _look(self, owners: Sequence[Tensor], parts: Sequence[Part], found: list[Remembered]) -> None:
        self.parts, self.places, self.types = _facts(owners), list(map(ADDRESS, owners)), list(map(type, owners))
        dtypes = {i: one.gradient for i, one in zip(self.where, found, strict=True)}
        self.gradients = [(shape, dtypes[i], cpu, True, False) for i, (shape, _, cpu, _) in enumerate(self.parts)]
        self.offsets = [
            part.piece.offset * one.gradient.itemsize for part, one in zip(parts, found, strict=True) if part.piece
        ]

    def _gradients(self, given: Sequence[Tensor], grads: list[Any]) -> tuple[list[int], Sequence[Tensor]] | None:
        same = self._same(given, grads)
        if same is None:
            return None
        starts = same[0]
        if 0 in starts:
            return None
        return [starts[i] + offset for i, offset in zip(self.where, self.offsets, strict=True)], given


def remember(
    owners: Sequence[Tensor], parts: Sequence[Part], found: list[Remembered], state: Any
) -> RememberedGroup | None:
    """What remembers the steps of these parts together; None if they are of more than one kind."""
    if {id(part.owner) for part in parts} != set(map(id, owners)):  # one of the owners has no parts
        return None
    if any(one.backend is not found[0].backend or one.options is not found[0].options for one in found):
        return None
    if len({counter.device for one in found if (counter := one.counter()) is not None}) != 1:  # `Again.extend`
        return None
    if all(part.data is part.owner and part.numel() for part in parts):
        return RememberedGroup(owners, parts, found, state)
    if all(part.key is not None and part.piece is not None for part in parts):
        # All pieces of a partition have gradients of one dtype.
        return RememberedPieces(owners, parts, found, state)
    if all(part.key is None and part.data is not part.owner for part in parts) and len(parts) == len(owners):
        return RememberedShards(owners, parts, found, state)
    return None


def _picking(places: list[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """A function that picks the entries at these places from a list, without a Python loop for two or more."""
    if len(places) < 2:
        return lambda entries: [entries[place] for place in places]
    return itemgetter(*places)


def is_counter(tensor: Any, group: dict[str, Any]) -> bool:
    """Whether this is a step counter as a step of the group would make it."""
    if type(tensor) is not Tensor or tensor.dtype is not torch.float32 or tensor.numel() != 1:
        return False
    return bool(tensor.is_cpu or group["capturable"])


def _facts(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(t.shape, t.dtype, t.is_cpu, t.is_contiguous()) for t in tensors]

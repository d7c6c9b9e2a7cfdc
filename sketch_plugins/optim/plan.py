"""What an optimizer remembers of its last step, so that the next one need not describe each parameter again.

Describing one takes some 70 microseconds of Python or more, and in a training loop nothing changes from step to step
but the gradient's address. Nothing is trusted: whatever a description was made of is looked at in each step (addresses,
shapes, dtypes, layouts, options, the tensors of the state), and what differs is described anew. No tensor is kept
alive, and none of this is state: a copy of the optimizer starts without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from sketch_plugins.optim.fused import Backend
from sketch_plugins.scratch import Slot
from sketch_plugins.sharding.parts import STATE_NAMES

# Read in every step.
_NUMBERS = ("lr", "betas", "eps")
_PLAIN = (Tensor, torch.nn.Parameter)
_ADDRESS, _ITEM = Tensor.data_ptr, Tensor.item
# Parameters of a group that is remembered as a whole, and how often it may have been in vain.
GROUP, FAILURES = 4, 20


class Remembered:
    """A part's step as it was described, and all that the description was made of.

    Attributes:
        backend: the kernels that take it.
        task: the step as they are given it.
        options: of the group; the same object as long as they are equal.
        address, shape, dtype, cpu: of the part.
        gradient: dtype of the gradient, which has the shape of the part and is contiguous.
        tensors: for each moment its name, its number of tensors, and (name, weak reference, address) of each.
        entries: of the state.
        counter: a weak reference to the number of steps.
    """

    __slots__ = (
        "address", "backend", "counter", "cpu", "dtype", "entries", "gradient", "options", "shape", "task", "tensors",
    )  # fmt: skip

    def __init__(
        self, p: Tensor, g: Tensor, options: tuple[Any, ...], state: Mapping[str, Any], backend: Backend, task: Any
    ) -> None:
        self.backend, self.task, self.options = backend, task, options
        self.address, self.shape, self.dtype, self.cpu = p.data_ptr(), p.shape, p.dtype, p.is_cpu
        self.gradient, self.entries, self.counter = g.dtype, len(state), ref(state["step"])
        self.tensors = [
            (name, len(moment), [(key, ref(tensor), tensor.data_ptr()) for key, tensor in moment.items()])
            for name, moment in state.items()
            if name in STATE_NAMES and type(moment) is dict
        ]

    def holds(self, p: Tensor, g: Tensor, address: int, state: Any) -> bool:
        """Whether part, gradient (at this address) and state look as they did."""
        if (
            p.data_ptr() != self.address
            or address == 0  # no memory of its own
            or p.shape != self.shape
            or g.shape != self.shape
            or p.dtype is not self.dtype
            or g.dtype is not self.gradient
            or p.is_cpu is not self.cpu
            or g.is_cpu is not self.cpu
            or not p.is_contiguous()
            or not g.is_contiguous()
            or g.is_neg()
            or not self.task.fits(address)
            or type(state) is not dict
            or len(state) != self.entries
        ):
            return False
        try:
            for name, size, tensors in self.tensors:
                moment = state[name]
                if len(moment) != size:
                    return False
                for key, known, place in tensors:
                    tensor = moment[key]
                    if tensor.data_ptr() != place or known() is not tensor:
                        return False
            return self.counter() is state["step"]
        except (KeyError, TypeError):  # another layout of the state
            return False


class Again:
    """The parts of a step that look as they did and take it with the same kernels, a list for each fact.

    Attributes:
        tasks: their steps as the kernels are given them.
        gradients: addresses.
        counters: their numbers of steps.
        rules: (group, number of this step) of each rule that is needed;
        which: the place of its own in there, for each part.
        changed: the tensors that are written: the parts, and the parameters where these are others.
        kept: gradients and state. Kernels know addresses only: another thread may replace the tensors while they run,
            and these have to outlive them.
    """

    __slots__ = ("_group", "_places", "_step", "changed", "counters", "gradients", "kept", "rules", "tasks", "which")

    def __init__(self) -> None:
        self.tasks: list[Any] = []
        self.gradients: list[int] = []
        self.counters: list[Tensor] = []
        self.rules: list[tuple[dict[str, Any], int]] = []
        self.which: list[int] = []
        self.changed: list[Tensor] = []
        self.kept: list[Any] = []
        self._places: dict[tuple[int, int], int] = {}
        self._group: Any = None
        self._step = -1.0

    def extend(
        self,
        tasks: list[Any],
        addresses: list[int],
        counters: list[Tensor],
        steps: list[Any],
        group: dict[str, Any],
        parts: Sequence[Tensor],
        kept: list[Tensor],
    ) -> None:
        """The parameters of a group: `add` for each."""
        self.tasks += tasks
        self.gradients += addresses
        self.counters += counters
        self.changed += parts
        self.kept += kept
        places = {}
        for step in set(steps):
            places[step] = len(self.rules)
            self.rules.append((group, int(step) + 1))
        self.which += [places[step] for step in steps]

    def add(
        self, task: Any, address: int, counter: Tensor, step: float, group: dict[str, Any], p: Tensor, owner: Tensor
    ) -> None:
        """One more part, which has taken ``step`` steps."""
        self.tasks.append(task)
        self.gradients.append(address)
        self.counters.append(counter)
        self.changed.append(p)
        if owner is not p:
            self.changed.append(owner)
        if step == self._step and group is self._group:  # as the part before
            self.which.append(self.which[-1])
            return
        self._group, self._step = group, step
        place = self._places.setdefault((id(group), int(step)), len(self.rules))
        if place == len(self.rules):
            self.rules.append((group, int(step) + 1))
        self.which.append(place)


class Counters:
    """The numbers of steps of the parts of one launch, in one piece of memory: they are counted by one operation.

    The tensors stay what they are, and each may be changed by itself.
    """

    def __init__(self, counters: list[Tensor]) -> None:
        # Inference tensors could not be changed by a step outside of torch.inference_mode.
        with torch.inference_mode(False):
            self.all = torch.stack(counters)
            for i, counter in enumerate(counters):
                counter.set_(self.all.untyped_storage(), i, (), ())  # type: ignore[call-overload]
        self.addresses = list(map(_ADDRESS, counters))

    def holds(self, counters: list[Tensor]) -> bool:
        """Whether the counters are these, in this order."""
        return list(map(_ADDRESS, counters)) == self.addresses


class RememberedGroup:
    """The steps of all parameters of a group that have a gradient; each of them has been recalled in the last step.

    What `Remembered.holds` compares is compared in columns: a list for each fact, and one comparison of lists.
    """

    def __init__(self, owners: Sequence[Tensor], states: Sequence[dict[str, Any]], found: list[Remembered]) -> None:
        self.options, self.backend = found[0].options, found[0].backend
        self.tasks, self.aligned = [one.task for one in found], not all(one.task.fits(1) for one in found)
        self.owners, self.types = list(map(id, owners)), list(map(type, owners))
        self.places, self.parts = list(map(_ADDRESS, owners)), _facts(owners)
        self.gradients = [
            (shape, one.gradient, cpu, True, False) for (shape, _, cpu, _), one in zip(self.parts, found, strict=True)
        ]
        self.moments = [(*[name for name, _, _ in one.tensors],) for one in found]
        self.entries = list(map(len, states))
        tensors, counters = self._tensors(states), [one["step"] for one in states]
        self.tensors, self.addresses = list(map(id, [*tensors, *counters])), list(map(_ADDRESS, tensors))
        self.counted: list[int] = []
        self.order: list[int] = []
        self.pieces: list[Counters] = []
        # An identity says nothing any more when its tensor is gone: another one may have it now.
        self.gone: list[Any] = []
        self.alive = [ref(tensor, self.gone.append) for tensor in [*tensors, *counters]]

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
            again: to which.
            given: the parameters that have a gradient,
            grads: and the gradients.
            group: the group,
            options: and what `Plan.marks` says of it.
            state: parameter -> state.
            pieces: memory that counters may lie in.
        """
        if (
            options is not self.options
            or self.gone
            or list(map(id, given)) != self.owners
            or list(map(type, given)) != self.types
            or set(map(type, grads)) != {Tensor}
        ):
            return False
        try:
            if (
                [(g.shape, g.dtype, g.is_cpu, g.is_contiguous(), g.is_neg()) for g in grads] != self.gradients
                or _facts(given) != self.parts
                or list(map(_ADDRESS, given)) != self.places
            ):
                return False
            places = list(map(_ADDRESS, grads))
        except RuntimeError:  # sparse tensors have no such facts
            return False
        if 0 in places or (self.aligned and any([place & 15 for place in places])):
            return False
        try:
            states = [state[p] for p in given]
            tensors, counters = self._tensors(states), [one["step"] for one in states]
            if list(map(len, states)) != self.entries or list(map(id, [*tensors, *counters])) != self.tensors:
                return False
        except (KeyError, TypeError, AttributeError):  # another layout of the state
            return False
        if list(map(_ADDRESS, tensors)) != self.addresses:
            return False
        steps = self._steps(counters, pieces)
        if min(steps) < 1 or max(steps) >= 1e18:
            return False
        again.extend(self.tasks, places, counters, steps, group, given, [*grads, *tensors])
        return True

    def _steps(self, counters: list[Tensor], pieces: Sequence[Counters]) -> list[float]:
        """The numbers of steps: read a piece at a time, where they all lie in pieces of memory that are known."""
        places = list(map(_ADDRESS, counters))
        if places != self.counted:
            at = {place: (piece, i) for piece in pieces for i, place in enumerate(piece.addresses)}
            if not all(place in at for place in places):
                return list(map(_ITEM, counters))
            used = [piece for piece in pieces if any(at[place][0] is piece for place in places)]
            starts = dict(zip(map(id, used), accumulate([0, *(len(piece.addresses) for piece in used)]), strict=False))
            self.counted, self.pieces = places, used
            self.order = [starts[id(piece)] + i for piece, i in map(at.__getitem__, places)]
        steps = [step for piece in self.pieces for step in piece.all.tolist()]
        return [steps[i] for i in self.order]

    def _tensors(self, states: Sequence[dict[str, Any]]) -> list[Tensor]:
        return [
            tensor
            for one, names in zip(states, self.moments, strict=True)
            for name in names
            for tensor in one[name].values()
        ]


def _facts(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(t.shape, t.dtype, t.is_cpu, t.is_contiguous()) for t in tensors]


class Plan:
    """Part -> what it looked like, and its task."""

    def __init__(self) -> None:
        #: Of whole steps (None), and of parameters that take theirs alone (their id).
        self.programs: dict[tuple[Backend, int | None], Any] = {}
        #: Whether the optimizer has a tensor for whose sake kernels are compiled; None: not known.
        self.large: bool | None = None
        #: Tasks of the step that is under way.
        self.used = 0
        #: Identity of a group -> the group, and its options in the last step.
        self.options: dict[int, tuple[Any, dict[str, Any]]] = {}
        #: Parts of an eager step -> the temporaries that it took.
        self.temporaries: dict[tuple[Any, ...], dict[Slot, int]] = {}
        #: (backend, only, number of a launch) -> the counters of its parts.
        self.counters: dict[Any, Counters] = {}
        #: Identity of a group -> its steps; and how often they were not what they had been.
        self._groups: dict[int, RememberedGroup] = {}
        self._failed: dict[int, int] = {}
        self._tasks: dict[Any, Remembered] = {}
        self._marks: dict[int, tuple[Any, ...] | None] = {}

    def marks(self, options: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """`group_marks`; the same object as long as they are equal."""
        now = group_marks(options, group)
        last = self._marks.get(id(group))
        if last == now:
            return last
        self._marks[id(group)] = now
        return now

    def recall_group(
        self,
        again: dict[Backend, Again],
        given: Sequence[Tensor],
        grads: list[Any],
        group: dict[str, Any],
        options: Any,
        state: Any,
    ) -> bool:
        """`recall` of all parameters of a group that have a gradient; nothing is added unless all are recalled."""
        known = self._groups.get(id(group))
        if known is None:
            return False
        those = again.get(known.backend)
        if those is None:
            those = again[known.backend] = Again()
        if known.recall(those, given, grads, group, options, state, [*self.counters.values()]):
            return True
        if not those.tasks:
            del again[known.backend]
        del self._groups[id(group)]
        self._failed[id(group)] = self._failed.get(id(group), 0) + 1
        return False

    def learn_group(self, given: Sequence[Tensor], group: dict[str, Any], state: Any) -> None:
        """Called when all of them have been recalled one by one. Of a group that changes all the time: no more."""
        if len(given) < GROUP or self._failed.get(id(group), 0) >= FAILURES:
            return
        found = [self._tasks[id(p)] for p in given]
        if all(one.backend is found[0].backend for one in found):
            self._groups[id(group)] = RememberedGroup(given, [state[p] for p in given], found)

    def recall(
        self,
        again: dict[Backend, Again],
        key: Any,
        p: Tensor,
        owner: Tensor,
        grad: Any,
        group: dict[str, Any],
        options: tuple[Any, ...] | None,
        state: Any,
    ) -> bool:
        """Add the step of a part to those that are taken again, if the part looks as it did.

        Args:
            again: to which.
            key: the part's `sharding.parts.Part.identity`.
            p: the part.
            owner: the tensor in the parameter group.
            grad: its gradient.
            group: its group,
            options: and what `marks` says of that.
            state: its state.
        """
        found = self._tasks.get(key)
        if (
            found is None
            or found.options is not options
            or type(grad) is not Tensor
            or type(p) not in _PLAIN
            or grad.layout is not torch.strided
        ):
            return False
        address = grad.data_ptr()
        if not found.holds(p, grad, address, state):
            return False
        counter = state["step"]
        step = counter.item()
        # A first step is no repetition: with lagged_rms it has to measure.
        if not 1 <= step < 1e18 or counter.dtype is not torch.float32:
            return False
        those = again.get(found.backend)
        if those is None:
            those = again[found.backend] = Again()
        those.kept += (grad, *state.values())
        those.add(found.task, address, counter, step, group, p, owner)
        return True

    def learn(
        self,
        key: Any,
        p: Tensor,
        grad: Tensor | None,
        options: tuple[Any, ...] | None,
        state: Any,
        backend: Backend,
        task: Any,
    ) -> None:
        """Keep a task for the next step."""
        if (
            options is not None
            and _is_plain(p)
            and type(grad) is Tensor
            and _is_plain(grad)
            and grad.shape == p.shape
            and type(state) is dict
        ):
            moments = [m for name, m in state.items() if name in STATE_NAMES and type(m) is dict]
            counter = state.get("step")
            if (
                type(counter) is Tensor
                and counter.numel() == 1
                and counter.is_cpu
                and all(type(tensor) is Tensor for moment in moments for tensor in moment.values())
            ):
                self._tasks[key] = Remembered(p, grad, options, state, backend, task)

    def trim(self) -> None:
        """Forget everything where most of it was not used: parameters that are replaced all the time leave tasks."""
        if max(len(self._tasks), len(self.programs), len(self._marks)) > 2 * self.used + 1000:
            self._tasks, self.programs, self._marks = {}, {}, {}
            self._groups, self._failed, self.counters = {}, {}, {}
        self.used = 0


def group_marks(options: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The options that a description depends on; None where every step has to be looked at."""
    if group["capturable"] or group["compile"] or group["row_sparse"] is not False or group.get("clean_every"):
        return None
    for name in _NUMBERS:
        value = group.get(name)
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, Tensor) and not one.is_cpu:  # nobody waits for a device to read it
                return None
    return tuple([group.get(name) for name in options if name not in _NUMBERS])


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN and tensor.layout is torch.strided and tensor.is_contiguous() and not tensor.is_neg()

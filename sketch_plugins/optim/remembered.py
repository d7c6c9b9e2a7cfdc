"""One part's step as it was described, and the steps that are taken again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from sketch_plugins.optim.fused import Backend
from sketch_plugins.sharding.parts import STATE_NAMES

ADDRESS = Tensor.data_ptr


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
        idle: the numbers of steps of parts without elements, which are counted and nothing else.
        kept: gradients and state. Kernels know addresses only: another thread may replace the tensors while they run,
            and these have to outlive them.
    """

    __slots__ = (
        "_group",
        "_places",
        "_step",
        "changed",
        "counters",
        "gradients",
        "idle",
        "kept",
        "rules",
        "tasks",
        "which",
    )

    def __init__(self) -> None:
        self.tasks: list[Any] = []
        self.gradients: list[int] = []
        self.counters: list[Tensor] = []
        self.rules: list[tuple[dict[str, Any], int]] = []
        self.which: list[int] = []
        self.changed: list[Tensor] = []
        self.idle: list[Tensor] = []
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
        self.addresses = list(map(ADDRESS, counters))

    def holds(self, counters: list[Tensor]) -> bool:
        """Whether the counters are these, in this order."""
        return list(map(ADDRESS, counters)) == self.addresses

"""One part's step as it was described, and the steps that are taken again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor

from sketch_plugins.sharding.state_names import PLACE, is_step, kind_of

ADDRESS = Tensor.data_ptr


class Remembered:
    """A part's step as it was described, with everything that the description was made from.

    Attributes:
        backend: the kernels that take the step; None if it is eager.
        task: the step as the kernels get it.
        options: the options of the group, which are the same object as long as they are equal.
        address, shape, dtype, cpu: of the part.
        gradient: dtype of the gradient, which is contiguous and has the shape of the part.
        tensors: (name, weak reference, address) of each tensor of the moments in the owner's state.
        step, counter: name of the step counter in that state, and a weak reference to it.
        factor: factor of its learning rate.
    """

    __slots__ = (
        "address", "backend", "counter", "cpu", "dtype", "factor", "gradient", "options", "shape", "step", "task",
        "tensors",
    )  # fmt: skip

    def __init__(
        self,
        p: Tensor,
        g: Tensor,
        options: tuple[Any, ...],
        state: Mapping[str, Tensor],
        backend: Any,
        task: Any,
        factor: float = 1.0,
    ) -> None:
        self.factor = factor
        self.backend, self.task, self.options = backend, task, options
        self.address, self.shape, self.dtype, self.cpu = p.data_ptr(), p.shape, p.dtype, p.is_cpu
        self.gradient = g.dtype
        self.step = next(filter(is_step, state))
        self.counter = ref(state[self.step])
        self.tensors = [
            (name, ref(tensor), tensor.data_ptr())
            for name, tensor in state.items()
            if kind_of(name) not in ("step", PLACE)
        ]

    def holds(self, p: Tensor, g: Tensor, address: int, state: Any) -> bool:
        """Whether the part, the gradient (at this address) and the owner's state look as they did."""
        if (
            p.data_ptr() != self.address
            or address == 0  # the gradient has no memory of its own
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
        ):
            return False
        try:
            for name, known, place in self.tensors:
                tensor = state[name]
                if tensor.data_ptr() != place or known() is not tensor:
                    return False
            counter = self.counter()
            return counter is not None and counter is state[self.step]
        except (KeyError, AttributeError, RuntimeError):  # the state has another layout now
            return False


class Factors(NamedTuple):
    """Factors of the learning rate of several parts.

    Attributes:
        all: of each part.
        distinct: each of them once.
        pick: takes a list with an entry for each of ``distinct``, and returns the entry of each part.
    """

    all: list[float]
    distinct: list[float]
    pick: Callable[[Sequence[Any]], Sequence[Any]]


class Again:
    """Parts that look as they did in the last step and take it again with the same kernels, as a list for each fact.

    Attributes:
        tasks: their steps as the kernels get them.
        gradients: addresses of their gradients.
        counters: their step counters.
        rules: (group, number of this step, factor of the learning rate) of each rule that is needed; each is a row of
            numbers. With ``capturable`` the second is a list of counters, which are not read. Each has a row of its
            own.
        which: the row of each part.
        changed: the tensors that are written: the parts, and their parameters if these are other tensors.
        idle: the step counters of parts without elements, for which only the step is counted.
        outliving: gradients and state. Kernels only know addresses, and another thread may replace the tensors while
            they run, so these references keep them alive.
    """

    __slots__ = (
        "_factor",
        "_group",
        "_places",
        "_rows",
        "_step",
        "changed",
        "counters",
        "gradients",
        "idle",
        "outliving",
        "rules",
        "tasks",
        "which",
    )

    def __init__(self) -> None:
        self.tasks: list[Any] = []
        self.gradients: list[int] = []
        self.counters: list[Tensor] = []
        self.rules: list[tuple[dict[str, Any], int | list[Tensor], float]] = []
        self.which: list[int] = []
        self.changed: list[Tensor] = []
        self.idle: list[Tensor] = []
        self.outliving: list[Any] = []
        self._places: dict[tuple[int, int, float], int] = {}
        self._rows = 0
        self._group: Any = None
        self._step = -1.0
        self._factor = 1.0

    def extend(
        self,
        tasks: list[Any],
        addresses: list[int],
        counters: Sequence[Tensor],
        steps: list[Any] | None,
        group: dict[str, Any],
        parts: Sequence[Tensor],
        outliving: list[Tensor],
        factors: Factors | None,
    ) -> None:
        """Add the parameters of a group, whose counters are on one device, as `add` does for each.

        ``factors`` is None if all are 1.
        """
        self.tasks += tasks
        self.gradients += addresses
        self.counters += counters
        self.changed += parts
        self.outliving += outliving
        if steps is None:
            self._uncounted(group, counters, factors.all if factors else [1.0] * len(counters))
            return
        if factors is not None and len(set(steps)) == 1:
            rows_of = [self._row(group, steps[0], one) for one in factors.distinct]
            self.which += factors.pick(rows_of)
            return
        if factors is not None:
            rows = {one: self._row(group, *one) for one in dict.fromkeys(zip(steps, factors.all, strict=True))}
            self.which += [rows[one] for one in zip(steps, factors.all, strict=True)]
            return
        places = {}
        for step in set(steps):
            places[step] = self._row(group, step, 1.0)
        self.which += [*places.values()] * len(steps) if len(places) == 1 else [places[step] for step in steps]

    def add(
        self,
        task: Any,
        address: int,
        counter: Tensor,
        step: float | None,
        group: dict[str, Any],
        p: Tensor,
        owner: Tensor,
        factor: float,
    ) -> None:
        """Add one more part, which has taken ``step`` steps. None: the counter is on a device and is not read."""
        self.tasks.append(task)
        self.gradients.append(address)
        self.counters.append(counter)
        self.changed.append(p)
        if owner is not p:
            self.changed.append(owner)
        if step is None:
            self._uncounted(group, [counter], [factor])
            return
        if step == self._step and group is self._group and factor == self._factor:  # the same as for the part before
            self.which.append(self.which[-1])
            return
        self._group, self._step, self._factor = group, step, factor
        key = id(group), int(step), factor
        if key not in self._places:
            self._places[key] = self._row(group, step, factor)
        self.which.append(self._places[key])

    def _uncounted(self, group: dict[str, Any], counters: Sequence[Tensor], factors: Sequence[float]) -> None:
        """A row for each of the counters, which are on one device and are not read."""
        rows = [0] * len(counters)
        for factor in dict.fromkeys(factors):
            places = [i for i, one in enumerate(factors) if one == factor]
            last, known, same = self.rules[-1] if self.rules else (None, None, None)
            if last is group and same == factor and isinstance(known, list) and known[0].device == counters[0].device:
                known += [counters[i] for i in places]
            else:
                self.rules.append((group, [counters[i] for i in places], factor))
            for i in places:
                rows[i] = self._rows
                self._rows += 1
        self.which += rows

    def _row(self, group: dict[str, Any], step: float, factor: float) -> int:
        self.rules.append((group, int(step) + 1, factor))
        self._rows += 1
        return self._rows - 1


class Counters:
    """The step counters of the parts of one launch, in one allocation, so that one operation counts them all.

    The tensors stay the same objects, and each of them can still be changed by itself.
    """

    def __init__(self, counters: list[Tensor]) -> None:
        # A step outside of torch.inference_mode could not change inference tensors.
        with torch.inference_mode(False):
            self.all = torch.stack(counters)
            for i, counter in enumerate(counters):
                counter.set_(self.all.untyped_storage(), i, (), ())  # type: ignore[call-overload]
        self.addresses = list(map(ADDRESS, counters))

    def holds(self, counters: list[Tensor]) -> bool:
        """Whether the counters are these, in this order."""
        return list(map(ADDRESS, counters)) == self.addresses

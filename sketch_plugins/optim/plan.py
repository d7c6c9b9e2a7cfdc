"""What an optimizer remembers of its last step on a CPU, so that the next one need not describe each parameter again.

Describing one takes some 70 microseconds of Python, and in a training loop nothing changes from step to step but the
gradient's address. Nothing is trusted: whatever a description was made of is looked at in each step (addresses, shapes,
dtypes, layouts, options, the names in the state), and what differs is described anew. No tensor is kept alive, and none
of this is state: a copy of the optimizer starts without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sketch_plugins.optim.fused import Backend
from sketch_plugins.scratch import Slot
from sketch_plugins.sharding.parts import STATE_NAMES, Part

# Read in every step.
_NUMBERS = ("lr", "betas", "eps")


class Known(NamedTuple):
    """A parameter's step in known circumstances."""

    p: Part
    backend: Backend
    task: Any
    group: dict[str, Any]
    counter: Tensor
    # Kernels know addresses only: another thread may replace the state while they run, which has to outlive them.
    state: dict[str, Any]
    step: int
    gradient: int


class Plan:
    """Parameter -> (what it looked like, its task)."""

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
        self._tasks: dict[Any, tuple[tuple[Any, ...], Backend, Any]] = {}

    def recall(
        self,
        p: Part,
        grad: Tensor | None,
        group: dict[str, Any],
        options: tuple[Any, ...] | None,
        state: Any,
    ) -> Known | None:
        """The step of a part that looks as it did; None if it does not."""
        found = self._tasks.get(p.identity)
        if found is None or options is None:
            return None
        marks = _marks(p.data, grad, options, state)
        if grad is None or marks is None or marks != found[0]:
            return None
        address = grad.data_ptr()
        if address == 0 and grad.numel():  # no memory of its own
            return None
        counter = state["step"]
        if (
            not isinstance(counter, Tensor)
            or counter.numel() != 1
            or counter.dtype != torch.float32
            or not counter.is_cpu
        ):
            return None
        step = counter.item()
        # A first step is no repetition: with lagged_rms it has to measure.
        if not 1 <= step < 1e18:
            return None
        return Known(p, found[1], found[2], group, counter, dict(state), int(step) + 1, address)

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
        marks = None if options is None else _marks(p, grad, options, state)
        if marks is not None:
            self._tasks[key] = marks, backend, task

    def trim(self) -> None:
        """Forget everything where most of it was not used: parameters that are replaced all the time leave tasks."""
        if max(len(self._tasks), len(self.programs)) > 2 * self.used + 1000:
            self._tasks, self.programs = {}, {}
        self.used = 0


def group_marks(options: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The options that a description depends on; None where every step has to be looked at."""
    if group["capturable"] or group["compile"] or group["row_sparse"] is not False or group.get("clean_every"):
        return None
    return tuple([group.get(name) for name in options if name not in _NUMBERS])


_PLAIN = (Tensor, torch.nn.Parameter)


def _marks(p: Tensor, g: Tensor | None, options: tuple[Any, ...], state: Any) -> tuple[Any, ...] | None:
    if type(p) not in _PLAIN or type(g) is not Tensor or type(state) is not dict or g.layout is not torch.strided:
        return None
    marks = [
        options, p.data_ptr(), p.shape, p.dtype, p.is_cpu, p.is_contiguous(), p.is_neg(),
        g.shape, g.dtype, g.is_cpu, g.is_contiguous(), g.is_neg(),
    ]  # fmt: skip
    for name, moment in state.items():
        if name not in STATE_NAMES:  # of a wrapper of the optimizer
            continue
        marks.append(name)
        if type(moment) is dict:
            for key, tensor in moment.items():
                if type(tensor) is not Tensor:
                    return None
                marks += key, tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.is_contiguous(), tensor.is_cpu
    return tuple(marks)

"""A part's step, resolved before anything changes: what is known of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sketch_plugins.kernels.work import Work
from sketch_plugins.optim.checks import is_fake
from sketch_plugins.optim.fused import Backend
from sketch_plugins.optim.rule import Rule
from sketch_plugins.sharding.parts import Part, has_address
from sketch_plugins.stores import Gradient, Store

# Elements of a parameter whose eager step is undone by an error: what is copied for that has to be next to nothing.
UNDO = 1 << 14


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
        return changed + list(tensors_in({name: value for name, value in self.state.items() if name != "step"}))

    @property
    def cleans(self) -> bool:
        """Whether the second moment is cleaned in this step (the paper's ``clean_every``)."""
        every = self.group.get("clean_every", 0)
        return bool(every) and "second_moment" in self.named and self.step % every == 0


def tensors_in(state: Mapping[str, Any]) -> Iterator[Tensor]:
    """All tensors of a state, at whatever level."""
    for value in state.values():
        if isinstance(value, Mapping):
            yield from tensors_in(value)
        elif isinstance(value, Tensor):
            yield value

"""A part's step, resolved before anything changes: what is known of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.kernels.work import Work
from sketch_plugins.optim.checks import is_fake
from sketch_plugins.optim.fused import Backend
from sketch_plugins.optim.rule import Rule
from sketch_plugins.sharding.parts import Part, has_address
from sketch_plugins.stores import Gradient, Store

# Elements of a parameter whose eager step is undone by an error: what is copied for that has to be next to nothing.
UNDO = 1 << 14


@dataclass(eq=False)
class Batch:
    """Eager steps that are taken together: of one part, unless an optimizer knows better.

    Attributes:
        eager: takes the step of a part.
        members: whose.
    """

    eager: Callable[[Pending], None]
    members: list[Pending]
    #: Parts of steps that kernels would take, to be tried out before: those are wrong that lose their backend.
    trials: list[Pending] = field(default_factory=list)

    def settle(self) -> None:
        """When the trials have been looked at."""

    def prepare(self) -> None:
        """Whatever can fail, when the temporaries have been reserved and before anything changes."""

    def take(self, members: Sequence[Pending]) -> None:
        """Take the steps of the members, or of copies of them."""
        for one in members:
            self.eager(one)

    def twin(self) -> Batch:
        """The same for a rehearsal."""
        return self

    @property
    def way(self) -> Any:
        """What decides about its temporaries beside the members."""
        return None


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
        repeated: it looks as in the last step, and was not resolved anew.
        refused: the kernels that were asked for do not take it, of which each step warns.
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
    repeated: bool = False
    refused: bool = False

    def at(self, p: Part, grad: Gradient) -> Pending:
        """The same of a copy of the part, with its gradient."""
        return replace(self, p=p, grad=grad)

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


def undo_slots(members: Sequence[Pending]) -> dict[Any, int]:
    """Slots of what an error in a step of these would be undone with."""
    slots: dict[Any, int] = {}
    for tensor in (tensor for one in members for tensor in one.undone):
        slot = "undo", tensor.dtype, tensor.device
        slots[slot] = slots.get(slot, 0) + tensor.numel()
    return slots


def copied_aside(members: Sequence[Pending]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """What an error would be undone with: for each dtype and device the tensors, and copies of them in one buffer."""
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in (tensor for one in members for tensor in one.undone):
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    out = []
    for (dtype, device), tensors in kinds.items():
        buffer = scratch.empty("undo", (sum(tensor.numel() for tensor in tensors),), dtype, device)
        parts = buffer.split([tensor.numel() for tensor in tensors])
        copies = [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
        torch._foreach_copy_(copies, tensors)
        out.append((tensors, copies))
    return out


def tensors_in(state: Mapping[str, Any]) -> Iterator[Tensor]:
    """All tensors of a state, at whatever level."""
    for value in state.values():
        if isinstance(value, Mapping):
            yield from tensors_in(value)
        elif isinstance(value, Tensor):
            yield value

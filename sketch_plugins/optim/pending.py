"""A part's step, resolved before anything changes: everything that is known of it."""

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
from sketch_plugins.sharding.parts import Part
from sketch_plugins.sharding.tensors import has_address
from sketch_plugins.stores import Gradient, Store

# The largest parameter whose eager step is undone after an error. The copies for that must be negligible.
UNDO = 1 << 14


@dataclass(eq=False)
class Batch:
    """Eager steps that are taken together. By default a batch has one part.

    Attributes:
        eager: takes the step of a part.
        members: the steps of the batch.
    """

    eager: Callable[[Pending], None]
    members: list[Pending]
    #: Parts of steps that kernels would take, to be checked first. Wrong ones lose their backend.
    trials: list[Pending] = field(default_factory=list)

    def settle(self) -> None:
        """Called when the trials have been checked."""

    def prepare(self) -> None:
        """Do what can fail, after the temporaries have been reserved and before anything changes."""

    def take(self, members: Sequence[Pending]) -> None:
        """Take the steps of the members, or of copies of them."""
        for one in members:
            self.eager(one)

    def twin(self) -> Batch:
        """A batch like this one, for a rehearsal."""
        return self

    @property
    def way(self) -> Any:
        """What decides its temporaries, apart from the members."""
        return None


@dataclass(eq=False)
class Pending:
    """One part's step, resolved before anything changes.

    Attributes:
        p: the part.
        group: its parameter group, with the options.
        grad: its gradient.
        state: its state, with the number of steps before this one.
        fresh: the state was made for this step and is not yet part of the optimizer's state.
        named: the stores of its moments, by name.
        step: number of this step. With ``capturable`` it is on the device, and so is everything that depends on it.
        rule: the update; None with ``capturable``, or if no row has a gradient.
        backend: kernels that take the step; None if it is eager.
        work: the step as the kernels get it.
        idle: only the number of steps changes, because the part has no elements or no row has a gradient.
        repeated: the part looks as in the last step, and was not resolved again.
        refused: ``fused=True`` asked for kernels that cannot take it. Each such step warns.
        factor: factor of its learning rate (``embedding_rate``), which ``rule`` contains.
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
    factor: float = 1.0

    def at(self, p: Part, grad: Gradient) -> Pending:
        """The same step for a copy of the part, with its gradient."""
        return replace(self, p=p, grad=grad)

    @property
    def undone(self) -> list[Tensor]:
        """All tensors that an eager step changes, to be restored after an error; none if they exceed a tile."""
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
    """Sizes of the buffers with which a step of these members can be undone, by slot."""
    slots: dict[Any, int] = {}
    for tensor in (tensor for one in members for tensor in one.undone):
        slot = "undo", tensor.dtype, tensor.device
        slots[slot] = slots.get(slot, 0) + tensor.numel()
    return slots


def copied_aside(members: Sequence[Pending]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Copies with which a step can be undone: for each dtype and device the tensors, and their copies in one buffer."""
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
    """All tensors of a state, at any level of nesting."""
    for value in state.values():
        if isinstance(value, Mapping):
            yield from tensors_in(value)
        elif isinstance(value, Tensor):
            yield value

"""Which preconditioned tensors take their steps in one stack. The roots of all stacks are computed at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from sketch_plugins.linalg import kronecker
from sketch_plugins.linalg.kronecker import Root
from sketch_plugins.optim.pending import Pending
from sketch_plugins.optim.sketchy.stack import Stack
from sketch_plugins.sharding.tensors import has_address, is_fake

#: Options that may differ between members of a stack.
PER_MEMBER = ("lr", "weight_decay")
#: The default size of a stack in bytes: what fits a CPU's caches, and enough to make launches few elsewhere.
CPU_STACK, ACCELERATOR_STACK = 1 << 25, 1 << 28


def stacked(eager: Iterable[Pending], options: Iterable[str]) -> list[list[Pending]]:
    """The members of each stack, in the order they came in.

    Args:
        eager: steps of preconditioned tensors.
        options: names of all options.
    """
    names = [name for name in options if name not in PER_MEMBER]
    kinds: dict[Any, list[Pending]] = {}
    of_group: dict[int, tuple[Any, ...]] = {}
    for one in eager:
        if id(one.group) not in of_group:
            of_group[id(one.group)] = tuple([one.group[name] for name in names])
        try:
            kinds.setdefault((of_group[id(one.group)], alike(one)), []).append(one)
        except TypeError:  # an option cannot be hashed
            kinds[id(one)] = [one]
    return [members for those in kinds.values() for members in cut(those, stack_bytes(those[0]))]


def stack_bytes(one: Pending) -> int:
    """The largest size in bytes of a stack of tensors like this one."""
    given = int(one.group["stack_bytes"])
    if given >= 0:
        return given
    return CPU_STACK if one.p.device.type == "cpu" else ACCELERATOR_STACK


def alike(one: Pending) -> tuple[Any, ...]:
    """What members of a stack have in common, apart from options."""
    p, grad = one.p, one.grad
    # A tensor that is copied for its step gets a stack of its own, because each member would be another copy.
    own = None if has_address(p.data) or is_fake(p.data) else p.identity
    return p.shape, p.whole, p.dtype, p.device, grad.dtype, grad.shape, grad.matrix.dtype, one.step, own


def share_roots(stacks: Sequence[Stack]) -> None:
    """Have the inverse roots of all stacks computed at once: they are small, and each operation is a launch."""
    kinds: dict[Any, list[Stack]] = {}
    for stack in [one for one in stacks if one.started and not one.samples]:
        one = stack.members[0]
        kind = one.p.device, one.grad.dtype, one.group["matrix_eps"], one.group["tail"]
        kinds.setdefault(kind, []).append(stack)
    for (_, _, eps, tail), members in kinds.items():
        shared = Shared([(one.covariances(one.members), one.exponent) for one in members], eps, tail)
        for index, stack in enumerate(members):
            stack.shared = partial(shared.of, index)


class Shared:
    """The roots of several stacks, computed when the first stack asks for its own.

    This object refers to the covariances and not to the stacks. A reference cycle would keep their gradients alive.
    """

    def __init__(self, stacks: Sequence[tuple[kronecker.Stack, float]], eps: float, tail: str) -> None:
        self.stacks, self.eps, self.tail = stacks, eps, tail
        self.found: list[dict[kronecker.Side, Root]] = []

    def of(self, index: int) -> Mapping[kronecker.Side, Root]:
        """The roots of one stack."""
        if not self.found:
            each, exponents = zip(*self.stacks, strict=True)
            self.found = kronecker.roots(each, exponents, self.eps, self.tail)
        return self.found[index]


def cut(members: Sequence[Pending], most: int) -> list[list[Pending]]:
    """Stacks of at most ``most`` bytes, or of one member. The copies to undo an error of small tensors count, too."""
    one = members[0]
    size = one.p.numel() * one.grad.dtype.itemsize + sum(t.numel() * t.element_size() for t in one.undone)
    count = max(1, most // size)
    return [list(members[i : i + count]) for i in range(0, len(members), count)]

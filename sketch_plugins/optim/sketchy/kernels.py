"""The elementwise parts of a stack's step as fused kernels: the graft's update, the momentum, the write-back.

The kernels that take whole steps are used. For the graft and the momentum, the kernel's parameter and its gradient are
both the tensor's place in the stack: ``x <- 0 * x - (-1) * update(x)``. This works because a kernel reads each number
before it writes it, and each result depends on one place only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.kernels.work import LOOKAHEAD, SHRINK, Work
from sketch_plugins.optim.fused import Backend, backend, numbers, ordered, vector
from sketch_plugins.optim.pending import Pending
from sketch_plugins.optim.rule import Rule
from sketch_plugins.sharding.state_names import CORRECTION
from sketch_plugins.sharding.tensors import has_address, is_fake
from sketch_plugins.stores import Store

PARTS = ("graft", "momentum", "write_back")
#: Options that belong to another part, as the kernels of a part get them.
_NEUTRAL = {"update_clip": 0.0, "scale_parameter": False, "maximize": False}
_NOTHING = Rule(
    first=None, second=None, step_size=-1.0, correction=1.0, decay=1.0, lookahead=None, denominator=None
)  # fmt: skip


@dataclass(eq=False)
class Program:
    """The tasks of a part of a stack's step, made for an address of the stack, and their program.

    They are used again as long as everything they were made from looks the same.
    """

    looks: Any
    place: int
    tasks: list[Any]
    last: Any = None


def rule_of(part: str, rule: Rule, momentum: Rule) -> tuple[Rule, Mapping[str, Any]]:
    """The rule that the kernel of a part computes, and the options that are changed for it.

    Args:
        part: one of `PARTS`.
        rule: the graft's rule.
        momentum: a rule with the average and the lookahead of the momentum.
    """
    if part == "graft":
        only = replace(_NOTHING, second=rule.second, denominator=rule.denominator, floor=rule.floor)
        return only, {"scale_parameter": False}
    if part == "momentum":
        return replace(_NOTHING, first=momentum.first, lookahead=momentum.lookahead), _NEUTRAL
    return replace(_NOTHING, step_size=1.0, decay=rule.decay, gate=rule.gate), _NEUTRAL


def kernels_for(members: Sequence[Pending], large: bool) -> Backend | None:
    """The kernels that may take parts of this stack's step, or None. They decide for each part (`Stack._parts`)."""
    first = members[0]
    kernels = backend(first.p.device, first.group["fused"])
    if kernels is None or first.grad.dtype != torch.float32:
        return None
    if first.p.device.type == "cpu" and not first.group["fused"] and not large:
        return None
    return kernels if all(has_address(one.p.data) or is_fake(one.p.data) for one in members) else None


def with_memory(one: Pending) -> Pending:
    """A stand-in for a part whose tensors have no memory: tensors of the same shape on the CPU."""
    p = replace(one.p, data=torch.empty(one.p.shape, dtype=one.p.dtype))
    gradient = one.grad.like(torch.empty(one.p.shape, dtype=one.grad.matrix.dtype))
    state = {
        name: store.allocate(one.grad.shape, torch.device("cpu"), one.grad.dtype) for name, store in one.named.items()
    }
    if CORRECTION in one.state:
        state[CORRECTION] = {
            name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in one.state[CORRECTION].items()
        }
    return replace(one, p=p, grad=one.grad.of(one.grad.like(p.data), gradient), state=state)


def work_of(part: str, one: Pending, x: Tensor, rule: Rule, group: Mapping[str, Any]) -> Work | None:
    """A part of a member's step as a kernel gets it, with ``x`` its place in the stack; None if no kernel takes it."""
    p, g, correction = x, x, None
    pairs: dict[str, tuple[Store, dict[str, Tensor]] | None] = {"first": None, "second": None}
    if part == "write_back":
        flat = one.grad.like(one.p.data)._flat
        if flat is None:
            return None
        p, correction = flat, one.state[CORRECTION]["codes"] if CORRECTION in one.state else None
    else:
        name = "second" if part == "graft" else "first"
        store = one.named[f"{name}_moment"]
        pairs[name] = (store, ordered(store, one.grad, one.state[f"{name}_moment"]))
    return Work(
        p, g, None, False, pairs["first"], pairs["second"],
        measure=bool(group["update_clip"]),
        stochastic=correction is None
        and part == "write_back"
        and group["stochastic_rounding"]
        and p.dtype == torch.bfloat16,
        seed=group["seed"],
        flags=1 << LOOKAHEAD if rule.lookahead and rule.first is not None else 0,
        emas=(rule.first, rule.second),
        correction=correction,
        matrices=one.grad.measured,
    )  # fmt: skip


def prepare(
    part: str,
    kernels: Backend,
    members: Sequence[Pending],
    x: Tensor,
    momentum: Rule,
    marks: Any,
    known: Program | None,
) -> tuple[Program, Callable[[], None]] | None:
    """Make a part of a stack's step ready, without changing anything.

    Args:
        part: one of `PARTS`.
        kernels: the backend.
        members: the stack's members.
        x: ``(c, R, D)``, the stack.
        momentum: see `rule_of`.
        marks: the options, which are the same object as long as they are equal. None: they have to be read in each
            step.
        known: the program of the last step.

    Returns:
        The program, for the next step, and the function that takes the part. None if the kernels cannot take it.
    """
    rows, which = _numbers(part, members, momentum, x.device)
    if rows is None:
        return None
    looks = None
    if marks is not None:
        looks = (
            marks,
            which,
            *[
                (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
                for one in members
                for tensor in _tensors(part, one)
            ],
        )
    fits = known is not None and looks is not None and known.looks == looks
    if fits and known is not None and part != "write_back" and known.place != x.data_ptr():
        fits = kernels.moved is not None and known.last is not None
        if kernels.moved is not None and fits:
            known.tasks = kernels.moved(known.tasks, known.last, x.data_ptr() - known.place)
            known.place = x.data_ptr()
    if known is None or not fits:
        tasks = []
        for one, place in zip(members, x, strict=True):
            assert one.rule is not None
            rule, changed = rule_of(part, one.rule, momentum)
            work = work_of(part, one, place, rule, {**one.group, **changed})
            task = None if work is None or kernels.unsupported(work) is not None else kernels.task(work)
            if task is None:
                return None
            tasks.append(task)
        known = Program(looks, x.data_ptr(), tasks)
    gradients = [place.data_ptr() for place in x]
    first = members[0].rule
    assert first is not None
    # The stack has been multiplied by the flag already, so without weight decay there is nothing to hold.
    held = part == "write_back" and any(row[SHRINK] != 1.0 for row in rows)
    moves = first.gate.moves if held and first.gate is not None else None
    known.last, takes = kernels.prepare_tasks(known.tasks, rows, which, gradients, known.last, moves=moves)

    def take() -> None:
        for _, launch in takes:
            launch()

    return known, take


def _numbers(
    part: str, members: Sequence[Pending], momentum: Rule, device: torch.device
) -> tuple[list[list[float]] | None, list[int]]:
    """A row of numbers for each group (rates and weight decays may differ), and the row of each member.

    The rows are None if some numbers are on a device.
    """
    rows: list[list[float]] = []
    places: dict[int, int] = {}
    which = []
    for one in members:
        place = places.setdefault(id(one.group), len(rows))
        which.append(place)
        if place == len(rows):
            assert one.rule is not None
            rule, changed = rule_of(part, one.rule, momentum)
            row, _ = vector(numbers(rule, {**one.group, **changed}, one.step), device)
            if isinstance(row, Tensor):
                return None, which
            rows.append(row)
    return rows, which


def _tensors(part: str, one: Pending) -> list[Tensor]:
    if part == "write_back":
        kept = one.state.get(CORRECTION)
        return [one.p.data] if kept is None else [one.p.data, kept["codes"]]
    return list(one.state["second_moment" if part == "graft" else "first_moment"].values())

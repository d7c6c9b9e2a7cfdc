"""Finds the temporaries of an eager step before it, by taking the step with tensors that have no memory."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sketch_plugins import scratch
from sketch_plugins.optim.checks import is_fake
from sketch_plugins.optim.pending import Batch, Pending

#: What the temporaries depend on -> their sizes. A rehearsal takes as long as some hundred operations, and the layers
#: of a model are alike.
REHEARSED: dict[Any, dict[scratch.Slot, int]] = {}
_MOST = 100


def rehearse(batch: Batch, kind: Any) -> dict[scratch.Slot, int]:
    """The temporaries of the steps of a batch, for an optimizer of class ``kind``.

    With ``compile=True`` copies of the tensors take the step, which compiles it. Row-sparse steps are not rehearsed:
    the host reads the touched rows, and tensors without memory have none, so the temporaries are allocated in the step
    itself. Steps are distinguished by class, options and the layout of all tensors, not by anything else that an
    instance knows.
    """
    if any(one.grad.rows is not None or one.rule is None for one in batch.members):
        return {}
    if any(one.grad.compile for one in batch.members):
        return _take(batch, batch.members[0].p.device)
    options = [name for name in kind.OPTIONS if name != "lr"]
    try:
        # Members of a batch are alike, so one of each kind is enough.
        kinds = tuple(dict.fromkeys(_depends_on(one, options) for one in batch.members))
        # The hash replaces the layouts, which are kilobytes. If two had the same, a buffer would grow in a step.
        key = hash((kind, batch.way, len(batch.members), kinds))
        known = REHEARSED.get(key)
    except TypeError:  # an option cannot be hashed
        return _take(batch, torch.device("meta"))
    if known is None:
        if len(REHEARSED) >= _MOST:
            REHEARSED.clear()
        known = REHEARSED[key] = _take(batch, torch.device("meta"))
    return known


def _depends_on(one: Pending, options: Sequence[str]) -> tuple[Any, ...]:
    """Everything that decides the sizes. Which parameter it is, its rate, and other keys of its group do not."""
    p, grad = one.p, one.grad
    piece = None if p.piece is None else dataclasses.replace(p.piece, index=0, offset=0)
    return (
        is_fake(p.data),
        p.device,
        torch.get_default_dtype(),
        _layout(p.data),
        p.whole,
        piece,
        _layout(grad.matrix.tensor),
        grad.matrix.batch,
        (grad.dtype, grad.chunk, grad.shape, grad.packed, grad.negate, grad.l2 is None, grad.matrices, grad.measured),
        tuple((name, type(store)) for name, store in one.named.items()),
        _layout({name: value for name, value in one.state.items() if name != "step"}),
        one.step,
        tuple(_layout(one.group.get(name)) for name in options),
    )


def _layout(value: Any) -> Any:
    """The layout of a tensor (so that none is kept alive), of the values of a mapping, or any other value itself."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, Mapping):
        return tuple((name, _layout(inner)) for name, inner in value.items())
    return value


def _take(batch: Batch, device: torch.device) -> dict[scratch.Slot, int]:
    fake, own = is_fake(batch.members[0].p.data), batch.members[0].p.device
    with _disable_current_modes() if fake else contextlib.nullcontext():
        members = [_twin_of(one, device, fake) for one in batch.members]
        with scratch.scratch():
            try:
                batch.twin().take(members)
            except NotImplementedError:  # an operation does not exist for tensors without memory
                return {}
            return {(name, dtype, own): n for (name, dtype, _), n in scratch.used().items()}


def _twin_of(one: Pending, device: torch.device, fake: bool) -> Pending:
    p = dataclasses.replace(one.p, data=_twin(one.p.data, device))
    p.owner = p.data
    gradient, state = one.grad.like(_twin(one.grad.matrix.tensor, device)), _twins(one.state, device)
    # A fake tensor has no number to read. `sketch_plugins.plan` answers for it that this is no first step.
    state["step"] = torch.full((), 2.0) if fake else one.state["step"] + 1
    return dataclasses.replace(one, p=p, grad=one.grad.of(one.grad.like(p.data), gradient), state=state)


def _twin(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the same layout: without memory on the meta device, with the same numbers elsewhere."""
    if device.type != "meta":
        return tensor.detach().clone()
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _twins(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: _twins(value, device) if isinstance(value, Mapping) else value if name == "step" else _twin(value, device)
        for name, value in state.items()
    }

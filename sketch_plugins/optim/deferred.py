"""``nonfinite="deferred"``: gradients that are not finite are noticed on the device, and by the host a step later.

In a step the device computes a flag: whether the norm of all gradients is small. It multiplies the gradients, and (by a
`Gate`) the learning rate and the weight decay, by this flag. The flag is sent to the host, which reads it before the
next step. By then it has arrived long ago, so the host waits for nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.notices import warn
from sketch_plugins.optim.base import SketchOptimizer
from sketch_plugins.optim.checks import is_fake
from sketch_plugins.optim.finite import LARGEST
from sketch_plugins.optim.gate import Gate
from sketch_plugins.optim.taking import StepOfAll
from sketch_plugins.sharding.blocks import Matrix
from sketch_plugins.sharding.process_groups import reduces_on
from sketch_plugins.stores import Gradient

#: The values of ``nonfinite`` with which the host does not wait: it raises an error later, or it counts.
DEFERRED = ("deferred", "deferred_skip")
# Integers with the size of a number: times 0 every number, NaN and infinity too, becomes 0.0, and times 1 it stays.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_deferred(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the host does not wait for the gradients of these groups.

    Raises:
        ValueError: it would have to wait for those of some groups.
    """
    first = groups[0]["nonfinite"] if groups else "error"
    for number, group in enumerate(groups):
        if (group["nonfinite"] in DEFERRED) != (first in DEFERRED):
            raise ValueError(
                f"nonfinite is {first!r} in parameter group 0 and {group['nonfinite']!r} in group {number}. A step is "
                "taken or left out as a whole, so the host waits for the gradients of all groups or of none: use "
                "'error' and 'skip' only, or 'deferred' and 'deferred_skip' only"
            )
    return first in DEFERRED


def defer(optimizer: SketchOptimizer, taking: StepOfAll, among: Sequence[Mapping[str, Any]], late: Late) -> Gate:
    """Replace gradients by zeros, in place, if one of them is not finite. The host does not learn whether that is so.

    If parameters are spread over ranks, the ranks reduce the flag on the device, so that all have the same.

    Args:
        optimizer: the optimizer.
        taking: the step.
        among: see `SketchOptimizer._may_step`.
        late: sends the flag to the host.

    Returns:
        What decides on the device whether the weights move.

    Raises:
        ValueError: ZeRO runs the optimizer.
    """
    if optimizer._parts.zero_group(among) is not None:
        raise ValueError(
            f"nonfinite={among[0]['nonfinite']!r} is not possible with DeepSpeed's ZeRO, which takes the steps of its "
            "groups one after the other, and checks all gradients itself before the first of them: use "
            "nonfinite='error' or 'skip'"
        )
    # The kinds are the same on all ranks, whichever parameters have a gradient here.
    kinds = sorted({group["nonfinite"] for group in among})
    alike: dict[tuple[torch.device, torch.dtype, str], list[Tensor]] = {}
    odd: list[tuple[Tensor, Gradient]] = []
    for group, tensor, grad in taking.gradients():
        if tensor.numel() == 0 or tensor.device.type == "meta":  # without numbers
            continue
        alike.setdefault((tensor.device, tensor.dtype, group["nonfinite"]), []).append(tensor)
        if grad is not None and not _writable(tensor):
            odd.append((tensor, grad))
    others = optimizer._parts.mesh_groups(among)
    home = reduces_on(others) if others else next((device for device, _, _ in alike), torch.device("cpu"))
    each: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    for (_, _, kind), tensors in alike.items():
        each[kind].append(_small(tensors).to(home, torch.int32, non_blocking=home.type != "cpu"))
    all_small = [_least(flags, home) for flags in each.values()]
    flags = torch.stack(all_small) if len(all_small) > 1 else all_small[0].view(1)
    for group in others:
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MIN, group=group)
    gate = Gate(flags.amin() if len(kinds) > 1 else flags.view(()))
    replaced = {id(tensor) for tensor, _ in odd}
    # Gradients may have been made in inference mode, outside of which they could not be written.
    with torch.inference_mode():
        for (device, dtype, _), tensors in alike.items():
            bits = _BITS[dtype.itemsize]
            views = [tensor.view(bits) for tensor in tensors if id(tensor) not in replaced]
            if views:
                torch._foreach_mul_(views, gate.on(device, bits))
    for tensor, grad in odd:
        grad.matrix = Matrix(torch.where(gate.moves(tensor.device), tensor, 0.0), grad.matrix.batch)
    late.send(kinds, flags)
    return gate


def _small(tensors: Sequence[Tensor]) -> Tensor:
    """0-d bool: whether the norm of gradients of one dtype and device is small. float16 itself would overflow."""
    wide = tensors[0].dtype == torch.float64
    if tensors[0].dtype.itemsize == 1:  # torch has no norm of float8
        tensors = [tensor.float() for tensor in tensors]
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float64 if wide else torch.float32)
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    return norm < (torch.inf if wide else LARGEST)


def _least(flags: list[Tensor], home: torch.device) -> Tensor:
    if not flags:
        return torch.ones((), dtype=torch.int32, device=home)
    return flags[0] if len(flags) == 1 else torch.stack(flags).amin()


def _writable(tensor: Tensor) -> bool:
    """Whether the bits of a gradient can be multiplied in place: no two elements share memory, none is negated."""
    if tensor.is_contiguous():
        return not tensor.is_neg()
    return not tensor.is_neg() and torch._debug_has_internal_overlap(tensor) != 1


class Late:
    """Flags on their way to the host, and what it has found in them.

    Attributes:
        skipped: number of steps in which no weight moved, and which are counted only.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self._failed = self._warned = False
        self._sent: tuple[list[str], Tensor, Any] | None = None
        self._pinned: Tensor | None = None

    def send(self, kinds: list[str], flags: Tensor) -> None:
        """Send the flags of a step: for each kind of `DEFERRED`, whether the gradients of its groups are small."""
        if is_fake(flags):  # a plan, in which there is no number to send
            return
        if flags.device.type != "cuda":
            self._sent = kinds, flags, None
            return
        if self._pinned is None or self._pinned.shape != flags.shape:
            # A step outside of torch.inference_mode could not write a tensor that was made within it.
            with torch.inference_mode(False):
                self._pinned = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        with torch.cuda.device(flags.device):
            self._pinned.copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._sent = kinds, self._pinned, event

    def look(self) -> None:
        """Look at the flags of the last step, and count it, or note that it failed."""
        if self._sent is None:
            return
        (kinds, flags, event), self._sent = self._sent, None
        if event is not None:
            event.synchronize()
        small = dict(zip(kinds, flags.tolist(), strict=True))
        if not small.get("deferred", 1):
            self._failed = True
        elif not small.get("deferred_skip", 1):
            self.skipped += 1
            if not self._warned:
                self._warned = True
                warn(
                    "the gradients of the last step were not finite, or their norm was 1e18 or more. No weight has "
                    "moved in that step (nonfinite='deferred_skip'). Further steps of this kind are counted in "
                    "skipped_steps without a warning. If there are many, scale the loss or clip the gradients",
                    RuntimeWarning,
                )

    def check(self) -> None:
        """Raise ValueError if the last step failed, once."""
        self.look()
        if self._failed:
            self._failed = False
            raise ValueError(
                "the gradients of the last step were not finite, or their norm was 1e18 or more "
                "(nonfinite='deferred', so this is noticed only now). No weight has moved in that step, and nothing "
                "has been changed since. Scale the loss or clip the gradients, and call this again to go on. "
                "nonfinite='error' names the parameter, and nonfinite='deferred_skip' only counts such steps"
            )

    def end(self) -> None:
        """Warn of an error that nobody will be told any more, because the optimizer is gone or the program ends."""
        with contextlib.suppress(RuntimeError):  # the device may be gone, too
            self.look()
        if self._failed:
            warn(
                "the gradients of the very last step were not finite, or their norm was 1e18 or more. No weight has "
                "moved in that step (nonfinite='deferred'). Call check_last_step() at the end of a training to get "
                "an error",
                RuntimeWarning,
            )

    def forget(self) -> None:
        """Forget the last step, because other state was loaded."""
        self._sent, self._failed = None, False

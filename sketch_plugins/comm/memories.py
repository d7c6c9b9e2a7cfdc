"""The error memory of each parameter, and the entries that an iteration has sent of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MEMORY_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = ("error", "momentum")


class Sent(NamedTuple):
    """Entries that a parameter's memory has sent in an iteration, kept until it is known whether they have arrived.

    Attributes:
        slot: memory of the parameter.
        where: ``(k,)`` positions; None if all entries were sent. Then the memory still has all of them.
        values: ``(k,)`` values at ``where``, not scaled. Without ``where``: whether anything was sent, 0-d.
        velocity: ``(k,)``, the velocities that factor masking has cleared.
        limit: 0-d; without ``where`` the largest number that could be sent, not scaled; None if there is no limit.
    """

    slot: dict[str, Tensor]
    where: Tensor | None
    values: Tensor
    velocity: Tensor | None = None
    limit: Tensor | None = None


class Memories:
    """A memory for each parameter, under its name: flat tensors, ``error`` and, with ``momentum``, ``momentum``.

    Args:
        params: (name, parameter) pairs, in the same order on every rank.
        momentum: beta of momentum correction; 0: there are no velocities.
        memory_dtype: a key of `MEMORY_DTYPES`.
    """

    def __init__(self, params: Iterable[tuple[str, Tensor]], momentum: float, memory_dtype: str) -> None:
        self.momentum, self.memory_dtype = momentum, memory_dtype
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._sent: list[Sent] = []  # entries that the last iteration has sent
        self._flags: list[Tensor] = []  # for each of its buckets: whether it was not finite
        self._running = False
        self.bind(params)

    def bind(self, params: Iterable[tuple[str, Tensor]]) -> None:
        """Set, or set again, the name of each parameter: after unpickling, or if a framework has replaced parameters.

        An existing memory moves to the device of its parameter.

        Raises:
            ValueError: an entry is not a (name, parameter) pair; a name or a parameter appears twice; a parameter is
                complex; a memory belongs to a parameter that is missing, or that has another size. Nothing has changed
                then.
        """
        names: dict[int, tuple[int, str]] = {}
        bound: dict[str, Tensor] = {}
        for number, pair in enumerate(params):
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
                raise ValueError(
                    f"params must be (name, parameter) pairs, as model.named_parameters() yields them, not {pair!r}"
                )
            name, p = pair
            if id(p) in names or name in bound:
                raise ValueError(f"parameter {name!r} is given twice")
            if p.is_complex():
                raise ValueError(f"parameter {name!r} is complex ({p.dtype}); only real gradients can be compressed")
            names[id(p)] = number, name
            bound[name] = p
        if not bound:
            raise ValueError("params is empty: pass model.named_parameters()")
        memory = self.memory
        for name, slot in memory.items():
            if name not in bound or bound[name].numel() != slot["error"].numel():
                what = f"which now has {bound[name].numel()}" if name in bound else "which is no longer bound"
                raise ValueError(
                    f"there is a memory of {slot['error'].numel()} entries for parameter {name!r}, {what}: bind the "
                    "same parameters, or call state.reset() first"
                )
        for name, slot in memory.items():
            slot.update({kind: t.to(bound[name].device) for kind, t in slot.items()})
        self._names: dict[int, tuple[int, str]] = names
        # Kept alive, because another tensor could get the id of a freed one.
        self._bound: list[Tensor] = list(bound.values())

    @property
    def memory(self) -> dict[str, dict[str, Tensor]]:
        """The memory of each parameter that has one, after the last iteration."""
        self.settle()
        return self._memory

    def memory_norm(self) -> float:
        """The L2 norm of everything that this rank has not sent yet. This waits for the device."""
        norms = [torch.linalg.vector_norm(slot["error"].float()) for slot in self.memory.values()]
        return float(torch.linalg.vector_norm(torch.stack([n.cpu() for n in norms]))) if norms else 0.0

    def memory_bytes(self) -> int:
        """Bytes of memory on this rank."""
        return sum(t.nbytes for slot in self.memory.values() for t in slot.values())

    def number(self, p: Tensor) -> int:
        """Number of a parameter, equal on all ranks.

        Raises:
            ValueError: the parameter is not one of ``params``.
        """
        return self._find(p)[0]

    def slot(self, p: Tensor) -> dict[str, Tensor]:
        """The memory of a parameter, flat: ``error`` and, with momentum, ``momentum``; zeros at first.

        Raises:
            ValueError: the parameter is not one of ``params``.
        """
        name = self._find(p)[1]
        if name not in self._memory:
            dtype = self._dtype_for(p)
            kinds = KINDS if self.momentum else KINDS[:1]
            self._memory[name] = {kind: torch.zeros(p.numel(), dtype=dtype, device=p.device) for kind in kinds}
        return self._memory[name]

    def present(self, p: Tensor) -> dict[str, Tensor] | None:
        """The memory of a parameter, or None if it has none; with momentum all parameters have one."""
        return self.slot(p) if self.momentum else self._memory.get(self._find(p)[1])

    @property
    def empty(self) -> bool:
        """Whether there is no memory, so that only the gradients are averaged."""
        return not self._memory and not self.momentum

    def remember(self, sent: Sent) -> None:
        """Keep entries that have to be put back if a bucket of this iteration is not finite."""
        self._sent.append(sent)

    def arrived(self, bad: Tensor) -> None:
        """A bucket has arrived; ``bad`` (0-d, equal on all ranks) says whether it has a non-finite entry."""
        self._flags.append(bad)

    @torch.no_grad()
    def settle(self) -> None:
        """Finish the last iteration: if one of its buckets was not finite, put back what all of them have sent.

        GradScaler, or other code that checks gradients, then skips the step on all ranks. All ranks have the same flags
        at this point. On a GPU the host does not read them, because it would have to wait.
        """
        if self._running or not (self._sent or self._flags):
            return
        sent, flags = self._sent, self._flags
        self._sent, self._flags = [], []
        bad: dict[torch.device, Tensor] = {}
        for one in sent:
            error = one.slot["error"]
            if error.device not in bad:
                bad[error.device] = _any(flags, error.device)
            lost = bad[error.device]
            if one.where is None:
                gone = one.values & ~lost
                if one.limit is None:
                    error.masked_fill_(gone, 0.0)
                else:
                    error.sub_(torch.where(gone, error.clamp(-one.limit, one.limit), 0.0))
            elif lost.is_cuda or bool(lost):
                error.index_add_(0, one.where, torch.where(lost, one.values, 0.0).to(error.dtype))
                if one.velocity is not None:
                    u = one.slot["momentum"]
                    u.index_add_(0, one.where, torch.where(lost, one.velocity, 0.0).to(u.dtype))

    def _find(self, p: Tensor) -> tuple[int, str]:
        if id(p) not in self._names:
            raise ValueError(
                f"a bucket contains a parameter of shape {tuple(p.shape)} that is not among the "
                f"{len(self._names)} parameters of this MemSGDState. Build it with the named_parameters() of the "
                "model that DistributedDataParallel wraps, or call state.bind(model.named_parameters())"
            )
        return self._names[id(p)]

    def _dtype_for(self, p: Tensor) -> torch.dtype:
        return torch.float64 if p.dtype == torch.float64 else MEMORY_DTYPES[self.memory_dtype]

    def _put(self, memory: dict[str, dict[str, Tensor]]) -> None:
        """Replace all memories; nothing of these was sent."""
        self._memory, self._sent, self._flags, self._running = memory, [], [], False


def _any(flags: Sequence[Tensor], device: torch.device) -> Tensor:
    """Whether one of the flags is set, on a device."""
    for flag in flags:
        if flag.is_cuda:  # made on another stream, which could reuse its memory
            flag.record_stream(torch.cuda.current_stream(flag.device))
    if not flags:
        return torch.zeros((), dtype=torch.bool, device=device)
    return torch.stack([flag.to(device, non_blocking=True) for flag in flags]).any()

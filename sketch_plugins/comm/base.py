"""The interface of all compressors: pick entries of a vector, encode what is sent, and put it back into a vector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sketch_plugins.hashing import TABLE1, TABLE2
from sketch_plugins.kernels.rounding import ACCELERATOR_NOISE, CPU_NOISE, round_stochastically

# A function that sums a tensor over all ranks, in place.
Reduce = Callable[[Tensor], None]


class Payload(NamedTuple):
    """What is sent of a vector.

    Attributes:
        values: ``(count,)``, in the dtype of the vector.
        at: the places of the values. If the compressor is not ``shared``, this is the index that is sent (see
            `Compressor.positions`). Otherwise these are positions (int64), ``(count,)``, which every rank knows and
            which are not sent.
    """

    values: Tensor
    at: Tensor


class Compressor(ABC):
    r"""C: sends some of the d entries of a vector unchanged, and the others not at all.

    .. math:: \|x - C(x)\|^2 \le (1 - k/d)\, \|x\|^2

    for the k largest entries, and in expectation for k random ones. Entries are not scaled by d/k. The caller adds the
    entries that are not sent to the next vector (error feedback), and then nothing is lost.

    Compressors have no state; ``(step, key)`` seed all random choices. Attributes of a class:

    * ``name``: its name in options.
    * ``shared``: all ranks pick the same entries. Then their values are summed by an all-reduce, and no index is sent.
      Otherwise each rank picks its own entries, and payloads are gathered.
    """

    name: ClassVar[str]
    shared: ClassVar[bool]

    @abstractmethod
    def count(self, size: int, density: float) -> int:
        """Number of entries that are sent of ``size``: about ``density * size``, at least 1 (0 if ``size`` is 0)."""

    @abstractmethod
    def compress(
        self, x: Tensor, density: float, *, step: int = 0, key: int = 0, reduce: Reduce | None = None
    ) -> Payload:
        """Pick entries of ``x``, which is not changed.

        Args:
            x: ``(d,)``, floating point.
            density: k / d, in (0, 1].
            step: number of the iteration; equal on all ranks.
            key: number of the parameter; equal on all ranks.
            reduce: sums a tensor over the ranks in place, for compressors whose ranks agree before they pick. None:
                this rank picks alone.
        """

    def decompress(self, payload: Payload, size: int, density: float) -> Tensor:
        """``C(x)``: ``(size,)``, with zeros for all entries that were not sent."""
        x = payload.values.new_zeros(size)
        return x.index_add_(0, self.positions(payload.at, size, density), payload.values)

    def positions(self, index: Tensor, size: int, density: float) -> Tensor:
        """Positions (int64) in the vector, ``(count,)``, from an index in the form that is sent."""
        return index.long()

    @abstractmethod
    def wire_bytes(self, size: int, density: float, itemsize: int = 4) -> int:
        """Bytes that one rank gives to collectives for a vector of ``size`` entries of ``itemsize`` bytes.

        Values are sent in the dtype of the gradient; indices and tables may have other dtypes.
        """

    def take(
        self,
        memory: Tensor,
        grad: Tensor,
        gain: Tensor | float,
        density: float,
        *,
        step: int = 0,
        key: int = 0,
        reduce: Reduce | None = None,
        momentum: Tensor | None = None,
        beta: float = 0.0,
        masking: bool = True,
    ) -> Payload:
        r"""Add a gradient to its memory, pick entries, and clear them in the memory: the definition of a fused kernel.

        .. math::
            u \leftarrow \beta u + \text{gain} \cdot g, \quad m \leftarrow m + u, \quad
            \text{send } m_I, \quad m_I \leftarrow 0, \quad u_I \leftarrow 0

        Without ``momentum``, u is ``gain * g``. Setting ``u_I`` to 0 is DGC's factor masking (``masking``).

        Args:
            memory: m, ``(d,)``, float32, float64, or bfloat16 with stochastic rounding; changed.
            grad: g, ``(d,)``.
            gain: factor of g; a number or a 0-d tensor. If it is 0, g is not read (it may be infinite), and m and u
                change only where entries are picked.
            density: see `compress`.
            step: see `compress`; it also seeds the rounding.
            key: see `compress`; it also seeds the rounding.
            reduce: see `compress`.
            momentum: u, like ``memory``; changed.
            beta: decay rate of the momentum.
            masking: clear the momentum of the entries that are sent.
        """
        m, u = accumulate(memory, grad, gain, momentum, beta)
        payload = self.compress(m, density, step=step, key=key, reduce=reduce)
        positions = self.positions(payload.at, len(m), density)
        m.index_fill_(0, positions, 0.0)
        if u is not None and masking:
            u.index_fill_(0, positions, 0.0)
        write_rounded(memory, m, key ^ TABLE1, step)
        if momentum is not None:
            assert u is not None
            write_rounded(momentum, u, key ^ TABLE2, step)
        return payload


def take_all(
    memory: Tensor,
    grad: Tensor,
    gain: Tensor | float,
    *,
    step: int = 0,
    key: int = 0,
    momentum: Tensor | None = None,
    beta: float = 0.0,
) -> Tensor:
    """Like `Compressor.take` with all entries picked, but nothing is cleared: returns m, ``(d,)``.

    The memory stays the vector to be sent, so nothing has to be put back if it does not arrive. The result is the
    memory itself, or for bfloat16 a float32 copy that has not been rounded.
    """
    m, u = accumulate(memory, grad, gain, momentum, beta)
    sent = m if m is memory else m.clone()  # a copy, because m is rounded in place below
    write_rounded(memory, m, key ^ TABLE1, step)
    if momentum is not None:
        assert u is not None
        write_rounded(momentum, u, key ^ TABLE2, step)
    return sent


def accumulate(
    memory: Tensor, grad: Tensor, gain: Tensor | float, momentum: Tensor | None, beta: float
) -> tuple[Tensor, Tensor | None]:
    """``u <- beta * u + gain * g; m <- m + u``, without momentum ``m <- m + gain * g``; nothing if ``gain`` is 0.

    Returns:
        m and u: the given tensors, changed; for bfloat16 copies in float32, for `write_rounded`.
    """
    low = memory.dtype == torch.bfloat16
    m, u = (memory.float(), None if momentum is None else momentum.float()) if low else (memory, momentum)
    if not isinstance(gain, Tensor):
        if gain == 0.0:
            return m, u
        g = grad.to(m.dtype)
        g = g * gain if gain != 1.0 else g
        if u is not None:
            g = u.mul_(beta).add_(g)
        m.add_(g)
        return m, u
    # The same as above without reading `gain`, because the host would have to wait for the device.
    none = gain == 0
    g = (grad.to(m.dtype) * gain).masked_fill_(none, 0.0)
    if u is not None:
        u.mul_(torch.full((), beta, dtype=u.dtype, device=u.device).masked_fill_(none, 1.0)).add_(g)
        g = torch.where(none, 0.0, u)
    m.add_(g)
    return m, u


def write_rounded(memory: Tensor, x: Tensor, key: int, step: int) -> None:
    """Write x into a memory of bfloat16 with stochastic rounding (x is rounded, too); otherwise x is the memory."""
    if memory is x:
        return
    # In blocks, because the noise takes 40 bytes for each entry while it is drawn.
    block = CPU_NOISE if x.device.type == "cpu" else ACCELERATOR_NOISE
    for start in range(0, len(x), block):
        part = x[start : start + block]
        round_stochastically(part, torch.arange(start, start + len(part), device=x.device), key, step)
    memory.copy_(x)


def check_density(density: float, name: str = "density") -> float:
    """Return the density unchanged.

    Raises:
        ValueError: it is not a number in (0, 1].
    """
    if not isinstance(density, (int, float)) or isinstance(density, bool) or not 0 < density <= 1:
        raise ValueError(f"{name}={density!r} is not allowed: {name} must be a number in (0, 1]")
    return float(density)


def check_seed(seed: int) -> int:
    """Return the seed unchanged.

    Raises:
        ValueError: it is not an integer.
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed={seed!r} is not allowed: seed must be an integer")
    return seed


def entries(size: int, density: float) -> int:
    """``density * size`` rounded to the nearest integer, but at least 1 and at most ``size``."""
    return min(size, max(1, round(density * size)))


def largest(x: Tensor, k: int) -> Tensor:
    """Positions (int64) of the k numbers of largest magnitude along the last dimension, unordered."""
    return torch.topk(x.abs(), k, dim=-1, sorted=False).indices


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device without waiting: a GPU reads it from pinned memory when it gets there."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)

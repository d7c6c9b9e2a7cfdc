"""The communication hook of DistributedDataParallel."""

# Without `from __future__ import annotations`: DistributedDataParallel compares the annotations of its hooks to types.

import math
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from sketch_plugins.comm.base import take_all
from sketch_plugins.comm.memories import Sent
from sketch_plugins.comm.state import MemSGDState

# torch's newer name, if it exists, because the older one warns then. Typed as Any, because newer annotations allow the
# result None, which never occurs with async_op=True.
_all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

_ATTACHED: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()


def attach(model: DistributedDataParallel, **options: Any) -> MemSGDState:
    """Register `memsgd_hook` on a DistributedDataParallel and return its state.

    Args:
        model: the model, before its first backward pass; it takes one hook.
        options: options of `MemSGDState`. Its parameters and process group are the model's.

    Raises:
        ValueError: ``model`` is of another type, or has a communication hook already; see `MemSGDState`.
    """
    if not isinstance(model, DistributedDataParallel):
        raise ValueError(
            f"model is a {type(model).__name__}, but gradients are compressed in DistributedDataParallel "
            "only: wrap the model in it first"
        )
    if model in _ATTACHED:  # DistributedDataParallel would store a second hook before it refuses it
        raise ValueError(_TWICE)
    state = MemSGDState(model.module.named_parameters(), process_group=model.process_group, **options)
    try:
        model.register_comm_hook(state, memsgd_hook)
    except RuntimeError as error:
        if "only be called once" not in str(error):
            raise
        raise ValueError(_TWICE) from error
    _ATTACHED.add(model)
    return state


_TWICE = (
    "model already has a communication hook, and DistributedDataParallel supports one: use the state "
    "that the hook was given, or wrap the module in a new DistributedDataParallel"
)


@torch.no_grad()
def memsgd_hook(state: MemSGDState, bucket: dist.GradBucket) -> Future[Tensor]:
    r"""Average a bucket of gradients, but send only some of their entries: see `MemSGDState`.

    Use: ``ddp.register_comm_hook(state, memsgd_hook)``. The behaviour in special cases:

    * In the first ``state.start`` iterations, with density 1, and for sparse gradients, everything is averaged; with
      momentum the velocities are.
    * If a gradient is not finite on some rank, every rank's bucket becomes NaN, so that a GradScaler or a check of the
      norm skips the step on all ranks. That gradient is not added to its memory, and the entries that all buckets of
      the iteration have sent are put back (`MemSGDState.settle`). The flag is sent with the values, so there is no
      further message, and no rank waits for a device.
    * For a parameter whose gradient is 0 on this rank (not used there, or this rank has left the `Join`), zeros are
      sent and the memory is kept: DistributedDataParallel would not apply it to a parameter that no rank has used.
    * Within ``no_sync`` the hook is not called; gradients accumulate as usual.
    * If a value does not fit the gradient's dtype, the part that rounding removes stays in the memory.
    * Every rank sums in the order of the ranks, so replicas stay equal bit for bit.

    Raises:
        ValueError: a bucket has a parameter that the state does not know, or a sparse gradient with momentum. In the
            first iteration, and in the first one after a state was loaded: the ranks are at different iterations, or
            have different options.
    """
    if bucket.index() == 0:
        state.agree(bucket.buffer().device)
        state.begin()
    if bucket.buffer().is_sparse:
        future = _average_sparse(state, bucket.buffer())
    elif state.density == 1.0:
        for part in _open(state, bucket)[1]:
            # So that an unknown parameter is an error now, and not in the first iteration that needs its number.
            state.number(part.p)
            if state.clip or not state.empty:
                _whole(state, part, _peak(part))
        future = _average(state, bucket.buffer())
    elif state.compressor.shared:
        future = _reduce(state, bucket)
    else:
        future = _gather(state, bucket)
    if bucket.is_last():
        state.end()
    return future


def _average(state: MemSGDState, buffer: Tensor) -> Future[Tensor]:
    # The same operations as DistributedDataParallel's without a hook, so that density 1 computes the same bits.
    state.sent(buffer.nbytes, buffer.nbytes)
    buffer.div_(state.world_size)
    work = dist.all_reduce(buffer, group=state.process_group, async_op=True)

    @torch.no_grad()
    def unpack(done: Future[Any]) -> Tensor:
        total: Tensor = done.value()[0]
        if not state.empty and total.numel():  # the sum is equal on all ranks, and so are its non-finite entries
            state.arrived(~torch.isfinite(torch.linalg.vector_norm(total, math.inf)))
        return total

    return work.get_future().then(unpack)


def _average_sparse(state: MemSGDState, buffer: Tensor) -> Future[Tensor]:
    if state.momentum:
        raise ValueError(
            f"momentum={state.momentum!r} does not support the sparse gradient of shape "
            f"{tuple(buffer.shape)}, because its velocity would not be sparse. Use momentum=0, or build the "
            "embedding with sparse=False"
        )
    if state.clip:
        values = buffer.coalesce().values()
        buffer.mul_((_bound(state) / _norm(values) * state.scale).clamp(max=1.0).to(buffer.dtype))
    entries = buffer.coalesce()
    size = entries.values().nbytes + entries.indices().nbytes
    state.sent(size, size)
    buffer.div_(state.world_size)
    work = dist.all_reduce(buffer, group=state.process_group, async_op=True)

    @torch.no_grad()
    def unpack(done: Future[Any]) -> Tensor:
        total: Tensor = done.value()[0]
        if not state.empty:
            state.arrived(~torch.isfinite(total.coalesce().values()).all())
        return total

    return work.get_future().then(unpack)


class _Part:
    """A parameter in a bucket: the place of its gradient, and whether all of it is sent."""

    def __init__(self, state: MemSGDState, buffer: Tensor, grad: Tensor, p: Tensor) -> None:
        self.begin: int = grad.storage_offset() - buffer.storage_offset()  # type: ignore[assignment]
        self.size: int = grad.numel()
        self.grad: Tensor = buffer[self.begin : self.begin + self.size]
        # A compressed message can be longer than the gradient: for example, with indices, at a high density.
        density, compressor = state.density, state.compressor
        wire = compressor.wire_bytes(self.size, density, grad.element_size()) if self.size >= state.min_size else 0
        self.whole = self.size < state.min_size or wire >= self.grad.nbytes
        self.p = p


def _take(state: MemSGDState, buffer: Tensor, parts: list[_Part]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Start of the rank's message (a flag, the values of all parts); indices to be sent; positions in the bucket."""
    values: list[Tensor] = []
    index: list[Tensor] = []
    positions: list[Tensor] = []
    fine = torch.ones((), dtype=torch.bool, device=buffer.device)
    density, compressor = state.density, state.compressor
    for part in parts:
        peak = _peak(part)
        if part.whole:
            fine = fine & _whole(state, part, peak)
            values.append(part.grad)
            continue
        slot = state.slot(part.p)
        gain, ok = _gain(state, part, peak)
        momentum = slot.get("momentum")
        payload = compressor.take(
            slot["error"], part.grad, gain, density,
            step=state.iteration, key=state.number(part.p), reduce=lambda t: _sum(state, t),
            momentum=momentum, beta=state.momentum, masking=False,
        )  # fmt: skip
        fine = fine & ok & torch.isfinite(payload.values).all()
        picked = payload.values.nan_to_num(0.0, 0.0, 0.0)  # a memory that has overflowed starts again from 0
        where = compressor.positions(payload.at, part.size, density)
        # An entry that has waited long may be too large for half precision: the rest is sent in the next iteration.
        limit, scaled, used = torch.finfo(buffer.dtype).max, picked * state.scale, peak > 0
        sent = torch.where(used, scaled, 0.0).clamp(-limit, limit).to(buffer.dtype)
        # Put back what was picked but not sent: all of it without a gradient, else the part that the dtype cannot hold.
        went = sent.to(picked.dtype) / state.scale
        slot["error"].index_add_(0, where, (picked - went).to(slot["error"].dtype))
        velocity = None
        if momentum is not None and state.factor_masking:  # not in `take`, because only now it is known what is sent
            velocity = torch.where(used & (scaled.abs() <= limit), momentum[where], 0.0)
            momentum.index_add_(0, where, -velocity)
        state.remember(Sent(slot, where, went, velocity))
        values.append(sent)
        index.append(payload.at)
        positions.append(where + part.begin)
    flag = torch.where(fine, 0.0, 1.0).to(buffer.dtype).reshape(1)
    return torch.cat([flag, *values]), index, positions


def _whole(state: MemSGDState, part: _Part, peak: Tensor) -> Tensor:
    """Write into the bucket what is sent of a parameter that is sent whole; return whether it is finite.

    That is its gradient (with momentum its velocity) and the rest of the memory from iterations that sent only some
    entries. The memory keeps all of this until it has arrived, and as long as there is no gradient.
    """
    gain, ok = _gain(state, part, peak)
    slot = state.present(part.p)
    if slot is None:
        if state.clip:
            part.grad.mul_(gain * state.scale)
        return ok
    x = take_all(
        slot["error"], part.grad, gain,
        step=state.iteration, key=state.number(part.p), momentum=slot.get("momentum"), beta=state.momentum,
    )  # fmt: skip
    used, limit = peak > 0, None
    scaled = x if isinstance(state.scale, float) and state.scale == 1.0 else x * state.scale
    if part.grad.dtype == torch.float16:  # a velocity may be too large for float16, even if the gradient is not
        largest = torch.finfo(torch.float16).max
        scaled, limit = scaled.clamp(-largest, largest), torch.full_like(peak, largest, dtype=x.dtype) / state.scale
    part.grad.copy_(scaled).masked_fill_(~used, 0.0).masked_fill_(~ok, math.nan)
    state.remember(Sent(slot, None, used, limit=limit))
    return ok


def _peak(part: _Part) -> Tensor:
    return torch.linalg.vector_norm(part.grad, math.inf) if part.size else part.grad.new_zeros(())


def _gain(state: MemSGDState, part: _Part, peak: Tensor) -> tuple[Tensor | float, Tensor]:
    """The factor of a gradient that is added to its memory (0 if it is not finite), and whether it is finite."""
    gain, ok = 1.0 / state.scale, torch.isfinite(peak)
    if state.clip:
        norm = _norm(part.grad) * gain
        ok = ok & torch.isfinite(norm)
        gain = gain * (_bound(state) / norm).clamp(max=1.0)
    if ok.is_cuda:  # so that the host does not wait for the device
        return torch.where(ok, gain, 0.0), ok
    return gain if bool(ok) else 0.0, ok


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _bound(state: MemSGDState) -> float:
    """Bound of a local norm, not scaled."""
    return state.clip / math.sqrt(state.world_size)


def _gather(state: MemSGDState, bucket: dist.GradBucket) -> Future[Tensor]:
    """Each rank picks for itself: one message gathers the values and indices of all ranks, as bytes."""
    buffer, parts = _open(state, bucket)
    values, index, _ = _take(state, buffer, parts)
    message = torch.cat([values.view(torch.uint8), *(i.view(torch.uint8) for i in index)])
    state.sent(message.nbytes, buffer.nbytes)
    received = message.new_empty(state.world_size * len(message))
    work = _all_gather(received, message, group=state.process_group, async_op=True)
    world, density = state.world_size, state.density

    @torch.no_grad()
    def unpack(done: Future[Any]) -> Tensor:
        done.value()
        table = received.view(world, -1)
        theirs = _column(table, 0, values.nbytes, buffer.dtype)
        cut = values.nbytes
        bad = (theirs[:, 0] != 0).any()
        out = _blank(buffer)
        shares = theirs.to(out.dtype).div_(world)
        at, i, where, what = 1, 0, [], []
        for part in parts:
            if part.whole:
                torch.sum(shares[:, at : at + part.size], 0, out=out[part.begin : part.begin + part.size])
                at += part.size
                continue
            width = index[i].nbytes
            picked = _column(table, cut, width, index[i].dtype)
            where.append(_positions(state, picked, part.size, density) + part.begin)
            what.append(shares[:, at : at + where[-1].shape[1]])
            at, cut, i = at + where[-1].shape[1], cut + width, i + 1
        if where:
            _add(out, torch.cat(where, 1).flatten(), torch.cat(what, 1).flatten())
        return _close(state, buffer, out, bad)

    return work.get_future().then(unpack)


def _reduce(state: MemSGDState, bucket: dist.GradBucket) -> Future[Tensor]:
    """All ranks have picked the same entries: an all-reduce sums the values."""
    buffer, parts = _open(state, bucket)
    message, _, positions = _take(state, buffer, parts)
    c, density, item = state.compressor, state.density, buffer.element_size()
    sizes = [part.size for part in parts if not part.whole]
    tables = sum(c.wire_bytes(size, density, item) - item * c.count(size, density) for size in sizes)
    state.sent(message.nbytes + tables, buffer.nbytes)
    work = dist.all_reduce(message.div_(state.world_size), group=state.process_group, async_op=True)

    @torch.no_grad()
    def unpack(done: Future[Any]) -> Tensor:
        total = done.value()[0]
        out, at, i = _blank(buffer), 1, 0
        for part in parts:
            count = part.size if part.whole else len(positions[i])
            if part.whole:
                out[part.begin : part.begin + part.size] = total[at : at + count]
            else:
                if out.is_cuda:  # the positions were made on another stream, which could reuse their memory
                    positions[i].record_stream(torch.cuda.current_stream())
                out[positions[i]] = total[at : at + count].to(out.dtype)
                i += 1
            at += count
        # A sum can overflow even if its terms do not: 65504 / 3 is rounded up in float16, and three of them are
        # infinite.
        return _close(state, buffer, out, (total[0] != 0) | ~torch.isfinite(total).all())

    return work.get_future().then(unpack)


def _open(state: MemSGDState, bucket: dist.GradBucket) -> tuple[Tensor, list[_Part]]:
    buffer = bucket.buffer()
    return buffer, [
        _Part(state, buffer, grad, p) for grad, p in zip(bucket.gradients(), bucket.parameters(), strict=True)
    ]


def _blank(buffer: Tensor) -> Tensor:
    """Zeros for the sum: the bucket itself, which has been copied by now, or for half precision a float32 tensor."""
    if buffer.dtype in (torch.float32, torch.float64):
        return buffer.zero_()
    return torch.zeros_like(buffer, dtype=torch.float32)


def _close(state: MemSGDState, buffer: Tensor, out: Tensor, bad: Tensor) -> Tensor:
    if out is not buffer:
        buffer.copy_(out)
    if bad.is_cuda or bool(bad):  # on a GPU always, because reading the flag would wait for the device
        buffer.masked_fill_(bad, math.nan)
    state.arrived(bad)
    return buffer


def _column(table: Tensor, begin: int, width: int, dtype: torch.dtype) -> Tensor:
    """The numbers of every rank at one place of the message; a copy, because rows may not be aligned to the dtype."""
    out = torch.empty(len(table), width // dtype.itemsize, dtype=dtype, device=table.device)
    out.view(torch.uint8).copy_(table[:, begin : begin + width])
    return out


def _positions(state: MemSGDState, picked: Tensor, size: int, density: float) -> Tensor:
    return torch.stack([state.compressor.positions(row, size, density) for row in picked])


def _add(out: Tensor, where: Tensor, what: Tensor) -> None:
    # Several ranks may have the same position. On a GPU index_add_ would add them in any order; index_put_ sorts them.
    if out.is_cuda:
        out.index_put_((where,), what, accumulate=True)
    else:
        out.index_add_(0, where, what)


def _sum(state: MemSGDState, tensor: Tensor) -> None:
    # Called in order on every rank. If callbacks started collectives, those of several buckets could cross.
    dist.all_reduce(tensor, group=state.process_group)

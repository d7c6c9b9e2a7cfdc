"""The communication hook of DistributedDataParallel."""

# No `from __future__ import annotations`: DistributedDataParallel compares the annotations of its hooks with the types.

import math
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from sketch_plugins.comm.base import take_all
from sketch_plugins.comm.state import MemSGDState, Sent

# By its newer name where there is one: the older one warns there. Of any type: newer annotations allow for no work,
# which there always is with async_op=True.
_all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)

_ATTACHED: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()


def attach(model: DistributedDataParallel, **options: Any) -> MemSGDState:
    """Register `memsgd_hook` on a DistributedDataParallel and return its state.

    Args:
        model: before its first backward pass; it takes one hook.
        options: those of `MemSGDState`, whose parameters and process group are the model's.

    Raises:
        ValueError: ``model`` is something else, or has a communication hook; see `MemSGDState`.
    """
    if not isinstance(model, DistributedDataParallel):
        raise ValueError(
            f"model is a {type(model).__name__}, but gradients are compressed in DistributedDataParallel "
            "only: wrap the model in it first"
        )
    if model in _ATTACHED:  # DistributedDataParallel would note the second hook before it refuses it
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
    r"""Average a bucket of gradients, sending only some of their entries: see `MemSGDState`.

    ``ddp.register_comm_hook(state, memsgd_hook)``. What it does about

    * the first ``state.start`` iterations, density 1, sparse gradients: averages everything, with momentum velocities;
    * a gradient that is not finite on some rank: every rank's bucket becomes NaN, so that a GradScaler or a check of
      the norm skips the step on all ranks alike. That gradient is not added to its memory, and what all buckets of the
      iteration have sent is put back (`MemSGDState.settle`). The flag travels with the values: no further message, and
      nobody waits for a device;
    * a parameter whose gradient is 0 on this rank (not used there, or this rank has left the `Join`): sends zeros and
      keeps its memory, which DistributedDataParallel would not apply to a parameter that no rank has used;
    * ``no_sync``: is not called then; gradients accumulate as ever;
    * values that do not fit the gradient's dtype: what rounding cuts off stays in the memory;
    * the order of sums: that of the ranks, on every rank. Replicas stay equal bit by bit.

    Raises:
        ValueError: a bucket has a parameter that the state does not know, or, with momentum, a sparse gradient; in the
            first iteration, and in the first after a state was loaded: ranks are at different iterations, or have other
            options.
    """
    if bucket.index() == 0:
        state.agree(bucket.buffer().device)
        state.begin()
    if bucket.buffer().is_sparse:
        future = _average_sparse(state, bucket.buffer())
    elif state.density == 1.0:
        for part in _open(state, bucket)[1]:
            state.number(part.p)  # now, not in the first iteration that needs it
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
    # As DistributedDataParallel does without a hook, so that density 1 is that bit for bit.
    state.sent(buffer.nbytes, buffer.nbytes)
    buffer.div_(state.world_size)
    work = dist.all_reduce(buffer, group=state.process_group, async_op=True)

    @torch.no_grad()
    def unpack(done: Future[Any]) -> Tensor:
        total: Tensor = done.value()[0]
        if not state.empty and total.numel():  # the sum is the same everywhere, and so is what is not finite in it
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
    """A parameter in a bucket: where its gradient is, and what of it is sent."""

    def __init__(self, state: MemSGDState, buffer: Tensor, grad: Tensor, p: Tensor) -> None:
        self.begin: int = grad.storage_offset() - buffer.storage_offset()  # type: ignore[assignment]
        self.size: int = grad.numel()
        self.grad: Tensor = buffer[self.begin : self.begin + self.size]
        # Some would be more than all: of a vector of 1000 entries the index of the largest ones, and so on.
        density, compressor = state.density, state.compressor
        wire = compressor.wire_bytes(self.size, density, grad.element_size()) if self.size >= state.min_size else 0
        self.whole = self.size < state.min_size or wire >= self.grad.nbytes
        self.p = p


def _take(state: MemSGDState, buffer: Tensor, parts: list[_Part]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """What every rank's message begins with (a flag, the values of all parts), indices, positions in the bucket."""
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
        picked = payload.values.nan_to_num(0.0, 0.0, 0.0)  # a memory that has overflowed begins anew
        where = compressor.positions(payload.at, part.size, density)
        # An entry that has waited may be too large for half precision: the rest goes next time.
        limit, scaled, used = torch.finfo(buffer.dtype).max, picked * state.scale, peak > 0
        sent = torch.where(used, scaled, 0.0).clamp(-limit, limit).to(buffer.dtype)
        # What was picked but not sent: all of it where there was no gradient, else what the dtype cannot say.
        went = sent.to(picked.dtype) / state.scale
        slot["error"].index_add_(0, where, (picked - went).to(slot["error"].dtype))
        velocity = None
        if momentum is not None and state.factor_masking:  # here, as only now it is known what is sent
            velocity = torch.where(used & (scaled.abs() <= limit), momentum[where], 0.0)
            momentum.index_add_(0, where, -velocity)
        state.remember(Sent(slot, where, went, velocity))
        values.append(sent)
        index.append(payload.at)
        positions.append(where + part.begin)
    flag = torch.where(fine, 0.0, 1.0).to(buffer.dtype).reshape(1)
    return torch.cat([flag, *values]), index, positions


def _whole(state: MemSGDState, part: _Part, peak: Tensor) -> Tensor:
    """Make a part of the bucket what is sent of a parameter that is sent whole; returns whether it is finite.

    That is its gradient, with momentum its velocity, and what is left of a time when it was sent in parts. The memory
    keeps it until it has arrived, and as long as there is no gradient.
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
    if part.grad.dtype == torch.float16:  # a velocity may be too large for it, where the gradient is not
        largest = torch.finfo(torch.float16).max
        scaled, limit = scaled.clamp(-largest, largest), torch.full_like(peak, largest, dtype=x.dtype) / state.scale
    part.grad.copy_(scaled).masked_fill_(~used, 0.0).masked_fill_(~ok, math.nan)
    state.remember(Sent(slot, None, used, limit=limit))
    return ok


def _peak(part: _Part) -> Tensor:
    return torch.linalg.vector_norm(part.grad, math.inf) if part.size else part.grad.new_zeros(())


def _gain(state: MemSGDState, part: _Part, peak: Tensor) -> tuple[Tensor | float, Tensor]:
    """What a gradient is multiplied by before it is added to its memory, and whether it is finite: if not, 0."""
    gain, ok = 1.0 / state.scale, torch.isfinite(peak)
    if state.clip:
        norm = _norm(part.grad) * gain
        ok = ok & torch.isfinite(norm)
        gain = gain * (_bound(state) / norm).clamp(max=1.0)
    if ok.is_cuda:  # nobody waits for it
        return torch.where(ok, gain, 0.0), ok
    return gain if bool(ok) else 0.0, ok


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _bound(state: MemSGDState) -> float:
    """Of a local norm, not scaled."""
    return state.clip / math.sqrt(state.world_size)


def _gather(state: MemSGDState, bucket: dist.GradBucket) -> Future[Tensor]:
    """Each rank picks for itself: all ranks' values and indices, as bytes, in one message."""
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
    """All ranks have picked the same: values are added on the way."""
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
                if out.is_cuda:  # made on another stream, which could use their memory again
                    positions[i].record_stream(torch.cuda.current_stream())
                out[positions[i]] = total[at : at + count].to(out.dtype)
                i += 1
            at += count
        # The sum of what fits may not: 65504 / 3 is rounded up in float16, and three of them are infinite.
        return _close(state, buffer, out, (total[0] != 0) | ~torch.isfinite(total).all())

    return work.get_future().then(unpack)


def _open(state: MemSGDState, bucket: dist.GradBucket) -> tuple[Tensor, list[_Part]]:
    buffer = bucket.buffer()
    return buffer, [
        _Part(state, buffer, grad, p) for grad, p in zip(bucket.gradients(), bucket.parameters(), strict=True)
    ]


def _blank(buffer: Tensor) -> Tensor:
    """Where the sum is made: in the bucket, of which everything has been copied, or in float32 for half precision."""
    if buffer.dtype in (torch.float32, torch.float64):
        return buffer.zero_()
    return torch.zeros_like(buffer, dtype=torch.float32)


def _close(state: MemSGDState, buffer: Tensor, out: Tensor, bad: Tensor) -> Tensor:
    if out is not buffer:
        buffer.copy_(out)
    if bad.is_cuda or bool(bad):  # on a GPU nobody looks: it would have to be waited for
        buffer.masked_fill_(bad, math.nan)
    state.arrived(bad)
    return buffer


def _column(table: Tensor, begin: int, width: int, dtype: torch.dtype) -> Tensor:
    """Every rank's numbers at one place of the message; a copy, as a row need not begin where a number may."""
    out = torch.empty(len(table), width // dtype.itemsize, dtype=dtype, device=table.device)
    out.view(torch.uint8).copy_(table[:, begin : begin + width])
    return out


def _positions(state: MemSGDState, picked: Tensor, size: int, density: float) -> Tensor:
    return torch.stack([state.compressor.positions(row, size, density) for row in picked])


def _add(out: Tensor, where: Tensor, what: Tensor) -> None:
    # Positions of several ranks may be equal: on a GPU index_add_ would add them in any order, index_put_ sorts them.
    if out.is_cuda:
        out.index_put_((where,), what, accumulate=True)
    else:
        out.index_add_(0, where, what)


def _sum(state: MemSGDState, tensor: Tensor) -> None:
    # One after the other on every rank: started from callbacks, collectives of several buckets could cross.
    dist.all_reduce(tensor, group=state.process_group)

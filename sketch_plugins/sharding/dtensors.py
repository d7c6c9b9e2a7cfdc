"""DTensors: their local shards, and the state of a shard as DTensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.sharding.tensors import plain


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor.

    The class is recognized by its name, because importing `torch.distributed.tensor` costs a second, and builds of
    torch without distributed do not have it.
    """
    return any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__)


def local_of(p: Tensor) -> Tensor:
    """The local shard of a DTensor; any other tensor unchanged."""
    return _local(p) if is_dtensor(p) else p


def local_grad(p: Any) -> Tensor:
    """The local shard of a gradient, which must exist."""
    grad = p.grad
    if not is_dtensor(grad):
        return plain(grad)
    if grad.placements != p.placements:  # tensor parallelism may leave partial sums
        grad = grad.redistribute(p.device_mesh, p.placements)
    return _local(grad)


def local_shards(tensors: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
    """The local shards of DTensors, and their layouts; the layout stays the same object until it changes.

    This reads DTensor's private attributes, at a tenth of the time of ``to_local``, because it reads them for every
    parameter in every step.
    """
    return list(map(_LOCAL, tensors)), list(map(_LAYOUT, tensors))


def gradients_of_shards(grads: Sequence[Any], layouts: Sequence[Any]) -> list[Any] | None:
    """The local shards of gradients; None unless each is a DTensor with the placements of its parameter."""
    try:
        local, own = local_shards(grads)
    except AttributeError:  # an ordinary tensor is among them
        return None
    same = all(map(is_, own, layouts)) or list(map(_PLACEMENTS, own)) == list(map(_PLACEMENTS, layouts))
    return local if same else None


_LOCAL, _LAYOUT, _PLACEMENTS = attrgetter("_local_tensor"), attrgetter("_spec"), attrgetter("placements")


def _local(tensor: Any) -> Tensor:
    with torch.no_grad():
        local = tensor.to_local()
    # Wait for a reduction that is not finished.
    return local.wait() if hasattr(local, "wait") else local


def offsets(p: Any) -> tuple[int, ...]:
    """The offsets of a DTensor's local shard, one for each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)[1])


def wrap(p: Any, tensors: Mapping[str, Any], layout: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a DTensor's local shard as DTensors, which a distributed checkpoint stores separately for each rank.

    A tensor of size s becomes one of size (W, *s) that is sharded along the first dimension (one such dimension for
    each mesh dimension that shards the parameter). Plain tensors would count as equal on all ranks, and only one would
    be saved.

    Args:
        p: the parameter.
        tensors: its state; nested.
        layout: name -> size of the largest shard's state, nested likewise. All ranks have to agree on a size, so
            smaller tensors are padded with zeros.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements: list[Any] = []
    for placement in p.placements:
        shards = sum(1 for one in placements if not one.is_replicate())
        placements.append(Replicate() if placement.is_replicate() else Shard(shards))
    lead = sum(1 for one in placements if not one.is_replicate())

    def one(name: str, tensor: Any, size: Any) -> Any:
        extra = set(tensor or ()) - set(size) if isinstance(size, Mapping) else ()
        if extra:
            raise ValueError(
                f"{', '.join(sorted(extra))} of {name} cannot be saved in a checkpoint of shape {tuple(p.shape)} "
                f"with placements {p.placements}, because the largest shard has no such tensor. Shard whole rows: "
                "Shard(0)"
            )
        if isinstance(size, Mapping):
            return {key: one(key, (tensor or {}).get(key), value) for key, value in size.items()}
        shape, dtype = size
        if tensor is None or tuple(tensor.shape) != tuple(shape):
            full = torch.zeros(shape, dtype=dtype, device=p.device)
            if tensor is not None:
                full[tuple(map(slice, tensor.shape))] = tensor
            tensor = full
        tensor = tensor.to(p.device)
        return DTensor.from_local(
            tensor.reshape((1,) * lead + tuple(tensor.shape)), p.device_mesh, placements, run_check=False
        )

    own = {name: tensor for name, tensor in tensors.items() if name != "step"}
    return one("the state", own, layout)


def unwrap(value: Any, lead: int) -> Any:
    """This rank's part of what `wrap` made; nested. ``lead`` is the number of dimensions that `wrap` added."""
    if isinstance(value, Mapping):
        return {key: unwrap(v, lead) for key, v in value.items()}
    if isinstance(value, Tensor) and is_dtensor(value):
        local = _local(value)
        return local.reshape(local.shape[lead:]) if all(n == 1 for n in local.shape[:lead]) else local
    return value


def trim(value: Any, layout: Any) -> Any:
    """Tensors without their padding, cut to the sizes of ``layout``; a tensor that does not fit is left unchanged.

    Later checks report such a tensor.
    """
    if isinstance(layout, Mapping):
        if not isinstance(value, Mapping):
            return value
        return {key: trim(value[key], size) for key, size in layout.items() if key in value}
    shape = layout[0]
    if not isinstance(value, Tensor) or value.ndim != len(shape) or any(map(int.__lt__, value.shape, shape)):
        return value
    return value[tuple(map(slice, shape))]


def leading(p: Any) -> int:
    """Number of dimensions that `wrap` puts in front of the state."""
    return sum(1 for placement in p.placements if not placement.is_replicate())


def largest(p: Any) -> Tensor:
    """A tensor without memory, with the maximum shape of a local shard of a DTensor."""
    shape = list(p.shape)
    for k, placement in enumerate(p.placements):
        if not placement.is_replicate():
            shape[placement.dim] = -(-shape[placement.dim] // p.device_mesh.size(k))
    return torch.empty(shape, dtype=p.dtype, device="meta")

"""What takes a step of its own: a parameter, the local shard of a DTensor, a piece of a flat partition."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.sharding import deepspeed
from sketch_plugins.sharding.pieces import Original, Piece, is_lazy, pieces
from sketch_plugins.sharding.state_names import is_ours, nested


@dataclass(eq=False)
class Part:
    """A tensor of this rank that an optimizer handles by itself.

    Attributes:
        data: the numbers, in the parameter's own memory.
        owner: the tensor in the parameter group.
        index: number of the owner in its group.
        whole: shape of the parameter that this is a part of.
        piece: where it lies in that parameter; None: it is the whole.
        key: where its state is in that of the owner; None: it is the owner's.
        name: of the parameter, where the owner is not the one that was given; else empty.
    """

    data: Tensor
    owner: Tensor
    index: int
    whole: tuple[int, ...]
    piece: Piece | None = None
    key: str | None = None
    name: str = ""

    @property
    def shape(self) -> torch.Size:
        """Of the part."""
        return self.data.shape

    @property
    def ndim(self) -> int:
        """Dimensions of the part."""
        return self.data.ndim

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameter."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        """Of the numbers."""
        return self.data.device

    def numel(self) -> int:
        """Elements of the part."""
        return self.data.numel()

    @property
    def grad(self) -> Tensor | None:
        """The part of the gradient."""
        grad = self.owner.grad
        if grad is None or self.data is self.owner:
            return grad if grad is None else plain(grad)
        if self.key is not None:
            assert self.piece is not None
            return self.piece.of(grad)
        return local_grad(self.owner)

    @property
    def identity(self) -> Any:
        """The same from step to step; the tensors may be others."""
        return id(self.owner) if self.key is None else (id(self.owner), self.key)


Shaped = Tensor | Part
BatchAxes = Callable[[tuple[int, ...], Mapping[str, Any]], int]


def whole_shape(p: Shaped) -> tuple[int, ...]:
    """Shape of the parameter that this is, or is a part of."""
    return p.whole if isinstance(p, Part) else tuple(p.shape)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor.

    By name: importing `torch.distributed.tensor` costs a second, and builds without distributed have none.
    """
    return any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__)


class Parts:
    """The parts of every parameter of an optimizer.

    It is no state: it is made anew for a copy. What lies where in a flat partition is found out once: it stays so as
    long as there is the partition, while its numbers may move (``offload_states``).

    No reference to a given parameter is kept. A strong one would keep a whole model alive that FSDP2 has replaced by
    shards, and a weak one would make `torch.utils.swap_tensors` refuse the parameter, and with it ``module.to()`` of
    every FSDP2 model. Only where a flat partition has taken the place of the given parameters are these looked for
    again, among everything that the garbage collector knows.
    """

    def __init__(self) -> None:
        self.originals: list[Original] = []
        self._groups: list[int] = []
        self._identities: list[int] = []  # of the given parameters, as in `originals`
        self._given: dict[int, tuple[int, ...] | None] = {}  # identity of a given parameter -> its shape
        self._flat: dict[int, tuple[weakref.ref[Tensor], int, list[Piece] | None]] = {}
        self._found: dict[int, Tensor] | None = None
        self._looking = 0
        # Identity of a flat partition -> entries of its state, and by piece the names of its tensors: there, here.
        self._names: dict[int, tuple[int, dict[str, list[tuple[str, str]]]]] = {}

    def state_of(self, part: Part, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a part, `nested`, in that of its owner; it may be empty."""
        if part.key is None:
            return nested(state)
        size, names = self._names.get(id(part.owner), (-1, {}))
        if size != len(state) or part.key not in names:
            names = {}
            for name in filter(is_ours, state):
                key, _, inner = name.partition(".")
                names.setdefault(key, []).append((inner, name))
            self._names[id(part.owner)] = len(state), names
        try:
            return nested({inner: state[name] for inner, name in names.get(part.key, ())})
        except KeyError:  # somebody has put entries in the place of others
            del self._names[id(part.owner)]
            return self.state_of(part, state)

    def add(self, group: Mapping[str, Any], number: int, batch_axes: BatchAxes = lambda whole, group: 0) -> None:
        """Remember the parameters of a new group: a framework may put other tensors in their place.

        ``batch_axes`` says how many of the first axes of a parameter of the group are a batch of matrices.
        """
        self._found = None
        names = group.get("param_names")
        for i, p in enumerate(group["params"]):
            name = names[i] if names else f"{number}.{i}"
            shape = deepspeed.whole_shape(p)
            batch = batch_axes(shape, group)
            self.originals.append(Original(partial(self._find, id(p)), shape, len(self.originals), name, batch))
            self._groups.append(number)
            self._identities.append(id(p))
            # A parameter of a lazy module gets its shape later.
            self._given[id(p)] = None if is_lazy(p) else shape

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Within the block, given parameters are looked for at most once."""
        self._looking += 1
        try:
            yield
        finally:
            self._looking -= 1
            if not self._looking:
                self._forget()

    def _find(self, identity: int) -> Tensor | None:
        """A given parameter, where it still exists."""
        if self._found is None:
            found = {id(one): one for one in gc.get_objects() if id(one) in self._given}
            self._found = {key: one for key, one in found.items() if isinstance(one, Tensor)}
        return self._found.get(identity)

    def _forget(self) -> None:
        # What ZeRO runs is alive as long as its engine is; what a framework has replaced must not be kept alive.
        if self._found is not None and not deepspeed.managed(self.originals):
            self._found = None

    def of(self, index: int, p: Tensor) -> list[Part]:
        """The parts of a tensor in a parameter group; none where a flat partition holds nothing but padding.

        Args:
            index: of the tensor in the group.
            p: the tensor.

        Raises:
            ValueError: it is a flat partition, and what lies where in it cannot be found.
        """
        # Without DeepSpeed there are no flat partitions, and no need to remember which tensors are none.
        foreign = p.ndim == 1 and "deepspeed" in sys.modules and not self._was_given(p)
        if not foreign or is_dtensor(p) or not self.originals:
            return [Part(local_of(p), p, index, tuple(p.shape), _shard(p, index))]
        found = self._flat.get(id(p))
        if found is None or found[0]() is not p or found[1] != p.numel():
            with self.looking():
                found = self._flat[id(p)] = weakref.ref(p), p.numel(), self._pieces(p)
            for key in [key for key, (ref, *_) in self._flat.items() if ref() is None]:
                del self._flat[key]
        if found[2] is None:
            return [Part(p, p, index, tuple(p.shape))]
        numbers = p.detach()
        return [
            Part(piece.of(numbers), p, index, piece.whole, piece, piece.key, self.originals[piece.index].name)
            for piece in found[2]
        ]

    def _was_given(self, p: Tensor) -> bool:
        shape = deepspeed.whole_shape(p)
        if id(p) in self._given and self._given[id(p)] is None:
            self._given[id(p)] = shape
        return self._given.get(id(p)) == shape

    def _pieces(self, flat: Tensor) -> list[Piece] | None:
        """What lies in a flat partition; None: it is an ordinary parameter."""
        fragments = deepspeed.fragments(flat, self.originals)
        return list(pieces(fragments, lambda f: self.originals[f.index].batch)) if fragments else None

    def rename(self, names: Mapping[int, str]) -> None:
        """Call given parameters otherwise: identity -> name."""
        self.originals = [
            replace(one, name=names.get(identity, one.name))
            for one, identity in zip(self.originals, self._identities, strict=True)
        ]

    def name_of(self, piece: Piece, names: Mapping[int, str]) -> str:
        """What to call the piece's parameter: its name among these (identity -> name), or the one that it has."""
        return names.get(self._identities[piece.index], self.originals[piece.index].name)

    def group_of(self, piece: Piece) -> int:
        """Number of the group that the piece's parameter was given in."""
        return self._groups[piece.index]

    def process_groups(self, groups: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The process groups over which parameters are spread, each once; none where each rank has all of them."""
        # Marks of ZeRO outlive its engine: only who is given other tensors than his own is run by it.
        flat = any(not self._was_given(p) and not is_dtensor(p) for group in groups for p in group["params"])
        with self.looking():
            spread = [deepspeed.process_group(self.originals)] if flat else []
        for group in groups:
            for p in group["params"]:
                if is_dtensor(p):
                    spread += [
                        p.device_mesh.get_group(k)
                        for k, placement in enumerate(p.placements)
                        if not placement.is_replicate()
                    ]
        return [one for i, one in enumerate(spread) if one is not None and one not in spread[:i]]


def local_of(p: Tensor) -> Tensor:
    """What this rank has of a DTensor; any other tensor as it is."""
    return _local(p) if is_dtensor(p) else p


def local_grad(p: Any) -> Tensor:
    """What this rank has of a gradient that is there."""
    grad = p.grad
    if not is_dtensor(grad):
        return plain(grad)
    if grad.placements != p.placements:  # tensor parallelism may leave sums to be made
        grad = grad.redistribute(p.device_mesh, p.placements)
    return _local(grad)


def local_shards(tensors: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
    """What this rank has of DTensors, and how each is laid out: the same object as long as it is.

    DTensor's own names, at a tenth of the time of ``to_local``: they are read for every parameter in every step.
    """
    return list(map(_LOCAL, tensors)), list(map(_LAYOUT, tensors))


def gradients_of_shards(grads: Sequence[Any], layouts: Sequence[Any]) -> list[Any] | None:
    """What this rank has of gradients; None unless each is a DTensor that is placed as its parameter is."""
    try:
        local, own = local_shards(grads)
    except AttributeError:  # an ordinary tensor
        return None
    same = all(map(is_, own, layouts)) or list(map(_PLACEMENTS, own)) == list(map(_PLACEMENTS, layouts))
    return local if same else None


_LOCAL, _LAYOUT, _PLACEMENTS = attrgetter("_local_tensor"), attrgetter("_spec"), attrgetter("placements")


def _local(tensor: Any) -> Tensor:
    with torch.no_grad():
        local = tensor.to_local()
    # Of a reduction that is still under way.
    return local.wait() if hasattr(local, "wait") else local


_PLAIN = (Tensor, torch.nn.Parameter)


def has_address(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor are in its own memory, in the order that its strides say.

    A subclass with operations of its own (`torch.Tensor.__torch_dispatch__`) may have none (quantized weights, fake
    tensors, results of collectives that are under way), or keep something else there.
    """
    own = type(tensor) in _PLAIN or type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    if not own or tensor.layout != torch.strided or tensor._is_zerotensor():
        return False
    try:
        return tensor.numel() == 0 or tensor.device.type == "meta" or tensor.data_ptr() != 0
    except RuntimeError:  # within a transformation of torch.func
        return False


def is_freed(tensor: Tensor) -> bool:
    """Whether an ordinary tensor's memory, or a part of it, was given back (``untyped_storage().resize_(0)``)."""
    own = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and tensor.layout == torch.strided
    if not own or tensor.numel() == 0 or tensor.device.type == "meta" or tensor._is_zerotensor():
        return False
    last = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().nbytes() < (last + 1) * tensor.element_size()


def is_fake(tensor: Tensor) -> bool:
    """Whether it is a tensor of `FakeTensorMode`, which has a shape and no numbers."""
    return any(cls.__name__ == "FakeTensor" for cls in type(tensor).__mro__)


def plain(tensor: Tensor) -> Tensor:
    """The numbers of a subclass with operations of its own as an ordinary tensor; other tensors as they are.

    Raises:
        ValueError: the subclass cannot be copied into an ordinary tensor.
    """
    if has_address(tensor) or tensor.layout != torch.strided or is_fake(tensor) or is_freed(tensor):
        return tensor
    try:
        if hasattr(tensor, "wait"):  # of a collective that is under way
            return tensor.wait()
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor.detach())
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} is a {type(tensor).__name__}, whose values cannot be "
            f"read: copying it to a plain tensor failed ({error}). Supported are plain tensors, DTensors, and "
            "subclasses that support copy_"
        ) from error


# Subclasses that a step has been able to read and to write.
_WRITABLE: set[type] = set()


def check_writable(tensor: Tensor, label: str) -> None:
    """Try, on a copy, what `opened` does to a parameter of a subclass with operations of its own.

    Raises:
        ValueError: it cannot be read, or not be written; names the type.
    """
    kind = type(tensor)
    if has_address(tensor) or is_fake(tensor) or kind in _WRITABLE:
        return
    numbers = plain(tensor)
    try:
        tensor.detach().clone().copy_(numbers)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"{label} is a {kind.__name__}, which cannot be written: copying a plain tensor into it failed "
            f"({error}). Supported are plain tensors, DTensors, and subclasses that support copy_"
        ) from error
    _WRITABLE.add(kind)


@contextmanager
def opened(part: Part) -> Iterator[Part]:
    """A part whose numbers an eager step can change tile by tile.

    Quantized weights and other subclasses with operations of their own are changed in an ordinary copy, one parameter
    at a time, and take the result at the end.
    """
    if has_address(part.data) or is_fake(part.data):
        yield part
        return
    copy = replace(part, data=plain(part.data))
    yield copy
    part.data.copy_(copy.data)


def _shard(p: Any, index: int) -> Piece | None:
    if not is_dtensor(p) or not leading(p):
        return None
    whole, local = tuple(p.shape), tuple(p.to_local().shape)
    start = offsets(p)
    row, column = (start[0] if start else 0), 0
    if len(whole) > 1:
        if any(start[2:]) or local[2:] != whole[2:]:
            row = column = -1  # columns of the matrix that do not adjoin
        else:
            column = start[1] * prod(whole[2:])
    return Piece(index, whole, local, row, column)


def offsets(p: Any) -> tuple[int, ...]:
    """Where the local shard of a DTensor starts, along each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return tuple(compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)[1])


def wrap(p: Any, tensors: Mapping[str, Any], layout: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a DTensor's local shard as DTensors, which a distributed checkpoint keeps apart for each rank.

    A tensor of size s becomes one of size (W, *s), sharded along the first dimension (one for each mesh dimension that
    shards the parameter): plain tensors would count as the same on every rank, and all but one would be lost.

    Args:
        p: the parameter.
        tensors: its state; nested.
        layout: name -> size, nested likewise, of the largest shard's state: all ranks have to agree on a size, so
            smaller ones are filled up with zeros.
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
    """This rank's part of what `wrap` made; nested. ``lead``: dimensions that it put in front."""
    if isinstance(value, Mapping):
        return {key: unwrap(v, lead) for key, v in value.items()}
    if isinstance(value, Tensor) and is_dtensor(value):
        local = _local(value)
        return local.reshape(local.shape[lead:]) if all(n == 1 for n in local.shape[:lead]) else local
    return value


def trim(value: Any, layout: Any) -> Any:
    """What was filled up, cut to the sizes of ``layout``; what does not fit is left for those who check it."""
    if isinstance(layout, Mapping):
        if not isinstance(value, Mapping):
            return value
        return {key: trim(value[key], size) for key, size in layout.items() if key in value}
    shape = layout[0]
    if not isinstance(value, Tensor) or value.ndim != len(shape) or any(map(int.__lt__, value.shape, shape)):
        return value
    return value[tuple(map(slice, shape))]


def leading(p: Any) -> int:
    """Dimensions that `wrap` puts in front of state."""
    return sum(1 for placement in p.placements if not placement.is_replicate())


def largest(p: Any) -> Tensor:
    """A tensor without memory, of the shape that the largest local shard of a DTensor has at most."""
    shape = list(p.shape)
    for k, placement in enumerate(p.placements):
        if not placement.is_replicate():
            shape[placement.dim] = -(-shape[placement.dim] // p.device_mesh.size(k))
    return torch.empty(shape, dtype=p.dtype, device="meta")


def agree(flag: bool, groups: Sequence[Any]) -> bool:
    """Whether the flag is set on every rank of the process groups."""
    if not groups:
        return flag
    import torch.distributed as dist

    # Of a device that the groups can reduce on.
    on_cpu = all("gloo" in dist.get_backend(group) for group in groups)
    device = None if on_cpu else torch.accelerator.current_accelerator()
    tensor = torch.tensor(int(flag), device=device or "cpu")
    for group in groups:
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN, group=group)
    return bool(tensor.item())

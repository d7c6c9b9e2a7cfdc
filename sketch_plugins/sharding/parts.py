"""The tensors that take a step each: a parameter, the local shard of a DTensor, or a piece of a flat partition."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.sharding import deepspeed
from sketch_plugins.sharding.dtensors import is_dtensor, leading, local_grad, local_of, offsets
from sketch_plugins.sharding.pieces import Original, Piece, is_lazy, pieces
from sketch_plugins.sharding.state_names import is_ours, nested
from sketch_plugins.sharding.tensors import has_address, is_fake, plain


@dataclass(eq=False)
class Part:
    """A tensor of this rank that an optimizer handles by itself.

    Attributes:
        data: the numbers, in the parameter's own memory.
        owner: the tensor in the parameter group.
        index: number of the owner in its group.
        whole: shape of the whole parameter.
        piece: the rectangle of that parameter; None if the part is the whole parameter.
        key: prefix of the part's state in the state of the owner; None if the owner's state is the part's.
        name: name of the parameter if the owner is not the given parameter itself; else empty.
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
        """Shape of the part."""
        return self.data.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions of the part."""
        return self.data.ndim

    @property
    def dtype(self) -> torch.dtype:
        """The parameter's dtype."""
        return self.data.dtype

    @property
    def device(self) -> torch.device:
        """The device of the numbers."""
        return self.data.device

    def numel(self) -> int:
        """Number of elements of the part."""
        return self.data.numel()

    @property
    def grad(self) -> Tensor | None:
        """The gradient of the part, or None."""
        grad = self.owner.grad
        if grad is None or self.data is self.owner:
            return grad if grad is None else plain(grad)
        if self.key is not None:
            assert self.piece is not None
            return self.piece.of(grad)
        return local_grad(self.owner)

    @property
    def identity(self) -> Any:
        """A key that stays the same from step to step, even if the tensors are replaced."""
        return id(self.owner) if self.key is None else (id(self.owner), self.key)


Shaped = Tensor | Part
BatchAxes = Callable[[tuple[int, ...], Mapping[str, Any]], int]


def whole_shape(p: Shaped) -> tuple[int, ...]:
    """Shape of the whole parameter: of a part, the parameter that it belongs to."""
    return p.whole if isinstance(p, Part) else tuple(p.shape)


class Parts:
    """The parts of every parameter of an optimizer.

    They are not part of the state: a copy of an optimizer makes its own. The contents of a flat partition are looked up
    once, because they stay the same as long as the partition exists, even if its numbers move (``offload_states``).

    No reference to a given parameter is kept. A strong one would keep a whole model alive that FSDP2 has replaced by
    shards. A weak one would make `torch.utils.swap_tensors` refuse the parameter, and with it ``module.to()`` of every
    FSDP2 model. If a flat partition has replaced the given parameters, and only then, they are searched for among all
    objects that the garbage collector knows.
    """

    def __init__(self) -> None:
        self.originals: list[Original] = []
        self._groups: list[int] = []
        self._identities: list[int] = []  # identities of the given parameters, in the order of `originals`
        self._given: dict[int, tuple[int, ...] | None] = {}  # identity of a given parameter -> its shape
        self._flat: dict[int, tuple[weakref.ref[Tensor], int, list[Piece] | None]] = {}
        self._found: dict[int, Tensor] | None = None
        self._looking = 0
        # Identity of a flat partition -> (size of its state, {piece: [(name within the piece, name in the state)]}).
        self._names: dict[int, tuple[int, dict[str, list[tuple[str, str]]]]] = {}

    def state_of(self, part: Part, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of a part, `nested`, from the state of its owner; it may be empty."""
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
        except KeyError:  # other code has replaced entries by others of the same number
            del self._names[id(part.owner)]
            return self.state_of(part, state)

    def add(self, group: Mapping[str, Any], number: int, batch_axes: BatchAxes = lambda whole, group: 0) -> None:
        """Remember the parameters of a new group, because a framework may replace them by other tensors.

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
        """Within the block, given parameters are searched for at most once."""
        self._looking += 1
        try:
            yield
        finally:
            self._looking -= 1
            if not self._looking:
                self._forget()

    def _find(self, identity: int) -> Tensor | None:
        """A given parameter, if it still exists."""
        if self._found is None:
            found = {id(one): one for one in gc.get_objects() if id(one) in self._given}
            self._found = {key: one for key, one in found.items() if isinstance(one, Tensor)}
        return self._found.get(identity)

    def _forget(self) -> None:
        # Parameters that ZeRO runs live as long as its engine. Parameters that a framework has replaced must not be
        # kept.
        if self._found is not None and not deepspeed.managed(self.originals):
            self._found = None

    def of(self, index: int, p: Tensor) -> list[Part]:
        """The parts of a tensor in a parameter group; an empty list if a flat partition holds nothing but padding.

        Args:
            index: number of the tensor in the group.
            p: the tensor.

        Raises:
            ValueError: it is a flat partition whose contents cannot be determined.
        """
        # Without DeepSpeed there are no flat partitions, so there is no need to remember which tensors are ordinary.
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
        """The contents of a flat partition; None if it is an ordinary parameter."""
        fragments = deepspeed.fragments(flat, self.originals)
        return list(pieces(fragments, lambda f: self.originals[f.index].batch)) if fragments else None

    def rename(self, names: Mapping[int, str]) -> None:
        """Give parameters other names: identity -> name."""
        self.originals = [
            replace(one, name=names.get(identity, one.name))
            for one, identity in zip(self.originals, self._identities, strict=True)
        ]

    def name_of(self, piece: Piece, names: Mapping[int, str]) -> str:
        """The name of the piece's parameter: the one in ``names`` (identity -> name), else the one that it has."""
        return names.get(self._identities[piece.index], self.originals[piece.index].name)

    def group_of(self, piece: Piece) -> int:
        """Number of the group that the piece's parameter belongs to."""
        return self._groups[piece.index]

    def process_groups(self, groups: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The distinct process groups over which parameters are spread; empty if each rank holds all of them."""
        zero, spread = self.zero_group(groups), self.mesh_groups(groups)
        return spread if zero is None or zero in spread else [zero, *spread]

    def zero_group(self, groups: Sequence[Mapping[str, Any]]) -> Any:
        """The process group over which ZeRO has spread parameters as flat partitions; None if it has not."""
        # ZeRO's attributes stay on parameters after its engine is gone. It runs only those whose group has other
        # tensors.
        flat = any(not self._was_given(p) and not is_dtensor(p) for group in groups for p in group["params"])
        with self.looking():
            return deepspeed.process_group(self.originals) if flat else None

    def mesh_groups(self, groups: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The distinct process groups over which DTensors among the parameters are sharded."""
        spread: list[Any] = []
        for group in groups:
            for p in group["params"]:
                if is_dtensor(p):
                    spread += [
                        p.device_mesh.get_group(k)
                        for k, placement in enumerate(p.placements)
                        if not placement.is_replicate()
                    ]
        return [one for i, one in enumerate(spread) if one is not None and one not in spread[:i]]


@contextmanager
def opened(part: Part) -> Iterator[Part]:
    """Make the numbers of a part writable tile by tile for an eager step.

    Quantized weights and other subclasses with operations of their own are changed in an ordinary copy, one parameter
    at a time, and get the result at the end.
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
            row = column = -1  # the shard is not one range of columns of the matrix
        else:
            column = start[1] * prod(whole[2:])
    return Piece(index, whole, local, row, column)

"""What DeepSpeed's ZeRO does to an optimizer's parameters: everything that the core knows about DeepSpeed's internals.

ZeRO replaces the parameters of a group by flat tensors of one dimension; each rank has its own:

* Stages 1 and 2 and ``BF16_Optimizer`` put the trainable parameters of a group into one buffer and cut it into as many
  equal partitions as there are ranks. The parameters become views of the buffer, so their storage offsets say where
  they lie. (The addresses in ``_hp_mapping`` do not: with ``round_robin_gradients`` they are wrong.)
* Stage 3 cuts each parameter into equal parts and puts those of several parameters into a sub-group; an optimizer
  steps once for each sub-group.
* Stage 0 passes on the parameters, or clones of them with their own shape in fp32, so there is nothing to find.

This module does not import DeepSpeed. It only reads the attributes that DeepSpeed sets on the parameters of an
optimizer. `tests/sharding/test_deepspeed_fragments.py` runs all of this on DeepSpeed's engines. If an attribute has
moved, it fails and names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from sketch_plugins.sharding.pieces import Fragment, Original, is_lazy

#: Attributes that ZeRO sets on parameters; one of them is enough to recognize a parameter of ZeRO.
FLAT_MARKS = ("_dp_group", "_hp_mapping")
STAGE3_MARKS = ("_z3_optimizer", "ds_id", "ds_numel", "ds_shape", "ds_process_group")


def managed(originals: Sequence[Original]) -> bool:
    """Whether an optimizer of ZeRO runs any of the parameters: their group may then hold flat tensors."""
    return any(_marked(p, STAGE3_MARKS) or _marked(p, FLAT_MARKS) for _, p in _live(originals))


def whole_shape(p: Tensor) -> tuple[int, ...]:
    """Shape of a parameter, also if ``zero.Init`` has emptied it (its own shape is ``(0,)`` then).

    A parameter of a lazy module has no shape yet, and ZeRO does not take it: the result is ``()``.
    """
    return () if is_lazy(p) else tuple(getattr(p, "ds_shape", p.shape))


def fragments(flat: Tensor, originals: Sequence[Original]) -> list[Fragment]:
    """Find which elements of which parameters lie in ``flat``, and where.

    Args:
        flat: a tensor in a parameter group.
        originals: the parameters that its group was given, or those of all groups: ZeRO gives an optimizer one group at
            a time, so the number of a group says nothing.

    Returns:
        Fragments in ascending order of their offsets. The list is empty if ``flat`` is an ordinary parameter; a
        partition that holds nothing but padding is one fragment without elements.

    Raises:
        ValueError: ZeRO runs the parameters, but their places cannot be found; the message says what is missing.
    """
    live = list(_live(originals))
    if any(p is flat for _, p in live):
        return []
    if any(_marked(p, STAGE3_MARKS) for _, p in live):
        found = _in_sub_group(flat, live)
    elif any(_marked(p, FLAT_MARKS) for _, p in live):
        found = _in_partition(flat, live)
    else:
        return []
    return sorted(found, key=lambda f: f.offset)


def process_group(originals: Sequence[Original]) -> dist.ProcessGroup | None:
    """The ranks that the parameters are spread over; None if ZeRO does not run them.

    Raises:
        ValueError: ZeRO runs the parameters, but has no process group at the expected attribute.
    """
    for _, p in _live(originals):
        if _marked(p, STAGE3_MARKS):
            if _trained(p):
                return _need(p, "ds_process_group")
        elif _marked(p, FLAT_MARKS):
            return _need(p, "_dp_group")
    return None


def _in_partition(flat: Tensor, live: Sequence[tuple[Original, Tensor]]) -> list[Fragment]:
    """Fragments in a partition of stage 1 or 2, or of BF16_Optimizer."""
    buffers: dict[int, list[tuple[Original, Tensor]]] = {}
    for original, p in live:
        if _marked(p, FLAT_MARKS):  # a frozen parameter is in no buffer
            buffers.setdefault(_storage(p), []).append((original, p))
    own, unlinked = [], []
    for members in buffers.values():
        links = [_need(p, "_hp_mapping") for _, p in members]
        masters = {_storage(m) for m in (_need(link, "hp_fragment") for link in links if link) if m is not None}
        if _storage(flat) in masters:
            own.append(members)
        if not masters:
            unlinked.append(members)
    if len(own) > 1:
        raise _lost(flat, "the parameters of its group are no longer views of one buffer")
    if not own and flat.dim() != 1:  # stage 0 runs the parameters after another engine was destroyed
        return []
    # No parameter is linked to a partition that holds padding only, or that offload_states() keeps elsewhere.
    candidates = [_cut(flat.numel(), members) for members in own or unlinked]
    found = [fragments for fragments in candidates if fragments is not None]
    if len(found) == 1 or (found and all(f.numel == 0 for fragments in found for f in fragments)):
        return found[0]
    if found:
        raise _lost(
            flat, "no parameter is linked to it (offload_states?), and the parameters of several groups would fit"
        )
    if own:
        raise _lost(flat, "the parameters of its group have more elements than its partitions")
    raise _lost(flat, "none of the parameters' _hp_mapping.hp_fragment lies in it")


def _cut(size: int, members: Sequence[tuple[Original, Tensor]]) -> list[Fragment] | None:
    """This rank's partition of a buffer; None if the buffer's parameters do not fit into partitions of that size."""
    group = _need(members[0][1], "_dp_group")
    # If the only parameter of a group needs no padding, its storage is the buffer, which begins at the parameter.
    base = int(members[0][1].storage_offset()) if len(members) == 1 else 0
    if max(p.storage_offset() - base + p.numel() for _, p in members) > size * dist.get_world_size(group):
        return None
    low, found = dist.get_rank(group) * size, []
    for original, p in members:
        at = int(p.storage_offset()) - base
        first, last = max(at, low), min(at + p.numel(), low + size)
        if first < last:
            found.append(Fragment(original.index, original.shape, first - at, last - first, first - low))
    original = members[0][0]
    return found or [Fragment(original.index, original.shape, 0, 0, 0)]


def _in_sub_group(flat: Tensor, live: Sequence[tuple[Original, Tensor]]) -> list[Fragment]:
    """Fragments in a sub-group of stage 3."""
    found: list[Fragment] = []
    empty: list[Fragment] = []
    for original, p in live:
        if not _trained(p):
            continue
        zero = _need(p, "_z3_optimizer")
        place = _need(zero, "grad_position").get(_need(zero, "get_param_id")(p))
        if place is None:
            raise _lost(flat, "a trainable parameter is missing in grad_position")
        number, offset, size = place
        if _need(zero, "fp32_partitioned_groups_flat")[number] is not flat:
            continue
        start = dist.get_rank(_need(p, "ds_process_group")) * size
        numel = max(0, min(size, _need(p, "ds_numel") - start))
        into = found if numel else empty
        into.append(Fragment(original.index, original.shape, start if numel else 0, numel, offset))
    if not found and not empty:
        raise _lost(flat, "it is not among the fp32_partitioned_groups_flat that hold a parameter of its group")
    return found or empty[:1]


def _live(originals: Sequence[Original]) -> Iterator[tuple[Original, Tensor]]:
    for original in originals:
        p = original.ref()
        if p is not None:
            yield original, p


def _marked(p: Tensor, marks: Sequence[str]) -> bool:
    return any(hasattr(p, mark) for mark in marks)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _trained(p: Tensor) -> bool:
    # The same condition as deepspeed.runtime.utils.is_optimized_parameter.
    return p.requires_grad and _need(p, "ds_numel") > 0


def _need(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        kind = "parameter" if isinstance(owner, Tensor) else type(owner).__name__
        raise ValueError(
            f"{kind}.{name} is missing: this version of DeepSpeed stores its partitions differently from the "
            "versions that sketch-plugins supports. ZeRO stage 0 works without it"
        )
    return getattr(owner, name)


def _lost(flat: Tensor, why: str) -> ValueError:
    return ValueError(
        f"a flat tensor of {flat.numel()} elements is a partition of DeepSpeed's ZeRO, but its contents "
        f"cannot be determined: {why}. ZeRO stage 0 works without this"
    )

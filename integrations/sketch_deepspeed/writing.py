"""The files of a ZeRO checkpoint for another number of ranks: weights, and everything that stays the same."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from sketch_deepspeed.layout import Buffer, Joint
from sketch_deepspeed.reading import MODEL, Checkpoint, base_key
from sketch_plugins.sharding.pieces import Fragment


class Weights:
    """The fp32 weights, for each parameter."""

    def __init__(self, old: Checkpoint) -> None:
        self.dtype = old.flats(0)[0].dtype
        self._runs: dict[str, list[tuple[Tensor, Fragment]]] = {}
        for rank in range(old.world):
            for buffer, flat in zip(old.buffers, old.flats(rank), strict=True):
                for f in buffer.fragments(rank):
                    self._runs.setdefault(buffer.parameters[f.index].name, []).append((flat.detach(), f))

    def flat(self, buffer: Buffer, fragments: Sequence[Fragment]) -> Tensor:
        """A new flat tensor, with zeros as padding."""
        out = torch.zeros(buffer.size, dtype=self.dtype)
        for new in fragments:
            for flat, f in self._runs[buffer.parameters[new.index].name]:
                first, last = max(f.start, new.start), min(f.start + f.numel, new.start + new.numel)
                if first < last:
                    at = f.offset + first - f.start
                    to = new.offset + first - new.start
                    out[to : to + last - first] = flat[at : at + last - first]
        return out


def rank_file(
    old: Checkpoint, buffers: Sequence[Buffer], world: int, rank: int, flats: list[Tensor], states: dict[int, Any]
) -> dict[str, Any]:
    """The contents of rank 0's file, with the state of another rank in place of its own."""
    like = old.zero(0)
    keys = [[key for key, buffer in enumerate(buffers) if buffer.group == n] for n in range(len(old.groups))]
    groups = [{**group, "params": keys[n]} for n, group in enumerate(old.base(0)["param_groups"])]
    base = {**old.base(0), "state": {key: s for key, s in states.items() if s}, "param_groups": groups}
    zero = {**like, base_key(old.stage): base}
    if old.stage == 3:
        zero |= {"partition_count": world, "fp32_flat_groups": flats}
    else:
        paddings = [buffer.padding(rank) for buffer in buffers]
        if old.bf16:  # BF16_Optimizer counts all padding on the last rank
            whole = [sum(buffer.padding(r) for r in range(world)) for buffer in buffers]
            paddings = whole if rank == world - 1 else [0 for _ in buffers]
        else:  # clone, because a slice would be saved with the memory of the whole tensor
            flats = [f[: b.size - b.padding(rank)].clone() for f, b in zip(flats, buffers, strict=True)]
        zero |= {
            "single_partition_of_fp32_groups": flats,
            "group_paddings": paddings,
            "partition_count": [world for _ in buffers],
            "param_slice_mappings": [_addresses(buffer, rank) for buffer in buffers],
        }
        if "param_alignment_paddings" in like:
            zero["param_alignment_paddings"] = [list(b.paddings) for b in buffers if isinstance(b, Joint)]
    return {**old.ranks[0], "optimizer_state_dict": zero}


def _addresses(buffer: Buffer, rank: int) -> OrderedDict[str, Any]:
    return OrderedDict(
        (buffer.parameters[f.index].name, fragment_address(numel=f.numel, start=f.offset))
        for f in buffer.fragments(rank)
    )


def model_files(old: Checkpoint, buffers: Sequence[Buffer], world: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and contents of the files of the model's weights."""
    shapes = [OrderedDict((p.name, torch.Size(p.shape)) for p in buffer.parameters) for buffer in buffers]
    if old.stage < 3:
        yield MODEL, {**old.models[0], "dp_world_size": world, "param_shapes": shapes}
        return
    for rank in range(world):
        like = old.models[min(rank, old.world - 1)]
        shared = old.models[0].get("shared_params") if rank == 0 else {}
        file = {**like, "dp_world_size": world, "param_shapes": shapes, "shared_params": shared}
        if old.models[0].get("frozen_param_fragments") is not None:
            file["frozen_param_fragments"] = _frozen(old, world, rank)
        yield f"zero_pp_rank_{rank}_{MODEL}", file


def _frozen(old: Checkpoint, world: int, rank: int) -> OrderedDict[str, Tensor]:
    """Cut frozen parameters like the others, each by itself."""
    out: OrderedDict[str, Tensor] = OrderedDict()
    for name, shape in old.models[0]["frozen_param_shapes"].items():
        numel = shape.numel()
        whole = torch.cat([model["frozen_param_fragments"][name] for model in old.models])[:numel]
        part = -(-numel // world)
        out[name] = torch.zeros(part, dtype=whole.dtype)
        mine = whole[rank * part : (rank + 1) * part]
        out[name][: len(mine)] = mine
    return out

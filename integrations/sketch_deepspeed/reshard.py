"""Rewrite a checkpoint of DeepSpeed's ZeRO for another number of ranks: ``sketch-plugins reshard``.

DeepSpeed loads the optimizer state of a checkpoint only with as many ranks as have written it. This module reads the
files of all ranks and writes those for N ranks, which ``engine.load_checkpoint`` reads as if N ranks had saved them.
Weights and fp32 master weights are equal bit for bit. The state of our optimizers is recut by
`sketch_plugins.checkpoints.recut`, which says what stays exact and what does not. Everything else (scheduler, loss
scale, step numbers, client state) stays the same.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from sketch_deepspeed.layout import Buffer, Joint, Parameter, joint, single, undealt
from sketch_plugins.checkpoints.recut_geometry import Held
from sketch_plugins.checkpoints.saved import (
    CannotReshard,
    Progress,
    Report,
    SavedOptimizer,
    nbytes,
    output_of,
    save,
    whole_or_not_at_all,
)
from sketch_plugins.sharding.pieces import Fragment, index_of, is_key
from sketch_plugins.sharding.state_names import flattened, nested

_MODEL = "mp_rank_00_model_states.pt"
_RANK = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_SUB_GROUP_SIZE = 10**9  # DeepSpeed's default


def reshard(
    checkpoint: str | os.PathLike[str],
    world_size: int,
    output: str | os.PathLike[str] | None = None,
    *,
    trust: bool = False,
    progress: Progress = lambda done, of, what: None,
) -> Report:
    """Write a copy of ``checkpoint`` for ``world_size`` ranks.

    Args:
        checkpoint: directory given to ``engine.save_checkpoint``, with a file ``latest``, or the directory of one tag.
        world_size: number of ranks that are to load it.
        output: directory to write, ``CHECKPOINT-worldN`` by default. Everything is written beside it first, and it gets
            its name when it is complete. Other files of the checkpoint's directory are copied.
        trust: unpickle all objects in the files. By default only tensors, plain values and DeepSpeed's own records are
            loaded.
        progress: called with the number of finished steps, the number of all steps, and the name of the current one.

    Raises:
        CannotReshard: not a checkpoint of ZeRO, a file is missing, another optimizer's state, model or expert
            parallelism, ``world_size`` is less than 1 or the present one, the output exists. No output is left behind.
    """
    root, tag = _find(Path(checkpoint))
    target = output_of(root, world_size, output)
    old = _read(root / tag, trust)
    if old.world == world_size:
        raise CannotReshard(f"{root / tag} already has {world_size} ranks")
    with whole_or_not_at_all(target) as partial:
        (partial / tag).mkdir(parents=True)
        report = _write(old, world_size, partial / tag, target, progress)
        for entry in root.iterdir():
            if entry.is_file():
                shutil.copy2(entry, partial / entry.name)
        (partial / "latest").write_text(tag)
    return report


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass
class _Checkpoint:
    """The files of all ranks.

    Attributes:
        stage: stage of ZeRO.
        bf16: whether ``BF16_Optimizer`` wrote them, which saves partitions together with their padding.
        models: contents of the files of the model's weights; one below stage 3.
        ranks: contents of the files of optimizer state.
        buffers: layout of the parameters in them.
        groups: parameters of each group, in the order of the group.
        prefix: start of the state files' names.
    """

    stage: int
    bf16: bool
    models: list[dict[str, Any]]
    ranks: list[dict[str, Any]]
    buffers: list[Buffer]
    groups: list[list[Parameter]]
    prefix: str

    @property
    def world(self) -> int:
        """Number of ranks that wrote the checkpoint."""
        return len(self.ranks)

    @property
    def config(self) -> Mapping[str, Any]:
        """DeepSpeed's settings of ZeRO."""
        return _config(self.ranks[0])

    def zero(self, rank: int) -> dict[str, Any]:
        """The state that ZeRO's optimizer saved on a rank."""
        return self.ranks[rank]["optimizer_state_dict"]

    def base(self, rank: int) -> dict[str, Any]:
        """The state of the optimizer inside ZeRO's."""
        return self.zero(rank)[_base_key(self.stage)]

    def flats(self, rank: int) -> Sequence[Tensor]:
        """The fp32 weights of a rank, with one tensor for each buffer."""
        return self.zero(rank)["fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"]


def _base_key(stage: int) -> str:
    return "optimizer_state_dict" if stage == 3 else "base_optimizer_state"


def _config(file: Mapping[str, Any]) -> Mapping[str, Any]:
    config = file.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, Mapping) else None
    return zero if isinstance(zero, Mapping) else {}


def _find(path: Path) -> tuple[Path, str]:
    """The directory that contains the tags, and the tag."""
    if not path.is_dir():
        raise CannotReshard(f"{path} is not a directory")
    latest = path / "latest"
    if latest.is_file():
        tag = latest.read_text().strip()
        if not tag or Path(tag).is_absolute() or ".." in Path(tag).parts:
            raise CannotReshard(f"{latest} contains {tag!r}; expected the name of a directory beside it")
        if not (path / tag).is_dir():
            raise CannotReshard(f"{latest} names the directory {tag!r}, which does not exist")
        return path, tag
    if any(path.glob("*_model_states.pt")) or any(path.glob("*_optim_states.pt")):
        return path.resolve().parent, path.resolve().name
    raise CannotReshard(
        f"{path} is not a DeepSpeed checkpoint: it has no file 'latest' and no files '*_model_states.pt'"
    )


def _load(file: Path, trust: bool) -> dict[str, Any]:
    if file.stat().st_size == 0:
        raise CannotReshard(f"{file} cannot be read: it is empty")
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=not trust)
    except UnpicklingError as error:
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except Exception:
            raise CannotReshard(f"{file} cannot be read: {error}") from error
        known = ("LossScaler", "ZeroStageEnum", "fragment_address")
        others = [name for name in names if not name.endswith(known)]
        raise CannotReshard(
            f"{file} contains Python objects other than tensors and plain values ({', '.join(others)}), and "
            "unpickling them can run code. If you trust the checkpoint, use --trust"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CannotReshard(f"{file} cannot be read: {error}") from error
    if not isinstance(loaded, dict):
        raise CannotReshard(f"{file} holds a {type(loaded).__name__}; expected a dict")
    return loaded


def _read(directory: Path, trust: bool) -> _Checkpoint:
    found: dict[int, Path] = {}
    prefix = ""
    for file in directory.iterdir():
        if match := _RANK.fullmatch(file.name):
            if int(match[3]) != 0:
                raise CannotReshard(
                    f"{directory} was written with model parallelism ({file.name}), which is not supported"
                )
            found[int(match[2])] = file
            prefix = match[1] or ""
    if not found:
        if (directory / _MODEL).exists():
            raise CannotReshard(
                f"{directory} has no optimizer state of ZeRO: a checkpoint of stage 0 loads with any number of ranks"
            )
        raise CannotReshard(f"{directory} is not a DeepSpeed checkpoint: it has no files '*_optim_states.pt'")
    first = _load(found[min(found)], trust)
    zero = first.get("optimizer_state_dict")
    if not isinstance(zero, Mapping) or "partition_count" not in zero:
        raise CannotReshard(f"{found[min(found)]} is not an optimizer state of ZeRO")
    counts = zero["partition_count"]
    world = counts if isinstance(counts, int) else max(counts)
    if not isinstance(counts, int) and len(set(counts)) > 1:
        raise CannotReshard(
            f"parameter groups are divided over {counts} ranks (expert parallelism?), which is not supported"
        )
    missing = [rank for rank in range(world) if rank not in found]
    if missing or len(found) > world:
        absent = ", ".join(map(str, missing))
        what = f"that of rank {absent} is missing" if len(missing) == 1 else f"those of ranks {absent} are missing"
        what = what if missing else f"{len(found)} are there"
        raise CannotReshard(f"{directory} was written by {world} ranks, and of their files '*_optim_states.pt' {what}")
    ranks = [first if rank == min(found) else _load(found[rank], trust) for rank in range(world)]
    bf16 = "zero_stage" not in zero
    stage = 1 if bf16 else int(zero["zero_stage"])
    models = []
    for rank in range(world if stage == 3 else 1):
        file = directory / (f"zero_pp_rank_{rank}_{_MODEL}" if stage == 3 else _MODEL)
        if not file.exists():
            raise CannotReshard(f"{file} is missing")
        models.append(_load(file, trust))
    return _checked(_Checkpoint(stage, bf16, models, ranks, [], [], prefix), directory)


def _checked(old: _Checkpoint, directory: Path) -> _Checkpoint:
    model = old.models[0]
    if model.get("mp_world_size", 1) != 1 or model.get("module") is None:
        raise CannotReshard(f"{directory} was written with model or pipeline parallelism, which is not supported")
    if model.get("num_experts"):
        raise CannotReshard(f"{directory} contains experts (MoE), whose partitions differ, which is not supported")
    if model.get("dp_world_size") != old.world:
        raise CannotReshard(
            f"{directory} has weights of {model.get('dp_world_size')} ranks and optimizer state of {old.world} ranks"
        )
    if old.config.get("mics_shard_size", -1) not in (-1, None):
        raise CannotReshard(f"{directory} was written with MiCS, which is not supported")
    base = old.base(0)
    if not isinstance(base, Mapping) or "param_groups" not in base:
        raise CannotReshard(f"{directory} is an elastic checkpoint of ZeRO, which is not supported")
    shapes, groups = model["param_shapes"], base["param_groups"]
    # Stage 3 has a list for each sub-group; sub-groups are in the order of the groups.
    owners = [number for number, group in enumerate(groups) for _ in group["params"]]
    if [key for group in groups for key in group["params"]] != list(range(len(shapes))):
        raise CannotReshard(f"{directory}: the parameter groups do not say which partitions belong to them")
    old.groups = [[] for _ in groups]
    for owner, named in zip(owners, shapes, strict=True):
        for name, shape in named.items():
            weight = model["module"].get(name)
            size = weight.element_size() if isinstance(weight, Tensor) else 4
            old.groups[owner].append(Parameter(name, tuple(shape), size))
    if old.stage < 3 and not old.bf16 and old.config.get("round_robin_gradients"):
        old.groups = [undealt(group, old.world) for group in old.groups]
    old.buffers = _layout(old, old.world)
    names = [[p.name for p in buffer.parameters] for buffer in old.buffers]
    if names != [list(named) for named in shapes]:
        raise CannotReshard(
            f"{directory}: the partitions do not have the layout that DeepSpeed's settings imply "
            f"({dict(old.config)}); this version of DeepSpeed uses another layout"
        )
    for rank in range(old.world):
        for number, (buffer, flat) in enumerate(zip(old.buffers, old.flats(rank), strict=True)):
            lean = buffer.size if old.stage == 3 or old.bf16 else buffer.size - buffer.padding(rank)
            if flat.numel() != lean:
                raise CannotReshard(
                    f"{directory}: partition {number} of rank {rank} has {flat.numel()} elements; expected {lean}"
                )
    return old


def _layout(old: _Checkpoint, world: int) -> list[Buffer]:
    config = old.config
    if old.stage == 3:
        most = config.get("sub_group_size", _SUB_GROUP_SIZE)
        return single(old.groups, world, int(most) if isinstance(most, int | float) else _SUB_GROUP_SIZE)
    robin = bool(config.get("round_robin_gradients")) and not old.bf16
    return joint(old.groups, world, robin, bool(config.get("parameter_alignment")) and not old.bf16)


# -- state -------------------------------------------------------------------------------------------------------------


class _State:
    """State of the optimizer, for each parameter."""

    def __init__(self, old: _Checkpoint) -> None:
        self.saved_optimizer = SavedOptimizer(old.base(0)["param_groups"])
        self.held: dict[str, list[Held]] = {}
        self.numbers: dict[str, int] = {}
        self.nbytes = 0
        for rank in range(old.world):
            states = old.base(rank)["state"]
            for key, buffer in enumerate(old.buffers):
                self._take(rank, key, buffer, nested(states.get(key) or {}), old.flats(rank)[key].dtype)

    def _take(self, rank: int, key: int, buffer: Buffer, states: Mapping[str, Any], dtype: torch.dtype) -> None:
        expected = self.saved_optimizer.pieces(buffer.fragments(rank), buffer.group)
        others = [name for name in states if not is_key(name)]
        if others:
            raise CannotReshard(
                f"the state of partition {key} of rank {rank} contains {', '.join(map(repr, others))}, which "
                f"{self.saved_optimizer.kind} did not write and which cannot be resharded. Delete it from the "
                "state before saving"
            )
        if states and len(states) != len(expected):
            raise CannotReshard(
                f"the state of partition {key} of rank {rank} has {len(states)} pieces; expected {len(expected)}"
            )
        for piece, (name, state) in zip(expected, states.items() or [("", {})] * len(expected), strict=True):
            parameter = buffer.parameters[piece.index].name
            held = self.saved_optimizer.held(piece, buffer.group, dtype, state, f"{parameter!r} on rank {rank}")
            if state:
                self.numbers[parameter] = index_of(name)
            self.held.setdefault(parameter, []).append(held)
            self.nbytes += nbytes(state)

    def cut(self, buffer: Buffer, fragments: Sequence[Fragment], dtype: torch.dtype, report: Report) -> dict[str, Any]:
        """The state of a new flat tensor; empty if no step was taken."""
        out: dict[str, Any] = {}
        for piece in self.saved_optimizer.pieces(fragments, buffer.group):
            parameter = buffer.parameters[piece.index].name
            state = self.saved_optimizer.recut(self.held[parameter], piece, buffer.group, dtype, report)
            if state:
                out |= flattened(state, replace(piece, index=self.numbers[parameter]).key)
        return out


# -- writing -----------------------------------------------------------------------------------------------------------


def _write(old: _Checkpoint, world: int, directory: Path, target: Path, progress: Progress) -> Report:
    state = _State(old)
    buffers = _layout(old, world)
    report = Report(target, f"DeepSpeed, ZeRO stage {old.stage}", state.saved_optimizer.kind, old.world, world)
    report.parameters = sum(p.numel for group in old.groups for p in group)
    weights = _Weights(old)
    after, steps = 0, world * len(buffers)
    for rank in range(world):
        flats, states = [], {}
        for key, buffer in enumerate(buffers):
            progress(rank * len(buffers) + key, steps, f"rank {rank}")
            fragments = buffer.fragments(rank)
            flats.append(weights.flat(buffer, fragments))
            states[key] = state.cut(buffer, fragments, weights.dtype, report)
            after += nbytes(states[key])
        name = f"{old.prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        save(_rank_file(old, buffers, world, rank, flats, states), directory / name)
    for name, file in _model_files(old, buffers, world):
        save(file, directory / name)
    progress(steps, steps, "done")
    report.nbytes = state.nbytes, after
    return report


class _Weights:
    """The fp32 weights, for each parameter."""

    def __init__(self, old: _Checkpoint) -> None:
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


def _rank_file(
    old: _Checkpoint, buffers: Sequence[Buffer], world: int, rank: int, flats: list[Tensor], states: dict[int, Any]
) -> dict[str, Any]:
    """The contents of rank 0's file, with the state of another rank in place of its own."""
    like = old.zero(0)
    keys = [[key for key, buffer in enumerate(buffers) if buffer.group == n] for n in range(len(old.groups))]
    groups = [{**group, "params": keys[n]} for n, group in enumerate(old.base(0)["param_groups"])]
    base = {**old.base(0), "state": {key: s for key, s in states.items() if s}, "param_groups": groups}
    zero = {**like, _base_key(old.stage): base}
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


def _model_files(old: _Checkpoint, buffers: Sequence[Buffer], world: int) -> Iterator[tuple[str, dict[str, Any]]]:
    shapes = [OrderedDict((p.name, torch.Size(p.shape)) for p in buffer.parameters) for buffer in buffers]
    if old.stage < 3:
        yield _MODEL, {**old.models[0], "dp_world_size": world, "param_shapes": shapes}
        return
    for rank in range(world):
        like = old.models[min(rank, old.world - 1)]
        shared = old.models[0].get("shared_params") if rank == 0 else {}
        file = {**like, "dp_world_size": world, "param_shapes": shapes, "shared_params": shared}
        if old.models[0].get("frozen_param_fragments") is not None:
            file["frozen_param_fragments"] = _frozen(old, world, rank)
        yield f"zero_pp_rank_{rank}_{_MODEL}", file


def _frozen(old: _Checkpoint, world: int, rank: int) -> OrderedDict[str, Tensor]:
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

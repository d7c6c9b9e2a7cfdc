"""Reads the files of a ZeRO checkpoint, and checks that their layout is known."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from sketch_deepspeed.layout import Buffer, Parameter, joint, single, undealt
from sketch_plugins.checkpoints.saved import CannotReshard

MODEL = "mp_rank_00_model_states.pt"
_RANK = re.compile(r"(bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_SUB_GROUP_SIZE = 10**9  # DeepSpeed's default


@dataclass
class Checkpoint:
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
        return self.zero(rank)[base_key(self.stage)]

    def flats(self, rank: int) -> Sequence[Tensor]:
        """The fp32 weights of a rank, with one tensor for each buffer."""
        return self.zero(rank)["fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"]


def base_key(stage: int) -> str:
    """The key of the state of the optimizer inside ZeRO's."""
    return "optimizer_state_dict" if stage == 3 else "base_optimizer_state"


def _config(file: Mapping[str, Any]) -> Mapping[str, Any]:
    config = file.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, Mapping) else None
    return zero if isinstance(zero, Mapping) else {}


def find(path: Path) -> tuple[Path, str]:
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


def load(file: Path, trust: bool) -> dict[str, Any]:
    """Load one file.

    Raises:
        CannotReshard: it is damaged, or has objects that need ``trust``.
    """
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


def read(directory: Path, trust: bool) -> Checkpoint:
    """Load the files of all ranks.

    Raises:
        CannotReshard: a file is missing or damaged, or the checkpoint is of a kind that is not supported.
    """
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
        if (directory / MODEL).exists():
            raise CannotReshard(
                f"{directory} has no optimizer state of ZeRO: a checkpoint of stage 0 loads with any number of ranks"
            )
        raise CannotReshard(f"{directory} is not a DeepSpeed checkpoint: it has no files '*_optim_states.pt'")
    first = load(found[min(found)], trust)
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
    ranks = [first if rank == min(found) else load(found[rank], trust) for rank in range(world)]
    bf16 = "zero_stage" not in zero
    stage = 1 if bf16 else int(zero["zero_stage"])
    models = []
    for rank in range(world if stage == 3 else 1):
        file = directory / (f"zero_pp_rank_{rank}_{MODEL}" if stage == 3 else MODEL)
        if not file.exists():
            raise CannotReshard(f"{file} is missing")
        models.append(load(file, trust))
    return _checked(Checkpoint(stage, bf16, models, ranks, [], [], prefix), directory)


def _checked(old: Checkpoint, directory: Path) -> Checkpoint:
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
    old.buffers = layout_for(old, old.world)
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


def layout_for(old: Checkpoint, world: int) -> list[Buffer]:
    """How ZeRO lays out the parameters of the checkpoint over ``world`` ranks."""
    config = old.config
    if old.stage == 3:
        most = config.get("sub_group_size", _SUB_GROUP_SIZE)
        return single(old.groups, world, int(most) if isinstance(most, int | float) else _SUB_GROUP_SIZE)
    robin = bool(config.get("round_robin_gradients")) and not old.bf16
    return joint(old.groups, world, robin, bool(config.get("parameter_alignment")) and not old.bf16)

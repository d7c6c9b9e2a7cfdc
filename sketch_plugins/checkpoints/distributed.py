"""Rewrite a directory of torch.distributed.checkpoint (FSDP2) for another number of shards.

Weights are DTensors in such a checkpoint, and torch itself loads them on any mesh. The state of our optimizers belongs
to a shard: a tensor of size s is kept as one of size ``(W, *s)`` for W shards
(`sketch_plugins.sharding.dtensors.wrap`). torch refuses it for another W, because the sizes differ. This module recuts
the state of each shard (`sketch_plugins.checkpoints.recut`) and puts it into tensors for N shards. The shards are those
of ``Shard(0)``, FSDP2's default: ``ceil(R / W)`` rows each.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict

from sketch_plugins.checkpoints.recut_geometry import Held
from sketch_plugins.checkpoints.saved import (
    CannotReshard,
    Progress,
    Report,
    SavedOptimizer,
    nbytes,
    output_of,
    whole_or_not_at_all,
)
from sketch_plugins.sharding.dtensors import trim
from sketch_plugins.sharding.pieces import Piece
from sketch_plugins.sharding.state_names import CORRECTION, PLACE, flattened, is_ours, nested


def reshard(
    checkpoint: str | os.PathLike[str],
    world_size: int,
    output: str | os.PathLike[str] | None = None,
    *,
    trust: bool = False,
    progress: Progress = lambda done, of, what: None,
) -> Report:
    """Write a copy of ``checkpoint`` for ``world_size`` shards (HSDP: the size of the mesh dimension that shards).

    All of it is read into memory at once, and written by this one process.

    Args:
        checkpoint: directory that ``torch.distributed.checkpoint.save`` was given. It holds, at any depth, a state dict
            of an optimizer with ``"state"`` and ``"param_groups"``, as `get_optimizer_state_dict` returns it.
        world_size: number of shards that are to load it.
        output: directory to write, ``CHECKPOINT-worldN`` by default. It gets this name when it is complete.
        trust: unpickle objects other than plain values and those that torch itself writes into the file ``.metadata``.
        progress: called with the number of finished steps, the number of all steps, and the name of the current one.

    Raises:
        CannotReshard: the checkpoint cannot be read; it has no state of an optimizer of sketch-plugins, or none that is
            sharded along dimension 0 alone; ``world_size`` is less than 1 or the present one; the output exists.
    """
    path = Path(checkpoint)
    target = output_of(path, world_size, output)
    loaded = _load(path, trust)
    found = list(_optimizers(loaded))
    if not found:
        raise CannotReshard(
            f"{path} holds no optimizer state dict with 'state' and 'param_groups'. A flattened state dict "
            "cannot be resharded"
        )
    report = None
    for number, saved in enumerate(found):
        done = _optimizer(saved, path, world_size, target, progress)
        if report is None:
            report = done
        else:
            report.exact += done.exact
            report.cut += done.cut
            report.parameters += done.parameters
            report.nbytes = report.nbytes[0] + done.nbytes[0], report.nbytes[1] + done.nbytes[1]
        progress(number + 1, len(found), "writing")
    assert report is not None
    with whole_or_not_at_all(target) as partial:
        try:
            # `save` cannot be used, because torch 2.6's has no no_dist.
            _save_state_dict(loaded, dcp.FileSystemWriter(partial), no_dist=True)
        except CheckpointException as error:
            raise CannotReshard(f"{target} cannot be written: {_inner(error)}") from error
    return report


class _Planner(_EmptyStateDictLoadPlanner):
    """Builds tensors and containers, and unpickles plain values only."""

    def __init__(self, trust: bool) -> None:
        super().__init__()
        self.trust = trust

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        if not self.trust:
            torch.load(value, weights_only=True)
            value.seek(0)
        super().load_bytes(read_item, value)


#: The objects that torch writes into ``.metadata``, by module and name. None of them runs code that the file chooses.
_METADATA = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "StorageMeta", "MetadataIndex", "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}  # fmt: skip


class _Untrusted(UnpicklingError):
    """The file contains an object that only running code could make."""


class _MetadataUnpickler(pickle.Unpickler):
    """Makes only the objects that torch writes into ``.metadata``; torch's own reader unpickles any object."""

    def find_class(self, module: str, name: str) -> Any:
        # A dotted name could reach everything that a module imports, but none of these names has a dot.
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _METADATA:
            raise _Untrusted(f"{module}.{name}")
        return super().find_class(module, name)


def _check_metadata(path: Path) -> None:
    for file in sorted(path.glob("*.metadata")):  # also the file of a single rank, which torch falls back to
        try:
            with file.open("rb") as stream:
                _MetadataUnpickler(stream).load()
        except _Untrusted as error:
            raise CannotReshard(
                f"{file} contains Python objects other than torch's own ({error}), and unpickling them can run "
                "code. If you trust the checkpoint, use --trust"
            ) from error
        except Exception as error:  # a damaged file may raise any error
            raise CannotReshard(f"{file} cannot be read: {str(error) or type(error).__name__}") from error


def _load(path: Path, trust: bool) -> dict[str, Any]:
    loaded: dict[str, Any] = {}
    if not trust:
        _check_metadata(path)
    try:
        _load_state_dict(loaded, storage_reader=dcp.FileSystemReader(path), planner=_Planner(trust), no_dist=True)
    except (Exception, CheckpointException) as error:  # which is no Exception; a damaged file may raise any error
        inner = _inner(error)
        if isinstance(inner, UnpicklingError) and not trust:
            raise CannotReshard(
                f"{path} contains Python objects other than tensors and plain values, and unpickling them can run "
                f"code. If you trust the checkpoint, use --trust ({inner})"
            ) from error
        raise CannotReshard(f"{path} cannot be read: {inner}") from error
    return loaded


def _inner(error: BaseException) -> BaseException:
    """The error of one process, from the errors of all processes that torch combines into one."""
    inner: BaseException = next(iter(getattr(error, "failures", {}).values()), (error,))[0]
    return inner


def _optimizers(value: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(value, dict):
        return
    groups = value.get("param_groups")
    if isinstance(value.get("state"), dict) and isinstance(groups, list) and groups and isinstance(groups[0], dict):
        yield value
        return
    for inner in value.values():
        yield from _optimizers(inner)


@dataclass(frozen=True)
class _Shards:
    """``Shard(0)`` of a parameter over W shards, cut as torch does it."""

    whole: tuple[int, ...]
    world: int

    def piece(self, rank: int) -> Piece:
        """The shard of one rank; the last ones may be empty."""
        part = -(-self.whole[0] // self.world)
        first = min(rank * part, self.whole[0])
        rows = min(part, self.whole[0] - first)
        return Piece(0, self.whole, (rows, *self.whole[1:]), first, 0)

    @property
    def largest(self) -> Piece:
        """The first shard: the tensors of all ranks have its sizes."""
        return self.piece(0)


def _optimizer(saved: dict[str, Any], path: Path, world: int, target: Path, progress: Progress) -> Report:
    saved_optimizer = SavedOptimizer(saved["param_groups"])
    report = Report(target, "torch.distributed.checkpoint (FSDP2)", saved_optimizer.kind, 0, world)
    states = {
        key: (number, saved["state"][key])
        for number, group in enumerate(saved["param_groups"])
        for key in group["params"]
        # State that every rank has whole is the same with any number of ranks.
        if PLACE in saved["state"].get(key, {})
    }
    before = {_shards(key, state, path).world for key, (_, state) in states.items()}
    if len(before) != 1:
        raise CannotReshard(
            f"{path} has parameters cut into {', '.join(map(str, sorted(before)))} shards: not supported"
            if before
            else f"{path} has no state that is cut into shards: it loads with any number of processes"
        )
    (report.before,) = before
    if report.before == world:
        raise CannotReshard(f"{path} already has {world} shards")
    for done, (key, (number, state)) in enumerate(states.items()):
        progress(done, len(states), str(key))
        shards = _shards(key, state, path)
        new = _Shards(shards.whole, world)
        # State that wrappers of the optimizer keep beside ours is saved whole, and stays unchanged.
        state = nested(state)
        own = {name: value for name, value in state.items() if is_ours(name)}
        others = {name: value for name, value in state.items() if name not in own}
        state = own
        dtype = torch.float64 if torch.float64 in set(_dtypes(state)) else torch.float32
        if CORRECTION in state:  # the parameter is in half precision; any such dtype will do
            dtype = torch.bfloat16
        old = [
            _held(saved_optimizer, shards, rank, number, dtype, state, f"{key!r}, shard {rank},")
            for rank in range(shards.world)
        ]
        layout = saved_optimizer.layout(new.largest, number, dtype)
        parts: list[Any] = []
        for rank in range(world):
            piece = new.piece(rank)
            parts.append(
                saved_optimizer.recut(old, piece, number, dtype, report) if piece.numel else {PLACE: piece.place}
            )
        saved["state"][key] = {"step": state["step"], **flattened(_stacked(parts, layout)), **others}
        report.parameters += prod(shards.whole)
        report.nbytes = (
            report.nbytes[0] + sum(nbytes(h.state) for h in old),
            report.nbytes[1] + sum(nbytes(part) for part in parts),
        )
    return report


def _shards(key: Any, state: Mapping[str, Any], path: Path) -> _Shards:
    places = state[PLACE]
    if not isinstance(places, Tensor) or places.ndim != 2 or places.shape[1] < 3:
        raise CannotReshard(f"{path}: {key!r} is sharded along more than one mesh dimension, which is not supported")
    shards = _Shards(tuple(places[0, 2:].tolist()), len(places))
    for rank, place in enumerate(places):
        piece = shards.piece(rank)
        if piece.numel and not torch.equal(place, piece.place):
            raise CannotReshard(
                f"{path}: shard {rank} of {key!r} starts at {place.tolist()[:2]} (row, column), but Shard(0) "
                f"starts it at {[piece.row, 0]}. Only Shard(0) is supported"
            )
    return shards


def _held(
    saved_optimizer: SavedOptimizer,
    shards: _Shards,
    rank: int,
    group: int,
    dtype: torch.dtype,
    state: Mapping[str, Any],
    label: str,
) -> Held:
    """The state of one shard, cut to its own sizes."""
    piece = shards.piece(rank)
    if not piece.numel:
        return Held(piece, {})
    layout = saved_optimizer.layout(piece, group, dtype)
    local = trim({name: _of(value, rank) for name, value in state.items() if name != "step"}, layout)
    return saved_optimizer.held(piece, group, dtype, {"step": state["step"], **local}, label)


def _of(value: Any, rank: int) -> Any:
    return {k: _of(v, rank) for k, v in value.items()} if isinstance(value, Mapping) else value[rank]


def _stacked(parts: Sequence[Any], layout: Mapping[str, Any]) -> dict[str, Any]:
    """The states of the shards as tensors of size ``(N, *s)``; smaller ones are padded with zeros."""
    out: dict[str, Any] = {}
    for name, size in layout.items():
        inner = [part.get(name) for part in parts]
        if isinstance(size, Mapping):
            out[name] = _stacked([one or {} for one in inner], size)
            continue
        shape, dtype = size
        out[name] = torch.zeros((len(parts), *shape), dtype=dtype)
        for row, tensor in zip(out[name], inner, strict=True):
            if tensor is not None:
                row[tuple(map(slice, tensor.shape))] = tensor
    return out


def _dtypes(value: Any) -> Iterator[torch.dtype]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _dtypes(inner)
    elif isinstance(value, Tensor):
        yield value.dtype

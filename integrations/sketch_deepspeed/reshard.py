"""Rewrite a checkpoint of DeepSpeed's ZeRO for another number of ranks: ``sketch-plugins reshard``.

DeepSpeed loads the optimizer state of a checkpoint only with as many ranks as have written it. This module reads the
files of all ranks and writes those for N ranks, which ``engine.load_checkpoint`` reads as if N ranks had saved them.
Weights and fp32 master weights are equal bit for bit. The state of our optimizers is recut by
`sketch_plugins.checkpoints.recut`, which says what stays exact and what does not. Everything else (scheduler, loss
scale, step numbers, client state) stays the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sketch_deepspeed.layout import Buffer
from sketch_deepspeed.reading import Checkpoint, find, layout_for, read
from sketch_deepspeed.writing import Weights, model_files, rank_file
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
    root, tag = find(Path(checkpoint))
    target = output_of(root, world_size, output)
    old = read(root / tag, trust)
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


class _State:
    """State of the optimizer, for each parameter."""

    def __init__(self, old: Checkpoint) -> None:
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


def _write(old: Checkpoint, world: int, directory: Path, target: Path, progress: Progress) -> Report:
    state = _State(old)
    buffers = layout_for(old, world)
    report = Report(target, f"DeepSpeed, ZeRO stage {old.stage}", state.saved_optimizer.kind, old.world, world)
    report.parameters = sum(p.numel for group in old.groups for p in group)
    weights = Weights(old)
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
        save(rank_file(old, buffers, world, rank, flats, states), directory / name)
    for name, file in model_files(old, buffers, world):
        save(file, directory / name)
    progress(steps, steps, "done")
    report.nbytes = state.nbytes, after
    return report

"""FSDP2: shards a module, and refuses checkpoints that a sharded run cannot convert."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sketch_plugins.optim.convert import is_foreign


def shard(module: torch.nn.Module, mesh: Any, classes: tuple[type[torch.nn.Module], ...]) -> None:
    """Shard a LightningModule: some modules within its children by themselves, and then the children.

    Raises:
        ValueError: a parameter belongs to no child, or to several.
    """
    from torch.distributed.fsdp import fully_shard

    how = "override configure_model and shard it there (torch.distributed.fsdp.fully_shard)"
    for name, _ in module.named_parameters(recurse=False):
        raise ValueError(
            f"parameter {name!r} belongs to the LightningModule itself, which is not called as a module: {how}"
        )
    owner: dict[int, str] = {}
    for name, child in _called(module):
        for label, p in child.named_parameters():
            if owner.setdefault(id(p), name) != name:
                raise ValueError(f"parameter {name}.{label} also belongs to {owner[id(p)]}: {how}")
    for _, child in _called(module):
        containers = (torch.nn.ModuleList, torch.nn.Sequential)
        for inner in list(child.modules()):
            entries = [inner] if isinstance(inner, classes) else []
            if not classes and isinstance(inner, containers):
                entries = list(inner)
            for entry in entries:
                if entry is not child and any(True for _ in entry.parameters()) and not _is_list(entry):
                    fully_shard(entry, mesh=mesh)
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh)


def _called(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The children; for lists, which are not called, their entries."""
    for name, child in module.named_children():
        if _is_list(child):
            yield from ((f"{name}.{inner}", entry) for inner, entry in _called(child))
        else:
            yield name, child


def _is_list(module: torch.nn.Module) -> bool:
    return isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict))


def refuse_foreign(path: Any, weights_only: bool | None) -> None:
    """Refuse a checkpoint that one of torch's optimizers wrote.

    Args:
        path: its file or directory.
        weights_only: see `torch.load`.

    Raises:
        ValueError: it has the state of such an optimizer.
    """
    from torch.distributed.checkpoint import FileSystemReader

    if Path(path).is_file():
        saved = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)
        foreign = any(is_foreign(state) for state in saved.get("optimizer_states", ()))
    elif (Path(path) / ".metadata").is_file():
        names = FileSystemReader(path).read_metadata().state_dict_metadata
        kept = (".exp_avg_sq", ".momentum_buffer", ".sum")
        foreign = any(name.startswith("optimizer_") and name.endswith(kept) for name in names)
    else:
        return
    if foreign:
        raise ValueError(
            f"the checkpoint {path} holds the state of one of torch's optimizers, and a sharded run cannot "
            "convert it: load only the weights, and start with a new optimizer state"
        )

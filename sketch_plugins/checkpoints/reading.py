"""Optimizers in files: the state dicts in a checkpoint of any framework, and their contents."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.checkpoints.contents import CannotReport, Contents, contents_of, named_states

#: Names of optimizer files in directories of transformers' Trainer and of accelerate.
FILES = ("optimizer.pt", "optimizer.bin")


def contents(checkpoint: str | Path, *, trust: bool = False) -> list[Contents]:
    """The contents of the optimizers in a checkpoint.

    Args:
        checkpoint: directory of a Trainer's checkpoint (``optimizer.pt``); file of ``torch.save`` or of Lightning with
            a state dict of an optimizer at any depth; directory of DeepSpeed or of ``torch.distributed.checkpoint``.
        trust: unpickle objects that are neither tensors nor plain values.

    Raises:
        ValueError: the checkpoint does not exist, is damaged, or has no optimizer; it has objects that need ``trust``.
    """
    path = Path(checkpoint)
    if path.is_file():
        return _of_file(path, trust)
    if not path.is_dir():
        raise CannotReport(absent(path))
    for name in FILES:
        if (path / name).is_file():
            return [replace(one, weights=_saved_weights(path)) for one in _of_file(path / name, trust)]
    for place in (path, *sorted(path.glob("optimizer*"))):
        if (place / ".metadata").is_file():
            distributed = importlib.import_module("sketch_plugins.checkpoints.distributed")
            return _of_value(distributed._load(place, trust), place)
    if (path / "latest").is_file() or any(path.glob("*_states.pt")):
        try:
            deepspeed = importlib.import_module("sketch_deepspeed.contents")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "deepspeed":
                raise
            raise CannotReport(
                f"{path} is a DeepSpeed checkpoint, and reading it needs DeepSpeed: "
                "pip install 'sketch-plugins[deepspeed]'"
            ) from error
        groups, named = deepspeed.contents(path, trust)
        return [contents_of(groups, named)]
    within = sorted(p.name for p in path.glob("checkpoint-*")) + sorted(p.name for p in path.glob("*.ckpt"))
    hint = f"; it contains {', '.join(within)}: give one of these" if within else ""
    raise CannotReport(
        f"{path} holds no optimizer checkpoint: none of {', '.join(FILES)}, '.metadata' or 'latest' is in it{hint}"
    )


def load(file: Path, trust: bool) -> Any:
    """Load a file of ``torch.save``.

    Raises:
        ValueError: it cannot be read, or not without running code.
    """
    try:
        # Since torch 1.6 files are zip archives, so that not all tensors have to be read at once.
        return torch.load(file, map_location="cpu", mmap=_is_zip(file), weights_only=not trust)
    except UnpicklingError as error:
        others = _unsafe(file)
        if others:
            raise CannotReport(
                f"{file} contains Python objects other than tensors and plain values ({', '.join(others)}), and "
                "unpickling them can run code. If you trust the checkpoint, use --trust"
            ) from error
        raise CannotReport(
            f"{file} cannot be read as a file of torch.save; it is damaged, or of another format"
        ) from error
    except Exception as error:  # a damaged file may raise any error
        # Of others (a KeyError of the unpickler: 101) the text says nothing.
        why = f": {error}" if isinstance(error, (OSError, RuntimeError)) and str(error) else ""
        raise CannotReport(
            f"{file} cannot be read as a file of torch.save. It is damaged, or has another format{why}"
        ) from error


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _unsafe(file: Path) -> list[str]:
    try:
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except Exception:
        return []


def _of_file(file: Path, trust: bool) -> list[Contents]:
    return _of_value(load(file, trust), file)


def _of_value(value: Any, path: Path) -> list[Contents]:
    found = []
    for saved in state_dicts(value):
        found.append(contents_of(saved["param_groups"], named_states(saved, _weights(value))))
    if not found:
        raise CannotReport(without_optimizer(path, value))
    return found


def absent(path: Path) -> str:
    """The error message for a path that is neither a file nor a directory."""
    why = "is neither a file nor a directory" if path.exists() else "does not exist"
    return f"{path} {why}: give the directory or file of a checkpoint"


def without_optimizer(path: Path, value: Any) -> str:
    """The error message for a checkpoint that has no state dict of an optimizer."""
    if isinstance(value, Mapping) and "state" in value and "param_groups" in value:
        kinds = (type(value[key]).__name__ for key in ("state", "param_groups"))
        return (
            f"{path} holds no optimizer state dict: 'state' has to be a dict, and 'param_groups' a list of dicts with "
            f"the key 'params'; here they are {' and '.join(kinds)}"
        )
    said = ", ".join(map(str, list(value)[:8])) if isinstance(value, Mapping) else type(value).__name__
    return (
        f"{path} holds no optimizer state dict, which would have the keys 'state' and 'param_groups'; it "
        f"holds {said or 'nothing'}"
    )


def is_state_dict(value: Mapping[Any, Any]) -> bool:
    """Whether it is a state dict of an optimizer."""
    groups = value.get("param_groups")
    whole = isinstance(groups, (list, tuple)) and all(isinstance(g, Mapping) and "params" in g for g in groups)
    return whole and isinstance(value.get("state"), Mapping)


def state_dicts(value: Any) -> Iterator[Mapping[str, Any]]:
    """The state dicts of optimizers in a checkpoint, at any depth."""
    if isinstance(value, Mapping):
        if is_state_dict(value):
            yield value
            return
        for inner in value.values():
            yield from state_dicts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from state_dicts(inner)


def _weights(value: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's weights in the checkpoint, in the model's order."""
    for key in ("state_dict", "model", "model_state_dict", "module"):
        weights = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(weights, Mapping) and weights and all(isinstance(w, Tensor) for w in weights.values()):
            return {str(name): tuple(w.shape) for name, w in weights.items()}
    return {}


def _saved_weights(directory: Path) -> int | None:
    """Number of elements in the safetensors files of a directory; only their headers are read."""
    total = 0
    for file in directory.glob("*.safetensors"):
        try:
            with file.open("rb") as stream:
                header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            total += sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (OSError, ValueError, KeyError, OverflowError, MemoryError):
            return None
    return total or None

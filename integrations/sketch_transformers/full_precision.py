"""Float32 weights of a run with ``weight_bits``, as a folder that ``from_pretrained`` reads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from sketch_plugins import full_precision_state_dict

#: Within a checkpoint of Trainer's.
FOLDER = "float32"


def save_full_precision(model: Any, optimizer: Any, directory: str | os.PathLike[str], write: bool = True) -> None:
    """Write the weights with all their bits (`sketch_plugins.full_precision_state_dict`) as a model of its own.

    A model of transformers is saved by ``save_pretrained``, with ``"float32"`` in its configuration:
    ``from_pretrained(directory)`` reads it. Of any other module the state dict is in ``pytorch_model.bin``. The folder
    appears when it is whole. On the host the weights take 4 bytes a parameter for a while, on the device one tensor.

    Args:
        model: the model in training; shards (FSDP2) are gathered, for which every process has to call this.
        optimizer: its optimizer, of sketch-plugins, or accelerate's wrapper around it; a list of several.
        directory: where to write; what is there is replaced.
        write: False on processes that only take part in gathering.

    Raises:
        ValueError: as `sketch_plugins.full_precision_state_dict`.
    """
    weights = full_precision_state_dict(model, optimizer, device="cpu", whole=True, keep=write)
    if not write:
        return
    target = Path(directory)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(partial, state_dict=weights)
            _say_float32(partial / "config.json")
        else:
            torch.save(weights, partial / "pytorch_model.bin")
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _say_float32(config: Path) -> None:
    if not config.exists():
        return
    said = json.loads(config.read_text())
    for key in ("dtype", "torch_dtype"):
        if key in said:
            said[key] = "float32"
    config.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")

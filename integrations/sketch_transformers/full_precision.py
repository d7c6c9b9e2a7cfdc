"""Float32 weights of a run with ``weight_bits``, as a folder that ``from_pretrained`` reads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from sketch_plugins import full_precision_state_dict

#: Folder within a checkpoint of Trainer.
FOLDER = "float32"


def save_full_precision(model: Any, optimizer: Any, directory: str | os.PathLike[str], write: bool = True) -> None:
    """Write the weights with all their bits (`sketch_plugins.full_precision_state_dict`) as a separate model.

    ``save_pretrained`` saves a model of transformers, with ``"float32"`` in its configuration, and
    ``from_pretrained(directory)`` reads it. For any other module, ``pytorch_model.bin`` contains the state dict. The
    folder gets its name when it is complete. The weights temporarily take 4 bytes a parameter on the host, and one
    tensor on the device.

    Args:
        model: the model in training; shards (FSDP2) are gathered, so every process has to call this.
        optimizer: its optimizer, of sketch-plugins, or accelerate's wrapper around it; or a list of several.
        directory: directory to write; an existing one is replaced.
        write: False on processes that only take part in gathering.

    Raises:
        ValueError: see `sketch_plugins.full_precision_state_dict`.
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

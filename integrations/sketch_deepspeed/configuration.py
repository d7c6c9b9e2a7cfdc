"""Build an optimizer from DeepSpeed's configuration, and report every mistake before training starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sketch_plugins import registry
from sketch_plugins.optim import SketchOptimizer

#: The way to change the number of ranks of a checkpoint; DeepSpeed's own tools know Adam's state only.
RESHARD = "sketch-plugins reshard CHECKPOINT --world-size N"


def optimizer_from(name: str, params: Mapping[str, Any], model_parameters: Any) -> SketchOptimizer:
    """The optimizer of the block ``{"type": name, "params": params}``.

    Args:
        name: a name of the registry.
        params: options of that optimizer; betas are a list of two numbers.
        model_parameters: parameters or parameter groups.

    Raises:
        ValueError: an unknown option (lists the known ones), a value of the wrong type or out of range, options that
            contradict each other, or an ``"auto"`` that was not replaced by a value.
    """
    where = f'the optimizer {{"type": "{name}"}} of the DeepSpeed configuration'
    for key, value in params.items():
        if isinstance(value, str) and value.lower() == "auto" and key in registry.get(name).options:
            choices = registry.get(name).options[key].choices
            if None not in choices and "auto" not in choices:
                raise ValueError(f'{where}: "{key}": "auto" is filled in by Hugging Face\'s Trainer only; give a value')
    try:
        options = registry.parse_options(name, params)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    try:
        return registry.get(name).cls(model_parameters, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def refuse_impossible(
    optimizer: SketchOptimizer, offload: Any, *, elastic: bool, universal: bool, zenflow: bool, masters: bool = False
) -> None:
    """Check the settings of the configuration that concern the optimizer.

    Args:
        optimizer: the one that is about to be used.
        offload: ``zero_optimization.offload_optimizer``, or None.
        elastic: ``zero_optimization.elastic_checkpoint``.
        universal: ``checkpoint.load_universal``.
        zenflow: whether the configuration has ``zero_optimization.zenflow``.
        masters: whether DeepSpeed keeps float32 weights of its own, which the optimizer steps.

    Raises:
        ValueError: a setting cannot work; the message names it and what works instead.
    """
    name = type(optimizer).__name__
    if elastic:
        raise ValueError(
            f'"elastic_checkpoint": true needs optimizer state with one number for each element, and {name} '
            f"has other state. Remove it; for another number of processes convert a checkpoint: {RESHARD}"
        )
    if universal:
        raise ValueError(
            f'"load_universal": true needs Adam\'s exp_avg and exp_avg_sq, which {name} does not have. For '
            f"another number of processes convert the ordinary checkpoint: {RESHARD}"
        )
    if zenflow:
        raise ValueError(f'"zenflow" replaces {name} by optimizers of its own: remove it')
    if masters and any(group.get("weight_bits") for group in optimizer.param_groups):
        raise ValueError(
            f'"weight_bits" of {name}: DeepSpeed keeps a float32 copy of bfloat16 and float16 weights (4 bytes a '
            "parameter, ZeRO of all stages), which is what the optimizer steps: there is nothing to correct, and "
            "nothing is saved. Leave weight_bits out, or train without DeepSpeed (FSDP2 takes bfloat16 parameters)"
        )
    if offload is None:
        return
    device = getattr(offload.device, "value", offload.device)
    if device == "nvme":
        raise ValueError(
            f'"offload_optimizer": {{"device": "nvme"}} moves tensors of one number for each element only, which the '
            f'state of {name} is not: use "cpu"'
        )
    if getattr(offload, "ratio", 1.0) != 1.0:
        raise ValueError(
            f'"offload_optimizer": {{"ratio": {offload.ratio}}} steps the rest with an AdamW of DeepSpeed in place of '
            f"{name}: leave ratio out"
        )
    if getattr(offload, "super_offload", False):
        raise ValueError(
            f'"offload_optimizer": {{"super_offload": true}} brings DeepSpeedCPUAdam in place of {name}: leave it out'
        )

"""A checkpoint of Trainer that AdamW wrote: its moments are converted with ``warm_start``; otherwise it is an error."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sketch_plugins.optim import SketchOptimizer
from sketch_plugins.optim.convert import convert_state, is_foreign
from sketch_transformers.optim_args import optimizer_options

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)


def follow(optimizer: SketchOptimizer, args: TrainingArguments) -> None:
    """Check every state dict that Trainer loads into the optimizer. Calling it again does no harm.

    With ``warm_start`` the state of one of torch's optimizers is converted. Otherwise loading it is an error.
    """
    if getattr(optimizer, "_sketch_looks_at_state", False):
        return
    name, options, warm = optimizer_options(args)
    keep = [key for key in ("betas", "momentum") if key in options]

    def look(_: Any, state_dict: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if not is_foreign(state_dict):
            return None
        kind = type(optimizer).__name__
        if not warm:
            how = (
                f'set optim_args="warm_start=true", or write a converted checkpoint with '
                f"`sketch-plugins convert CHECKPOINT --optim {name}`"
                if name is not None
                else "call sketch_plugins.convert_state(state_dict, optimizer) and load what it returns"
            )
            raise ValueError(
                f"the checkpoint holds the state of one of torch's optimizers, not of {kind}. To convert it, "
                f"{how}. Or load only the weights, and start with a new optimizer state"
            )
        converted = convert_state(state_dict, optimizer, keep=keep)
        logger.info("warm start: converted the checkpoint's moments to the state of %s", kind)
        return converted  # type: ignore[no-any-return]

    optimizer.register_load_state_dict_pre_hook(look)  # type: ignore[arg-type]
    optimizer._sketch_looks_at_state = True  # type: ignore[attr-defined]


def check(args: TrainingArguments, deepspeed: bool, fsdp: bool) -> None:
    """Check whether a warm start is possible.

    Raises:
        ValueError: ``warm_start`` under DeepSpeed or FSDP, or with ``optim_target_modules``.
    """
    if not optimizer_options(args)[2]:
        return
    if deepspeed or fsdp:
        what = (
            "DeepSpeed reads its checkpoints itself"
            if deepspeed
            else "FSDP reads a checkpoint into the state that already exists"
        )
    elif args.optim_target_modules is not None:
        what = "with optim_target_modules the parameter groups differ from those of the checkpoint and its schedule"
    else:
        return
    raise ValueError(
        f"optim_args={args.optim_args!r}: warm_start=true is not possible here: {what}. It works with one "
        "process and with DistributedDataParallel. Otherwise load only the weights, and start with a new "
        "optimizer state"
    )

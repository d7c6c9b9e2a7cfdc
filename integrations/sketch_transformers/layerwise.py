"""``optim="cs_adam_layerwise"``: steps in backward, by `sketch_plugins.InBackward`, in Trainer."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.state import GradientState

from sketch_plugins import InBackward
from sketch_transformers._private import base_name

if TYPE_CHECKING:
    from transformers import TrainingArguments


def layerwise(cls: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A stand-in for ``cls`` that makes an instance of ``cls`` with steps in backward.

    ``LayerWiseDummyOptimizer``, Trainer's own way for such names, is not used: with it, the learning rate that is
    logged is not the one that is used, and checkpoints contain no state.
    """

    def new(_: type, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = cls(*args, **kwargs)
        # Before each backward Trainer sets whether it is the last one of its cycle, also for the shorter cycle at the
        # end of an epoch.
        back = InBackward(optimizer, last=lambda: bool(GradientState().sync_gradients))

        def train() -> None:
            """Trainer calls this before each forward, when FSDP2 has replaced the parameters by its own."""
            if back.taken:  # in a backward that failed: training has begun again (auto_find_batch_size)
                back.reset()
            back.install()

        optimizer.train = train  # type: ignore[attr-defined]
        return optimizer

    # Python does not run `__init__` again on the result of `__new__`, because it is no instance of the stand-in.
    return type(cls.__name__, (cls,), {"__new__": new, "__module__": cls.__module__, "__doc__": cls.__doc__})


def check(args: TrainingArguments, name: str, keys: Iterable[str], deepspeed: bool, fsdp_version: int | None) -> None:
    """Refuse settings that do not work with steps in backward.

    Args:
        args: the arguments.
        name: name of the optimizer, as it was given.
        keys: keys of ``optim_args``.
        deepspeed: whether DeepSpeed runs the training.
        fsdp_version: version of FSDP; None without FSDP.

    Raises:
        ValueError: fp16, whose GradScaler unscales after backward; DeepSpeed; several processes without FSDP2;
            compressed communication.
    """
    plain = base_name(name)
    if args.fp16 or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") == "fp16":
        raise ValueError(
            f"optim={name!r} does not support fp16: GradScaler unscales gradients after backward, when they "
            f"have been freed. Use bf16, or optim={plain!r}"
        )
    if deepspeed:
        raise ValueError(
            f"optim={name!r} does not support DeepSpeed, which partitions gradients itself and takes its "
            f"steps after backward: use optim={plain!r}"
        )
    compressed = [key for key in keys if key.startswith("comm")]
    if compressed:
        raise ValueError(
            f"optim={name!r} does not support {compressed[0]!r} in optim_args: gradients are freed before "
            f"they could be sent. Use optim={plain!r}"
        )
    if args.world_size > 1 and fsdp_version != 2:
        raise ValueError(
            f"optim={name!r} does not support DistributedDataParallel ({args.world_size} processes): "
            "gradients would be averaged after the steps, and the processes would drift apart. Use FSDP2: "
            f'fsdp="full_shard", fsdp_config={{"version": 2}}; or optim={plain!r}'
        )


def clipping_warning(args: TrainingArguments, name: str) -> str | None:
    """A warning about ``max_grad_norm``, which Trainer sets to 1 by default; None if it is off."""
    if not args.max_grad_norm or args.max_grad_norm <= 0:
        return None
    return (
        f"max_grad_norm={args.max_grad_norm} has no effect with optim={name!r}, which takes its steps in "
        "backward, when not all gradients exist; for the same reason no grad_norm is logged. Set "
        "max_grad_norm=0 to silence this warning. update_clip in optim_args bounds the update of each "
        "tensor"
    )

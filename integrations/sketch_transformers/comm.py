"""Sparsified gradients in Trainer: ``enable_memsgd(trainer)``, or ``comm=...`` in ``optim_args``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from sketch_plugins.comm import MemSGDState, attach, memsgd_hook
from sketch_plugins.comm.state import check_options
from sketch_transformers.optim_args import COMMUNICATION, communication_options

logger = logging.getLogger(__name__)

FOLDER = "memsgd"
#: Keys of ``optim_args`` that are options of `enable_memsgd`.
OPTIONS = COMMUNICATION


def enable_memsgd(trainer: Trainer, **options: Any) -> MemSGDCallback:
    """Send sparsified gradients, and keep the other entries in a memory on each process: see `MemSGDState`.

    Call it before ``trainer.train()``: ``enable_memsgd(trainer, density=0.01)``. The hook is registered when training
    begins, on the DistributedDataParallel that Trainer has made by then. Each checkpoint gets a folder ``memsgd`` with
    a file of every process. ``train(resume_from_checkpoint=...)`` reads them, also with another number of processes.
    Under fp16 memories are kept unscaled. `SketchCallback` logs ``comm/...``.

    Args:
        trainer: a trainer that several processes run (torchrun). With one process there is nothing to send: a warning
            says so, and training continues.
        options: options of `MemSGDState`: ``density``, ``compressor``, ``start``, ...

    Returns:
        The callback, whose ``state`` is the `MemSGDState` from the beginning of training on.

    Raises:
        ValueError: an option is not allowed; it was called before; ``optim_args`` has ``comm=...``; when training
            begins: FSDP or DeepSpeed, which reduce gradients themselves.
    """
    if communication(trainer.callback_handler.callbacks) is not None:
        raise ValueError(
            "enable_memsgd was already called for this trainer, and DistributedDataParallel has one hook: call it once"
        )
    if communication_options(trainer.args) is not None:
        raise ValueError(
            f"optim_args={trainer.args.optim_args!r} and enable_memsgd both set the gradient compression: use "
            "one of them"
        )
    return _enable(trainer, options)


def _enable(trainer: Trainer, options: Mapping[str, Any]) -> MemSGDCallback:
    callback = MemSGDCallback(trainer, **options)
    trainer.add_callback(callback)
    return callback


class MemSGDCallback(TrainerCallback):
    """The callback of `enable_memsgd`; ``state`` is None until training begins, and with one process."""

    def __init__(self, trainer: Trainer, **options: Any) -> None:
        check_options(options)
        self.trainer, self.options = trainer, options
        self.state: MemSGDState | None = None
        self.resume_from: Any = None  # the argument resume_from_checkpoint of train()
        self._wrapped: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Register the hook, and load the memory of the checkpoint from which the run is resumed."""
        model = self.trainer.model_wrapped
        if not isinstance(model, DistributedDataParallel):
            if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
                what = "FSDP" if self.trainer.is_fsdp_enabled else "DeepSpeed"
                raise ValueError(
                    f"memsgd is not possible under {what}, which reduces gradients itself: use DistributedDataParallel"
                )
            logger.warning("memsgd has no effect: there is one process, so no gradients are sent")
            if state.global_step > 0 and (folder := self._resumed(args, state)) is not None and folder.is_dir():
                logger.warning(
                    "memsgd: %s is not loaded, because there is one process now: gradients that the saved processes "
                    "had not sent yet are lost",
                    folder,
                )
            return
        if model is not self._wrapped:
            if self.state is None:
                self.state = attach(model, **self.options)
            else:  # a second train() wraps the model again
                # The weights are new, so the memory does not belong to them.
                if self.trainer.model_init is not None and state.global_step == 0:
                    self.state.reset()
                self.state.process_group = model.process_group
                self.state.bind(model.module.named_parameters())
                model.register_comm_hook(self.state, memsgd_hook)
            self._wrapped = model
        assert self.state is not None
        self.state.scaler = getattr(self.trainer.accelerator, "scaler", None)
        if state.global_step > 0 and (folder := self._resumed(args, state)) is not None:
            if folder.is_dir():
                self.state.load(folder)
            else:
                logger.warning("memsgd: %s does not exist, so the error memory starts at zero", folder)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the file of each process."""
        if self.state is not None:
            self.state.save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER)

    def _resumed(self, args: TrainingArguments, state: TrainerState) -> Path | None:
        if not self.resume_from:
            return None
        last = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        return (last if self.resume_from is True else Path(self.resume_from)) / FOLDER


def communication(callbacks: list[TrainerCallback]) -> MemSGDCallback | None:
    """The callback of `enable_memsgd`, if there is one."""
    return next((callback for callback in callbacks if isinstance(callback, MemSGDCallback)), None)


def before_training(trainer: Trainer, resume_from_checkpoint: Any) -> None:
    """Enable what ``optim_args`` asks for, and store the checkpoint to resume from. ``Trainer.train`` calls this."""
    options = communication_options(trainer.args)
    callback = communication(trainer.callback_handler.callbacks)
    if callback is None and options is not None:
        callback = _enable(trainer, options)
    if callback is not None:
        callback.resume_from = resume_from_checkpoint

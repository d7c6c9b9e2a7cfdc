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

from sketch_plugins.comm import COMPRESSORS, MemSGDState, attach, memsgd_hook
from sketch_plugins.comm.state import check_options
from sketch_plugins.optim.options import Option

logger = logging.getLogger(__name__)

FOLDER = "memsgd"

#: Keys of ``optim_args``, each an option of `MemSGDState` behind the first underscore.
OPTIONS = {
    option.name: option
    for option in (
        Option("comm", str, "compressor of the gradients between processes", choices=tuple(COMPRESSORS)),
        Option("comm_density", float, "fraction that is sent (default 0.01)"),
        Option("comm_start", int, "steps that send everything (default 2)"),
        Option("comm_warmup", int, "steps in which the density falls (default 0)"),
        Option("comm_initial_density", float, "density that it falls from (default 0.25)"),
        Option("comm_momentum", float, "momentum correction (default 0)"),
        Option("comm_factor_masking", bool, "clear the velocity of what was sent (default True)"),
        Option("comm_clip", float, "bound of local gradient norms (default 0: off)"),
        Option("comm_memory_dtype", str, "numbers of the memory: 'fp32' (default) or 'bf16'"),
        Option("comm_min_size", int, "smaller parameters are sent whole (default 1024)"),
        Option("comm_seed", int, "of random entries, hashes and rounding (default 0)"),
    )
}


def enable_memsgd(trainer: Trainer, **options: Any) -> MemSGDCallback:
    """Send sparsified gradients, and keep what was not sent in a memory on each process: see `MemSGDState`.

    Before ``trainer.train()``: ``enable_memsgd(trainer, density=0.01)``. The hook is registered when training begins,
    on the DistributedDataParallel that Trainer has made by then. Each checkpoint gets a folder ``memsgd`` with a file
    of every process, which ``train(resume_from_checkpoint=...)`` reads, with another number of processes, too. Under
    fp16 memories are kept unscaled. `SketchCallback` logs ``comm/...``.

    Args:
        trainer: run by several processes (torchrun). With one there is nothing to send: a warning says so, training
            goes on.
        options: those of `MemSGDState`: ``density``, ``compressor``, ``start``, ...

    Returns:
        The callback, whose ``state`` is the `MemSGDState` from the beginning of training on.

    Raises:
        ValueError: an option that is not allowed; it was called before; ``optim_args`` has ``comm=...``; when training
            begins, FSDP or DeepSpeed, which reduce gradients themselves.
    """
    from sketch_transformers.arguments import communication_options

    if communication(trainer.callback_handler.callbacks) is not None:
        raise ValueError("enable_memsgd was called for this trainer before: DistributedDataParallel takes one hook")
    if communication_options(trainer.args) is not None:
        raise ValueError(
            f"optim_args={trainer.args.optim_args!r} says how gradients are sent, and so does enable_memsgd: leave one "
            "of them out"
        )
    return _enable(trainer, options)


def _enable(trainer: Trainer, options: Mapping[str, Any]) -> MemSGDCallback:
    callback = MemSGDCallback(trainer, **options)
    trainer.add_callback(callback)
    return callback


class MemSGDCallback(TrainerCallback):
    """What `enable_memsgd` adds to a trainer; ``state`` is None until training begins, and with one process."""

    def __init__(self, trainer: Trainer, **options: Any) -> None:
        check_options(options)
        self.trainer, self.options = trainer, options
        self.state: MemSGDState | None = None
        self.resume_from: Any = None  # what train() was given as resume_from_checkpoint
        self._wrapped: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Register the hook; take up the memory of the checkpoint that is resumed."""
        model = self.trainer.model_wrapped
        if not isinstance(model, DistributedDataParallel):
            if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
                what = "FSDP" if self.trainer.is_fsdp_enabled else "DeepSpeed"
                raise ValueError(f"memsgd under {what}, which reduces gradients itself: use DistributedDataParallel")
            logger.warning("memsgd: this is one process, there are no gradients to send")
            if state.global_step > 0 and (folder := self._resumed(args, state)) is not None and folder.is_dir():
                logger.warning("memsgd: %s is not read: what those processes had not sent yet is lost", folder)
            return
        if model is not self._wrapped:
            if self.state is None:
                self.state = attach(model, **self.options)
            else:  # train() a second time wraps the model anew
                if self.trainer.model_init is not None and state.global_step == 0:  # other weights: nothing is owed
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
                logger.warning("memsgd: %s does not exist: the error memory begins at zero", folder)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Every process writes its file."""
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
    """``Trainer.train`` calls this: enable what ``optim_args`` asks for, remember what is resumed."""
    from sketch_transformers.arguments import communication_options

    options = communication_options(trainer.args)
    callback = communication(trainer.callback_handler.callbacks)
    if callback is None and options is not None:
        callback = _enable(trainer, options)
    if callback is not None:
        callback.resume_from = resume_from_checkpoint


def parse(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options of `MemSGDState` from keys of ``optim_args`` that begin with ``comm``; None if there are none.

    Raises:
        ValueError: an unknown key, a value that is not allowed; ``comm_...`` without ``comm``.
    """
    if not given:
        return None
    unknown = [key for key in given if key not in OPTIONS]
    if unknown:
        raise ValueError(f"there is no {unknown[0]!r}; of communication there are {', '.join(OPTIONS)}")
    if "comm" not in given:
        raise ValueError(
            f"{next(iter(given))!r} without 'comm': add comm=block_topk, or another of {list(COMPRESSORS)}"
        )
    parsed = {key: OPTIONS[key].parse(value) for key, value in given.items()}
    options = {("compressor" if key == "comm" else key.removeprefix("comm_")): v for key, v in parsed.items()}
    check_options(options)
    return options

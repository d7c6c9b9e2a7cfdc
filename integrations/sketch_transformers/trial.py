"""A trial: Trainer trains on batches of one size for a few steps, and all ranks learn whether it fits."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils.memory import should_reduce_batch_size
from transformers import Trainer
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from sketch_plugins import state_report
from sketch_transformers import _private

#: Results of a step of a trial; all ranks use the smallest one.
FAILED, OUT_OF_MEMORY, SKIPPED, STEPPED = range(4)
#: The number of steps that a gradient scaler may skip in a trial.
SKIPS = 64


@dataclasses.dataclass(frozen=True)
class Trial:
    """One size that was tried.

    Attributes:
        batch_size: samples of a batch, on each device.
        gradient_accumulation_steps: batches of an update.
        fits: whether it fits on all ranks.
        peak: bytes at the peak on this rank; None if the memory ran out.
    """

    batch_size: int
    gradient_accumulation_steps: int
    fits: bool
    peak: int | None


class _TrialOver(Exception):
    """Ends a trial: enough steps were taken, or a rank could not take one."""


class Stop(TrainerCallback):
    """The only callback of a trial. Ranks agree after each step, and only then."""

    is_trial = True

    def __init__(self, trainer: Trainer, steps: int, size: int) -> None:
        self.trainer, self.left, self.size = trainer, steps, size
        self.outcome, self.ran_out = FAILED, False
        self.state_bytes = self.adamw_bytes = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the loader makes batches of the size that is tried."""
        _private.stop_sync(self.trainer)
        loader = kwargs.get("train_dataloader")
        made = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        if made is not None and made != self.size:
            raise ValueError(
                f"ReclaimBatchSize: get_train_dataloader made batches of {made}, but per_device_train_batch_size "
                f"is {self.size}: it must use that size"
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Agree on the result of the step; end the trial after the last step, or if a rank could not take one."""
        skipped = self.trainer.accelerator.optimizer_step_was_skipped
        self.outcome = agree(self.trainer, SKIPPED if skipped else STEPPED)
        self.left -= self.outcome == STEPPED
        if self.outcome < SKIPPED or self.left == 0:
            if self.left == 0:
                report = state_report(kwargs["optimizer"])
                self.state_bytes, self.adamw_bytes = report.state_bytes, report.adamw_bytes
            raise _TrialOver


def run(trainer: Trainer, stop: Stop) -> None:
    """Train until `stop` ends the trial; ``stop.outcome`` is the same on all ranks."""
    try:
        _private.only_training(trainer, stop, stop.left + SKIPS)
        _private.stock_train()(trainer)
    except _TrialOver:
        if stop.outcome == FAILED:
            raise RuntimeError(
                "ReclaimBatchSize: another rank failed in a trial; its error message has the reason"
            ) from None
    except Exception as error:
        stop.ran_out = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or should_reduce_batch_size(error)
        stop.outcome = agree(trainer, OUT_OF_MEMORY if stop.ran_out else FAILED)
        if not stop.ran_out:
            raise
        if stop.outcome == FAILED:
            raise RuntimeError(
                "ReclaimBatchSize: another rank failed in a trial; its error message has the reason"
            ) from None
    else:
        raise RuntimeError(f"ReclaimBatchSize: the gradient scaler skipped {SKIPS} steps of a trial")


def agree(trainer: Trainer, value: int) -> int:
    """The smallest value of all ranks."""
    if trainer.args.world_size == 1 or not dist.is_initialized():
        return value
    tensor = torch.tensor(value, device=trainer.args.device)
    dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return int(tensor)

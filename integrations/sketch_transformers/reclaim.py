"""The largest batch that fits into the memory: ``reclaim_batch_size(trainer)``, or the callback `ReclaimBatchSize`."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import Trainer
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import get_last_checkpoint, has_length
from transformers.training_args import TrainingArguments

from sketch_plugins.memory.meter import AllocatorMeter, Meter, ResidentMeter, meter_for, parse_budget, total_memory
from sketch_plugins.memory.report import format_bytes
from sketch_plugins.memory.search import check_search, largest
from sketch_transformers import _private
from sketch_transformers.comm import communication
from sketch_transformers.optim_args import communication_options
from sketch_transformers.snapshot import Snapshot
from sketch_transformers.trial import STEPPED, Stop, Trial, agree, run

logger = logging.getLogger(__name__)


class ReclaimBatchSize(TrainerCallback, ExportableState):
    """Uses the memory that the sketched optimizer saves: finds the largest batch that fits, and trains with it.

        Trainer(model, args, train_dataset=data, callbacks=[ReclaimBatchSize(budget=0.9)]).train()

    Before ``train`` begins, Trainer itself trains on batches of growing size for a few steps each, with the
    accumulation of gradients and an optimizer of its own, until the memory exceeds the budget or runs out. Then
    everything is restored: weights, buffers and attributes of modules, the state of optimizer and scheduler, random
    numbers (also of generators that model, data set or collator hold), Trainer's state and arguments. No other callback
    sees the trials. ``per_device_train_batch_size`` becomes the size that was found, and training computes the same
    bits as a run that had this size from the start. Other changes to data set and collator are not undone.

    A size is tried on the first samples of training. If batches are padded to their longest sample, later ones may be
    longer: leave room in the budget, or use ``train_sampling_strategy="group_by_length"``, which begins with the
    longest.

    Under DistributedDataParallel all ranks agree on a size that fits on each of them. Gradients are not averaged in a
    trial, because a rank that runs out of memory would leave the others waiting. A resumed run takes the size from its
    checkpoint and does not search, and neither does a second ``train()``.

    Args:
        budget: bytes (``2 * 2**30`` or ``"2GiB"``) or a fraction of the device's memory (0.9) that the peak may take;
            on a CPU it counts the resident memory of the process. None: until CUDA runs out of memory.
        keep_effective: False: use the largest batch, and keep ``gradient_accumulation_steps``. True: keep the samples
            per update: use the largest batch that divides them, with less accumulation.
        mode: ``"binsearch"``: exact to the sample; ``"power"``: by factors of two.
        steps_per_trial: number of optimizer steps with each size, at least 2, because the first allocates the state.
        init_val: first size; None: ``per_device_train_batch_size``.
        max_val: largest size.
        max_trials: maximum number of sizes that are tried.
        meter: measures memory instead of CUDA's statistics or the resident memory of a process on Linux: an object
            with ``start()`` and ``read()``, which returns the bytes at the peak since ``start``.
            `sketch_plugins.memory.meter.AllocatorMeter` counts what torch allocates on a CPU, to the byte.

    Attributes:
        batch_size: the size that was found; None before the search.
        gradient_accumulation_steps: the accumulation that belongs to it; None before the search.
        trials: the sizes that were tried, in their order.
        state_bytes: bytes of the optimizer's state on this rank.
        adamw_bytes: bytes that AdamW would keep.

    Raises:
        ValueError: an argument that is not allowed; when training begins: no budget and no CUDA, a budget in which not
            even one sample fits, or a setting in which nothing can be tried or restored (DeepSpeed, FSDP, DataParallel,
            a model on several devices, an `IterableDataset` without length, ``auto_find_batch_size``, `enable_memsgd`,
            ``hyperparameter_search``, loaders that ignore ``per_device_train_batch_size``).
    """

    def __init__(
        self,
        budget: int | float | str | None = None,
        keep_effective: bool = False,
        mode: str = "binsearch",
        steps_per_trial: int = 2,
        init_val: int | None = None,
        max_val: int = 8192,
        max_trials: int = 25,
        meter: Meter | None = None,
    ) -> None:
        check_search(budget, mode, steps_per_trial, init_val, max_val, max_trials)
        if steps_per_trial < 2:
            raise ValueError(
                "steps_per_trial=1 is not allowed: the optimizer's state is allocated by the first step, so only "
                "from the second step on the peak contains it. Use 2 or more"
            )
        self.budget, self.keep_effective, self.mode = budget, keep_effective, mode
        self.steps_per_trial, self.init_val = steps_per_trial, init_val
        self.max_val, self.max_trials, self.meter = max_val, max_trials, meter
        self.batch_size: int | None = None
        self.gradient_accumulation_steps: int | None = None
        self.trials: list[Trial] = []
        self.state_bytes = self.adamw_bytes = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add this callback's state if the run is resumed from a checkpoint without it."""
        # Otherwise Trainer's next save would fail with a KeyError.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def state(self) -> dict[str, Any]:
        """The state that Trainer saves in ``trainer_state.json``: the options (without the meter), and the result."""
        options = ("budget", "keep_effective", "mode", "steps_per_trial", "init_val", "max_val", "max_trials")
        return {
            "args": {name: getattr(self, name) for name in options},
            "attributes": {
                "batch_size": self.batch_size,
                "gradient_accumulation_steps": self.gradient_accumulation_steps,
            },
        }

    def table(self) -> Table:
        """A rich table of the trials."""
        allowed = "" if self.budget is None else f", budget {self.budget}"
        table = Table(
            title=f"ReclaimBatchSize{allowed}: per_device_train_batch_size={self.batch_size}, "
            f"gradient_accumulation_steps={self.gradient_accumulation_steps}",
            caption=f"optimizer state {format_bytes(self.state_bytes)}, AdamW's {format_bytes(self.adamw_bytes)}",
        )
        for heading in ("batch size", "accumulation", "fits", "peak on this rank"):
            table.add_column(heading, justify="right")
        for trial in sorted(self.trials, key=lambda trial: trial.batch_size):
            chosen = trial.batch_size == self.batch_size
            table.add_row(
                str(trial.batch_size),
                str(trial.gradient_accumulation_steps),
                "yes" if trial.fits else "no",
                "out of memory" if trial.peak is None else format_bytes(trial.peak),
                style="bold" if chosen else None,
            )
        return table

    def __str__(self) -> str:
        """The table as text."""
        text = io.StringIO()
        Console(width=120, file=text, markup=False, emoji=False, force_jupyter=False).print(self.table())
        return text.getvalue()

    # -- the search --------------------------------------------------------------------------------------------------

    def search(self, trainer: Trainer) -> None:
        """Find the size and set it. If this fails, everything is restored."""
        self._check(trainer)
        before = Snapshot(trainer)
        self.trials = []
        try:
            found = self._try_sizes(trainer, before)
        except BaseException:  # after any error, nothing of a trial may be left
            before.restore()
            raise
        self.batch_size, self.gradient_accumulation_steps = found
        _private.set_batch(trainer, *found)
        if trainer.is_world_process_zero():
            logger.info("largest batch\n%s", self)

    def _try_sizes(self, trainer: Trainer, before: Snapshot) -> tuple[int, int]:
        args = trainer.args
        present, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        device = torch.device(args.device)
        meter = self.meter or meter_for(device)
        budget = None if self.budget is None else parse_budget(self.budget, total_memory(device))
        start = self.init_val or present
        # A size above the number of samples would not give larger batches.
        limit = max(1, min(self.max_val, len(trainer.train_dataset) // args.world_size))
        effective = present * accumulation
        # Every trial has the accumulation that training would have, so only divisors are tried.
        sizes: Any = range(1, limit + 1)
        if self.keep_effective:
            sizes = [n for n in range(1, min(limit, effective) + 1) if effective % n == 0]
            if self.mode == "power":
                sizes = [n for n in sizes if _is_power_of_two(n, present)]
        # The memory of the snapshot itself is not part of the training.
        ours = before.nbytes if isinstance(meter, (ResidentMeter, AllocatorMeter)) else 0

        def fits(index: int) -> bool:
            size = sizes[index - 1]
            batches = effective // size if self.keep_effective else accumulation
            _private.set_batch(trainer, size, batches)
            stop = Stop(trainer, self.steps_per_trial, size)
            meter.start()
            try:
                run(trainer, stop)
            finally:
                peak = max(0, meter.read() - ours)
                before.restore()
            within = stop.outcome == STEPPED and (budget is None or peak <= budget)
            fitting = agree(trainer, int(within)) == 1
            if stop.outcome == STEPPED:
                self.state_bytes, self.adamw_bytes = stop.state_bytes, stop.adamw_bytes
            self.trials.append(Trial(size, batches, fitting, None if stop.ran_out else peak))
            if trainer.is_world_process_zero():
                said = "out of memory" if stop.ran_out else format_bytes(peak)
                logger.info("a batch of %d %s (%s)", size, "fits" if fitting else "does not fit", said)
            return fitting

        at = sum(size <= start for size in sizes) or 1
        mode = "binsearch" if self.keep_effective else self.mode
        found = largest(fits, at, len(sizes), mode, self.max_trials)
        if not found:
            least = min(self.trials, key=lambda trial: trial.batch_size)
            took = "ran out of it" if least.peak is None else f"took {format_bytes(least.peak)} on this rank"
            allowed = "the memory" if budget is None else f"budget={self.budget!r} ({format_bytes(budget)})"
            raise ValueError(
                f"ReclaimBatchSize: {allowed} is too small: a batch of {least.batch_size} {took}. Use a larger "
                "budget, or a smaller init_val with more max_trials"
            )
        size = sizes[found - 1]
        return size, effective // size if self.keep_effective else accumulation

    def _check(self, trainer: Trainer) -> None:
        args = trainer.args
        data = trainer.train_dataset
        reasons = {
            "DeepSpeed": (
                trainer.is_deepspeed_enabled,
                "because its parameter partitions cannot be restored after a trial",
            ),
            "FSDP": (
                trainer.is_fsdp_enabled or getattr(trainer, "is_fsdp_xla_enabled", False),
                ("because a rank that runs out of memory would leave the others waiting for its part of the weights"),
            ),
            "DataParallel": (args.n_gpu > 1, "which divides a batch over the devices of one process: use torchrun"),
            "a model on several devices": (
                trainer.is_model_parallel or getattr(trainer, "is_distributed_loading_by_transformers", False),
                "because only the memory of one device is measured",
            ),
            "auto_find_batch_size=True": (args.auto_find_batch_size, "which also searches for the batch size"),
            "split_batches=True": (
                args.accelerator_config.split_batches and args.world_size > 1,
                "which makes per_device_train_batch_size the size of all devices together",
            ),
            "a data set without length": (
                data is not None and not has_length(data),
                "because a trial would use up its samples",
            ),
        }
        for what, (found, why) in reasons.items():
            if found:
                raise ValueError(f"ReclaimBatchSize does not support {what}, {why}")
        if data is None:
            raise ValueError("ReclaimBatchSize needs a train_dataset to try batches of, and the Trainer has none")
        callbacks = trainer.callback_handler.callbacks
        if communication(callbacks) is not None or communication_options(args) is not None:
            raise ValueError(
                "ReclaimBatchSize does not support enable_memsgd: a trial does not allocate the error memory, so "
                "its peak would be too low"
            )
        device = torch.device(args.device).type
        if self.budget is None and device != "cuda":
            raise ValueError(
                f"ReclaimBatchSize: budget=None means all memory of a CUDA device, but the device is {device}: "
                "give bytes ('2GiB') or a fraction of the memory (0.5)"
            )


def reclaim_batch_size(
    trainer: Trainer,
    budget: int | float | str | None = None,
    *,
    keep_effective: bool = False,
    mode: str = "binsearch",
    steps_per_trial: int = 2,
    init_val: int | None = None,
    max_val: int = 8192,
    max_trials: int = 25,
    meter: Meter | None = None,
) -> ReclaimBatchSize:
    """Search at once, and train with the result: ``reclaim_batch_size(trainer, 0.9)`` before ``trainer.train()``.

    Args:
        trainer: the trainer, which gets the callback and the size that was found.
        budget: see `ReclaimBatchSize`.
        keep_effective: see `ReclaimBatchSize`.
        mode: see `ReclaimBatchSize`.
        steps_per_trial: see `ReclaimBatchSize`.
        init_val: see `ReclaimBatchSize`.
        max_val: see `ReclaimBatchSize`.
        max_trials: see `ReclaimBatchSize`.
        meter: see `ReclaimBatchSize`.

    Returns:
        The callback, with the table of the trials.

    Raises:
        ValueError: see `ReclaimBatchSize`; or the trainer already has one.
    """
    if _callback_of(trainer) is not None:
        raise ValueError(
            "this trainer already has a ReclaimBatchSize callback, which searches when training begins: use "
            "either the callback or reclaim_batch_size"
        )
    callback = ReclaimBatchSize(budget, keep_effective, mode, steps_per_trial, init_val, max_val, max_trials, meter)
    callback.search(trainer)
    trainer.add_callback(callback)
    return callback


def before_training(trainer: Trainer, resume_from_checkpoint: Any, trial: Any) -> None:
    """Search, or take the size from a checkpoint. ``Trainer.train`` calls this."""
    callback = _callback_of(trainer)
    if callback is None:
        return
    if trial is not None:
        raise ValueError(
            "ReclaimBatchSize does not support hyperparameter_search, whose trials change the arguments "
            "after the search"
        )
    if resume_from_checkpoint:
        _resume(callback, trainer, resume_from_checkpoint)
    elif callback.batch_size is None:
        callback.search(trainer)


def _resume(callback: ReclaimBatchSize, trainer: Trainer, resume_from_checkpoint: Any) -> None:
    folder = get_last_checkpoint(trainer.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
    file = None if folder is None else Path(folder) / "trainer_state.json"
    if file is None or not file.is_file():
        return  # Trainer's own error says what is missing
    saved = json.loads(file.read_text()).get("stateful_callbacks", {}).get(type(callback).__name__)
    found = saved["attributes"] if isinstance(saved, dict) else {}
    if not found.get("batch_size"):
        logger.warning(
            "ReclaimBatchSize: %s was saved without ReclaimBatchSize, so training resumes with "
            "per_device_train_batch_size=%d as given",
            folder,
            trainer.args.per_device_train_batch_size,
        )
        return
    callback.batch_size = found["batch_size"]
    callback.gradient_accumulation_steps = found["gradient_accumulation_steps"]
    _private.set_batch(trainer, found["batch_size"], found["gradient_accumulation_steps"])
    logger.info("batch size %d, taken from the checkpoint", found["batch_size"])


def _callback_of(trainer: Trainer) -> ReclaimBatchSize | None:
    found = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ReclaimBatchSize)]
    if len(found) > 1:
        raise ValueError("this trainer has more than one ReclaimBatchSize: remove all but one")
    return found[0] if found else None


def _is_power_of_two(size: int, present: int) -> bool:
    large, small = max(size, present), min(size, present)
    ratio = large // small
    return large % small == 0 and ratio & (ratio - 1) == 0

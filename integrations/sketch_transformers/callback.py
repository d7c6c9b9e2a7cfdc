"""The size of the optimizer's state, and the error of the sketch's estimates, in Trainer's own logs."""

from __future__ import annotations

import base64
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import TrainingArguments

from sketch_plugins import NumericsProbe, state_report
from sketch_plugins.comm import MemSGDState
from sketch_plugins.memory.in_backward import in_backward
from sketch_plugins.memory.numerics import check_setting
from sketch_plugins.memory.probe import SecondMomentProbe

logger = logging.getLogger(__name__)


class SketchCallback(TrainerCallback, ExportableState):
    """Logs the size of the optimizer's state to all of Trainer's reporters (TensorBoard, W&B, ``log_history``, ...).

    Every training log gets

    * ``optimizer/state_bytes``: bytes of state on this rank;
    * ``optimizer/state_bytes_per_param``: the same for each parameter;
    * ``optimizer/saved_vs_adamw_bytes``: the bytes that ``torch.optim.AdamW`` would keep, minus those of the state;
    * ``optimizer/second_moment_relative_error``, if ``sampled``: the error of the second moment in use against an exact
      one of the same gradients, on a few rows: ``||estimate - exact|| / ||exact||``;
    * ``numerics/unmoved``, with ``check_numerics``: the share of weights with a gradient that a step did not move, in
      the last step that was checked, and ``numerics/unmoved_group_0``, ... of each parameter group.

    and with `enable_memsgd` (of this process, in the last step)

    * ``comm/wire_bytes``, ``comm/dense_bytes``, ``comm/wire_over_dense``: bytes given to collectives, bytes that
      averaging everything would take, their ratio;
    * ``comm/density``: fraction of the entries that the last step has sent;
    * ``comm/memory_norm``, ``comm/memory_bytes``: norm and bytes of what has not been sent yet.

    A table of the memory goes to the logger ``sketch_transformers.callback`` (level INFO) once, after the first step.
    The memory of any torch optimizer is logged, so that a run with AdamW can be compared; ``sampled`` is for sketched
    ones. The samples are saved with each checkpoint (in ``trainer_state.json``), and a resumed run restores them.

    Args:
        sampled: keep the exact second moment of a few rows and log the error. It is off under a gradient scaler (fp16),
            where gradients are scaled, and not possible with ``_layerwise`` names, where they are freed before the
            step.
        rows: number of sampled rows of each sampled parameter, in fp32.
        params: number of sampled parameters.
        seed: seed of the choice of rows.
        full_precision: write the float32 weights of a run with ``weight_bits`` into each checkpoint, as
            ``checkpoint-N/float32``: see `save_full_precision`. They take 4 bytes a parameter on disk.
        check_numerics: compare a sample of the weights before and after a step, on the first process: True for every
            100 steps, or the number of steps. A warning says once if more than half of the weights do not move in
            three checks in a row; see `sketch_plugins.NumericsProbe`. It works with any torch optimizer but LBFGS, and
            with names that end in ``_layerwise``.

    Raises:
        ValueError: ``check_numerics`` is neither a bool nor an integer >= 0; at the start of training:
            ``full_precision`` with an optimizer that has no ``weight_bits``; ``check_numerics`` under DeepSpeed or
            with LBFGS.
    """

    def __init__(
        self,
        sampled: bool = False,
        rows: int = 8,
        params: int = 4,
        seed: int = 0,
        full_precision: bool = False,
        check_numerics: bool | int = False,
    ) -> None:
        self._every = check_setting(check_numerics)
        self.check_numerics = check_numerics
        self.numerics: NumericsProbe | None = None
        self.full_precision = full_precision
        self.sampled = sampled
        self.rows = rows
        self.params = params
        self.seed = seed
        self.reported = False
        self._probe: SecondMomentProbe | None = None
        self._restored: Any = None  # samples of a checkpoint, until the probe exists

    def add_to(self, logs: dict[str, float], optimizer: Any, communication: MemSGDState | None = None) -> None:
        """Add the figures to a training log, but not to evaluation logs. ``Trainer.log`` calls this."""
        if optimizer is None or not ("loss" in logs or "train_loss" in logs):
            return
        report = state_report(optimizer)
        logs["optimizer/state_bytes"] = report.state_bytes
        logs["optimizer/state_bytes_per_param"] = report.bytes_per_param
        logs["optimizer/saved_vs_adamw_bytes"] = report.saved_bytes
        error = math.nan if self._probe is None else self._probe.relative_error()
        if not math.isnan(error):  # an optimizer without a sketched second moment has no samples
            logs["optimizer/second_moment_relative_error"] = error
        if self.numerics is not None:
            logs.update(self.numerics.figures())
        if communication is not None:
            logs.update({f"comm/{name}": value for name, value in communication.figures().items()})

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load the samples of the checkpoint from which the run is resumed.

        Raises:
            ValueError: ``sampled`` with an optimizer that takes its steps in backward; see also the class.
        """
        if self.sampled and in_backward(kwargs.get("optimizer")) is not None:
            raise ValueError(
                "SketchCallback(sampled=True) reads gradients before optimizer.step(), but a layerwise optim has "
                "already freed them: use sampled=False, or optim without _layerwise"
            )
        if self.full_precision:
            groups = getattr(_unwrap(kwargs.get("optimizer")), "param_groups", ())
            if not any(group.get("weight_bits") for group in groups):
                raise ValueError(
                    "SketchCallback(full_precision=True) writes the weights of 24 or 32 bits, but the optimizer keeps "
                    'none. Set weight_bits, as in optim_args="weight_bits=24", or remove full_precision: a checkpoint '
                    "then has all bits of the weights already"
                )
        self._watch_numerics(args, state, kwargs.get("optimizer"))
        # If the checkpoint was saved without this callback, Trainer's next save would fail with a KeyError.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if (
            state.global_step > 0
            and isinstance(saved, dict)
            and self._samples_of(saved["args"]) == self._samples_of(self.state()["args"])
        ):
            self.samples = saved["attributes"]["samples"]

    def _watch_numerics(self, args: TrainingArguments, state: TrainerState, optimizer: Any) -> None:
        if self.numerics is not None:
            self.numerics.remove()
            self.numerics = None
        if not self._every:
            return
        from sketch_transformers.arguments import deepspeed_config

        if deepspeed_config(args):
            raise ValueError(
                f"SketchCallback(check_numerics={self.check_numerics}) does not support DeepSpeed, which steps float32 "
                "weights of its own, so that no update is lost to the rounding of bfloat16: leave it out"
            )
        if state.is_world_process_zero:
            self.numerics = NumericsProbe(optimizer, every=self._every, seed=self.seed)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at no more steps; what was seen last stays in ``self.numerics``."""
        if self.numerics is not None:
            self.numerics.remove()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the samples with the gradients that the optimizer is about to use: averaged and clipped."""
        if not self.sampled or not state.is_world_process_zero:
            return
        optimizer = kwargs["optimizer"]
        if getattr(optimizer, "scaler", None) is not None:
            logger.warning(
                "SketchCallback(sampled=True) is switched off, because a gradient scaler is in use: use bf16 "
                "instead of fp16"
            )
            self.sampled = False
            return
        optimizer = _unwrap(optimizer)
        if self._probe is None or self._probe.optimizer is not optimizer:
            self._probe = SecondMomentProbe(optimizer, rows=self.rows, params=self.params, seed=self.seed)
            if self._restored is not None:
                self._probe.load_state_dict(_map(self._restored, lambda tensor: tensor.to(args.device)))
                self._restored = None
        self._probe.update()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the float32 weights into the checkpoint that has just been written."""
        if self.full_precision:
            from sketch_transformers.full_precision import FOLDER, save_full_precision

            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / FOLDER
            save_full_precision(kwargs["model"], _unwrap(kwargs["optimizer"]), folder, state.is_world_process_zero)

    @staticmethod
    def _samples_of(settings: Any) -> Any:
        return {name: settings.get(name) for name in ("sampled", "rows", "params", "seed")}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the table once, as soon as there is state."""
        if not self.reported and state.is_world_process_zero:
            if logger.isEnabledFor(logging.INFO):
                report = state_report(kwargs["optimizer"], kwargs.get("model"))
                logger.info("optimizer state after step %d\n%s", state.global_step, report)
        self.reported = True

    @property
    def will_report(self) -> bool:
        """Whether the table will be logged after the first step."""
        return not self.reported and logger.isEnabledFor(logging.INFO)

    def state(self) -> dict[str, Any]:
        """The state that Trainer saves in ``trainer_state.json``."""
        return {
            "args": {
                "sampled": self.sampled,
                "rows": self.rows,
                "params": self.params,
                "seed": self.seed,
                "full_precision": self.full_precision,
                "check_numerics": self.check_numerics,
            },
            "attributes": {"reported": self.reported, "samples": self.samples},
        }

    @property
    def samples(self) -> Any:
        """The exact second moments of the sampled rows, as JSON; None before the first step or if not ``sampled``."""
        return _map(self._restored if self._probe is None else self._probe.state_dict(), _encode)

    @samples.setter
    def samples(self, value: Any) -> None:
        self._restored = _decode(value)
        self._probe = None


def _unwrap(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _map(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    return function(value) if isinstance(value, torch.Tensor) else value


def _encode(tensor: torch.Tensor) -> dict[str, Any]:
    data = base64.b64encode(tensor.cpu().numpy().tobytes()).decode()
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "base64": data}


def _decode(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "base64" not in value:
        return {key: _decode(item) for key, item in value.items()}
    data = bytearray(base64.b64decode(value["base64"]))
    return torch.frombuffer(data, dtype=getattr(torch, value["dtype"])).reshape(value["shape"])

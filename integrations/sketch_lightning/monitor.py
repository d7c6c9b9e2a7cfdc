"""OptimizerStateMonitor: figures of the optimizers' state in the trainer's logs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from sketch_lightning import _private
from sketch_lightning.shared import before_update, check_count, named_optimizers
from sketch_plugins import NumericsProbe, full_precision_state_dict, state_report
from sketch_plugins.memory.in_backward import in_backward
from sketch_plugins.memory.numerics import check_setting
from sketch_plugins.memory.probe import SecondMomentProbe
from sketch_plugins.optim import SketchOptimizer
from sketch_plugins.optim.introduction import hand_over
from sketch_plugins.sharding.dtensors import is_dtensor


class OptimizerStateMonitor:
    """Logs the size of the optimizers' state to all loggers of the trainer, and prints a table at the start of ``fit``.

    Every ``log_every_n_steps`` batches of the trainer:

    * ``optimizer/state_bytes``: bytes of state on this rank;
    * ``optimizer/state_bytes_per_param``: the same for each parameter;
    * ``optimizer/saved_vs_adamw_bytes``: the bytes that ``torch.optim.AdamW`` would keep, minus those of the state;
    * ``optimizer/second_moment_relative_error``, if ``sampled``: the error of the second moment in use against an exact
      one of the same gradients, on a few rows: ``||estimate - exact|| / ||exact||``;
    * ``numerics/unmoved``, with ``check_numerics``: the share of weights with a gradient that a step did not move, in
      the last step that was checked, and ``numerics/unmoved_group_0``, ... of each parameter group.

    and with compressed gradients (``ddp_memsgd``, ``comm=...``) figures of the first rank's last step

    * ``comm/wire_bytes``, ``comm/dense_bytes``, ``comm/wire_over_dense``, ``comm/density``, ``comm/memory_norm``,
      ``comm/memory_bytes``: see `sketch_plugins.comm.MemSGDState.figures`.

    With several optimizers the names are ``optimizer_0/...``, ``numerics_0/...`` and so on. The bytes of any torch
    optimizer are logged, so that a run with AdamW can be compared. Checkpoints contain the samples, and a resumed run
    continues them.

    Args:
        sampled: keep the exact second moment of a few rows (of sketched optimizers, on the first rank) and log the
            error.
        rows: number of sampled rows of each sampled parameter, in fp32.
        params: number of sampled parameters.
        seed: seed of the choice of rows.
        prog_bar: show the state's size in the progress bar, too.
        full_precision: also put the float32 weights of a run with ``weight_bits`` into each checkpoint, as
            ``checkpoint["full_precision_state_dict"]`` on the CPU: see `sketch_plugins.full_precision_state_dict`. They
            take 4 bytes a parameter, on the first rank only.
        check_numerics: compare a sample of the weights before and after a step, on the first rank: True for every 100
            steps, or the number of steps. A warning says once if more than half of the weights do not move in three
            checks in a row; see `sketch_plugins.NumericsProbe`. It works with any torch optimizer but LBFGS, and with
            steps in backward.

    Raises:
        ValueError: ``rows`` or ``params`` is not a positive integer; ``check_numerics`` is neither a bool nor an
            integer >= 0; at the start of training, ``sampled`` with steps in backward, ``full_precision`` if no
            optimizer has ``weight_bits``, or ``check_numerics`` with DeepSpeed or LBFGS.
    """

    _namespace = ""

    def __init__(
        self,
        sampled: bool = False,
        rows: int = 8,
        params: int = 4,
        seed: int = 0,
        prog_bar: bool = False,
        full_precision: bool = False,
        check_numerics: bool | int = False,
    ) -> None:
        self.full_precision = full_precision
        self.check_numerics, self._every = check_numerics, check_setting(check_numerics)
        self.numerics: dict[int, NumericsProbe] = {}
        for name, value in (("rows", rows), ("params", params)):
            check_count(name, value)
        self.sampled, self.rows, self.params, self.seed, self.prog_bar = sampled, rows, params, seed, prog_bar
        self._probes: dict[int, SecondMomentProbe] = {}
        self._handles: list[Any] = []
        self._restored: dict[int, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Print the table, and start the samples."""
        if self.full_precision and not self._corrected(trainer):
            raise ValueError(
                "OptimizerStateMonitor(full_precision=True) saves weights of 24 or 32 bits, and no optimizer keeps "
                "them: give it weight_bits=24 or 32; without, a checkpoint has all bits of its weights"
            )
        self._watch_numerics(trainer)
        if not trainer.is_global_zero:
            return
        info = _private.find(self._namespace, "utilities.rank_zero", "rank_zero_info")
        for _, _, optimizer in named_optimizers(trainer):
            info(str(state_report(optimizer, pl_module)))
            hand_over(optimizer, lambda: None)  # the table replaces the line of the first step
        if self.sampled:
            self._remove()
            for number, prefix, optimizer in named_optimizers(trainer):
                if in_backward(optimizer) is not None:
                    raise ValueError(
                        "OptimizerStateMonitor(sampled=True) reads gradients before optimizer.step(), but steps in "
                        "backward have already freed them: use sampled=False"
                    )
                if isinstance(optimizer, SketchOptimizer):
                    probe = SecondMomentProbe(optimizer, rows=self.rows, params=self.params, seed=self.seed)
                    if number in self._restored:
                        probe.load_state_dict(self._restored.pop(number))
                    if any(is_dtensor(p) for group in optimizer.param_groups for p in group["params"]):
                        _private.find(self._namespace, "utilities.rank_zero", "rank_zero_warn")(
                            f"OptimizerStateMonitor(sampled=True): {prefix}/second_moment_relative_error "
                            "does not include parameters that are sharded over ranks (FSDP2); if all of "
                            "them are, it is not logged"
                        )
                    self._probes[number] = probe
                    self._handles.append(before_update(optimizer, probe.update))

    def _watch_numerics(self, trainer: Any) -> None:
        self._end_numerics()
        self.numerics = {}
        if not self._every:
            return
        if isinstance(trainer.strategy, _private.find(self._namespace, "strategies", "DeepSpeedStrategy")):
            raise ValueError(
                f"OptimizerStateMonitor(check_numerics={self.check_numerics}) does not support DeepSpeed, which steps "
                "float32 weights of its own, so that no update is lost to the rounding of bfloat16: leave it out"
            )
        if trainer.is_global_zero:
            self.numerics = {
                number: NumericsProbe(optimizer, every=self._every, seed=self.seed)
                for number, _, optimizer in named_optimizers(trainer)
            }

    def _end_numerics(self) -> None:
        for probe in self.numerics.values():
            probe.remove()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the float32 weights. Every rank takes part, because shards are gathered."""
        optimizers = self._corrected(trainer) if self.full_precision else []
        if not optimizers:
            return
        weights = full_precision_state_dict(
            pl_module, optimizers, device="cpu", whole=True, keep=trainer.is_global_zero
        )
        if trainer.is_global_zero:
            checkpoint["full_precision_state_dict"] = dict(weights)

    def _corrected(self, trainer: Any) -> list[SketchOptimizer]:
        """The optimizers with ``weight_bits``."""
        return [
            optimizer
            for _, _, optimizer in named_optimizers(trainer)
            if isinstance(optimizer, SketchOptimizer) and any(g.get("weight_bits") for g in optimizer.param_groups)
        ]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log the figures."""
        if not trainer.is_global_zero or not _private.should_log(trainer):
            return
        figures: dict[str, float] = {}
        total = 0
        for number, prefix, optimizer in named_optimizers(trainer):
            report = state_report(optimizer)
            total += report.state_bytes
            figures[f"{prefix}/state_bytes"] = report.state_bytes
            figures[f"{prefix}/state_bytes_per_param"] = report.bytes_per_param
            figures[f"{prefix}/saved_vs_adamw_bytes"] = report.saved_bytes
            error = self._probes[number].relative_error() if number in self._probes else math.nan
            if not math.isnan(error):  # an optimizer without a sketched second moment has no samples
                figures[f"{prefix}/second_moment_relative_error"] = error
            if number in self.numerics:
                figures.update(self.numerics[number].figures(prefix.replace("optimizer", "numerics")))
        if (sending := getattr(trainer.strategy, "comm_state", None)) is not None:
            figures.update({f"comm/{name}": value for name, value in sending.figures().items()})
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=_private.batches_that_stepped(trainer))
        # float64, so that bytes are not rounded.
        trainer.callback_metrics.update({k: torch.tensor(v, dtype=torch.float64) for k, v in figures.items()})
        if self.prog_bar:
            pl_module.log("state_MiB", total / 2**20, prog_bar=True, logger=False, rank_zero_only=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End the samples."""
        self._remove(keep=True)
        self._end_numerics()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End the samples."""
        self._remove(keep=True)
        self._end_numerics()

    def state_dict(self) -> dict[str, Any]:
        """The samples, and the choice of rows that they belong to."""
        samples = {number: probe.state_dict() for number, probe in self._probes.items()}
        return {"settings": self._settings(), "samples": samples or self._restored}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue the samples of a checkpoint, if they are of the same rows."""
        self._restored = dict(state_dict["samples"]) if state_dict["settings"] == self._settings() else {}

    def _settings(self) -> dict[str, int]:
        return {"rows": self.rows, "params": self.params, "seed": self.seed}

    def _remove(self, keep: bool = False) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if not keep:
            self._probes = {}

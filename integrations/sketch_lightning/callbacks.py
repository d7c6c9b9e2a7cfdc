"""The callbacks, made once for each of Lightning's two namespaces."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from sketch_lightning import _private
from sketch_lightning.in_backward import SteppingInBackward
from sketch_lightning.reclaim import Reclaiming
from sketch_plugins import NumericsProbe, full_precision_state_dict, scratch, state_report
from sketch_plugins.memory.in_backward import in_backward
from sketch_plugins.memory.numerics import check_setting
from sketch_plugins.memory.probe import SecondMomentProbe
from sketch_plugins.optim import SketchOptimizer
from sketch_plugins.optim.introduction import hand_over
from sketch_plugins.sharding.dtensors import is_dtensor
from sketch_plugins.stores import Store


def build(namespace: str, module: str) -> dict[str, Any]:
    """Derive the callbacks from Lightning's own class in ``namespace``.

    Args:
        namespace: ``"lightning.pytorch"`` or ``"pytorch_lightning"``.
        module: module that will contain the classes, where pickles look for them.

    Raises:
        _private.MovedSymbolError: Lightning lacks a name that is needed.
    """
    _private.check(namespace, _private.CALLBACKS)
    base = _private.find(namespace, "callbacks", "Callback")
    made = {}
    for cls in (OptimizerStateMonitor, SketchCleaning, ReclaimBatchSize, OptimizerInBackward):
        new = type(cls.__name__, (cls, base), {"__doc__": cls.__doc__, "__module__": module, "_namespace": namespace})
        made[new.__name__] = new
    return made


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
            _check_count(name, value)
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
        for _, _, optimizer in _named(trainer):
            info(str(state_report(optimizer, pl_module)))
            hand_over(optimizer, lambda: None)  # the table replaces the line of the first step
        if self.sampled:
            self._remove()
            for number, prefix, optimizer in _named(trainer):
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
                for number, _, optimizer in _named(trainer)
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
            for _, _, optimizer in _named(trainer)
            if isinstance(optimizer, SketchOptimizer) and any(g.get("weight_bits") for g in optimizer.param_groups)
        ]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log the figures."""
        if not trainer.is_global_zero or not _private.should_log(trainer):
            return
        figures: dict[str, float] = {}
        total = 0
        for number, prefix, optimizer in _named(trainer):
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


class SketchCleaning:
    """Cleans the sketches: multiplies the sketched second moments by a factor, every few steps or epochs.

    By steps it does the same as the option ``clean_every`` of the optimizers, bit for bit: before every
    ``every_n_steps``-th update. A step that a gradient scaler skips does not count. By epochs the cleaning is at the
    start of an epoch. As with the option, exact second moments are not changed.

    Args:
        every_n_steps: steps of the optimizer between two cleanings.
        every_n_epochs: epochs between two cleanings; give one of the two.
        factor: factor of the estimates, in [0, 1].

    Raises:
        ValueError: both numbers or neither are given, or one that is not a positive integer; ``factor`` is not in
            [0, 1]; at the start of training: no optimizer keeps a second moment, or one has ``clean_every`` set itself;
            ``every_n_steps`` with steps in backward.

    Source: https://arxiv.org/abs/1902.00179, section 4: factor 0.2 every 125 steps for Adam, 0.5 for Adagrad.
    """

    _namespace = ""

    def __init__(
        self, every_n_steps: int | None = None, every_n_epochs: int | None = None, factor: float = 0.2
    ) -> None:
        if (every_n_steps is None) == (every_n_epochs is None):
            raise ValueError(
                f"every_n_steps={every_n_steps!r} and every_n_epochs={every_n_epochs!r} are given: use exactly "
                "one of them"
            )
        name, value = ("every_n_steps", every_n_steps) if every_n_epochs is None else ("every_n_epochs", every_n_epochs)
        _check_count(name, value)
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor <= 1:
            raise ValueError(f"factor={factor!r} is not allowed: factor must be a number in [0, 1]")
        self.every_n_steps, self.every_n_epochs, self.factor = every_n_steps, every_n_epochs, float(factor)
        #: Number of cleanings so far; each step or epoch with a cleaning counts once.
        self.cleanings = 0
        self._epoch = -1
        self._handles: list[Any] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start without a cleaned epoch, for another fit; a checkpoint is loaded after this."""
        if stage == "fit":
            self._epoch = -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the optimizers, and add the hooks before their updates."""
        self._remove()
        found = []
        for _, _, optimizer in _named(trainer):
            if not isinstance(optimizer, SketchOptimizer) or not any(True for _ in _second_moments(optimizer)):
                continue
            for number, group in enumerate(optimizer.param_groups):
                if group.get("clean_every"):
                    raise ValueError(
                        f"parameter group {number} of {type(optimizer).__name__} has "
                        f"clean_every={group['clean_every']}, so the optimizer and SketchCleaning "
                        "would both clean the sketch: set clean_every=0 or remove SketchCleaning"
                    )
            found.append(optimizer)
        if not found:
            kinds = ", ".join(type(optimizer).__name__ for _, _, optimizer in _named(trainer))
            raise ValueError(f"SketchCleaning has no effect: {kinds} keeps no second moment in a sketch")
        if self.every_n_steps is not None:
            if any(in_backward(optimizer) is not None for optimizer in found):
                raise ValueError(
                    f"SketchCleaning(every_n_steps={self.every_n_steps}) works before optimizer.step(), which is too "
                    f"late for steps in backward: set clean_every={self.every_n_steps} of the optimizer instead"
                )
            for optimizer in found:
                self._handles.append(before_update(optimizer, functools.partial(self._step, optimizer)))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Clean, if the cleaning is by epochs."""
        epoch = trainer.current_epoch
        # An epoch that is resumed in the middle begins again.
        if self.every_n_epochs is None or epoch == 0 or epoch % self.every_n_epochs or epoch <= self._epoch:
            return
        self._epoch = epoch
        cleaned = [
            clean(optimizer, self.factor)
            for _, _, optimizer in _named(trainer)
            if isinstance(optimizer, SketchOptimizer)
        ]
        self.cleanings += any(cleaned)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Remove the hooks."""
        self._remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the hooks."""
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """The number of cleanings, and the epoch of the last one."""
        return {"cleanings": self.cleanings, "epoch": self._epoch}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.cleanings, self._epoch = state_dict["cleanings"], state_dict["epoch"]

    def _step(self, optimizer: SketchOptimizer) -> None:
        assert self.every_n_steps is not None
        self.cleanings += clean(optimizer, self.factor, self.every_n_steps)

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class ReclaimBatchSize(Reclaiming):
    """Uses the memory that the sketched optimizer saves: finds the largest batch that fits, and trains with it.

    Before training, batches of growing size are trained on for a few steps each, optimizer step included, until the
    memory exceeds the budget or runs out. Then everything is restored: parameters, buffers, states of optimizers,
    schedulers and random number generators. (Changes of a module to its own Python attributes are not undone.) The
    size is set where it came from: in the attribute ``batch_arg_name`` of module, datamodule or their hyperparameters,
    or in the loaders that were given to ``fit``. Unlike Lightning's ``BatchSizeFinder`` it works with DDP, where all
    ranks agree on a size that fits on each of them: in a trial each rank steps by itself.

    A resumed run takes the batch size from its checkpoint, and searches nothing.

    Args:
        budget: bytes (``2 * 2**30`` or ``"2GiB"``) or a fraction of the device's memory (0.9) that the peak may take;
            on a CPU it counts the resident memory of the process. None: until CUDA runs out of memory.
        keep_effective: False: use the largest batch. True: keep the samples per update: the accumulation is lowered as
            far as the memory allows, and the batch is raised accordingly.
        mode: ``"binsearch"``: exact to the sample; ``"power"``: by factors of two.
        steps_per_trial: number of optimizer steps with each size (the first one allocates the state).
        init_val: first size; None: the present batch size.
        max_val: largest size.
        max_trials: maximum number of sizes that are tried.
        batch_arg_name: see above.
        meter: measures memory instead of CUDA's statistics or the resident memory of a process on Linux: an object
            with ``start()`` and ``read()``, which returns the bytes at the peak since ``start``.

    Attributes:
        batch_size: the size that was found; None before the search.
        accumulate_grad_batches: the accumulation that belongs to it; None before the search.

    Raises:
        ValueError: an argument that is not allowed; at the start of ``fit``: no budget and no CUDA, a loader whose size
            cannot be changed, a strategy whose parameters cannot be put back (DeepSpeed), ``keep_effective`` with
            manual optimization or a ``GradientAccumulationScheduler``, or a budget in which not even one sample fits.
    """


class OptimizerInBackward(SteppingInBackward):
    """Takes the optimizer's steps in backward, and frees each gradient at once: see `sketch_plugins.InBackward`.

    The weights are the same as without it, to the last bit, including accumulation, schedules and checkpoints. The
    gradients take about the memory of the largest one. With ``accumulate_grad_batches`` this holds only in the last
    batch of a cycle, because gradients have to be kept before it. It works with automatic optimization. In manual
    optimization the module says which backward is the last one::

        def configure_optimizers(self):
            optimizer = CSAdam(self.parameters())
            InBackward(optimizer)
            return optimizer

        def training_step(self, batch, batch_idx):
            self.manual_backward(self.loss(batch))  # here the weights change
            self.optimizers().step()

    ``on_before_optimizer_step`` and ``on_after_backward`` see no gradients. If this callback comes before
    `ReclaimBatchSize` in the list of callbacks, the batch is searched with steps in backward.

    Raises:
        ValueError: at the start of ``fit``: manual optimization; ``gradient_clip_val``, or a module's own
            ``configure_gradient_clipping``; a precision with GradScaler (16-mixed); DDP, FSDP1 and DeepSpeed; an
            optimizer that is not a sketched one.
    """


def clean(optimizer: SketchOptimizer, factor: float, every: int | None = None) -> bool:
    """Clean second moments; return whether there were any.

    Args:
        optimizer: the optimizer.
        factor: factor of the estimates.
        every: clean only parameters that are about to take an ``every``-th step; None: clean all.
    """
    found = False
    with scratch.scratch():
        for part, store, state in _second_moments(optimizer):
            step = 1 if state is None else int(state["step"]) + 1
            if state is not None and (every is None or (part.grad is not None and step % every == 0)):
                store.clean(state["second_moment"], factor, step)
                found = True
    return found


def before_update(optimizer: torch.optim.Optimizer, function: Callable[[], Any]) -> Any:
    """Call the function before each update, when the gradients are those that the optimizer uses: clipped, unscaled.

    Lightning's ``on_before_optimizer_step`` comes before clipping, and also in steps that a gradient scaler skips.

    Returns:
        A handle that removes it.
    """

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # Lightning computes and clips the gradients in the closure.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            function()
            return None

        def then() -> Any:
            loss = closure()
            with torch.no_grad():
                function()
            return loss

        if len(args) > 1:
            return (args[0], then, *args[2:]), kwargs
        return args, {**kwargs, "closure": then}

    return optimizer.register_step_pre_hook(hook)


def _second_moments(optimizer: SketchOptimizer) -> Iterator[tuple[Any, Any, Any]]:
    """(part, store, state) of every part with a second moment in a sketch."""
    for _, group, part, state in optimizer.held():
        store, _ = optimizer.planned_state(part, group).get("second_moment", (None, 0))
        if isinstance(store, Store) and type(store).clean is not Store.clean:
            yield part, store, state


def _named(trainer: Any) -> Iterator[tuple[int, str, torch.optim.Optimizer]]:
    """Number, name in the logs, and the optimizer inside any wrapper."""
    for number, optimizer in enumerate(trainer.optimizers):
        prefix = "optimizer" if len(trainer.optimizers) == 1 else f"optimizer_{number}"
        inner = optimizer
        while not isinstance(inner, SketchOptimizer) and hasattr(inner, "optimizer"):
            inner = inner.optimizer  # DeepSpeed's wrappers
        if not _private.is_mock(inner):
            yield number, prefix, inner


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} is not allowed: {name} must be an integer >= 1")

"""The search for the largest batch: the work of `ReclaimBatchSize`, without Lightning's base class."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from sketch_lightning import _private
from sketch_plugins import state_report
from sketch_plugins.memory.meter import Meter, ResidentMeter, meter_for, parse_budget, total_memory
from sketch_plugins.memory.report import format_bytes
from sketch_plugins.memory.search import check_search, largest, split


class TrialOver(Exception):
    """Ends a trial that has taken enough steps."""


class Reclaiming:
    """See `sketch_lightning.callbacks.ReclaimBatchSize`."""

    _namespace = ""

    def __init__(
        self,
        budget: int | float | str | None = None,
        keep_effective: bool = False,
        mode: str = "binsearch",
        steps_per_trial: int = 2,
        init_val: int | None = None,
        max_val: int = 8192,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        meter: Meter | None = None,
    ) -> None:
        check_search(budget, mode, steps_per_trial, init_val, max_val, max_trials)
        self.budget, self.keep_effective, self.mode = budget, keep_effective, mode
        self.steps_per_trial, self.init_val, self.max_val, self.max_trials = (
            steps_per_trial,
            init_val,
            max_val,
            max_trials,
        )
        self.batch_arg_name, self.meter = batch_arg_name, meter
        self.batch_size: int | None = None
        self.accumulate_grad_batches: int | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Prepare a new search for another fit; a checkpoint is loaded after this."""
        if stage == "fit":
            self.batch_size = self.accumulate_grad_batches = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Search, or take the size from a checkpoint."""
        info = self._find("utilities.rank_zero", "rank_zero_info")
        if trainer.fast_dev_run:
            info("ReclaimBatchSize does not search in a fast_dev_run")
            return
        self._check(trainer, pl_module)
        had_loader, length = _private.has_loader(trainer), trainer.num_training_batches
        given, searched = _private.loader_of(trainer), self.batch_size is None
        if searched:
            start = self.init_val or self._present(pl_module, given)
            with self._find("utilities.seed", "isolate_rng")():
                self._search(trainer, pl_module, given, start, info)
        assert self.batch_size is not None
        self._set(trainer, pl_module, given, self.batch_size)
        if self.keep_effective:
            trainer.accumulate_grad_batches = self.accumulate_grad_batches
        if had_loader:
            with self._find("utilities.seed", "isolate_rng")():
                _private.set_up_loader(trainer, again=True)
            if searched and not self.keep_effective and trainer.num_training_batches != length:
                self._find("utilities.rank_zero", "rank_zero_warn")(
                    f"ReclaimBatchSize: an epoch had {length} batches when configure_optimizers asked for their "
                    "number (for a schedule built from trainer.estimated_stepping_batches?), and now has "
                    f"{trainer.num_training_batches}, so such a schedule has the old length. Build it for the batch "
                    "size that was found, or use keep_effective=True"
                )
        else:
            _private.set_up_loader(trainer, again=False)

    def state_dict(self) -> dict[str, Any]:
        """The size that was found."""
        return {"batch_size": self.batch_size, "accumulate_grad_batches": self.accumulate_grad_batches}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the size from a checkpoint, so that nothing is searched."""
        self.batch_size = state_dict["batch_size"]
        self.accumulate_grad_batches = state_dict["accumulate_grad_batches"]

    # -- the search --------------------------------------------------------------------------------------------------

    def _search(self, trainer: Any, module: Any, given: Any, start: int, info: Callable[[str], None]) -> None:
        before = Snapshot(trainer, module, given)
        present = self._present(module, given) if given is None or self.keep_effective else None
        try:
            self._try_sizes(trainer, module, given, start, present, before, info)
        except BaseException:  # after any error, nothing of a trial may be left
            before.restore()
            if present is None or given is not None:
                _private.give_loader(trainer, given)
            else:
                self._set(trainer, module, given, present)
            _private.set_up_loader(trainer, again=False)
            raise

    def _try_sizes(
        self,
        trainer: Any,
        module: Any,
        given: Any,
        start: int,
        present: int | None,
        before: Snapshot,
        info: Callable[[str], None],
    ) -> None:
        device = trainer.strategy.root_device
        meter = self.meter or meter_for(device)
        budget = None if self.budget is None else parse_budget(self.budget, total_memory(device))
        peaks: dict[int, int] = {}
        limit = self.max_val
        self._set(trainer, module, given, start)
        _private.set_up_loader(trainer, again=True)
        length = _private.dataset_length(trainer)
        if length is not None:  # a size above this limit would not give larger batches
            limit = max(1, min(limit, length // trainer.world_size))
        accumulate = trainer.accumulate_grad_batches
        effective = (present or 0) * accumulate
        if self.keep_effective:
            limit = min(limit, effective)

        def fits(size: int) -> bool:
            self._set(trainer, module, given, size)
            _private.set_up_loader(trainer, again=True)
            meter.start()
            ended = self._trial(trainer, before.progress)
            # The memory of the snapshot itself is not part of the training.
            peaks[size] = max(0, meter.read() - (before.nbytes if isinstance(meter, ResidentMeter) else 0))
            before.restore()
            if device.type == "cuda" or not ended:
                self._find("utilities.memory", "garbage_collection_cuda")()
            fits = ended and (budget is None or peaks[size] <= budget)
            fits = bool(trainer.strategy.reduce_boolean_decision(fits, all=True))
            said = "out of memory" if not ended else format_bytes(peaks[size])
            info(f"ReclaimBatchSize: a batch of {size} {'fits' if fits else 'does not fit'} ({said} on this rank)")
            return fits

        found = largest(fits, start, limit, self.mode, self.max_trials)
        allowed = "the memory" if budget is None else f"budget={self.budget!r} ({format_bytes(budget)})"
        if not found:
            least = min(peaks)
            raise ValueError(
                f"ReclaimBatchSize: {allowed} is too small: a batch of {least} needed "
                f"{format_bytes(peaks[least])}. Use a larger budget, or a smaller init_val with more max_trials"
            )
        self.batch_size, self.accumulate_grad_batches = found, accumulate
        if self.keep_effective:
            self.batch_size, self.accumulate_grad_batches = split(effective, found)
        reports = [state_report(optimizer) for optimizer in trainer.optimizers]
        state, adamw = sum(r.state_bytes for r in reports), sum(r.adamw_bytes for r in reports)
        info(
            f"ReclaimBatchSize: {self.batch_arg_name}={self.batch_size}, "
            f"accumulate_grad_batches={self.accumulate_grad_batches}; the optimizer keeps {format_bytes(state)}, AdamW "
            f"would keep {format_bytes(adamw)}"
        )

    def _trial(self, trainer: Any, progress: Any) -> bool:
        """Whether the steps could be taken within the memory."""
        is_oom_error = self._find("utilities.memory", "is_oom_error")
        stop = type("Stop", (_Stop, self._find("callbacks", "Callback")), {})(self.steps_per_trial)
        with _private.only_training(trainer, self.steps_per_trial, stop):
            try:
                with _private.without_sync(trainer):
                    _private.run_loop(trainer, copy.deepcopy(progress))
            except TrialOver:
                pass
            except (RuntimeError, MemoryError) as error:
                if not isinstance(error, MemoryError) and not is_oom_error(error):
                    raise
                return False
        return True

    # -- where the size is -------------------------------------------------------------------------------------------

    def _present(self, module: Any, given: Any) -> int:
        if given is not None:
            sizes = {loader.batch_size for loader in leaves(given)}
            if len(sizes) != 1:
                raise ValueError(
                    f"ReclaimBatchSize: the loaders have different batch sizes ({sorted(sizes)}): set init_val"
                )
            return int(sizes.pop())
        return int(self._find("utilities.parsing", "lightning_getattr")(module, self.batch_arg_name))

    def _set(self, trainer: Any, module: Any, given: Any, size: int) -> None:
        if given is not None:
            _private.give_loader(trainer, with_batch_size(given, size))
        else:
            self._find("utilities.parsing", "lightning_setattr")(module, self.batch_arg_name, size)

    def _check(self, trainer: Any, module: Any) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, self._find("strategies", "DeepSpeedStrategy")):
            raise ValueError(
                "ReclaimBatchSize cannot restore parameters in DeepSpeed's partitions: it supports strategies "
                "for one device, DDP and FSDP2"
            )
        if self.budget is None and strategy.root_device.type != "cuda":
            raise ValueError(
                "ReclaimBatchSize: budget=None means all memory of a CUDA device, but the device is "
                f"{strategy.root_device.type}: give bytes ('2GiB') or a fraction of the memory (0.5)"
            )
        given = _private.loader_of(trainer)
        if given is not None:
            if not leaves(given):
                raise ValueError(
                    f"ReclaimBatchSize: fit() received a {type(given).__name__}, but only DataLoaders are supported"
                )
            for loader in leaves(given):
                _check_loader(loader)
        elif not self._find("utilities.parsing", "lightning_hasattr")(module, self.batch_arg_name):
            raise ValueError(
                "ReclaimBatchSize: the module, the datamodule and their hparams have no attribute "
                f"batch_arg_name={self.batch_arg_name!r}"
            )
        if not self.keep_effective:
            return
        if not module.automatic_optimization:
            raise ValueError(
                "ReclaimBatchSize: keep_effective=True lowers accumulate_grad_batches, which has no effect in "
                "manual optimization: use keep_effective=False"
            )
        scheduler = self._find("callbacks.gradient_accumulation_scheduler", "GradientAccumulationScheduler")
        if any(isinstance(callback, scheduler) for callback in trainer.callbacks):
            raise ValueError(
                "ReclaimBatchSize: keep_effective=True and GradientAccumulationScheduler both set the "
                "accumulation: use one of them"
            )

    def _find(self, module: str, name: str) -> Any:
        return _private.find(self._namespace, module, name)


class _Stop:
    """A mixin for Lightning's callback that ends a trial."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_train_batch_end(self, *_: Any) -> None:
        self.left -= 1
        if self.left == 0:  # before the end of the epoch, where ranks communicate
            raise TrialOver


class Snapshot:
    """A copy of everything that training changes, to restore it."""

    def __init__(self, trainer: Any, module: Any, given: Any) -> None:
        self.trainer, self.module = trainer, module
        # On the CPU, because copies on the device would take the memory that is measured.
        self.tensors = [(t, t.detach().to("cpu", copy=True)) for t in (*module.parameters(), *module.buffers())]
        self.nbytes = sum(
            t.numel() * t.element_size() for t in (getattr(saved, "_local_tensor", saved) for _, saved in self.tensors)
        )
        self.optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in trainer.optimizers]
        self.schedulers = [copy.deepcopy(config.scheduler.state_dict()) for config in trainer.lr_scheduler_configs]
        self.precision = copy.deepcopy(trainer.precision_plugin.state_dict())
        self.progress = copy.deepcopy(trainer.fit_loop.state_dict())
        self.generators: dict[int, tuple[torch.Generator, torch.Tensor]] = {}
        for holder in (
            module,
            getattr(trainer, "datamodule", None),
        ):  # their loaders may draw from these generators
            self.keep(generators_of(list(getattr(holder, "__dict__", {}).values())))
        self.keep(generators_of(_private.made_loaders(trainer) if given is None else given))

    def keep(self, generators: list[torch.Generator]) -> None:
        """Also restore these generators, to their present states, unless they are known already."""
        for generator in generators:
            self.generators.setdefault(id(generator), (generator, generator.get_state()))

    @torch.no_grad()
    def restore(self) -> None:
        """Restore everything."""
        for tensor, saved in self.tensors:
            tensor.copy_(saved)
            tensor.grad = None
        for optimizer, state in zip(self.trainer.optimizers, self.optimizers, strict=True):
            optimizer.load_state_dict(copy.deepcopy(state))
        for config, state in zip(self.trainer.lr_scheduler_configs, self.schedulers, strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))
        if self.precision:
            self.trainer.precision_plugin.load_state_dict(copy.deepcopy(self.precision))
        for generator, state in self.generators.values():
            generator.set_state(state)
        for module in self.module.modules():
            if type(module).__module__.startswith("torchmetrics") and hasattr(module, "reset"):
                module.reset()


# -- loaders that were given to fit ----------------------------------------------------------------------------------


def leaves(loaders: Any) -> list[Any]:
    """Every loader of a collection."""
    if hasattr(loaders, "flattened"):  # CombinedLoader
        return leaves(list(loaders.flattened))
    if isinstance(loaders, Mapping):
        return leaves(list(loaders.values()))
    if isinstance(loaders, (list, tuple)):
        return [leaf for one in loaders for leaf in leaves(one)]
    return [loaders] if isinstance(loaders, DataLoader) else []


def generators_of(values: Any) -> list[torch.Generator]:
    """The generators in a collection, and in its loaders."""
    if isinstance(values, torch.Generator):
        return [values]
    if isinstance(values, dict):
        return generators_of(list(values.values()))
    if isinstance(values, (list, tuple)):
        return [found for one in values for found in generators_of(one)]
    samplers = [(loader, loader.sampler, getattr(loader, "batch_sampler", None)) for loader in leaves(values)]
    sources = [source for one in samplers for source in (*one, getattr(one[2], "sampler", None))]
    found = [getattr(source, "generator", None) for source in sources]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


def with_batch_size(loaders: Any, size: int) -> Any:
    """A copy of the collection of loaders, with another batch size."""
    if hasattr(loaders, "flattened"):
        new = copy.copy(loaders)
        new.flattened = [with_batch_size(one, size) for one in loaders.flattened]
        return new
    if isinstance(loaders, Mapping):
        return {key: with_batch_size(one, size) for key, one in loaders.items()}
    if isinstance(loaders, (list, tuple)):
        return type(loaders)(with_batch_size(one, size) for one in loaders)
    if not isinstance(loaders, DataLoader):
        return loaders
    _check_loader(loaders)
    iterable = isinstance(loaders.dataset, torch.utils.data.IterableDataset)
    names = (
        "num_workers", "collate_fn", "pin_memory", "drop_last", "timeout", "worker_init_fn", "multiprocessing_context",
        "generator", "prefetch_factor", "persistent_workers", "pin_memory_device", "in_order",
    )  # fmt: skip
    options = {name: getattr(loaders, name) for name in names if hasattr(loaders, name)}
    sampler = None if iterable else loaders.sampler
    return DataLoader(loaders.dataset, batch_size=size, sampler=sampler, **options)


def _check_loader(loader: Any) -> None:
    if type(loader) is not DataLoader or type(loader.batch_sampler) not in (BatchSampler, type(None)):
        raise ValueError(
            f"ReclaimBatchSize cannot rebuild a {type(loader).__name__} with a "
            f"{type(loader.batch_sampler).__name__}: it supports DataLoaders with batch_size. For other "
            "loaders, give the module or datamodule an attribute batch_size and use it there"
        )
    if loader.batch_size is None:
        raise ValueError("ReclaimBatchSize: a DataLoader with batch_size=None makes no batches: give it a batch size")

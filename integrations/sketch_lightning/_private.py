"""All names of Lightning that this package uses although they are not documented.

Lightning exists under two names, ``lightning.pytorch`` and ``pytorch_lightning``, with classes and a registry each.
Every name is looked up in one of them. Nothing of Lightning is changed. Strategies are added to its registries, and
subclasses override

* ``Strategy.setup_optimizers``, when optimizers and schedulers have been made and nothing has used them yet,
* ``DDPStrategy._register_ddp_hooks``, because the original registers a communication hook on CUDA devices only,
* ``DeepSpeedStrategy._init_optimizers``, because DeepSpeed's strategy makes its optimizer there.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import Any

from sketch_plugins import patching

#: Names under which Lightning may be installed.
NAMESPACES = ("lightning.pytorch", "pytorch_lightning")
#: Names that the strategies need: module in a namespace, then dotted name in it.
STRATEGIES = (
    ("strategies", "StrategyRegistry.register"),
    ("strategies", "SingleDeviceStrategy.root_device"),
    ("strategies", "Strategy.setup_optimizers"),
    ("strategies", "Strategy.load_optimizer_state_dict"),
    ("strategies", "DDPStrategy._register_ddp_hooks"),
    ("strategies", "DeepSpeedStrategy._init_optimizers"),
    ("strategies", "DeepSpeedStrategy.setup_environment"),
    ("strategies", "ModelParallelStrategy.load_checkpoint"),
    ("utilities.rank_zero", "rank_zero_info"),
)
#: Names that the callbacks need, which are made when all of Lightning is imported.
CALLBACKS = (
    ("callbacks", "Callback"),
    ("callbacks.gradient_accumulation_scheduler", "GradientAccumulationScheduler"),
    ("core.optimizer", "_MockOptimizer"),
    ("loops", "_FitLoop.setup_data"),
    ("loops", "_TrainingEpochLoop"),
    ("utilities.memory", "is_oom_error"),
    ("utilities.memory", "garbage_collection_cuda"),
    ("utilities.parsing", "lightning_getattr"),
    ("utilities.parsing", "lightning_hasattr"),
    ("utilities.parsing", "lightning_setattr"),
    ("utilities.rank_zero", "rank_zero_warn"),
    ("utilities.seed", "isolate_rng"),
)


class MovedSymbolError(patching.MovedSymbolError):
    """Lightning lacks a name that this package relies on."""


_FRAMEWORKS = {
    namespace: patching.Framework(
        package=namespace.partition(".")[0],
        touched=tuple((f"{namespace}.{module}", name) for module, name in STRATEGIES),
        purpose="add its strategies",
        instead="A module whose configure_optimizers returns sketch_plugins.CSAdam(...) works without them.",
        error=MovedSymbolError,
    )
    for namespace in NAMESPACES
}


def check(namespace: str, touched: tuple[tuple[str, str], ...] = STRATEGIES) -> None:
    """Look up every name that is needed.

    Raises:
        MovedSymbolError: names the first one that is missing and the version of Lightning.
    """
    for module, name in touched:
        find(namespace, module, name)


def find(namespace: str, module: str, name: str) -> Any:
    """An object of Lightning."""
    return _FRAMEWORKS[namespace].find(f"{namespace}.{module}" if module else namespace, name)


def is_installed(namespace: str) -> bool:
    """Whether the package is installed; it is not imported."""
    return importlib.util.find_spec(_FRAMEWORKS[namespace].package) is not None


def is_mock(optimizer: Any) -> bool:
    """Whether it is Lightning's stand-in if ``configure_optimizers`` returned no optimizer."""
    return type(optimizer).__name__ == "_MockOptimizer"


# -- trials of a batch size ------------------------------------------------------------------------------------------


def batches_that_stepped(trainer: Any) -> int:
    """The step number with which Lightning's own monitors log."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def should_log(trainer: Any) -> bool:
    """Whether Lightning itself logs after this batch."""
    return bool(trainer._logger_connector.should_update_logs)


def loader_of(trainer: Any) -> Any:
    """The loader, or collection of loaders, that was given to ``fit``; None if a module or datamodule makes it."""
    source = trainer.fit_loop._data_source
    return None if source.is_module() else source.instance


def give_loader(trainer: Any, loader: Any) -> None:
    """Replace the loader that was given to ``fit``."""
    trainer.fit_loop._data_source.instance = loader


def made_loaders(trainer: Any) -> Any:
    """Training loaders that the module or datamodule makes; newly made ones, unless they are set up already."""
    loop = trainer.fit_loop
    return loop._data_source.dataloader() if loop._combined_loader is None else loop._combined_loader


def has_loader(trainer: Any) -> bool:
    """Whether the training loader has been set up."""
    return trainer.fit_loop._combined_loader is not None


def set_up_loader(trainer: Any, again: bool) -> None:
    """Drop the training loader, and set it up ``again`` or leave that to Lightning."""
    loop = trainer.fit_loop
    if loop._data_fetcher is not None:
        loop._data_fetcher.teardown()
        loop._data_fetcher = None
    loop._combined_loader = None
    if again:
        loop.setup_data()


def dataset_length(trainer: Any) -> int | None:
    """Number of samples of the training data, of all processes together; None if unknown."""
    try:
        return int(trainer.fit_loop._combined_loader._dataset_length())
    except (NotImplementedError, AttributeError, TypeError):
        return None


@contextlib.contextmanager
def only_training(trainer: Any, steps: int, callback: Any) -> Iterator[None]:
    """For ``steps`` steps, a trainer with this callback only, without loggers, validation and progress bar."""
    loop = trainer.fit_loop
    names = ("callbacks", "loggers", "limit_val_batches", "accumulate_grad_batches", "val_check_batch")
    kept = {name: getattr(trainer, name) for name in names if hasattr(trainer, name)}
    progress, limit, mode = loop.state_dict(), loop.epoch_loop.max_steps, trainer.lightning_module.training
    bar = trainer.progress_bar_callback
    if bar is not None:
        bar.disable()
    trainer.callbacks, trainer.loggers = [callback], []
    trainer.limit_val_batches, trainer.accumulate_grad_batches = 0, 1
    loop.epoch_loop.max_steps = steps
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(trainer, name, value)
        loop.epoch_loop.max_steps = limit
        if bar is not None:
            bar.enable()
        loop.load_state_dict(progress)
        loop.restarting = False
        loop.epoch_loop.restarting = False
        trainer.lightning_module.train(mode)
        trainer._logger_connector.reset_results()
        trainer._logger_connector.reset_metrics()
        loop.epoch_loop._results.clear()  # the results remember how a value was averaged


def run_loop(trainer: Any, progress: Any) -> None:
    """Train from the beginning of the loop, once."""
    loop = trainer.fit_loop
    loop.load_state_dict(progress)
    loop.restarting = False
    loop.run()


@contextlib.contextmanager
def without_sync(trainer: Any) -> Iterator[None]:
    """Let each rank train by itself: gradients and logged values are not averaged, and signals are not exchanged.

    Otherwise a rank that runs out of memory would leave the others waiting, or mix up their collectives.
    """
    strategy, loop = trainer.strategy, trainer.fit_loop.epoch_loop
    blocked = strategy.block_backward_sync() if hasattr(strategy, "block_backward_sync") else contextlib.nullcontext()
    strategy.reduce = lambda tensor, *_, **__: tensor
    loop._broadcast_sigterm_tensor = lambda *_: None  # recent versions call it before each batch
    try:
        with blocked:
            yield
    finally:
        del strategy.reduce, loop._broadcast_sigterm_tensor

"""Changes in transformers once this package is registered.

These names are changed, each once. Other optimizers behave as before.

* ``OptimizerNames`` gets two members per optimizer of the registry, such as ``cs_adam`` and ``cs_adam_layerwise``.
* ``TrainingArguments.__post_init__`` checks the arguments of our optimizers, so that a mistake is reported before a
  model is loaded.
* ``Trainer.get_optimizer_cls_and_kwargs`` answers for our names. It has the same signature in all supported versions.
  The dispatch table behind it is private and exists in recent versions only. Moreover, it is reached only after code
  that splits ``optim_args`` and fails on "compression" with "not enough values to unpack".
* ``Trainer.create_optimizer`` prevents accelerate and DeepSpeed from replacing an optimizer of ours with offloaded
  state by DeepSpeedCPUAdam, whichever setting asks for the offloading.
* ``Trainer.create_optimizer`` and ``Trainer.create_scheduler`` let an optimizer of ours check the state that Trainer
  loads after them: that of AdamW is converted (``warm_start``), or is an error that says what to do. Its parameters get
  the names that they have in the model, and the line of its first step goes to transformers' log. The second method is
  changed for subclasses that override the first.
* ``Trainer.log`` adds the figures of a :class:`~sketch_transformers.SketchCallback` to the logs. A callback alone
  cannot do this, because ``on_log`` reaches TensorBoard and the other reporters before a user's callback. The norm of
  gradients that have been consumed in backward would be logged as 0, and is left out.
* ``Trainer.train`` enables the gradient compression that ``optim_args`` asks for, and stores the checkpoint that it is
  told to resume, because no callback is told. It also lets a `ReclaimBatchSize` search, because its callback is called
  too late.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sketch_plugins import registry
from sketch_plugins.memory.in_backward import in_backward
from sketch_plugins.optim import SketchOptimizer
from sketch_plugins.patching import wrap
from sketch_transformers._private import LAYERWISE, STOCK, TRANSFORMERS, check, extend_enum, is_ours


def register() -> None:
    """Make every optimizer of the registry a value of ``TrainingArguments.optim``. Calling it again does no harm.

    While transformers is only partly imported, this changes what exists, and leaves the rest to the next call.

    Raises:
        MovedSymbolError: see `sketch_transformers._private.check`.
        ValueError: transformers has an optimizer of its own under one of our names.
    """
    check()
    optimizer_names = TRANSFORMERS.find_if_there("transformers.training_args", "OptimizerNames")
    if optimizer_names is not None:
        for name in registry.names():
            extend_enum(optimizer_names, name)
            extend_enum(optimizer_names, name + LAYERWISE)
    training_arguments = TRANSFORMERS.find_if_there("transformers.training_args", "TrainingArguments")
    if training_arguments is not None:
        wrap(training_arguments, "__post_init__", _checking)
    trainer = TRANSFORMERS.find_if_there("transformers.trainer", "Trainer")
    if trainer is not None:
        wrap(trainer, "get_optimizer_cls_and_kwargs", _answering)
        wrap(trainer, "create_optimizer", _keeping)
        wrap(trainer, "create_scheduler", _following)
        wrap(trainer, "log", _reporting)
        wrap(trainer, "train", _communicating)


def _checking(post_init: Callable[..., None]) -> Callable[..., None]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        post_init(self, *args, **kwargs)
        from sketch_transformers.arguments import check_arguments, check_deepspeed_block

        check_deepspeed_block(self)
        if is_ours(self.optim):
            check_arguments(self)

    return wrapped


def _answering(get_optimizer_cls_and_kwargs: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    def wrapped(args: Any, model: Any = None) -> tuple[Any, Any]:
        if not is_ours(args.optim):
            return get_optimizer_cls_and_kwargs(args, model)
        from sketch_transformers.arguments import optimizer_cls_and_kwargs

        return optimizer_cls_and_kwargs(args, model)

    return wrapped


def _keeping(create_optimizer: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = create_optimizer(self, *args, **kwargs)
        if isinstance(self.optimizer, SketchOptimizer):
            from sketch_transformers.arguments import prepare_deepspeed

            prepare_deepspeed(self.args)
        _follow(self)
        return optimizer

    return wrapped


def _following(create_scheduler: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        _follow(self)
        return create_scheduler(self, *args, **kwargs)

    return wrapped


def _follow(trainer: Any) -> None:
    optimizer = trainer.optimizer
    while not isinstance(optimizer, SketchOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer  # accelerate's wrapper
    if isinstance(optimizer, SketchOptimizer):
        from sketch_transformers.introduction import introduce_in
        from sketch_transformers.warm_start import follow

        follow(optimizer, trainer.args)
        introduce_in(trainer, optimizer)


def _reporting(log: Callable[..., None]) -> Callable[..., None]:
    def wrapped(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        from sketch_transformers.callback import SketchCallback
        from sketch_transformers.comm import communication

        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SketchCallback):
                sending = communication(self.callback_handler.callbacks)
                state = None if sending is None else sending.state
                callback.add_to(logs, self.callback_handler.optimizer, state)
        if in_backward(self.callback_handler.optimizer) is not None:
            logs.pop("grad_norm", None)
        log(self, logs, *args, **kwargs)

    return wrapped


def _communicating(train: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        from sketch_transformers import comm, reclaim

        comm.before_training(self, resume_from_checkpoint)
        reclaim.before_training(self, resume_from_checkpoint, args[0] if args else kwargs.get("trial"))
        return train(self, resume_from_checkpoint, *args, **kwargs)

    STOCK["train"] = train
    return wrapped

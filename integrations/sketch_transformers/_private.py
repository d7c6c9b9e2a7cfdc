"""Everything of transformers that is changed, or used without being documented: nothing of it is named elsewhere.

These things are changed, each once; what does not concern our optimizers behaves as before:

* ``OptimizerNames`` gets two members per optimizer of the registry, as ``cs_adam`` and ``cs_adam_layerwise``.
* ``TrainingArguments.__post_init__`` checks the arguments of our optimizers, so that a mistake is reported before a
  model is loaded.
* ``Trainer.get_optimizer_cls_and_kwargs`` answers for our names. It exists, with this signature, in all versions
  supported. The dispatch table behind it (``_OPTIMIZER_HANDLERS``) is private, exists in recent ones only, and is
  reached after ``optim_args`` was split by code that fails on "compression" with "not enough values to unpack".
* ``Trainer.create_optimizer`` keeps accelerate and DeepSpeed from putting DeepSpeedCPUAdam in the place of an optimizer
  of ours, however it was asked for, where its state is offloaded.
* ``Trainer.create_optimizer`` and ``Trainer.create_scheduler`` let an optimizer of ours look at the state that Trainer
  loads after them: that of AdamW is converted (``warm_start``), or is an error that says how. Its parameters get the
  names that they have in the model, and the line of its first step goes to transformers' log. The second is for
  subclasses that override the first.
* ``Trainer.log`` adds the figures of a :class:`~sketch_transformers.SketchCallback` to the logs. A callback alone
  cannot: ``on_log`` reaches TensorBoard and the other reporters before it reaches a user's callback. The norm of
  gradients that have been consumed in backward would be logged as 0, and is left out.
* ``Trainer.train`` enables the gradient compression that ``optim_args`` asks for, and remembers the checkpoint that it
  is told to resume: no callback is told.
  It also lets a `ReclaimBatchSize` search, for which a callback is told too late.
"""

from __future__ import annotations

import copy
import functools
import importlib
import sys
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch

from sketch_plugins import registry
from sketch_plugins.import_hooks import is_initializing
from sketch_plugins.memory.in_backward import in_backward
from sketch_plugins.optim import SketchOptimizer

#: Behind an optimizer's name, as transformers has it in names of its own.
LAYERWISE = "_layerwise"
#: Where in transformers the names are that this package touches: module, then dotted name in it.
TOUCHED = (
    ("transformers.training_args", "OptimizerNames"),
    ("transformers.training_args", "TrainingArguments.__post_init__"),
    ("transformers.trainer", "Trainer.get_optimizer_cls_and_kwargs"),
    ("transformers.trainer", "Trainer.create_optimizer"),
    ("transformers.trainer", "Trainer.create_scheduler"),
    ("transformers.trainer", "Trainer.log"),
    ("transformers.trainer", "Trainer.train"),
    ("transformers.trainer_utils", "check_target_module_exists"),
    ("transformers.pytorch_utils", "Conv1D"),
)


class MovedSymbolError(RuntimeError):
    """A name of transformers that this package relies on is not where it was."""


def register() -> None:
    """Make every optimizer of the registry a value of ``TrainingArguments.optim``. Calling it again does no harm.

    While transformers is half imported, what exists is changed and the rest left to the next call.

    Raises:
        MovedSymbolError: see :func:`check`.
        ValueError: transformers has an optimizer of its own under one of our names.
    """
    check()
    optimizer_names = _find("transformers.training_args", "OptimizerNames")
    if optimizer_names is not None:
        for name in registry.names():
            _extend_enum(optimizer_names, name)
            _extend_enum(optimizer_names, name + LAYERWISE)
    training_arguments = _find("transformers.training_args", "TrainingArguments")
    if training_arguments is not None:
        _wrap(training_arguments, "__post_init__", _checking)
    trainer = _find("transformers.trainer", "Trainer")
    if trainer is not None:
        _wrap(trainer, "get_optimizer_cls_and_kwargs", _answering)
        _wrap(trainer, "create_optimizer", _keeping)
        _wrap(trainer, "create_scheduler", _following)
        _wrap(trainer, "log", _reporting)
        _wrap(trainer, "train", _communicating)


def check() -> None:
    """Look up every name this package touches.

    Raises:
        MovedSymbolError: names the first one that is missing and the version of transformers.
    """
    for module_name, qualname in TOUCHED:
        found = _find(module_name, qualname)
        if (
            qualname == "OptimizerNames"
            and found is not None
            and not (issubclass(found, str) and issubclass(found, Enum))
        ):
            raise _moved(f"{module_name}.{qualname}", "is no longer a str Enum")


def matches_target(target_modules: str | list[str], module_name: str) -> bool:
    """Whether transformers itself takes ``module_name`` to be meant by ``optim_target_modules``."""
    from transformers.trainer_utils import check_target_module_exists

    return bool(check_target_module_exists(target_modules, module_name))


def conv1d_class() -> type:
    """GPT-2's linear layer, which is a class of its own."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def _find(module_name: str, qualname: str) -> Any:
    """The object, or None where its module has not got that far in its own import, further up the call stack."""
    module = sys.modules.get(module_name)
    if module is None:
        if any(is_initializing(sys.modules[name]) for name, _ in TOUCHED if name in sys.modules):
            return None  # to import another module now would be to run into the half imported one
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name != module_name:
                raise
            raise _moved(module_name) from error
    found: Any = module
    for part in qualname.split("."):
        if not hasattr(found, part):
            if found is module and is_initializing(module):
                return None
            raise _moved(f"{module_name}.{qualname}")
        found = getattr(found, part)
    return found


def _moved(symbol: str, what: str = "is missing") -> MovedSymbolError:
    import transformers

    return MovedSymbolError(
        f"{symbol} {what} in transformers {transformers.__version__}: this version of sketch-plugins cannot register "
        "its optimizers there. Trainer(optimizer_cls_and_kwargs=(CSAdam, {...})) works without registration."
    )


def _extend_enum(cls: Any, value: str) -> None:
    """Add ``value`` to a str Enum as if it stood in its class body.

    An Enum with members cannot be subclassed, and ``TrainingArguments`` and ``HfArgumentParser`` both look here.
    """
    known = cls._value2member_map_.get(value)
    if known is not None:
        if not getattr(known, _MARK, False):
            import transformers

            raise ValueError(f"transformers {transformers.__version__} has an optimizer {value!r} of its own")
        return
    name = value.upper()
    member = str.__new__(cls, value)
    member._name_, member._value_ = name, value
    member.__objclass__ = cls
    member._sort_order_ = len(cls._member_names_)
    setattr(member, _MARK, True)
    cls._member_names_.append(name)
    cls._member_map_[name] = member
    cls._value2member_map_[value] = member
    type.__setattr__(cls, name, member)


def _wrap(cls: type, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace the method ``name`` of ``cls`` by ``wrapper(method)``, once."""
    method = getattr(cls, name)
    if getattr(method, _MARK, False):
        return
    replacement = functools.wraps(method)(wrapper(method))
    setattr(replacement, _MARK, True)
    static = isinstance(cls.__dict__.get(name), staticmethod)
    setattr(cls, name, staticmethod(replacement) if static else replacement)


def _checking(post_init: Callable[..., None]) -> Callable[..., None]:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        post_init(self, *args, **kwargs)
        from sketch_transformers.arguments import check_arguments, check_deepspeed_block

        check_deepspeed_block(self)
        if _is_ours(self.optim):
            check_arguments(self)

    return wrapped


def _answering(get_optimizer_cls_and_kwargs: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    def wrapped(args: Any, model: Any = None) -> tuple[Any, Any]:
        if not _is_ours(args.optim):
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

    _STOCK["train"] = train
    return wrapped


def base_name(name: str) -> str:
    """A name without ``_layerwise``, which says that steps are taken in backward."""
    return name.removesuffix(LAYERWISE)


def _is_ours(optim: Any) -> bool:
    return base_name(str(getattr(optim, "value", optim))) in registry.names()


_MARK = "_sketch_plugins"
_STOCK: dict[str, Callable[..., Any]] = {}


# -- trials of a batch size ------------------------------------------------------------------------------------------


def stock_train() -> Callable[..., Any]:
    """``Trainer.train`` as transformers has it, to be called with the trainer."""
    return _STOCK["train"]


def set_batch(trainer: Any, size: int, accumulation: int) -> None:
    """As if the arguments had had these from the start; ``_train_batch_size`` is what the loaders are made with."""
    args = trainer.args
    args.per_device_train_batch_size, args.gradient_accumulation_steps = size, accumulation
    trainer._train_batch_size = args.train_batch_size


def only_training(trainer: Any, callback: Any, steps: int) -> None:
    """Leave the trainer this callback alone, and ``steps`` to train for. Who calls this puts all attributes back.

    Nothing but gradients talks to other ranks then, but the loaders at the beginning of an epoch.
    """
    args, accelerator = trainer.args, trainer.accelerator
    handler = copy.copy(trainer.callback_handler)
    handler.callbacks = [callback]
    trainer.callback_handler, trainer.control = handler, type(trainer.control)()
    trainer.model_init = None  # or the weights would be made anew, and those that are there kept beside
    trainer._memory_tracker = type(trainer._memory_tracker)(True)
    accelerator.scaler = copy.deepcopy(accelerator.scaler)  # its scale falls and rises with the steps
    args.max_steps, args.eval_on_start = steps, False
    args.include_num_input_tokens_seen = "no" if isinstance(args.include_num_input_tokens_seen, str) else False
    args.average_tokens_across_devices = False


def stop_sync(trainer: Any) -> None:
    """Each rank by itself: DistributedDataParallel, if it is that, averages no gradients and sends no buffers."""
    model = trainer.model_wrapped
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model.require_backward_grad_sync = model.require_forward_param_sync = False


def grad_hooks(parameter: torch.Tensor) -> dict[Any, Any]:
    """Hooks that wait for a parameter's gradient; a dictionary to be changed in place."""
    hooks = parameter._post_accumulate_grad_hooks
    return {} if hooks is None else hooks


def is_sending(trainer: Any) -> bool:
    """Whether gradients are sent sparsified."""
    from sketch_transformers.arguments import communication_options
    from sketch_transformers.comm import communication

    return (
        communication(trainer.callback_handler.callbacks) is not None or communication_options(trainer.args) is not None
    )

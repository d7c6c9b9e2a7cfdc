"""All names of transformers that this package changes, or uses although they are not documented.

`sketch_transformers.registration` has the replacements of its methods. This module imports none of the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch

from sketch_plugins import patching, registry

#: Suffix of an optimizer's name, as in transformers' own names.
LAYERWISE = "_layerwise"
#: Names of transformers that this package uses: module, then dotted name in it. ``_OPTIMIZER_HANDLERS``, the table of
#: ``get_optimizer_cls_and_kwargs``, is not among them, because only recent versions have it.
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


class MovedSymbolError(patching.MovedSymbolError):
    """transformers lacks a name that this package relies on."""


TRANSFORMERS = patching.Framework(
    package="transformers",
    touched=TOUCHED,
    purpose="register its optimizers",
    instead="Trainer(optimizer_cls_and_kwargs=(CSAdam, {...})) works without registration.",
    error=MovedSymbolError,
)


def check() -> None:
    """Look up every name that this package uses.

    Raises:
        MovedSymbolError: names the first one that is missing and the version of transformers.
    """
    for module_name, qualname in TOUCHED:
        found = TRANSFORMERS.find_if_there(module_name, qualname)
        if (
            qualname == "OptimizerNames"
            and found is not None
            and not (issubclass(found, str) and issubclass(found, Enum))
        ):
            raise TRANSFORMERS.moved(f"{module_name}.{qualname}", "is no longer a str Enum")


def known_names() -> list[str]:
    """Every value of ``TrainingArguments.optim``, including our names once they are registered."""
    return [str(name.value) for name in TRANSFORMERS.find("transformers.training_args", "OptimizerNames")]


def base_name(name: str) -> str:
    """A name without the suffix ``_layerwise``, which stands for steps in backward."""
    return name.removesuffix(LAYERWISE)


def is_ours(optim: Any) -> bool:
    """Whether a value of ``TrainingArguments.optim`` is one of ours."""
    return base_name(str(getattr(optim, "value", optim))) in registry.names()


def matches_target(target_modules: str | list[str], module_name: str) -> bool:
    """Whether ``optim_target_modules`` means ``module_name``, by the rules of transformers."""
    from transformers.trainer_utils import check_target_module_exists

    return bool(check_target_module_exists(target_modules, module_name))


def conv1d_class() -> type:
    """GPT-2's linear layer, which has a class of its own."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def extend_enum(cls: Any, value: str) -> None:
    """Add ``value`` to a str Enum as if its class body had it.

    An Enum with members cannot be subclassed, and both ``TrainingArguments`` and ``HfArgumentParser`` use this class.

    Raises:
        ValueError: transformers has an optimizer of its own under this name.
    """
    known = cls._value2member_map_.get(value)
    if known is not None:
        if not patching.is_ours(known):
            raise ValueError(f"transformers {TRANSFORMERS.version()} already has an optimizer {value!r}")
        return
    name = value.upper()
    member = str.__new__(cls, value)
    member._name_, member._value_ = name, value
    member.__objclass__ = cls
    member._sort_order_ = len(cls._member_names_)
    patching.mark(member)
    cls._member_names_.append(name)
    cls._member_map_[name] = member
    cls._value2member_map_[value] = member
    type.__setattr__(cls, name, member)


# -- trials of a batch size ------------------------------------------------------------------------------------------


#: Original methods of transformers, by name.
STOCK: dict[str, Callable[..., Any]] = {}


def stock_train() -> Callable[..., Any]:
    """The original ``Trainer.train``, to be called with the trainer."""
    return STOCK["train"]


def set_batch(trainer: Any, size: int, accumulation: int) -> None:
    """Set sizes as if the arguments had had them from the start; loaders are made with ``_train_batch_size``."""
    args = trainer.args
    args.per_device_train_batch_size, args.gradient_accumulation_steps = size, accumulation
    trainer._train_batch_size = args.train_batch_size


def only_training(trainer: Any, callback: Any, steps: int) -> None:
    """Leave the trainer only this callback, and ``steps`` steps to train. The caller restores all attributes.

    Only gradients, and the loaders at the beginning of an epoch, communicate with other ranks then.
    """
    args, accelerator = trainer.args, trainer.accelerator
    handler = copy.copy(trainer.callback_handler)
    handler.callbacks = [callback]
    trainer.callback_handler, trainer.control = handler, type(trainer.control)()
    trainer.model_init = None  # otherwise the weights would be made again, and the existing ones kept as well
    trainer._memory_tracker = type(trainer._memory_tracker)(True)
    accelerator.scaler = copy.deepcopy(accelerator.scaler)  # its scale changes with the steps
    args.max_steps, args.eval_on_start = steps, False
    args.include_num_input_tokens_seen = "no" if isinstance(args.include_num_input_tokens_seen, str) else False
    args.average_tokens_across_devices = False


def stop_sync(trainer: Any) -> None:
    """Let each rank train by itself: DistributedDataParallel, if used, averages no gradients and sends no buffers."""
    model = trainer.model_wrapped
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model.require_backward_grad_sync = model.require_forward_param_sync = False


def grad_hooks(parameter: torch.Tensor) -> dict[Any, Any]:
    """Hooks that run when a parameter's gradient is complete; a dictionary that the caller changes in place."""
    hooks = parameter._post_accumulate_grad_hooks
    return {} if hooks is None else hooks

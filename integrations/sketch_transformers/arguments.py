"""Convert ``TrainingArguments`` to an optimizer class and its keyword arguments, and report every mistake."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from sketch_plugins import registry
from sketch_plugins.import_hooks import install_integrations
from sketch_transformers import warm_start
from sketch_transformers._private import base_name
from sketch_transformers.optim_args import communication_options as communication_options
from sketch_transformers.optim_args import given_options, name_of, parse_optim_args
from sketch_transformers.targets import only_on, select_parameters

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)


def optimizer_cls_and_kwargs(
    args: TrainingArguments, model: torch.nn.Module | None = None
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The optimizer that ``args`` describe, as ``Trainer.get_optimizer_cls_and_kwargs`` returns it.

    With ``args.optim_target_modules``, the returned class is a stand-in: called with the parameter groups of Trainer
    (or others), it builds the optimizer with every group split in two, compressed and exact. It is also a stand-in for
    a name that ends in ``_layerwise``; see `sketch_transformers.layerwise`.

    Args:
        args: ``optim``, ``optim_args``, ``optim_target_modules``, ``learning_rate`` and ``adam_*`` are read. The
            parameter groups contain the weight decay.
        model: the model; needed with ``optim_target_modules`` only.

    Raises:
        ValueError: see :func:`check_arguments`; ``optim_target_modules`` without a model, or with an entry that matches
            nothing in it.
    """
    check_arguments(args)
    cls, kwargs = _cls_and_kwargs(args)
    if args.optim_target_modules is not None:
        if model is None:
            raise ValueError(f"optim_target_modules={args.optim_target_modules!r} needs a model, but the model is None")
        cls = only_on(cls, select_parameters(model, args.optim_target_modules))
    if _is_layerwise(args):
        from sketch_transformers.layerwise import clipping_warning, layerwise

        cls = layerwise(cls)
        warning = clipping_warning(args, name_of(args))
        if warning is not None:
            logger.warning(warning)
    prepare_deepspeed(args)
    return cls, kwargs


def check_arguments(args: TrainingArguments) -> None:
    """Check everything that can be checked without a model.

    Raises:
        ValueError: ``optim_args`` is malformed, has an unknown key, or a value of the wrong type or out of range (the
            message lists what is allowed); ``adam_*`` are set for an optimizer that does not use them; FSDP1 would
            shard the parameters; the DeepSpeed configuration has an optimizer of its own or asks for DeepSpeed's CPU
            Adam; ``warm_start`` under FSDP or DeepSpeed; see `sketch_transformers.layerwise.check`.
    """
    cls, kwargs = _cls_and_kwargs(args)
    try:
        cls([torch.empty(0)], **kwargs)  # the constructor checks which values go together
    except (TypeError, ValueError) as error:
        raise ValueError(f"optim={name_of(args)!r} with optim_args={args.optim_args!r}: {error}") from error
    _check_sharding(args)
    deepspeed = bool(deepspeed_config(args)) or bool(getattr(args, "deepspeed", None))
    warm_start.check(args, deepspeed, _fsdp_version(args) is not None)
    if _is_layerwise(args):
        from sketch_transformers.layerwise import check

        check(args, name_of(args), given_options(args), deepspeed, _fsdp_version(args))


def _cls_and_kwargs(args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    name = name_of(args)
    cls = registry.get(base_name(name)).cls
    given = parse_optim_args(name, args.optim_args)
    kwargs: dict[str, Any] = {"lr": args.learning_rate}
    if cls.ADAM_SETTINGS:
        kwargs |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    else:
        _check_adam_settings(args, given)
    if "momentum" in given and "betas" not in given:
        kwargs.pop("betas", None)  # ``momentum`` is another name for the first of the betas
    return cls, kwargs | given


def _check_adam_settings(args: TrainingArguments, given: Mapping[str, Any]) -> None:
    """Refuse changed ``adam_*`` for an optimizer that has values of its own, where they would have no effect."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    pair = f"betas={args.adam_beta1}:{args.adam_beta2}"
    for field, key, instead in (
        ("adam_beta1", "betas", pair),
        ("adam_beta2", "betas", pair),
        ("adam_epsilon", "eps", f"eps={args.adam_epsilon}"),
    ):
        value = getattr(args, field)
        if key not in given and value != defaults[field]:
            raise ValueError(
                f"{field}={value!r} has no effect on optim={name_of(args)!r}, which has {key} of its own: use "
                f"optim_args={instead!r}"
            )


def _is_layerwise(args: TrainingArguments) -> bool:
    return name_of(args) != base_name(name_of(args))


def _check_sharding(args: TrainingArguments) -> None:
    if getattr(args, "fsdp_config", None) and args.fsdp_config.get("xla", False):
        raise ValueError(f"optim={name_of(args)!r} does not support the flat parameters of FSDP on XLA: use FSDP2")
    if _fsdp_version(args) == 1:
        raise ValueError(
            f"optim={name_of(args)!r} does not support FSDP1, whose flat parameters have no shape that could "
            f'be compressed. Use FSDP2: fsdp_config={{"version": 2}}, or fsdp_version: 2 in the configuration '
            "of accelerate"
        )
    _check_deepspeed(args)


def _fsdp_version(args: TrainingArguments) -> int | None:
    """Version of FSDP that will run; None without FSDP."""
    if args.fsdp:
        # If no version is given, recent versions of transformers choose 2, and have stored their choice already.
        known = getattr(args, "fsdp_plugin_args", None) or {}
        given = (args.fsdp_config or {}).get("version", os.environ.get("FSDP_VERSION", 1))
        return int(known.get("fsdp_version", given))
    # `accelerate launch` sets FSDP in the environment, not in the arguments.
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return int(os.environ.get("FSDP_VERSION", 1))
    return None


def _check_deepspeed(args: TrainingArguments) -> None:
    config, name = deepspeed_config(args), name_of(args)
    block = config.get("optimizer")
    if block is not None and block.get("type") != name:
        raise ValueError(
            f"optim={name!r} would be ignored, because the DeepSpeed configuration has an optimizer of its "
            f"own, {block.get('type')!r}: remove that block"
        )
    if _offloads(config) and config.get("zero_force_ds_cpu_optimizer") is True:
        raise ValueError(
            f"zero_force_ds_cpu_optimizer=true would replace optim={name!r} by DeepSpeedCPUAdam; "
            "remove it or set it to false"
        )


def check_deepspeed_block(args: TrainingArguments) -> None:
    """Check an optimizer block of the DeepSpeed configuration that names one of ours, for any ``optim``.

    Raises:
        ValueError: DeepSpeed does not know the name, because sketch_deepspeed is neither imported nor installed;
            ``"auto"`` would give Adam's betas or eps to an optimizer that has its own; ``optim_args`` or
            ``optim_target_modules`` are set as well.
    """
    block = deepspeed_config(args).get("optimizer") or {}
    name = block.get("type")
    if name not in registry.names():
        return
    # The name is registered when DeepSpeed's engine is imported, which may still come, so it does not matter which of
    # the two this process imports first.
    if "sketch_deepspeed" not in sys.modules and not install_integrations("deepspeed.runtime.engine"):
        raise ValueError(
            f'the DeepSpeed configuration has {{"type": "{name}"}}, which DeepSpeed does not know before '
            "`import sketch_deepspeed`: add that import"
        )
    for given in ("optim_args", "optim_target_modules"):
        if getattr(args, given, None):
            raise ValueError(
                f"{given}={getattr(args, given)!r} would be ignored, because the DeepSpeed configuration has an "
                "optimizer block: remove the block, or set the options in its params"
            )
    if registry.get(name).cls.ADAM_SETTINGS:
        return
    for key in ("betas", "eps"):
        if _as_written(args).get("optimizer", {}).get("params", {}).get(key) == "auto":
            raise ValueError(
                f'"{key}": "auto" of the DeepSpeed configuration stands for Adam\'s value, but {name} has {key} of '
                "its own: remove it, or give a value"
            )


def prepare_deepspeed(args: TrainingArguments) -> None:
    """Keep DeepSpeed from replacing an optimizer of ours."""
    config = deepspeed_config(args)
    if _offloads(config):
        # Otherwise accelerate silently replaces the optimizer by DeepSpeedCPUAdam with its full state.
        config["zero_force_ds_cpu_optimizer"] = False


def _as_written(args: TrainingArguments) -> dict[str, Any]:
    """The DeepSpeed configuration before Trainer filled in its values."""
    given = getattr(args, "deepspeed", None)
    if isinstance(given, str) and os.path.exists(given):
        with open(given, encoding="utf-8") as file:
            given = json.load(file)
    return given if isinstance(given, dict) else {}


def deepspeed_config(args: TrainingArguments) -> dict[str, Any]:
    """The configuration of the DeepSpeed that is going to run the training; empty without."""
    # `deepspeed=...` in the arguments sets the first, `accelerate launch --use_deepspeed` only the second.
    plugin = getattr(args, "deepspeed_plugin", None)
    holder = getattr(args, "hf_deepspeed_config", None) or getattr(plugin, "hf_ds_config", None)
    return {} if holder is None else holder.config


def _offloads(config: dict[str, Any]) -> bool:
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"

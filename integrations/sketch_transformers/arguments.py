"""From ``TrainingArguments`` to an optimizer class and its keyword arguments, with every mistake reported."""

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
from sketch_transformers.targets import only_on, select_parameters
from sketch_transformers.warm_start import WARM_START, registered

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

#: Options of the optimizer that have a place of their own; in ``optim_args`` they would contradict it or be ignored.
ELSEWHERE = {
    "lr": "TrainingArguments.learning_rate",
    "weight_decay": "TrainingArguments.weight_decay, which Trainer sets per parameter group",
}


def optimizer_cls_and_kwargs(
    args: TrainingArguments, model: torch.nn.Module | None = None
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The optimizer that ``args`` describe, as ``Trainer.get_optimizer_cls_and_kwargs`` returns it.

    With ``args.optim_target_modules`` the class returned is a stand-in: called with the parameter groups of Trainer (or
    any others), it builds the optimizer with every group split in two, compressed and exact. For a name that ends in
    ``_layerwise`` it is one, too: see `sketch_transformers.layerwise`.

    Args:
        args: ``optim``, ``optim_args``, ``optim_target_modules``, ``learning_rate`` and ``adam_*`` are read. The weight
            decay comes with the parameter groups.
        model: needed with ``optim_target_modules`` only.

    Raises:
        ValueError: see :func:`check_arguments`; ``optim_target_modules`` without a model or with an entry that matches
            nothing in it.
    """
    check_arguments(args)
    cls, kwargs = _cls_and_kwargs(args)
    if args.optim_target_modules is not None:
        if model is None:
            raise ValueError(f"optim_target_modules={args.optim_target_modules!r} needs the model, which is None")
        cls = only_on(cls, select_parameters(model, args.optim_target_modules))
    if _is_layerwise(args):
        from sketch_transformers.layerwise import clipping_warning, layerwise

        cls = layerwise(cls)
        warning = clipping_warning(args, _name(args))
        if warning is not None:
            logger.warning(warning)
    prepare_deepspeed(args)
    return cls, kwargs


def check_arguments(args: TrainingArguments) -> None:
    """Check all that can be known without a model.

    Raises:
        ValueError: ``optim_args`` is malformed, has an unknown key, a value of the wrong type or an impossible one (the
            message lists what is allowed); ``adam_*`` are set for an optimizer that does not read them; the parameters
            are to be sharded by FSDP1; the DeepSpeed configuration has an optimizer of its own or asks for DeepSpeed's
            CPU Adam; ``warm_start`` under FSDP or DeepSpeed; see `sketch_transformers.layerwise.check`.
    """
    cls, kwargs = _cls_and_kwargs(args)
    try:
        cls([torch.empty(0)], **kwargs)  # the constructor knows best which values go together
    except (TypeError, ValueError) as error:
        raise ValueError(f"optim={_name(args)!r} with optim_args={args.optim_args!r}: {error}") from error
    _check_sharding(args)
    deepspeed = bool(_deepspeed_config(args)) or bool(getattr(args, "deepspeed", None))
    warm_start.check(args, deepspeed, _fsdp_version(args) is not None)
    if _is_layerwise(args):
        from sketch_transformers.layerwise import check

        check(args, _name(args), _optim_args(args), deepspeed, _fsdp_version(args))


def parse_communication(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """See `sketch_transformers.comm.parse`, which needs Trainer: that may be half imported here."""
    if not given:
        return None
    from sketch_transformers.comm import parse

    return parse(given)


def parse_optim_args(name: str, optim_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Typed keyword arguments from ``optim_args``: "key=value,key=value", or a mapping from a JSON or YAML file.

    Args:
        name: a name of the registry, with or without ``_layerwise``.
        optim_args: options of that optimizer, without those in :data:`ELSEWHERE`.

    Raises:
        ValueError: names the offending part and what is allowed.
    """
    where = f"optim_args={optim_args!r} of optim={name!r}"
    given = dict(optim_args) if isinstance(optim_args, Mapping) else _split(name, optim_args, where)
    for key in given:
        if key in ELSEWHERE:
            raise ValueError(f"{where}: {key!r} is set by {ELSEWHERE[key]}")
    try:
        parse_communication({key: given.pop(key) for key in list(given) if key.startswith("comm")})
        if WARM_START.name in given:
            WARM_START.parse(given.pop(WARM_START.name))
        return registry.parse_options(base_name(name), given, {WARM_START.name: WARM_START})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def optimizer_options(args: TrainingArguments) -> tuple[str | None, dict[str, Any], bool]:
    """The registry's name, the options that ``optim_args`` has, and whether ``optim_args`` asks for a warm start.

    None, no options and False where ``optim`` is not one of ours.
    """
    name = registered(base_name(_name(args)))
    if name is None:
        return None, {}, False
    given = _optim_args(args).get(WARM_START.name, False)
    return name, parse_optim_args(name, args.optim_args), bool(WARM_START.parse(given))


def communication_options(args: TrainingArguments) -> dict[str, Any] | None:
    """Options of `enable_memsgd` that ``optim_args`` has (``comm=block_topk,comm_density=0.01``), None if it has none.

    Raises:
        ValueError: names the offending part and what is allowed; with an optimizer that is not ours.
    """
    if base_name(_name(args)) not in registry.names():
        given = args.optim_args if isinstance(args.optim_args, str) else ""
        if any(f"{part}=".lstrip().startswith(("comm=", "comm_")) for part in given.split(",")):  # nobody reads it
            raise ValueError(
                f"optim_args={given!r}: 'comm' is there for the optimizers {', '.join(registry.names())}; with "
                f"optim={_name(args)!r} call sketch_transformers.enable_memsgd(trainer, ...)"
            )
        return None
    try:
        return parse_communication({key: value for key, value in _optim_args(args).items() if key.startswith("comm")})
    except ValueError as error:
        raise ValueError(f"optim_args={args.optim_args!r} of optim={_name(args)!r}: {error}") from error


def _optim_args(args: TrainingArguments) -> Mapping[str, Any]:
    """As given, split."""
    if isinstance(args.optim_args, Mapping):
        return args.optim_args
    name = _name(args)
    return _split(name, args.optim_args, f"optim_args={args.optim_args!r} of optim={name!r}")


def _cls_and_kwargs(args: TrainingArguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    name = _name(args)
    cls = registry.get(base_name(name)).cls
    given = parse_optim_args(name, args.optim_args)
    kwargs: dict[str, Any] = {"lr": args.learning_rate}
    if cls.ADAM_SETTINGS:
        kwargs |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    else:
        _check_adam_settings(args, given)
    if "momentum" in given and "betas" not in given:
        kwargs.pop("betas", None)  # one value under two names
    return cls, kwargs | given


def _check_adam_settings(args: TrainingArguments, given: Mapping[str, Any]) -> None:
    """``adam_*`` are Adam's, and so are their defaults: 0.999 would make averages of SM3's sums without a word."""
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
                f"{field}={value!r} is Adam's: optim={_name(args)!r} has {key} of its own and does not read it; give "
                f"optim_args={instead!r} instead"
            )


def _name(args: TrainingArguments) -> str:
    # A str Enum after __post_init__, but a plain string may have been assigned since.
    return str(getattr(args.optim, "value", args.optim))


def _is_layerwise(args: TrainingArguments) -> bool:
    return _name(args) != base_name(_name(args))


def _split(name: str, optim_args: Any, where: str) -> dict[str, str]:
    if optim_args is None or optim_args == "":
        return {}
    if not isinstance(optim_args, str):
        raise ValueError(f"{where}: expected a string 'key=value,key=value', not {type(optim_args).__name__}")
    given: dict[str, str] = {}
    for part in optim_args.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (key and equals and value):
            keys = ", ".join(key for key in registry.get(base_name(name)).options if key not in ELSEWHERE)
            raise ValueError(f"{where}: {part!r} is not of the form key=value; the keys are {keys}")
        if key in given:
            raise ValueError(f"{where}: {key!r} is given twice, {given[key]!r} and {value!r}")
        given[key] = value
    return given


def _check_sharding(args: TrainingArguments) -> None:
    if getattr(args, "fsdp_config", None) and args.fsdp_config.get("xla", False):
        raise ValueError(f"optim={_name(args)!r} does not know the flat parameters of FSDP on XLA: use FSDP2")
    if _fsdp_version(args) == 1:
        raise ValueError(
            f"optim={_name(args)!r} and FSDP1: it cuts parameters into pieces without a shape, of which nothing can be "
            'compressed. Use FSDP2: fsdp_config={"version": 2}, or fsdp_version: 2 in the configuration of accelerate'
        )
    _check_deepspeed(args)


def _fsdp_version(args: TrainingArguments) -> int | None:
    """Of FSDP as it will run; None without FSDP."""
    if args.fsdp:
        # Who does not say which gets 2 in recent versions of transformers, which have worked it out already.
        known = getattr(args, "fsdp_plugin_args", None) or {}
        given = (args.fsdp_config or {}).get("version", os.environ.get("FSDP_VERSION", 1))
        return int(known.get("fsdp_version", given))
    # `accelerate launch` asks for FSDP in the environment, not in the arguments.
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return int(os.environ.get("FSDP_VERSION", 1))
    return None


def _check_deepspeed(args: TrainingArguments) -> None:
    config, name = _deepspeed_config(args), _name(args)
    block = config.get("optimizer")
    if block is not None and block.get("type") != name:
        raise ValueError(
            f"optim={name!r} would be ignored: the DeepSpeed configuration has its own optimizer, "
            f"{block.get('type')!r}; remove that block"
        )
    if _offloads(config) and config.get("zero_force_ds_cpu_optimizer") is True:
        raise ValueError(
            f"zero_force_ds_cpu_optimizer=true would replace optim={name!r} by DeepSpeedCPUAdam; "
            "remove it or set it to false"
        )


def check_deepspeed_block(args: TrainingArguments) -> None:
    """Check an optimizer block of the DeepSpeed configuration that names one of ours, whatever ``optim`` is.

    Raises:
        ValueError: DeepSpeed does not know the name, for sketch_deepspeed was neither imported nor installed;
            ``"auto"`` would give Adam's betas or eps to an optimizer that has its own; ``optim_args`` or
            ``optim_target_modules`` beside it.
    """
    block = _deepspeed_config(args).get("optimizer") or {}
    name = block.get("type")
    if name not in registry.names():
        return
    # The import of DeepSpeed's engine, which may be yet to come, then registers the name: it need not be known which of
    # the two this process imports first.
    if "sketch_deepspeed" not in sys.modules and not install_integrations("deepspeed.runtime.engine"):
        raise ValueError(
            f'the DeepSpeed configuration has {{"type": "{name}"}}, which DeepSpeed knows after '
            "`import sketch_deepspeed`"
        )
    for given in ("optim_args", "optim_target_modules"):
        if getattr(args, given, None):
            raise ValueError(
                f"{given}={getattr(args, given)!r} would be ignored: the DeepSpeed configuration has an optimizer "
                "block; remove the block, or write the options into its params"
            )
    if registry.get(name).cls.ADAM_SETTINGS:
        return
    for key in ("betas", "eps"):
        if _as_written(args).get("optimizer", {}).get("params", {}).get(key) == "auto":
            raise ValueError(
                f'"{key}": "auto" of the DeepSpeed configuration is Adam\'s, and {name} has {key} of its own: leave it '
                "out, or give a value"
            )


def prepare_deepspeed(args: TrainingArguments) -> None:
    """Keep DeepSpeed from replacing an optimizer of ours."""
    config = _deepspeed_config(args)
    if _offloads(config):
        # Or accelerate replaces the optimizer by DeepSpeedCPUAdam, with full state and without a word.
        config["zero_force_ds_cpu_optimizer"] = False


def _as_written(args: TrainingArguments) -> dict[str, Any]:
    """The DeepSpeed configuration before Trainer filled it in."""
    given = getattr(args, "deepspeed", None)
    if isinstance(given, str) and os.path.exists(given):
        with open(given, encoding="utf-8") as file:
            given = json.load(file)
    return given if isinstance(given, dict) else {}


def _deepspeed_config(args: TrainingArguments) -> dict[str, Any]:
    # `deepspeed=...` in the arguments sets the first, `accelerate launch --use_deepspeed` only the second.
    plugin = getattr(args, "deepspeed_plugin", None)
    holder = getattr(args, "hf_deepspeed_config", None) or getattr(plugin, "hf_ds_config", None)
    return {} if holder is None else holder.config


def _offloads(config: dict[str, Any]) -> bool:
    offload = config.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"

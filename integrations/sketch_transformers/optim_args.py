"""The keys of ``optim_args``: options of the optimizer, of communication between processes, and of a warm start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sketch_plugins import registry
from sketch_plugins.comm import COMPRESSORS
from sketch_plugins.comm.state import check_options
from sketch_plugins.optim.options import Option
from sketch_transformers._private import base_name

if TYPE_CHECKING:
    from transformers import TrainingArguments

#: Options of the optimizer that are set elsewhere; in ``optim_args`` they would contradict that or be ignored.
ELSEWHERE = {
    "lr": "TrainingArguments.learning_rate",
    "weight_decay": "TrainingArguments.weight_decay, which Trainer sets per parameter group",
}
#: The key in ``optim_args`` that asks for a warm start.
WARM_START = Option("warm_start", bool, "convert the state of one of torch's optimizers (default False)")
#: Keys of communication. Without ``comm_``, each is an option of `MemSGDState`.
COMMUNICATION = {
    option.name: option
    for option in (
        Option("comm", str, "compressor of the gradients between processes", choices=tuple(COMPRESSORS)),
        Option("comm_density", float, "fraction that is sent (default 0.01)"),
        Option("comm_start", int, "number of first steps that send everything (default 2)"),
        Option("comm_warmup", int, "steps in which the density falls (default 0)"),
        Option("comm_initial_density", float, "density that it falls from (default 0.25)"),
        Option("comm_momentum", float, "momentum correction (default 0)"),
        Option("comm_factor_masking", bool, "clear the velocity of what was sent (default True)"),
        Option("comm_clip", float, "bound of local gradient norms (default 0: off)"),
        Option("comm_memory_dtype", str, "dtype of the memory: 'fp32' (default) or 'bf16'"),
        Option("comm_min_size", int, "smaller parameters are sent whole (default 1024)"),
        Option("comm_seed", int, "seed of random entries, hashes and rounding (default 0)"),
    )
}


def parse_optim_args(name: str, optim_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Typed keyword arguments from ``optim_args``: "key=value,key=value", or a mapping from a JSON or YAML file.

    Args:
        name: a name of the registry, with or without ``_layerwise``.
        optim_args: options of that optimizer, without those in :data:`ELSEWHERE`.

    Raises:
        ValueError: names the wrong part and what is allowed.
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
    """The name in the registry, the optimizer's options in ``optim_args``, and whether it asks for a warm start.

    None, no options and False if ``optim`` is not one of ours.
    """
    name = base_name(name_of(args))
    if name not in registry.names():
        return None, {}, False
    given = given_options(args).get(WARM_START.name, False)
    return name, parse_optim_args(name, args.optim_args), bool(WARM_START.parse(given))


def communication_options(args: TrainingArguments) -> dict[str, Any] | None:
    """Options of `enable_memsgd` in ``optim_args`` (``comm=block_topk,comm_density=0.01``); None if it has none.

    Raises:
        ValueError: names the wrong part and what is allowed; or the optimizer is not one of ours.
    """
    if base_name(name_of(args)) not in registry.names():
        given = args.optim_args if isinstance(args.optim_args, str) else ""
        # Otherwise no code would read it.
        if any(f"{part}=".lstrip().startswith(("comm=", "comm_")) for part in given.split(",")):
            raise ValueError(
                f"optim_args={given!r}: 'comm' is available for the optimizers {', '.join(registry.names())}. "
                f"With optim={name_of(args)!r} call sketch_transformers.enable_memsgd(trainer, ...) instead"
            )
        return None
    try:
        return parse_communication({key: value for key, value in given_options(args).items() if key.startswith("comm")})
    except ValueError as error:
        raise ValueError(f"optim_args={args.optim_args!r} of optim={name_of(args)!r}: {error}") from error


def given_options(args: TrainingArguments) -> Mapping[str, Any]:
    """``optim_args`` as given, split into keys and values.

    Raises:
        ValueError: names the part that is not of the form key=value, or the key that is given twice.
    """
    if isinstance(args.optim_args, Mapping):
        return args.optim_args
    name = name_of(args)
    return _split(name, args.optim_args, f"optim_args={args.optim_args!r} of optim={name!r}")


def parse_communication(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """Options of `MemSGDState` from keys of ``optim_args`` that begin with ``comm``; None if there are none.

    Raises:
        ValueError: an unknown key, a value that is not allowed; ``comm_...`` without ``comm``.
    """
    if not given:
        return None
    unknown = [key for key in given if key not in COMMUNICATION]
    if unknown:
        raise ValueError(
            f"{unknown[0]!r} does not exist; the options of gradient compression are {', '.join(COMMUNICATION)}"
        )
    if "comm" not in given:
        raise ValueError(
            f"{next(iter(given))!r} has no effect without 'comm': add comm=block_topk, or another of "
            f"{list(COMPRESSORS)}"
        )
    parsed = {key: COMMUNICATION[key].parse(value) for key, value in given.items()}
    options = {("compressor" if key == "comm" else key.removeprefix("comm_")): v for key, v in parsed.items()}
    check_options(options)
    return options


def name_of(args: TrainingArguments) -> str:
    """The name in ``args.optim``: a str Enum after ``__post_init__``, unless a plain string was assigned later."""
    return str(getattr(args.optim, "value", args.optim))


def _split(name: str, optim_args: Any, where: str) -> dict[str, str]:
    if optim_args is None or optim_args == "":
        return {}
    if not isinstance(optim_args, str):
        raise ValueError(f"{where}: expected text of the form 'key=value,key=value', not {type(optim_args).__name__}")
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

"""``sketch-plugins convert``: write a copy of AdamW's checkpoint with the state of a sketched optimizer."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sketch_plugins import registry
from sketch_plugins.checkpoints import reading
from sketch_plugins.checkpoints.convert_files import CannotConvert, framework_of, optimizer_files, target_of, write
from sketch_plugins.checkpoints.saved import nbytes
from sketch_plugins.memory.report import format_bytes
from sketch_plugins.optim import SketchOptimizer, Sketchy
from sketch_plugins.optim.convert import convert_state, is_foreign
from sketch_plugins.optim.hyperparameters import carried_over
from sketch_plugins.optim.written import written_by
from sketch_plugins.spelling import split_options

#: Keys in the groups of torch's optimizers, with the values for checkpoints that are older than the key.
_GROUPS: dict[str, dict[str, Any]] = {
    "Adam": {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False},
    "SGD": {"momentum": 0, "dampening": 0, "nesterov": False},
    "Adagrad": {"lr_decay": 0, "eps": 1e-10, "initial_accumulator_value": 0},
}
#: Keys that identify the optimizer of a group. Other optimizers that have all of them also have other keys.
_TELLING = {"Adam": {"betas", "amsgrad"}, "SGD": {"momentum", "dampening"}, "Adagrad": {"lr_decay"}}
_OTHERS = {"momentum_decay", "alpha", "rho", "beta2_decay", "clip_threshold"}


@dataclass(frozen=True)
class Group:
    """One parameter group: parameters with state, their elements, and bytes of state before and after."""

    parameters: int
    elements: int
    before: int
    after: int


@dataclass
class Converted:
    """The result of a conversion.

    Attributes:
        output: file or directory that was written.
        framework: the framework that wrote the checkpoint.
        optimizers: the groups of each optimizer that was converted.
        notes: what the user should know.
    """

    output: Path
    framework: str
    optimizers: list[list[Group]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def main(
    checkpoint: str, name: str, optim_args: str | None, out: str | None, force: bool, trust: bool, program: str
) -> int:
    """Run the command and return its exit status: 0, or 1 if nothing was written."""
    try:
        done = convert(checkpoint, name, optim_args, out, force=force, trust=trust)
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    console = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)
    console.print(f"{checkpoint} -> {done.output}", soft_wrap=True, highlight=False)
    console.print(table(done, name))
    for note in done.notes:
        console.print(note, soft_wrap=True, highlight=False)
    return 0


def table(done: Converted, name: str) -> Table:
    """A table of the bytes of state before and after, with a row for each group."""
    out = Table()
    out.add_column("state of")
    for heading in ("parameters", "elements", "before", name, "of it"):
        out.add_column(heading, justify="right")

    def row(label: str, groups: Sequence[Group], style: str | None = None) -> None:
        parameters, elements, before, after = (
            sum(getattr(g, key) for g in groups) for key in ("parameters", "elements", "before", "after")
        )
        share = f"{after / before:.1%}" if before else ""
        out.add_row(
            label, f"{parameters:,}", f"{elements:,}", format_bytes(before), format_bytes(after), share, style=style
        )

    for number, groups in enumerate(done.optimizers):
        prefix = f"optimizer {number}, " if len(done.optimizers) > 1 else ""
        for index, group in enumerate(groups):
            row(f"{prefix}group {index}", [group])
    out.add_section()
    row("all", [group for groups in done.optimizers for group in groups], "bold")
    return out


def convert(
    checkpoint: str | os.PathLike[str],
    name: str,
    optim_args: str | Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    trust: bool = False,
) -> Converted:
    """Write a copy of a checkpoint of AdamW, Adam, SGD or Adagrad with the state of a sketched optimizer.

    The state is the result of `convert_state`, bit for bit. Learning rates, betas, epsilons and weight decays of the
    groups stay the same, and so does everything else in the checkpoint.

    Args:
        checkpoint: directory of a Trainer's checkpoint (or accelerate's); or a file of Lightning or of ``torch.save``
            that has the state dict of an optimizer at any depth.
        name: name in the registry.
        optim_args: its options, as in Trainer: ``"compression=0.1,seed=1"``. Options that decide how state is kept
            have to be given to the run that continues, too.
        out: the output: a directory for a directory; for a file a file, or a directory to put it into (one that exists,
            or a name that ends in a slash). None: beside the checkpoint, with ``-NAME`` in its name.
        force: replace an existing output, but never the checkpoint itself.
        trust: unpickle objects that are neither tensors nor plain values.

    Raises:
        ValueError: an unknown optimizer or option; no such checkpoint, or one that cannot be converted; the output
            exists, or is the checkpoint. Nothing has been written then.
    """
    options = _options(name, optim_args)
    root = Path(checkpoint)
    files = optimizer_files(root)
    target = target_of(root, name, out, force)
    done = Converted(target, framework_of(root))
    values = {}
    for file in files:
        value = reading.load(file, trust)
        seen = len(done.optimizers)

        def made(saved: Mapping[str, Any]) -> Mapping[str, Any]:
            new, groups = _converted(saved, name, options, done.notes)
            done.optimizers.append(groups)
            return new

        values[file.name] = _replaced(value, made)
        if len(done.optimizers) == seen:
            raise CannotConvert(_nothing_in(file, value))
    write(root, target, values, force)
    said = f", optim_args={optim_args!r}" if optim_args else ""
    if done.framework == "Trainer":
        done.notes.append(
            f"continue with TrainingArguments(optim={name!r}{said}) and "
            f"train(resume_from_checkpoint={os.fspath(target)!r})"
        )
    return done


def _options(name: str, optim_args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    given = dict(optim_args) if isinstance(optim_args, Mapping) else dict[str, Any](split_options(optim_args))
    if "lr" in given:
        raise CannotConvert(
            f"--optim-args sets lr={given['lr']!r}, but the learning rate and its schedule come from the "
            "checkpoint. Remove lr"
        )
    parsed = registry.parse_options(name, given)
    registry.get(name).cls([torch.empty(0)], **parsed)  # the constructor checks which values go together
    return parsed


def _replaced(value: Any, made: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Any:
    """The value with every state dict of one of torch's optimizers converted; the same object if it has none."""
    if isinstance(value, Mapping):
        if reading.is_state_dict(value):
            return made(value) if is_foreign(value) else value
        new = {key: _replaced(inner, made) for key, inner in value.items()}
        if all(new[key] is inner for key, inner in value.items()):
            return value
        changed = copy.copy(value)
        for key, inner in new.items():
            changed[key] = inner  # type: ignore[index]
        return changed
    if type(value) in (list, tuple):
        entries = [_replaced(inner, made) for inner in value]
        return type(value)(entries) if any(a is not b for a, b in zip(entries, value, strict=True)) else value
    return value


def _nothing_in(file: Path, value: Any) -> str:
    found = list(reading.state_dicts(value))
    if any(written_by(group) is not None for saved in found for group in saved["param_groups"]):
        return f"{file} already holds the state of a sketched optimizer: there is nothing to convert"
    if found:
        return f"{file} holds an optimizer state dict without parameter groups: there is nothing to convert"
    return reading.without_optimizer(file, value)


def _converted(
    saved: Mapping[str, Any], name: str, options: Mapping[str, Any], notes: list[str]
) -> tuple[Mapping[str, Any], list[Group]]:
    optimizer = _optimizer(saved, name, options, notes)
    keep = [key for key in ("betas", "momentum") if key in options]
    new: Mapping[str, Any] = convert_state(saved, optimizer, keep=keep)
    groups = []
    for group, old_group, new_group in zip(
        optimizer.param_groups, saved["param_groups"], new["param_groups"], strict=True
    ):
        old = [saved["state"].get(key) or {} for key in old_group["params"]]
        own = [new["state"].get(key) or {} for key in new_group["params"]]
        sizes = [p.numel() for p, state in zip(group["params"], old, strict=True) if state]
        groups.append(Group(len(sizes), sum(sizes), sum(map(nbytes, old)), sum(map(nbytes, own))))
    return new, groups


def _optimizer(saved: Mapping[str, Any], name: str, options: Mapping[str, Any], notes: list[str]) -> SketchOptimizer:
    """An optimizer of ours for parameters of the shapes that the state has, with the hyperparameters of its groups."""
    cls = registry.get(name).cls
    groups = []
    for number, group in enumerate(saved["param_groups"]):
        kind, whole = _kind(group, number, notes)
        own = carried_over(cls, name, kind, whole, given=options, how=lambda key, value: f"--optim-args {key}={value}")
        names = group.get("param_names")
        members = [_parameter(saved["state"].get(key)) for key in group["params"]]
        groups.append(
            {
                **{key: value for key, value in own.items() if key not in options},
                "params": list(zip(names, members, strict=True)) if names else members,
            }
        )
    optimizer = cls(groups, **options)
    for group in optimizer.param_groups:
        option = _needs_weights(optimizer, group)
        if option is not None:
            raise CannotConvert(
                f"{option}=True of {name} needs the parameters' values, and this checkpoint's optimizer state "
                "does not contain them. Either let the training run convert the state (Trainer: "
                'optim_args="warm_start=true"; Lightning: warm_start=True; otherwise '
                f"sketch_plugins.convert_state), or pass --optim-args {option}=false"
            )
    return optimizer


def _needs_weights(optimizer: SketchOptimizer, group: Mapping[str, Any]) -> str | None:
    """The option that makes `convert_state` read the parameters; None if no option does."""
    if group.get("lagged_rms"):
        return "lagged_rms"
    momentum = group.get("first_moment", "none") != "none" and group.get("momentum_placement") != "after"
    if isinstance(optimizer, Sketchy) and momentum and group.get("scale_parameter"):
        return "scale_parameter"
    return None


def _kind(group: Mapping[str, Any], number: int, notes: list[str]) -> tuple[str, dict[str, Any]]:
    """The torch optimizer that a group belongs to, and the group with all the keys of this optimizer."""
    found = [kind for kind, telling in _TELLING.items() if telling <= group.keys() and not _OTHERS & group.keys()]
    if not found:
        keys = ", ".join(key for key in group if key not in ("params", "param_names"))
        raise CannotConvert(
            f"parameter group {number} was not written by AdamW, Adam, SGD or Adagrad, and only their state "
            f"can be converted; its keys are {keys}"
        )
    kind = found[0]
    if kind == "Adam" and group.get("decoupled_weight_decay") is None:
        note = (
            "the checkpoint does not say whether Adam or AdamW wrote it (torch before 2.7): AdamW's weight "
            "decay is assumed"
        )
        if group.get("weight_decay") and note not in notes:
            notes.append(note)
        kind = "AdamW"
    base = {"maximize": False, "weight_decay": 0.0, **_GROUPS["Adam" if kind == "AdamW" else kind]}
    return "AdamW" if group.get("decoupled_weight_decay") else kind, {**base, **group}


def _parameter(state: Mapping[str, Any] | None) -> Tensor:
    """A parameter of the shape that its state has. Its numbers are not read, and its memory is never touched."""
    for key in ("exp_avg", "exp_avg_sq", "momentum_buffer", "sum"):
        kept = (state or {}).get(key)
        if isinstance(kept, Tensor):
            return torch.nn.Parameter(torch.empty(kept.shape, dtype=kept.dtype))
    return torch.nn.Parameter(torch.empty(0))

"""Parameter groups: the values of options, which of them may change between steps, and names for messages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from sketch_plugins.optim.fused import backend as fused_backend
from sketch_plugins.optim.options import NoEffect, Option, is_boxed
from sketch_plugins.optim.written import MARK, built_with, renew, written_with
from sketch_plugins.sharding.dtensors import is_dtensor
from sketch_plugins.sharding.names import names_of
from sketch_plugins.sharding.parts import Part, Parts
from sketch_plugins.sharding.pieces import is_lazy
from sketch_plugins.sharding.state_names import is_ours

# Stands for the value of an option that a group does not have.
NO_OPTION = object()

# Options that torch's optimizers have, too. A key with such a name is always meant as the option.
COMMON_NAMES = frozenset({
    "lr", "betas", "eps", "weight_decay", "maximize", "momentum", "nesterov", "fused", "capturable", "lr_decay",
    "initial_accumulator_value",
})  # fmt: skip

OWN_KEY = "If this is a key of your own, give it another name"


class Groups(torch.optim.Optimizer):
    """The options of all parameter groups, validated when a group is added, and again when one has changed."""

    OPTIONS: ClassVar[dict[str, Option]] = {}
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}
    #: Arguments of torch's optimizers that are accepted without effect. They are no options.
    NO_EFFECT: ClassVar[dict[str, NoEffect]] = {}
    #: Whether a framework's settings for Adam (betas, epsilon) have the same meaning here, defaults included.
    ADAM_SETTINGS: ClassVar[bool] = True
    #: Keys of a parameter group that are no options of this optimizer, with the values that are used for them.
    FIXED: ClassVar[dict[str, Any]] = {}
    _parts_of: Parts | None = None
    # Whether the line of the first step has been logged.
    _introduced = False
    # Whether learning rates are checked. They are not if a learning rate is only tried out.
    _watches_rates = True
    # Returns the logger of that line, if a framework has set one (`introduction.hand_over`).
    _introduces_to: Any = None

    @classmethod
    def _preset(cls, name: str) -> dict[str, Any]:
        if name not in cls.PRESETS:
            raise ValueError(f"preset={name!r} is not one of {', '.join(map(repr, cls.PRESETS))} ({cls.__name__})")
        return cls.PRESETS[name]

    @classmethod
    def _arguments(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments, among the local variables of a constructor, that are options or accepted without effect."""
        return {name: value for name, value in given.items() if name in cls.OPTIONS or name in cls.NO_EFFECT}

    @classmethod
    def _accept_without_effect(cls, given: Mapping[str, Any]) -> None:
        for name, argument in cls.NO_EFFECT.items():
            if name in given:
                argument.accept(given[name], cls.__name__)

    @classmethod
    def _group_value(cls, name: str, value: Any) -> Any:
        """The validated value of an option in a parameter group, where users have keys of their own, too."""
        try:
            return cls.OPTIONS[name].validate(value)
        except ValueError as error:
            if name in COMMON_NAMES:
                raise
            raise ValueError(f"{error}. {name!r} is an option of {cls.__name__}. {OWN_KEY}") from None

    @classmethod
    def _group_preset(cls, name: str) -> dict[str, Any]:
        """The options that a preset sets in a group: all that any preset sets. Others keep the constructor's values."""
        base, *others = (cls._preset(n) for n in cls.PRESETS)
        return {key: base[key] for preset in others for key in preset if key in base} | {
            key: value for key, value in cls._preset(name).items() if name != next(iter(cls.PRESETS))
        }

    def _check_options(self, seen: dict[int, tuple[Any, dict[str, Any]]], number: int, group: dict[str, Any]) -> None:
        """Validate the options of a group that have changed since the last step."""
        # A group's number does not identify it: DeepSpeed steps groups one by one, each as the only group.
        known, last = seen.get(id(group), (None, {}))
        last = last if known is group else {}
        if last and self._only_the_rate_changed(group, last):
            self._accept_without_effect(group)
            return
        now = {}
        changed, missing = not last, None
        for name, option in self.OPTIONS.items():
            if name not in group:
                # Groups of old pickles lack newer options, and so do the pickles' defaults.
                missing = name if missing is None and name in self.defaults else missing
                continue
            value = now[name] = group[name]
            if name in last:
                before = last[name]
                if isinstance(value, Tensor):
                    # It may have been changed in place. On a device reading it would wait, so only identity counts.
                    if value is before and value.device.type != "cpu":
                        continue
                elif value is before or (type(value) is type(before) and value == before and not is_boxed(value)):
                    continue
            checked = self._group_value(name, value)
            if is_boxed(value) and not isinstance(checked, Tensor):
                group[name] = now[name] = checked
            if isinstance(checked, Tensor):
                check_rate_device(checked, group["params"], f"param_groups[{number}]")
            changed = changed or option.structural
        self._accept_without_effect(group)
        if changed or now.keys() != last.keys():
            self._check_structure(number, group)
        if missing is not None:
            raise ValueError(
                f"the key {missing} is missing in param_groups[{number}], so no step can be taken. Restore it: "
                f"param_groups[{number}][{missing!r}] = {self.defaults[missing]!r} is the value that the "
                "optimizer was built with"
            )
        if last and any(last.get(name) is not now.get(name) for name in ("fused", "compile", "capturable")):
            for index, p in enumerate(group["params"]):
                self._check_kernels(p, group, partial(self._label, group, index))
        seen[id(group)] = group, now

    def _only_the_rate_changed(self, group: Mapping[str, Any], last: dict[str, Any]) -> bool:
        """Whether everything except ``lr`` is the same object as in the last step, as in nearly all steps."""
        new = [
            name for name in self.OPTIONS
            if (value := group.get(name, NO_OPTION)) is not last.get(name, NO_OPTION) or isinstance(value, Tensor)
        ]  # fmt: skip
        if not new:
            return True
        if new != ["lr"] or type(group["lr"]) is not float or "lr" not in last:
            return False
        self._group_value("lr", group["lr"])
        last["lr"] = group["lr"]
        return True

    def _check_structure(self, number: int, group: Mapping[str, Any]) -> None:
        """Refuse structural options that do not fit the state of the group's parameters."""
        assert isinstance(group, dict)
        preset = built_with(group)
        if preset is not None and group.get("preset") != preset:
            raise ValueError(
                f"preset of group {number} was {preset!r} and is now {group.get('preset')!r}, but a preset sets "
                "options only when a group is added. Set it back, and change the options themselves, or build a new "
                "optimizer"
            )
        if MARK not in group or not any(self._has_state(p) for p in group["params"]):
            renew(type(self).__name__, self.OPTIONS, group)
            return
        for name, before in written_with(group).items():
            if name not in self.OPTIONS:
                continue
            if name not in group:
                raise ValueError(
                    f"{name} of group {number} was {before!r} and is now missing, but the parameters' state cannot be "
                    "used without it"
                )
            if self.OPTIONS[name].validate(group[name]) != before:
                raise ValueError(
                    f"{name} of group {number} was {before!r} and is now {group[name]!r}, but the parameters' state "
                    f"was made with the old value. Set it back, or build a new optimizer. {OWN_KEY}"
                )

    def _has_state(self, owner: Tensor) -> bool:
        """Whether a tensor in a parameter group has state of ours."""
        return any(map(is_ours, self.state.get(owner, ())))

    def _label(self, group: Mapping[str, Any], p: int | Part) -> str:
        """The name of a parameter in messages. ``p`` is its number in the group, or a part of it."""
        names = names_of(group)
        part, index = (p, p.index) if isinstance(p, Part) else (None, p)
        if part is not None and part.key is not None:
            return f"parameter {part.name!r} of shape {part.whole} (its part {tuple(part.shape)} on this rank)"
        if part is None:
            owner = group["params"][index]
            said = "not known yet" if is_lazy(owner) else str(tuple(owner.shape))
        else:
            said = str(part.whole)
        at = next((i for i, other in enumerate(self.param_groups) if other is group), len(self.param_groups))
        name = names[index] if index < len(names) else None
        label = f"parameter {index} of group {at}," if name is None else f"parameter {name!r}"
        label += f" of shape {said}"
        if part is not None and part.piece is not None and not part.piece.complete:
            label += f" (its part {tuple(part.shape)} on this rank)"
        return label if name is not None else label + ","

    def _check_kernels(self, p: Tensor, group: Mapping[str, Any], label: Callable[[], str]) -> None:
        """Raise ValueError if the options ask for kernels that do not exist on the device."""
        if group["fused"] and group["compile"]:
            raise ValueError("fused=True and compile=True are two ways to speed up a step: use one of them")
        backend = fused_backend(p.device, group["fused"])
        if group["capturable"]:
            if backend is None or backend.name != "triton":
                raise ValueError(
                    f"capturable=True needs the Triton kernels, which {label()} on {p.device} with "
                    f"fused={group['fused']!r} does not use: move it to a CUDA device before you build the optimizer"
                )
            if group.get("clean_every"):
                raise ValueError(
                    f"capturable=True does not support clean_every={group['clean_every']}, because a captured step is "
                    "the same every time: use clean_every=0"
                )

    @property
    def _parts(self) -> Parts:
        if self._parts_of is None:
            self._parts_of = Parts()
        return self._parts_of


def one_of_width_and_compression(given: Mapping[str, Any]) -> None:
    """Raise ValueError if both are given."""
    if given.get("width") and given.get("compression") is not None:
        raise ValueError(
            f"width={given['width']!r} and compression={given['compression']!r} both set the number of "
            "buckets: use one of them"
        )


def check_parameter(p: Any, label: Callable[[], str], kind: str) -> None:
    """Raise ValueError if an optimizer of this kind cannot step a parameter, whatever its gradient will be."""
    if is_dtensor(p):
        odd = [str(one) for one in p.placements if one.is_partial()]
        if odd:
            raise ValueError(
                f"{label()} is a DTensor with placement {', '.join(odd)}, and {kind} supports Shard and Replicate "
                "only: redistribute it"
            )
    refuse_fsdp1(p, label, kind)
    if p.is_complex():
        raise ValueError(
            f"{label()} is complex ({p.dtype}), and {kind} needs real parameters: pass torch.view_as_real(parameter)"
        )
    if not p.is_floating_point():
        raise ValueError(f"{label()} has dtype {p.dtype}, and {kind} needs floating point parameters")
    if p.layout != torch.strided:
        raise ValueError(f"{label()} has layout {p.layout}, and {kind} needs strided parameters")


def refuse_fsdp1(p: Tensor, label: Callable[[], str], kind: str) -> None:
    """Raise ValueError if a parameter belongs to a flat parameter of FSDP1."""
    # This also holds with use_orig_params=True, where the model's own tensors are one-dimensional pieces.
    if getattr(p, "_fsdp_flattened", False):
        raise ValueError(
            f"{label()} belongs to a flat parameter of FSDP1 (FullyShardedDataParallel), in which {kind} "
            "cannot recognise matrices. Use FSDP2: torch.distributed.fsdp.fully_shard"
        )


def check_rate_device(lr: Tensor, params: Sequence[Tensor], where: str) -> None:
    """Raise ValueError if a learning rate has no number, although parameters have."""
    if lr.device.type == "meta" and any(p.device.type != "meta" for p in params):
        raise ValueError(
            f"lr of {where} is a tensor on the meta device, which has no number, but its parameters have numbers: use "
            "a number, or a tensor on the CPU or on their device"
        )


def check_compiler() -> None:
    """Raise ValueError if there is no C++ compiler for ``compile=True``."""
    # This is checked here because the first step would fail half-way, with a page of torch's internals.
    wanted = os.environ.get("CXX", "g++")
    if not any(shutil.which(name) for name in (wanted, "clang++", "cl")):
        raise ValueError(
            f"compile=True needs a C++ compiler on a CPU, and {wanted} was not found: install one, set CXX, "
            "or use compile=False"
        )

"""What an option is. Options validate constructors, parameter groups and text from a command line.

An `Option` has a type and knows what is allowed, and whether it is *structural*: it decides the shape or meaning of the
state, so a state dict that was written with another value is refused.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sketch_plugins.optim.checks import has_numbers


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: keyword of the constructor and key of a parameter group.
        type: ``float``, ``int``, ``bool`` or ``str``; ``tuple`` for betas.
        doc: what it does, as an optimizer's docstring says it.
        choices: the allowed values, if they are few.
        allowed: what is allowed, in words.
        check: returns True for a value (of the right type) that is allowed.
        structural: state that was written with another value cannot be loaded.
        default: its value in an optimizer's first preset.
    """

    name: str
    type: type
    doc: str
    choices: tuple[Any, ...] = ()
    allowed: str = ""
    check: Callable[[Any], bool] | None = None
    structural: bool = False
    default: Any = None

    def validate(self, value: Any) -> Any:
        """The value itself (an int becomes a float if needed). Raises ValueError, naming the option and the value."""
        if self.choices:
            for choice in self.choices:
                if value == choice and type(value) is type(choice):
                    return value
            raise ValueError(f"{self.name}={value!r} is not one of {', '.join(map(repr, self.choices))}")
        if self.name == "lr" and isinstance(value, torch.Tensor):
            return self._rate_tensor(value)
        given, ok = value, False
        if type(value) is not float and self.type in (float, tuple):
            value = unboxed(value)
        if self.type is tuple:
            ok = isinstance(value, (tuple, list)) and all(_is_number(v) for v in value)
        elif self.type is float:
            ok = _is_number(value)
        elif self.type is int:
            ok = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        else:
            ok = isinstance(value, self.type)
        if not ok or (self.check is not None and not self.check(value)):
            large = "" if not _is_large(value) else f" that float32 can hold (at most {LARGEST:g})"
            raise ValueError(f"{self.name}={given!r} is not allowed: {self.name} must be {self.describe()}{large}")
        # Plain Python values are returned, because numpy's would not load with weights_only.
        return tuple(map(float, value)) if self.type is tuple else self.type(value)

    def _rate_tensor(self, value: torch.Tensor) -> torch.Tensor:
        if value.numel() != 1:
            raise ValueError(f"lr must be a number or a tensor of one element, not one of shape {tuple(value.shape)}")
        real = not value.is_complex() and value.dtype != torch.bool
        # Tensors without numbers (meta, fake) are accepted.
        if not real or (has_numbers(value) and not (_is_number(number := float(value)) and _is_rate(number))):
            large = "" if not real or not _is_large(float(value)) else f" that float32 can hold (at most {LARGEST:g})"
            raise ValueError(f"lr={value!r} is not allowed: lr must be {self.describe()}{large}")
        return value

    def parse(self, text: Any) -> Any:
        """A value from text (``"0.05"``, ``"true"``, ``"0.9:0.999"``). Values that are no text are validated as is."""
        if not isinstance(text, str):
            return self.validate(text)
        raw = text.strip()
        kinds = {type(c) for c in self.choices} or {self.type}
        if type(None) in kinds and raw.lower() in ("none", "null", "auto"):
            return self.validate(None)
        if bool in kinds and raw.lower() in ("true", "false"):
            return self.validate(raw.lower() == "true")
        try:
            if int in kinds:
                return self.validate(int(raw))
            if float in kinds:
                return self.validate(float(raw))
            if tuple in kinds:
                return self.validate(tuple(float(v) for v in raw.strip("()[]").replace(":", " ").split()))
        except (ValueError, OverflowError):
            pass
        if str in kinds:
            return self.validate(raw)
        raise ValueError(f"{self.name}={text!r} is not allowed: {self.name} must be {self.describe()}")

    def describe(self) -> str:
        """What is allowed, in words."""
        if self.choices:
            return "one of " + ", ".join(map(repr, self.choices))
        if self.allowed:
            return self.allowed
        return {bool: "True or False", int: "an integer", float: "a number", str: "a string"}.get(self.type, "valid")


@dataclass(frozen=True)
class NoEffect(Option):
    """An argument of torch's optimizers that only accepts ``choices``, which change nothing; ``doc`` says why."""

    def accept(self, value: Any, owner: str) -> None:
        """Accept a value, or a text that stands for one.

        Raises:
            ValueError: the value is not one of those that change nothing.
        """
        given = value
        if isinstance(value, str):
            text = value.strip().lower()
            try:
                given = {"none": None, "null": None, "true": True, "false": False}.get(text, text)
                given = float(given) if isinstance(given, str) else given
            except ValueError:
                pass
        for choice in self.choices:
            if given is choice or (choice is not None and isinstance(given, numbers.Real) and given == choice):
                return
        allowed, several = " and ".join(map(repr, self.choices)), len(self.choices) > 1
        raise ValueError(
            f"{owner} does not support {self.name}={value!r}, because {self.doc}. Only {allowed} "
            + ("are accepted, and they change nothing" if several else "is accepted, and it changes nothing")
        )


def validate(options: Mapping[str, Option], values: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """The validated values. An unknown name is an error that lists the known ones."""
    unknown = [name for name in values if name not in options]
    if unknown:
        raise ValueError(unknown_option(owner, unknown[0], options))
    return {name: options[name].validate(value) for name, value in values.items()}


def unknown_option(owner: str, name: str, options: Mapping[str, Option]) -> str:
    """The error message about an option that does not exist."""
    close = difflib.get_close_matches(str(name), options, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{owner} has no option {name!r}.{hint} Options: {', '.join(sorted(options))}"


#: The largest number of float32, in which steps compute. A larger one would be an error of torch's within a step.
LARGEST = torch.finfo(torch.float32).max


def unboxed(value: Any) -> Any:
    """The number in a 0-d tensor on a CPU, or in a 0-d array, also within a tuple or list; other values unchanged."""
    if not is_boxed(value):
        return value
    return tuple(map(unboxed, value)) if isinstance(value, (tuple, list)) else value.item()


def is_boxed(value: Any) -> bool:
    """Whether a value is a 0-d tensor on a CPU, a 0-d array, or a tuple or list with such a value."""
    if isinstance(value, (tuple, list)):
        return any(map(is_boxed, value))
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 and value.device.type == "cpu" and has_numbers(value)
    return getattr(value, "shape", None) == () and hasattr(value, "item")


def held(value: float, dtype: torch.dtype) -> float:
    """A number as a tensor of this dtype holds it: infinite if it is too large, which would be an error in torch."""
    limit = torch.finfo(dtype).max
    return value if -limit <= value <= limit or value != value else math.copysign(math.inf, value)


def _is_number(value: Any) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return abs(float(value)) <= LARGEST
    except OverflowError:
        return False


def _is_large(value: Any) -> bool:
    """Whether a number, or one in a tuple, is finite and too large for float32."""
    if isinstance(value, (tuple, list)):
        return any(map(_is_large, value))
    return isinstance(value, numbers.Real) and bool(LARGEST < abs(value) < math.inf)  # type: ignore[operator]


#: Rounding leaves a rate of up to this size at the end of a schedule to 0. Torch's own leave -5e-17 of the first rate.
RATE_ROUNDING = 1e-10


def _is_rate(value: Any) -> bool:
    return value >= -RATE_ROUNDING


def rate(group: Mapping[str, Any]) -> float | torch.Tensor:
    """The learning rate of a group: a float or a 0-d tensor. Rates below 0, which rounding leaves of 0, become 0."""
    lr = group["lr"]
    if isinstance(lr, torch.Tensor):
        return lr.detach().reshape(()).clamp(min=0)
    return lr if lr > 0 else 0.0


def step_rate(group: Mapping[str, Any]) -> float | torch.Tensor:
    """The factor of a group's updates: the learning rate, divided by ``reference_rms`` with `scale_parameter`."""
    if not group.get("scale_parameter"):
        return rate(group)
    size = rate(group) / group["reference_rms"]
    return size if isinstance(size, torch.Tensor) else held(size, torch.float32)


def _beta(value: Any) -> bool:
    return 0.0 <= value < 1.0


def _table(*options: Option) -> dict[str, Option]:
    return {one.name: one for one in options}


#: Arguments that constructors name themselves, as torch's do, with their own defaults. Docstrings describe them.
BY_POSITION = _table(
    Option("lr", float, "learning rate; a number or a tensor", allowed="a finite number >= 0", check=_is_rate),
    Option(
        "betas",
        tuple,
        "decay rates of the first and second moment; as text: 0.9:0.999",
        allowed="two numbers in [0, 1)",
        check=lambda v: len(v) == 2 and all(_beta(b) for b in v),
    ),
    Option("eps", float, "added to the root of the second moment", allowed="a number >= 0", check=lambda v: v >= 0),
    Option("weight_decay", float, "weight decay", allowed="a number >= 0", check=lambda v: v >= 0),
)

"""The options of every optimizer: one table that validates constructors, parameter groups and text from a command line.

An `Option` knows its type, what is allowed and whether it decides the *shape or meaning of the state* (then a state
dict written with another value is refused).
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sketch_plugins.hashing import HASHES
from sketch_plugins.optim.checks import has_numbers
from sketch_plugins.stores.kinds import FIRST_MOMENTS, SECOND_MOMENTS
from sketch_plugins.stores.sketch import BUCKETS, TABLE_DTYPES


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        name: keyword of the constructor and key of a parameter group.
        type: ``float``, ``int``, ``bool`` or ``str``; ``tuple`` for betas.
        doc: one line, with the default.
        choices: the values allowed, where they are few.
        allowed: what is allowed, in words.
        check: True for a value (of the right type) that is allowed.
        structural: state written under another value cannot be loaded.
    """

    name: str
    type: type
    doc: str
    choices: tuple[Any, ...] = ()
    allowed: str = ""
    check: Callable[[Any], bool] | None = None
    structural: bool = False

    def validate(self, value: Any) -> Any:
        """The value itself (an int where a float is wanted becomes one). Raises ValueError that names both."""
        if self.choices:
            for choice in self.choices:
                if value == choice and type(value) is type(choice):
                    return value
            raise ValueError(f"{self.name}={value!r} is not one of {', '.join(map(repr, self.choices))}")
        if self.name == "lr" and isinstance(value, torch.Tensor):
            return self._rate_tensor(value)
        ok = False
        if self.type is tuple:
            ok = isinstance(value, (tuple, list)) and all(_is_number(v) for v in value)
        elif self.type is float:
            ok = _is_number(value)
        elif self.type is int:
            ok = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        else:
            ok = isinstance(value, self.type)
        if not ok or (self.check is not None and not self.check(value)):
            raise ValueError(f"{self.name}={value!r} is not allowed: {self.name} must be {self.describe()}")
        # Plain Python values: numpy's would not load with weights_only.
        return tuple(map(float, value)) if self.type is tuple else self.type(value)

    def _rate_tensor(self, value: torch.Tensor) -> torch.Tensor:
        if value.numel() != 1:
            raise ValueError(f"lr must be a number or a tensor of one element, not one of shape {tuple(value.shape)}")
        real = not value.is_complex() and value.dtype != torch.bool
        # Tensors without numbers (meta, fake) are taken as they are.
        if not real or (has_numbers(value) and not (_is_number(number := float(value)) and _is_rate(number))):
            raise ValueError(f"lr={value!r} is not allowed: lr must be {self.describe()}")
        return value

    def parse(self, text: Any) -> Any:
        """A value from text (``"0.05"``, ``"true"``, ``"0.9:0.999"``); other values are validated as they are."""
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
    """An argument of torch's optimizers whose ``choices`` change nothing here; ``doc`` says why there are no others."""

    def accept(self, value: Any, owner: str) -> None:
        """Take a value, or a text that stands for one.

        Raises:
            ValueError: another value than those that change nothing.
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
        raise ValueError(
            f"{owner} has no option {self.name!r} but for {' and '.join(map(repr, self.choices))}, which "
            f"{'change' if len(self.choices) > 1 else 'changes'} nothing: {self.name}={value!r} is not allowed, "
            f"because {self.doc}"
        )


def no_effect(name: str, choices: tuple[Any, ...], why: str) -> dict[str, NoEffect]:
    """An argument of torch's optimizers that is accepted where it changes nothing."""
    return {name: NoEffect(name, bool, why, choices=choices)}


def validate(options: Mapping[str, Option], values: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Every value checked; unknown names are an error that lists the known ones."""
    unknown = [name for name in values if name not in options]
    if unknown:
        raise ValueError(unknown_option(owner, unknown[0], options))
    return {name: options[name].validate(value) for name, value in values.items()}


def unknown_option(owner: str, name: str, options: Mapping[str, Option]) -> str:
    """The message for an option that does not exist."""
    close = difflib.get_close_matches(str(name), options, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"{owner} has no option {name!r}.{hint} Options: {', '.join(sorted(options))}"


def misspelt(name: str, options: Mapping[str, Option]) -> str | None:
    """The option, of this or another of our optimizers, that an unknown parameter-group key was probably meant to be.

    Frameworks keep keys of their own in parameter groups ("initial_lr", "name", "lr_scale"), so an unknown key as such
    cannot be refused there; one that is nearly an option of ours, or an option of another of our optimizers, is. But
    for words that frameworks use themselves (layer-wise decay notes the "depth" of a layer).
    """
    if name in options or not isinstance(name, str) or name in _WORDS_OF_OTHERS:
        return None
    # Another optimizer's options, too: this one would not read them.
    close = difflib.get_close_matches(name, _FAMILY.union(options), n=1, cutoff=0.9)
    return close[0] if close else None


def _is_number(value: Any) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


#: What rounding leaves of a rate that a schedule ends at 0: torch's own leave -5e-17 of it.
RATE_ROUNDING = 1e-10


def _is_rate(value: Any) -> bool:
    return value >= -RATE_ROUNDING


def rate(group: Mapping[str, Any]) -> float | torch.Tensor:
    """The learning rate that a group's parameters take: a float or a 0-d tensor, and 0 where rounding has left less."""
    lr = group["lr"]
    if isinstance(lr, torch.Tensor):
        return lr.detach().reshape(()).clamp(min=0)
    return lr if lr > 0 else 0.0


def _beta(value: Any) -> bool:
    return 0.0 <= value < 1.0


def _table(*options: Option) -> dict[str, Option]:
    return {o.name: o for o in options}


COMMON = _table(
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
    Option("maximize", bool, "ascend instead of descend (default False)"),
    Option(
        "compression",
        float,
        "fraction of the rows kept as buckets in each table (default 0.05; 1.0: a bucket for every row)",
        allowed="a number in (0, 1]",
        check=lambda v: 0 < v <= 1,
        structural=True,
    ),
    Option(
        "width",
        int,
        "buckets of each table, instead of compression (default 0: use compression)",
        allowed="an integer >= 0",
        check=lambda v: v >= 0,
        structural=True,
    ),
    Option(
        "depth",
        int,
        "hashes, one table each (default 1)",
        allowed="an integer >= 1",
        check=lambda v: v >= 1,
        structural=True,
    ),
    Option(
        "hash",
        str,
        "'strided' (default): row mod width for the first table; 'affine': (a * row + b) mod R mod width",
        choices=HASHES,
        structural=True,
    ),
    Option(
        "batch_dims",
        str,
        "how many first axes are a batch of matrices, each with buckets of its own: 'auto' (default): 1 for weights of "
        "three dimensions whose shape is no convolution's (experts), else 0; or 0, or 1",
        choices=("auto", 0, 1),
        structural=True,
    ),
    Option(
        "table_dtype",
        str,
        "numbers of the sketches' tables: 'fp32' (default), or 'bf16', rounded stochastically",
        choices=TABLE_DTYPES,
        structural=True,
    ),
    Option("seed", int, "seed of hashes and of stochastic rounding (default 0)", structural=True),
    Option(
        "min_compress_size",
        int,
        "tensors with fewer elements, and all vectors, are kept exactly (default 4096)",
        allowed="an integer >= 0",
        check=lambda v: v >= 0,
        structural=True,
    ),
    Option(
        "row_sparse",
        str,
        "dense gradients: False (default) updates every row; True skips rows that are all zero; 'auto' does so in a "
        "step where at least half of the rows are. Skipping (lazy Adam) learns much more slowly where most rows are "
        "rare",
        choices=(False, True, "auto"),
    ),
    Option(
        "update_clip",
        float,
        "scale the update down to this root mean square before the learning rate (default 0: off)",
        allowed="a number >= 0",
        check=lambda v: v >= 0,
    ),
    Option("scale_parameter", bool, "multiply the step by max(1e-3, RMS(p)), as Adafactor does (default False)"),
    Option(
        "lagged_rms",
        bool,
        "update_clip and scale_parameter take what the last step measured: one sweep less (default False)",
        structural=True,
    ),
    Option(
        "chunk_size",
        int,
        "elements worked on at a time (default 0: 2**20 on a CPU, 2**22 compiled, 2**24 on an accelerator)",
        allowed="an integer >= 0",
        check=lambda v: v >= 0,
    ),
    Option("compile", bool, "run the eager step's tiles through torch.compile (default False)"),
    Option(
        "fused",
        bool,
        "one fused kernel for a step: None (default): where there is one (Triton on a GPU, Numba on a CPU); True: an "
        "error where there is none; False: eager torch",
        choices=(None, True, False),
    ),
    Option(
        "capturable", bool, "step counters on the device, so that a CUDA graph can capture the step (default False)"
    ),
    Option(
        "stochastic_rounding",
        bool,
        "round bfloat16 parameters up or down by chance, without bias: no float32 master copy needed (default False)",
    ),
)

FIRST_MOMENT = _table(
    Option(
        "first_moment",
        str,
        "store of the first moment (default 'int8')",
        choices=tuple(FIRST_MOMENTS),
        structural=True,
    ),
    Option(
        "first_moment_rounding",
        str,
        "rounding of int8 codes (default 'nearest')",
        choices=("nearest", "stochastic"),
    ),
    Option(
        "block_size",
        int,
        "columns that share a scale in int8 state, or an exponent in log8 (default 128)",
        allowed="an integer >= 1",
        check=lambda v: v >= 1,
        structural=True,
    ),
    Option(
        "allow_dense_count_sketch",
        bool,
        "train with a signed sketch of a dense first moment all the same (default False)",
    ),
)

SECOND_MOMENT = _table(
    Option(
        "second_moment",
        str,
        "store of the second moment (default 'count_min')",
        choices=tuple(kind for kind in SECOND_MOMENTS if kind != "none"),
        structural=True,
    ),
    Option(
        "bucket",
        str,
        "what a bucket holds of its rows' g * g for dense gradients: 'mean' or 'sum'",
        choices=BUCKETS,
        structural=True,
    ),
    Option(
        "clean_every",
        int,
        "multiply the sketched second moment by clean_factor every so many steps (default 0: never)",
        allowed="an integer >= 0",
        check=lambda v: v >= 0,
    ),
    Option(
        "clean_factor",
        float,
        "factor of that cleaning (default 0.2)",
        allowed="a number in [0, 1]",
        check=lambda v: 0 <= v <= 1,
    ),
)

DECOUPLED = _table(
    Option(
        "decoupled_weight_decay",
        bool,
        "False (default): weight_decay * p is added to the gradient, as in torch.optim; True: as in AdamW",
    ),
)

# Arguments of torch's optimizers that change nothing: whoever hands on AdamW's need not take them out.
TORCHS = {
    **no_effect("amsgrad", (False,), "the maxima of AMSGrad are not kept"),
    **no_effect("foreach", (None, False), "fused=True is what asks for kernels here"),
    **no_effect("differentiable", (False,), "a step changes parameters in place, outside of autograd"),
}
DECOUPLES = no_effect("decoupled_weight_decay", (True,), "weight decay is decoupled, as in AdamW")

# What only a sketched optimizer calls an option: no framework means something else by it.
_SKETCHY = {
    "budget", "shampoo_beta", "update_freq", "statistics_freq", "start_preconditioning_step", "solver", "refresh_every",
    "graft", "matrix_eps", "momentum_placement", "momentum_of", "merge_dims", "max_block_dim", "max_axis",
    "max_aspect_ratio", "nonfinite",
}  # fmt: skip
#: Options of some of our optimizers that are other people's words, too.
_WORDS_OF_OTHERS = frozenset({"depth", "width", "rank", "budget"})
_FAMILY = (frozenset({**COMMON, **FIRST_MOMENT, **SECOND_MOMENT}) | _SKETCHY) - {"betas", "eps"}

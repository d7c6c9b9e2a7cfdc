"""``sketch-plugins run --optim NAME``: replace torch's optimizers by a sketched one wherever the program builds them.

The classes stay the same objects, so that ``from torch.optim import AdamW``, subclasses and annotations continue to
work, whether they come before or after the replacement. The end of their constructors turns the new object into the
counterpart, which is a ``torch.optim.Optimizer`` but not an ``AdamW``: programs and frameworks that test for an
``AdamW`` also expect its state (accelerate would replace it by DeepSpeedCPUAdam).
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.optim import Optimizer

from sketch_plugins import counterpart, registry, spelling
from sketch_plugins.running import watch

WORDS = counterpart.Wording(
    options="--optim-args",
    owner="the program",
    instead="Use one of these in the program, or run it without --optim",
    set_option="--optim-args {key}={value}",
)

IN_DEEPSPEED = (
    "Set an optimizer of sketch-plugins in the optimizer block of the DeepSpeed configuration, "
    '{"type": "cs_adam"}, which needs no --optim; or run the program without --optim'
)

_said = False
_looked_at: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def begin(name: str, optim_args: str | None) -> None:
    """Replace torch's optimizers by ``name`` from now on, in this process.

    Raises:
        SystemExit: status 2, after a line that gives the reason: an unknown optimizer or option, or a value that is not
            allowed.
    """
    try:
        registry.get(name)
        options = counterpart.check_options(name, spelling.split_options(optim_args), WORDS)
    except ValueError as error:
        watch.note(watch.REFUSED, name)
        watch.refuse(name, error)
        # Not an ordinary exception: the program did nothing wrong, and might take it for a missing torch.
        raise SystemExit(2) from None
    for cls in counterpart.REPLACED:
        cls.__init__ = _becoming(cls, cls.__init__, name, options)  # type: ignore[method-assign]
    Optimizer.__init__ = _refusing(Optimizer.__init__)  # type: ignore[method-assign]


def _becoming(cls: type, construct: Callable[..., None], name: str, options: Mapping[str, Any]) -> Callable[..., None]:
    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        # Not if a subclass called this constructor: AdamW is a subclass of Adam.
        if type(self) is cls:
            try:
                counterpart.become(self, name, options, WORDS)
            except ValueError:
                watch.note(watch.REFUSED, cls.__name__)
                raise
            watch.note(watch.OURS, type(self).__name__)  # also if all of its parameters are still frozen
            _say_once(cls, self, options)

    return __init__


def _refusing(construct: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        cls = type(self)
        if watch.is_ours(cls) or cls in counterpart.REPLACED:
            construct(self, *args, **kwargs)
            return
        # With the dot, because some of torch's classes (Adafactor, Muon) name the package itself as their module.
        if any(base is not Optimizer and f"{base.__module__}.".startswith("torch.optim.") for base in cls.__mro__):
            _refuse(cls)
        construct(self, *args, **kwargs)
        # It may be a wrapper around an optimizer, which can be recognized only after it is built.
        self.register_step_pre_hook(_at_first_step)

    return __init__


def _at_first_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Refuse the first step of an optimizer without counterpart; wrappers and placeholders may step."""
    if optimizer in _looked_at:
        return
    wraps = any(isinstance(held, Optimizer) and held is not optimizer for held in _held(optimizer))
    trains = any(p.requires_grad for group in optimizer.param_groups for p in group["params"])
    if trains and not wraps:
        _refuse(type(optimizer))
    _looked_at.add(optimizer)


def _held(optimizer: Any) -> Iterator[Any]:
    for key, value in vars(optimizer).items():
        if key in ("state", "param_groups", "defaults"):
            continue
        if isinstance(value, (list, tuple, set)):
            yield from value
        elif isinstance(value, dict):
            yield from value.values()
        else:
            yield value


def _refuse(cls: type) -> None:
    watch.note(watch.REFUSED, cls.__name__)
    words = WORDS
    if cls.__module__.startswith("deepspeed."):
        # DeepSpeed builds this for {"type": "AdamW"}. With "torch_adam": true it builds torch's, which is replaced.
        words = dataclasses.replace(WORDS, instead=IN_DEEPSPEED)
    raise ValueError(counterpart.without_counterpart(cls, words))


def _say_once(old: type, new: Any, options: Mapping[str, Any]) -> None:
    global _said
    if not _said and watch.is_first_rank():
        watch.say("INFO", f"replaced {counterpart.describe(old, new, options)}")
    _said = True

"""Steps that are taken during backward, so that gradients are freed one by one and never exist all at once."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.optim.base import SketchOptimizer


class InBackward:
    """Let an optimizer take each parameter's step during ``backward``, as soon as its gradient is complete.

    The gradient is freed at once, so at the peak the gradients need the memory of about the largest one, not of all.
    The training loop does not change, ``optimizer.step()`` included, and the weights are the same bit for bit::

        optimizer = CSAdam(model.parameters(), lr=1e-3, stochastic_rounding=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
        InBackward(optimizer)
        for batch in batches:
            loss(model, batch).backward()  # here the weights change
            optimizer.step()
            schedule.step()

    ``optimizer.step()`` ends the cycle. It takes the steps of the parameters that still have a gradient (set by hand,
    or by a backward that was not the last one), and does what needs all parameters (Sketchy's decompositions).
    Schedulers, ``state_dict`` and resuming work as usual; checkpoints of ordinary runs can be loaded, and vice versa.
    With a closure, the steps are taken in the backward that the closure runs.

    *Accumulation.* Steps are taken in the last backward of a cycle. ``last`` says which one that is, or
    ``with accumulate():`` marks the others. Until then all gradients are kept, so accumulation saves no memory before
    its last backward::

        back = InBackward(optimizer, last=lambda: (number + 1) % 4 == 0)
        # or: with back.accumulate(): loss.backward()

    *Limits.* The gradients never exist all at once. Therefore they cannot be clipped by their common norm
    (``update_clip`` bounds each tensor's update), a step cannot be skipped because some gradient overflowed
    (GradScaler; Sketchy with another ``nonfinite`` than ``"error"``), and gradients cannot be read after backward. A
    parameter changes while backward continues. Autograd has used it for the last time by then; if other code still
    needs the old values (``p.detach()``, a second graph, ``retain_graph``), torch raises its error about a tensor that
    was "modified by an inplace operation".

    *Errors.* `SketchOptimizer.step` checks all gradients before anything changes. Here, when an error occurs in the
    middle of backward, parameters near the loss have already taken their step and others have not. The error is raised
    by ``backward`` and names the parameter. Load a checkpoint, or call `reset` and continue.

    Parameters are looked up in the groups in each step. Parameters that are added later (`add_param_group`, unfrozen,
    replaced by FSDP2) take their steps in ``optimizer.step()`` once, and in backward afterwards, or after `install`.
    FSDP2 (``fully_shard``) calls the hooks when a gradient has been reduced. Other hooks of
    ``register_post_accumulate_grad_hook`` see a gradient only if they were registered earlier.

    Args:
        optimizer: a sketched optimizer, or a wrapper with an ``optimizer`` attribute.
        last: a function without arguments, called for each gradient, that returns whether this is the last backward of
            the cycle. None: every backward is the last one.

    Raises:
        TypeError: ``optimizer`` is not a sketched optimizer, or ``last`` cannot be called.
        ValueError: the optimizer has an `InBackward` already; it is Sketchy with another ``nonfinite`` than
            ``"error"``; parameters belong to DistributedDataParallel, whose all-reduce comes after the hooks, or to an
            engine of DeepSpeed (noticed here, or in the first backward).

    Backward raises RuntimeError, which names the parameter, with ``create_graph=True``, and if a parameter gets a
    second gradient in a cycle. Such a gradient comes from a second backward that was not marked as accumulating, or
    from a parameter that checkpoints with ``use_reentrant=True`` share: the second of them would compute with weights
    that have changed. ``optimizer.step()`` raises RuntimeError if a gradient appeared after the parameter's step, and
    under GradScaler, whose first backward has already changed weights by then.

    Source: torch's tutorial "How to save memory by fusing an optimizer step into the backward pass", and LOMO,
    https://arxiv.org/abs/2306.09782. Deviation: there is one optimizer, with groups, schedules and state as usual.
    """

    def __init__(self, optimizer: Any, last: Callable[[], bool] | None = None) -> None:
        while not isinstance(optimizer, SketchOptimizer):
            if not isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
                raise TypeError(f"InBackward takes a sketched optimizer, not {type(optimizer).__name__}")
            optimizer = optimizer.optimizer
        if last is not None and not callable(last):
            raise TypeError(
                f"last={last!r} is not callable; it must be a function that says whether this is the last "
                "backward of a cycle"
            )
        if in_backward(optimizer) is not None:
            raise ValueError(f"this {type(optimizer).__name__} already takes its steps in backward")
        self.last = last
        #: Whether ``optimizer.step`` is running a closure.
        self.stepping = False
        self._accumulating = 0
        # The optimizer keeps this object, not the other way round, so that it is freed together with the optimizer.
        self._optimizer = weakref.ref(optimizer)
        # Identity of a parameter -> its hook; there is no reference to the parameter, not even a weak one.
        self._handles: dict[int, Any] = {}
        self._places: dict[int, tuple[int, int]] = {}
        self._taken: set[int] = set()
        self._looked_for_owners = False
        self._lock = threading.RLock()  # for a model on several devices, autograd has a thread for each device
        self.install()
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_post_hook(lambda _: self._taken.clear()),
        ]
        optimizer._in_backward = self
        # With this, GradScaler passes itself to the step, which refuses it, because the kernels do not unscale
        # gradients.
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]

    @property
    def taken(self) -> int:
        """Number of parameters that have taken their step since the last ``optimizer.step()``."""
        return len(self._taken)

    def install(self) -> None:
        """Look at all parameters, and add hooks to those without one. This is done after each ``optimizer.step()``.

        Raises:
            ValueError: see the class; nothing has been added then.
        """
        optimizer = self._optimizer()
        if optimizer is None:
            return
        new: list[Tensor] = []
        present = set()
        for number, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                present.add(id(p))
                if p.requires_grad and not self._has_hook(p):
                    new.append(p)
            why = optimizer._why_not_alone(group)
            if why is not None:
                raise ValueError(f"parameter group {number} cannot take its steps in backward: {why}")
        if new:
            self._refuse_owners(optimizer)
            self._looked_for_owners = False  # a framework may wrap them from now on
        for key in [key for key in self._handles if key not in present]:
            self._handles.pop(key).remove()
        for p in new:
            # Hooks must not keep this object alive, and with it a trained model.
            self._handles[id(p)] = p.register_post_accumulate_grad_hook(_Hook(weakref.ref(self)))
        if new or len(self._places) != len(present):
            self._look_up(optimizer)

    def _has_hook(self, p: Tensor) -> bool:
        # A tensor that has the identity of a freed one has no hook with that number.
        handle = self._handles.get(id(p))
        return handle is not None and handle.id in (p._post_accumulate_grad_hooks or {})  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Remove the hooks: from the next backward on, only ``optimizer.step()`` takes steps."""
        optimizer = self._optimizer()
        for handle in self._handles.values():
            handle.remove()
        for handle in self._hooks:
            handle.remove()
        self._handles, self._hooks = {}, []
        if optimizer is not None and in_backward(optimizer) is self:
            self.reset()
            optimizer._in_backward = None
            optimizer.__dict__.pop("_step_supports_amp_scaling", None)

    def reset(self) -> None:
        """Begin a new cycle without ``optimizer.step()``, after a backward that failed and is abandoned.

        Parameters that have taken their step keep it. Existing gradients stay, so call ``zero_grad``.
        """
        self._taken.clear()
        optimizer = self._optimizer()
        if optimizer is not None:
            with torch.no_grad():
                optimizer._complete()

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """For backwards that are not the last of their cycle: gradients are summed, and no steps are taken."""
        self._accumulating += 1
        try:
            yield
        finally:
            self._accumulating -= 1

    def __enter__(self) -> InBackward:
        """``with InBackward(optimizer): ...`` removes it at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove it at the end of the block."""
        self.remove()

    # -- backward ------------------------------------------------------------------------------------------------

    def _on_gradient(self, p: Tensor) -> None:
        with self._lock:
            optimizer = self._optimizer()
            if optimizer is None or p.grad is None or self._accumulating or not (self.last is None or self.last()):
                return
            place = self._place_of(optimizer, p)
            if place is None:
                return  # no longer a parameter of this optimizer
            number, index = place
            if not self._looked_for_owners:
                self._refuse_owners(optimizer)
                self._looked_for_owners = True
            if id(p) in self._taken:
                raise RuntimeError(
                    f"{_name(optimizer, place)} received a second gradient since the last optimizer.step(), but it "
                    "has already taken its step with the first one. If you accumulate gradients, say which backward "
                    "is the last of a cycle with last= or `with accumulate():`. If checkpointed (recomputed) "
                    "segments share this parameter, use use_reentrant=False. If a backward failed, call reset()"
                )
            if p.grad.requires_grad:
                raise RuntimeError(
                    f"{_name(optimizer, place)} has a gradient that is part of a graph (backward(create_graph=True)), "
                    "and a step in backward would change the values that the graph needs. Use torch.autograd.grad "
                    "for such gradients"
                )
            try:
                optimizer.step_parameter(number, index)
            except Exception as error:
                before = f"{len(self._taken)} of {len(self._places)} parameters have already taken their step"
                _say(error, f"this happened in backward, in the step of {_name(optimizer, place)}; {before}")
                raise
            self._taken.add(id(p))
            p.grad = None

    def _place_of(self, optimizer: SketchOptimizer, p: Tensor) -> tuple[int, int] | None:
        for again in (False, True):
            if again:
                self._look_up(optimizer)
            place = self._places.get(id(p))
            if place is None:
                continue
            number, index = place
            if number < len(optimizer.param_groups):
                params = optimizer.param_groups[number]["params"]
                if index < len(params) and params[index] is p:
                    return place
        return None

    def _look_up(self, optimizer: SketchOptimizer) -> None:
        self._places = {
            id(p): (number, index)
            for number, group in enumerate(optimizer.param_groups)
            for index, p in enumerate(group["params"])
        }
        if optimizer._step_cache is not None:
            optimizer._step_cache.large = None

    # -- the end of a cycle --------------------------------------------------------------------------------------

    def _before_step(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        scaled = [name for name in ("grad_scale", "found_inf") if optimizer.__dict__.pop(name, None) is not None]
        if scaled:
            raise RuntimeError(
                "InBackward does not support GradScaler: the steps were taken in backward with gradients that "
                "were still scaled. Use bfloat16, which needs no scaler, or take the steps after backward"
            )
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._check_leftovers(optimizer)
            return None

        def then() -> Any:
            self.stepping = True
            try:
                loss = closure()
            finally:
                self.stepping = False
            self._check_leftovers(optimizer)
            return loss

        return (args[0], then, *args[2:]) if len(args) > 1 else args, {
            **kwargs,
            **({} if len(args) > 1 else {"closure": then}),
        }

    def _check_leftovers(self, optimizer: SketchOptimizer) -> None:
        for number, group in enumerate(optimizer.param_groups):
            for index, p in enumerate(group["params"]):
                if p.grad is not None and id(p) in self._taken:
                    raise RuntimeError(
                        f"{_name(optimizer, (number, index))} has already taken its step in backward "
                        "and has a gradient again: something wrote to .grad afterwards. "
                        "DistributedDataParallel does so, because its all-reduce comes after the "
                        "hook, which is too late for a step in backward"
                    )

    def _after_step(self, *_: Any) -> None:
        self._taken.clear()
        self.install()

    def _refuse_owners(self, optimizer: SketchOptimizer) -> None:
        """Refuse parameters whose gradients a wrapper reduces later.

        A parameter does not say that it has such a wrapper, so all wrappers are asked for their parameters.
        """
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        from torch.nn.parallel import DistributedDataParallel

        engine = getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)
        kinds = (DistributedDataParallel,) if engine is None else (DistributedDataParallel, engine)
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        # DeepSpeed has replaced the given parameters by others.
        with optimizer._parts.looking():
            mine |= {id(original.ref()) for original in optimizer._parts.originals}
        for one in gc.get_objects():
            if not issubclass(type(one), kinds) or not isinstance(vars(one).get("_modules"), dict):
                continue
            if not any(id(p) in mine for p in one.parameters()):
                continue
            if issubclass(type(one), DistributedDataParallel):
                raise ValueError(
                    "InBackward does not support DistributedDataParallel: steps would be taken before the "
                    "all-reduce, and the processes would drift apart. Use FSDP2 "
                    "(torch.distributed.fsdp.fully_shard), or take the steps after backward"
                )
            raise ValueError(
                "InBackward does not support DeepSpeed, whose engine keeps the gradients and offers them only "
                "after backward. Use the optimizer without InBackward; ZeRO stage 2 or 3 distributes gradients "
                "over the processes"
            )


class _Hook:
    """The hook of a parameter."""

    def __init__(self, owner: weakref.ref[InBackward]) -> None:
        self.owner = owner

    def __call__(self, p: Tensor) -> None:
        owner = self.owner()
        if owner is not None:
            owner._on_gradient(p)


def in_backward(optimizer: Any) -> InBackward | None:
    """The `InBackward` of an optimizer, which may be wrapped; None if it has none."""
    while not isinstance(optimizer, SketchOptimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    found: InBackward | None = getattr(optimizer, "_in_backward", None)
    return found


def _name(optimizer: SketchOptimizer, place: tuple[int, int]) -> str:
    number, index = place
    return optimizer._label(optimizer.param_groups[number], index).rstrip(",")


def _say(error: Exception, what: str) -> None:
    """Add to an error's message. The error keeps its type, so that callers can react (out of memory: smaller batch)."""
    if error.args and isinstance(error.args[0], str):
        error.args = (f"{error.args[0]} ({what})", *error.args[1:])
    elif hasattr(error, "add_note"):
        error.add_note(what)

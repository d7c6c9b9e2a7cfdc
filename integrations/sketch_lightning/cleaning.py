"""SketchCleaning: cleans sketched second moments every few steps or epochs."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from sketch_lightning.shared import before_update, check_count, named_optimizers
from sketch_plugins import scratch
from sketch_plugins.memory.in_backward import in_backward
from sketch_plugins.optim import SketchOptimizer
from sketch_plugins.stores import Store


class SketchCleaning:
    """Cleans the sketches: multiplies the sketched second moments by a factor, every few steps or epochs.

    By steps it does the same as the option ``clean_every`` of the optimizers, bit for bit: before every
    ``every_n_steps``-th update. A step that a gradient scaler skips does not count. By epochs the cleaning is at the
    start of an epoch. As with the option, exact second moments are not changed.

    Args:
        every_n_steps: steps of the optimizer between two cleanings.
        every_n_epochs: epochs between two cleanings; give one of the two.
        factor: factor of the estimates, in [0, 1].

    Raises:
        ValueError: both numbers or neither are given, or one that is not a positive integer; ``factor`` is not in
            [0, 1]; at the start of training: no optimizer keeps a second moment, or one has ``clean_every`` set itself;
            ``every_n_steps`` with steps in backward.

    Source: https://arxiv.org/abs/1902.00179, section 4: factor 0.2 every 125 steps for Adam, 0.5 for Adagrad.
    """

    _namespace = ""

    def __init__(
        self, every_n_steps: int | None = None, every_n_epochs: int | None = None, factor: float = 0.2
    ) -> None:
        if (every_n_steps is None) == (every_n_epochs is None):
            raise ValueError(
                f"every_n_steps={every_n_steps!r} and every_n_epochs={every_n_epochs!r} are given: use exactly "
                "one of them"
            )
        name, value = ("every_n_steps", every_n_steps) if every_n_epochs is None else ("every_n_epochs", every_n_epochs)
        check_count(name, value)
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor <= 1:
            raise ValueError(f"factor={factor!r} is not allowed: factor must be a number in [0, 1]")
        self.every_n_steps, self.every_n_epochs, self.factor = every_n_steps, every_n_epochs, float(factor)
        #: Number of cleanings so far; each step or epoch with a cleaning counts once.
        self.cleanings = 0
        self._epoch = -1
        self._handles: list[Any] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start without a cleaned epoch, for another fit; a checkpoint is loaded after this."""
        if stage == "fit":
            self._epoch = -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the optimizers, and add the hooks before their updates."""
        self._remove()
        found = []
        for _, _, optimizer in named_optimizers(trainer):
            if not isinstance(optimizer, SketchOptimizer) or not any(True for _ in _second_moments(optimizer)):
                continue
            for number, group in enumerate(optimizer.param_groups):
                if group.get("clean_every"):
                    raise ValueError(
                        f"parameter group {number} of {type(optimizer).__name__} has "
                        f"clean_every={group['clean_every']}, so the optimizer and SketchCleaning "
                        "would both clean the sketch: set clean_every=0 or remove SketchCleaning"
                    )
            found.append(optimizer)
        if not found:
            kinds = ", ".join(type(optimizer).__name__ for _, _, optimizer in named_optimizers(trainer))
            raise ValueError(f"SketchCleaning has no effect: {kinds} keeps no second moment in a sketch")
        if self.every_n_steps is not None:
            if any(in_backward(optimizer) is not None for optimizer in found):
                raise ValueError(
                    f"SketchCleaning(every_n_steps={self.every_n_steps}) works before optimizer.step(), which is too "
                    f"late for steps in backward: set clean_every={self.every_n_steps} of the optimizer instead"
                )
            for optimizer in found:
                self._handles.append(before_update(optimizer, functools.partial(self._step, optimizer)))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Clean, if the cleaning is by epochs."""
        epoch = trainer.current_epoch
        # An epoch that is resumed in the middle begins again.
        if self.every_n_epochs is None or epoch == 0 or epoch % self.every_n_epochs or epoch <= self._epoch:
            return
        self._epoch = epoch
        cleaned = [
            clean(optimizer, self.factor)
            for _, _, optimizer in named_optimizers(trainer)
            if isinstance(optimizer, SketchOptimizer)
        ]
        self.cleanings += any(cleaned)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Remove the hooks."""
        self._remove()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove the hooks."""
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """The number of cleanings, and the epoch of the last one."""
        return {"cleanings": self.cleanings, "epoch": self._epoch}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.cleanings, self._epoch = state_dict["cleanings"], state_dict["epoch"]

    def _step(self, optimizer: SketchOptimizer) -> None:
        assert self.every_n_steps is not None
        self.cleanings += clean(optimizer, self.factor, self.every_n_steps)

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def clean(optimizer: SketchOptimizer, factor: float, every: int | None = None) -> bool:
    """Clean second moments; return whether there were any.

    Args:
        optimizer: the optimizer.
        factor: factor of the estimates.
        every: clean only parameters that are about to take an ``every``-th step; None: clean all.
    """
    found = False
    with scratch.scratch():
        for part, store, state in _second_moments(optimizer):
            step = 1 if state is None else int(state["step"]) + 1
            if state is not None and (every is None or (part.grad is not None and step % every == 0)):
                store.clean(state["second_moment"], factor, step)
                found = True
    return found


def _second_moments(optimizer: SketchOptimizer) -> Iterator[tuple[Any, Any, Any]]:
    """(part, store, state) of every part with a second moment in a sketch."""
    for _, group, part, state in optimizer.held():
        store, _ = optimizer.planned_state(part, group).get("second_moment", (None, 0))
        if isinstance(store, Store) and type(store).clean is not Store.clean:
            yield part, store, state

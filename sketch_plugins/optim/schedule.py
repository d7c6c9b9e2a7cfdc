"""Learning rate schedules that the optimizers' papers ask for."""

from __future__ import annotations

import numbers
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR


@dataclass
class QuadraticWarmup:
    """The factor of `quadratic_warmup`. It is a class so that the scheduler can be pickled."""

    warmup_steps: int
    total_steps: int | None
    decay: float

    def __call__(self, done: int) -> float:
        """The factor of the step that follows ``done`` steps."""
        step = done + 1
        factor = 1.0 if step >= self.warmup_steps else (step / self.warmup_steps) ** 2
        if self.total_steps is not None and self.decay > 0:
            left = (self.total_steps + 1 - step) / (self.decay * self.total_steps + 1)
            factor *= min(1.0, max(0.0, left))
        return factor


def quadratic_warmup(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int | None = None, decay: float | None = None
) -> LambdaLR:
    r"""Learning rate ``lr * min(1, (t / warmup_steps)^2)`` in step t = 1, 2, ...; optionally falling to 0 at the end.

    The authors of SM3 recommend this schedule (https://arxiv.org/abs/1901.11150 and their code): a warm-up over about
    5 % of the steps, preferably quadratic, and no decay, or a linear decay to 0 over the last 10 %. Call the schedule's
    ``step()`` after each step of the optimizer. Steps count from 1, so that no step has a learning rate of 0.

    Args:
        optimizer: any torch optimizer; the ``lr`` of its groups is the full rate.
        warmup_steps: number of steps until the full rate; 0: no warm-up.
        total_steps: length of the run. The rate falls in its last part and is 0 after the last step. None: no decay.
        decay: the length of that last part as a fraction of the run, in [0, 1] (default 0.1).

    Returns:
        A `torch.optim.lr_scheduler.LambdaLR`; it can be pickled, and its ``state_dict`` holds the schedule.

    Raises:
        ValueError: a value is not allowed, or ``decay`` is given without ``total_steps``.

    Example:
        >>> optimizer = SM3(model.parameters(), lr=0.1, preset="paper")
        >>> scheduler = quadratic_warmup(optimizer, warmup_steps=500, total_steps=10_000)
    """
    _check_steps("warmup_steps", warmup_steps, 0)
    if total_steps is not None:
        _check_steps("total_steps", total_steps, 1)
        if warmup_steps > total_steps:
            raise ValueError(f"warmup_steps={warmup_steps!r} is larger than total_steps={total_steps!r}")
    elif decay is not None:
        raise ValueError(f"decay={decay!r} is a fraction of total_steps, so total_steps must be given")
    if decay is not None and not (isinstance(decay, numbers.Real) and 0 <= decay <= 1):
        raise ValueError(f"decay={decay!r} is not allowed: decay must be a number in [0, 1]")
    return LambdaLR(optimizer, QuadraticWarmup(warmup_steps, total_steps, 0.1 if decay is None else float(decay)))


def _check_steps(name: str, value: int, least: int) -> None:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} is not allowed: {name} must be an integer >= {least}")

"""The findings of `sketch_plugins.NumericsProbe`: how many weights a step did not move."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Unmoved:
    """Weights that have not moved, of one parameter group or of all.

    Attributes:
        sampled: number of weights in the sample that have a finite gradient other than zero.
        weights: estimated number of weights of the model that these represent.
        unmoved: estimated number of those that have not moved.
    """

    sampled: int = 0
    weights: float = 0.0
    unmoved: float = 0.0

    @property
    def share(self) -> float:
        """``unmoved / weights``; NaN if no weight of the sample has a gradient."""
        return self.unmoved / self.weights if self.weights else math.nan

    def __add__(self, other: Unmoved) -> Unmoved:
        """The sum of both."""
        return Unmoved(self.sampled + other.sampled, self.weights + other.weights, self.unmoved + other.unmoved)


@dataclass(frozen=True)
class NumericsReport:
    """The findings of `NumericsProbe` in one step.

    Attributes:
        step: number of the step, counted from 1 since the probe was made.
        groups: number of each parameter group that took a step -> its weights.
        lasting: the same without weights with stochastic rounding, which lose no update on average.
    """

    step: int
    groups: Mapping[int, Unmoved]
    lasting: Mapping[int, Unmoved] = field(repr=False)

    @property
    def total(self) -> Unmoved:
        """The weights of all groups."""
        return sum(self.groups.values(), Unmoved())

    def __str__(self) -> str:
        """The report in one line."""
        if not self.total.weights:
            return f"step {self.step}: no weight with a gradient took a step"
        shares = {number: f"{one.share:.1%}" if one.weights else "no steps" for number, one in self.groups.items()}
        each = ", ".join(f"group {number}: {share}" for number, share in sorted(shares.items()))
        return f"step {self.step}: {self.total.share:.1%} of the weights with a gradient did not move ({each})"

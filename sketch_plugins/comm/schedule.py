"""The density of each iteration."""

from __future__ import annotations

from dataclasses import dataclass

from sketch_plugins.comm.base import check_density


@dataclass(frozen=True)
class DensitySchedule:
    r"""Density of iteration t, counted from 0, the first compressed one.

    .. math:: \rho_t = \rho_0 (\rho / \rho_0)^{t / T}, \quad t < T; \qquad \rho_t = \rho, \quad t \ge T

    Attributes:
        final: rho, in (0, 1].
        initial: rho_0, in (0, 1] (default 0.25).
        warmup: T, iterations (default 0: no warm-up).

    Raises:
        ValueError: a density is not in (0, 1], or ``warmup`` is no integer >= 0.

    Source: https://arxiv.org/abs/1712.01887, section 3.3 (25 %, 6.25 %, 1.5625 %, 0.4 %, 0.1 % in the first epochs).
    Deviation: a smooth curve through these, because a hook is not told where epochs end.
    """

    final: float
    initial: float = 0.25
    warmup: int = 0

    def __post_init__(self) -> None:
        check_density(self.final)
        check_density(self.initial, "initial_density")
        if not isinstance(self.warmup, int) or isinstance(self.warmup, bool) or self.warmup < 0:
            raise ValueError(f"warmup={self.warmup!r} is not allowed: warmup must be an integer >= 0")

    def at(self, iteration: int) -> float:
        """The density of an iteration."""
        if iteration >= self.warmup:
            return self.final
        return self.initial * (self.final / self.initial) ** (iteration / self.warmup)

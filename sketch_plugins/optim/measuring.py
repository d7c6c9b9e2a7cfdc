"""Root mean squares of an update and of a parameter: of the whole, or of each matrix of a batch (experts).

`update_clip` and `scale_parameter` use them. A matrix that is measured by itself takes the same step as a parameter of
its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.kernels.tile import joined, root_mean_square
from sketch_plugins.sharding.blocks import Matrix
from sketch_plugins.stores import Gradient


class Sizes:
    """Collects root mean squares, one tile after the other.

    Args:
        grad: the gradient of the step, which says what is measured: with touched rows, only these.
    """

    def __init__(self, grad: Gradient) -> None:
        self.grad = grad
        self._parts: list[list[Tensor]] = [[] for _ in range(grad.measured)]

    def _count(self, matrix: int) -> int:
        """The number of elements of a matrix, or of the whole."""
        rows, columns = self.grad.shape
        if self.grad.rows is None:
            return rows // self.grad.measured * columns
        if self.grad.measured == 1:
            return len(self.grad.rows) * columns
        first, last = self.grad.touched[matrix]
        return (last - first) * columns

    def add(
        self,
        matrix: int,
        numbers: Tensor,
        factor: Tensor | None = None,
        run: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
    ) -> None:
        """Measure a tile of a matrix; see `root_mean_square`."""
        self._parts[matrix].append(root_mean_square(numbers, factor, self._count(matrix), run))

    def all(self) -> Tensor:
        """The root mean square of the whole, 0-d; ``(matrices,)`` of several matrices, 0 for one without touched rows.

        In a rehearsal, tiles of equal shape are measured once, so that most matrices have none.
        """
        if len(self._parts) == 1:
            return joined(self._parts[0])
        nothing = torch.zeros((), dtype=self.grad.dtype, device=self.grad.device)
        return torch.stack([joined(parts) if parts else nothing for parts in self._parts])


def of_matrix(value: float | Tensor, matrix: int, grad: Gradient) -> Any:
    """The number of one matrix, if each matrix of the gradient has one."""
    if grad.measured > 1 and isinstance(value, Tensor) and value.ndim:
        return value[matrix]
    return value


def rms_of(p: Matrix, grad: Gradient) -> Tensor:
    """The RMS of a whole parameter (or of each matrix, as `Sizes.all`), whichever rows have a gradient."""
    whole = Gradient(p, None, grad.dtype, grad.chunk, grad.shape, matrices=grad.matrices, measured=grad.measured)
    sizes = Sizes(whole)
    for matrix, at in whole.of_matrices():
        sizes.add(matrix, p.get(at).to(grad.dtype))
    return sizes.all()


def last_of(state: Mapping[str, Any], grad: Gradient) -> Tensor:
    """What the last step has measured (`lagged_rms`): ``(2,)``, or ``(matrices, 2)`` of several matrices."""
    last: Tensor = state["rms"]["last"]
    return last if grad.measured > 1 else last.view(2)


def keep(state: Mapping[str, Any], p: Matrix, grad: Gradient, update: Tensor, parameter: Tensor) -> None:
    """Write what a step has measured for the next one.

    A matrix without touched rows keeps what it has. In the first step it has nothing: the RMS of its update is then 0,
    and that of its numbers is measured.
    """
    last = last_of(state, grad)
    if grad.measured > 1 and grad.rows is not None:
        idle = torch.tensor([first == end for first, end in grad.touched], device=last.device)
        first_step = int(state["step"]) == 1
        update = torch.where(idle, torch.zeros_like(update) if first_step else last[:, 0], update)
        parameter = torch.where(idle, rms_of(p, grad) if first_step else last[:, 1], parameter)
    torch.stack([update, parameter], dim=-1, out=last)

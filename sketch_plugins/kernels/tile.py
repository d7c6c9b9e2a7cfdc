"""The arithmetic of one tile, with or without torch.compile: the numerator, sums of squares, root mean squares.

The functions take plain tensors. Anything that changes from step to step is a tensor, because torch.compile would
compile the function again for another number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sketch_plugins import scratch

# The smallest magnitude that a numerator is divided by to get its sign, so that 0 stays 0.
LEAST = 1e-30


def numerator_of(g: Tensor, m: Tensor | None, lookahead: float | None, sign: bool = False) -> Tensor:
    """The numerator of the update: g, m, or Nesterov's ``g + lookahead * m``; with ``sign``, the sign of that."""
    if m is None:
        out = g
    elif lookahead is None:
        out = m
    else:
        out = torch.add(g, m, alpha=lookahead, **scratch.out("numerator", g))
    if not sign:
        return out
    # torch.sign would turn NaN into 0.
    size = torch.abs(out, **scratch.out("magnitude", out)).clamp_(min=LEAST)
    return torch.div(out, size, **scratch.out("magnitude", out))


def fold_squares(target: Tensor, x: Tensor, weight: Tensor) -> None:
    """``target += weight * sum over the cycles of x * x``. ``weight`` is 0-d or has one number for each target row."""
    squares = torch.mul(x, x, **scratch.out("cells", x))
    sums = squares[0] if x.shape[0] == 1 else torch.sum(squares, [0], **scratch.out("sums", x[0]))
    target.addcmul_(sums, weight)


def root_mean_square(
    numerator: Tensor,
    factor: Tensor | None,
    count: int,
    run: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function,
) -> Tensor:
    """``sqrt(sum((numerator * factor) ** 2) / count)``, 0-d: a tile's part of the RMS of ``count`` numbers.

    The result is right for all numbers of the arithmetic dtype, although squares in float32 overflow from 1.8e19 on and
    underflow below 1e-19. If the sum is not finite, or so small that squares may have been lost, the numbers are
    divided by the largest one and their squares are summed again.

    Args:
        numerator: tile of the numerator.
        factor: its factor, which broadcasts to it; None means 1.
        count: the number of elements of all tiles; `joined` combines their parts.
        run: `stores.base.Gradient.run`, which may compile a function.
    """
    if numerator.device.type == "cpu":  # on other devices, reading the sum would wait for the device
        total = run(sum_of_squares)(numerator, factor)
        if 1e8 * torch.finfo(numerator.dtype).tiny * numerator.numel() < float(total) < math.inf:
            return (total / count).sqrt_()
    total, largest = run(scaled_squares)(numerator, factor)
    return (total / count).sqrt_() * largest


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The root mean square of the whole, 0-d, from the parts that `root_mean_square` returned for its tiles."""
    return parts[0] if len(parts) == 1 else root_mean_square(torch.stack(list(parts)), None, 1)


def sum_of_squares(numerator: Tensor, factor: Tensor | None) -> Tensor:
    """``sum((numerator * factor) ** 2)``, 0-d. It may overflow or underflow."""
    u = _product(numerator, factor)
    if torch.compiler.is_compiling():
        return (u * u).sum()
    flat = u.reshape(-1)
    return torch.dot(flat, flat)  # several times faster on a CPU than a norm


def scaled_squares(numerator: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(sum((numerator * factor / largest) ** 2), largest)``, both 0-d, with the largest magnitude of the products.

    If that is 0 or not finite, ``largest`` is 1 and nothing is scaled.
    """
    u = _product(numerator, factor)
    compiling = torch.compiler.is_compiling()
    largest = u.abs().amax() if compiling else torch.linalg.vector_norm(u, math.inf)
    largest = torch.where(largest.isfinite() & (largest > 0), largest, 1.0)
    u = torch.div(u, largest, **scratch.out("update", u))
    if compiling:
        return (u * u).sum(), largest
    flat = u.reshape(-1)
    return torch.dot(flat, flat), largest


def _product(numerator: Tensor, factor: Tensor | None) -> Tensor:
    return numerator if factor is None else torch.mul(numerator, factor, **scratch.out("update", numerator))

"""A step's work on one tile, written once: run as it is, or through torch.compile (``compile=True``).

The functions take plain tensors and change them in place. Whatever varies from step to step is a tensor, or it would be
compiled anew; what stays (a store, betas, momentum) may be a Python value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.hashing import random32

if TYPE_CHECKING:
    from sketch_plugins.sharding.blocks import At
    from sketch_plugins.stores.base import Ema, State, Store

# Elements whose noise is drawn at once: it takes 40 bytes for each, ten times what a tile itself does.
CPU_NOISE, ACCELERATOR_NOISE = 1 << 14, 1 << 20


def update(
    p: Tensor,
    g: Tensor,
    slices: State,
    factor: Tensor,
    keep: Tensor | None,
    first: Store | None,
    ema: Ema | None,
    lookahead: float | None,
    inner: Tensor | None = None,
) -> None:
    """``p <- keep * p - factor * numerator`` with the numerator m, g (no first moment) or ``g + lookahead * m``.

    With ``inner`` (a preconditioner that comes before the momentum) g is replaced by ``inner * g`` throughout.

    Args:
        p: tile of the parameter, ``(cycles, rows, columns)`` or ``(n, columns)``, in the arithmetic dtype.
        g: tile of the gradient, of the same shape.
        slices: the first moment's state there; changed in place.
        factor: learning rate over the denominator, broadcastable to ``p``.
        keep: 0-d, one minus the decoupled weight decay; None for one.
        first: store of the first moment.
        ema: its average.
        lookahead: Nesterov's momentum.
        inner: None, or broadcastable to ``g``.
    """
    if inner is not None:
        g = torch.mul(g, inner, **scratch.out("preconditioned", g))
    numerator = numerator_of(g, first.blend(slices, g, ema) if first and ema else None, lookahead)
    if keep is not None:
        p.mul_(keep)
    p.addcmul_(numerator, factor, value=-1.0)


def numerator_of(g: Tensor, m: Tensor | None, lookahead: float | None) -> Tensor:
    """What the update divides: g, m, or Nesterov's ``g + lookahead * m``."""
    if m is None:
        return g
    if lookahead is None:
        return m
    return torch.add(g, m, alpha=lookahead, **scratch.out("numerator", g))


def fold_squares(target: Tensor, x: Tensor, weight: Tensor) -> None:
    """``target += weight * sum over the cycles of x * x``; ``weight`` is 0-d or one for each row of ``target``."""
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

    The result is right for all numbers of the arithmetic dtype, although squares of float32 overflow from 1.8e19 on and
    underflow below 1e-19: where their sum is not finite, or too small to be trusted, the numbers are divided by the
    largest one and their squares are summed again.

    Args:
        numerator: tile of the update before it is divided.
        factor: what it is multiplied by, broadcastable to it; None: nothing.
        count: how many numbers all tiles have together; `joined` puts their parts together.
        run: `stores.base.Gradient.run`, which may compile a function.
    """
    if numerator.device.type == "cpu":  # elsewhere, a look at the sum would wait for the device
        total = run(sum_of_squares)(numerator, factor)
        if 1e8 * torch.finfo(numerator.dtype).tiny * numerator.numel() < float(total) < math.inf:
            return (total / count).sqrt_()
    total, largest = run(scaled_squares)(numerator, factor)
    return (total / count).sqrt_() * largest


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The root mean square of a whole, 0-d, from those parts of it that `root_mean_square` found in its tiles."""
    return parts[0] if len(parts) == 1 else root_mean_square(torch.stack(list(parts)), None, 1)


def sum_of_squares(numerator: Tensor, factor: Tensor | None) -> Tensor:
    """``sum((numerator * factor) ** 2)``, 0-d, as far as the arithmetic dtype can hold it."""
    u = _product(numerator, factor)
    if torch.compiler.is_compiling():
        return (u * u).sum()
    flat = u.reshape(-1)
    return torch.dot(flat, flat)  # several times faster on a CPU than a norm


def scaled_squares(numerator: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """``(sum((numerator * factor / largest) ** 2), largest)``, both 0-d, with the largest magnitude of the products.

    Where that is 0 or not finite, ``largest`` is 1 and the sum what it is.
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


def round_to_bf16(part: Tensor, at: At, columns: int, seed: int, step: int) -> Tensor:
    """``part`` (float32, changed) rounded stochastically to numbers that bfloat16 holds exactly.

    Away from zero with a probability equal to the fraction that is cut off, so that the expectation is the unrounded
    number; the noise is a function of (seed, step, element). Infinities and NaN stay what they are.
    """
    rows = at.from_rows(at.index(part.device).unsqueeze(-1) * columns)
    own = torch.arange(at.lo, at.hi, device=part.device)
    if torch.compiler.is_compiling():
        return round_stochastically(part, rows + own, seed, step)
    _round_blocks(part, rows, own, seed, step, CPU_NOISE if part.device.type == "cpu" else ACCELERATOR_NOISE)
    return part


def _round_blocks(part: Tensor, rows: Tensor, own: Tensor, seed: int, step: int, limit: int, dim: int = 0) -> None:
    """In place; the first number of each row and the places in it (``own``) add up to those of the elements."""
    if part.numel() <= limit:
        round_stochastically(part, rows + own, seed, step)
        return
    size = part.shape[dim]
    each = max(1, limit // (part.numel() // size))
    for start in range(0, size, each):
        n = min(each, size - start)
        block, last = part.narrow(dim, start, n), dim == part.ndim - 1
        of_rows, of_own = (rows, own.narrow(0, start, n)) if last else (rows.narrow(dim, start, n), own)
        _round_blocks(block, of_rows, of_own, seed, step, limit, dim + 1)


def round_stochastically(part: Tensor, index: Tensor, seed: int, step: int) -> Tensor:
    """`round_to_bf16` of elements whose numbers (int64, in the shape of ``part``) are ``index``."""
    bits = part.view(torch.int32)
    noise = (random32(index, seed, step) & 0xFFFF).to(torch.int32)
    noise.masked_fill_((bits & 0x7F800000) == 0x7F800000, 0)
    nan = part.isnan()  # its bits may all be in the half that is cut off
    return bits.add_(noise).bitwise_and_(-0x10000).view(torch.float32).masked_fill_(nan, float("nan"))


@lru_cache(maxsize=64)
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through torch.compile: one piece of code for all shapes."""
    inner = torch.compile(function, dynamic=True)

    def run(*args: Any) -> Any:
        for arg in args:
            for tensor in arg.values() if isinstance(arg, dict) else (arg,):
                if isinstance(tensor, Tensor) and tensor.ndim == 4:
                    # A view in blocks: loops over a block of unknown size would not be vectorised.
                    torch._dynamo.mark_static(tensor, 3)
        return inner(*args)

    return run

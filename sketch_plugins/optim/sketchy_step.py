"""The step of a preconditioned tensor: graft, statistics, momentum, inverse roots, the graft's size, learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.kernels.tile import joined, numerator_of, root_mean_square
from sketch_plugins.linalg.kronecker import Kronecker
from sketch_plugins.optim.eager import Factors, number, update, write_tile
from sketch_plugins.optim.options import rate
from sketch_plugins.optim.rule import SCALE_FLOOR, Rule
from sketch_plugins.sharding.blocks import Matrix
from sketch_plugins.sharding.parts import Part
from sketch_plugins.stores import Ema, Gradient, Store


def take_preconditioned(
    p: Part,
    grad: Gradient,
    rule: Rule,
    state: Mapping[str, Any],
    named: Mapping[str, Store],
    group: Mapping[str, Any],
    preconditioner: Kronecker,
    gather: Callable[[Tensor], None],
) -> None:
    """Take the step of a dense gradient.

    Args:
        p: the part.
        grad: its gradient.
        rule: of the graft.
        state: of the part.
        named: its stores.
        group: its options.
        preconditioner: what it has of covariances.
        gather: takes what is preconditioned into the covariances, or into what they gather.
    """
    step, beta1, first = int(state["step"].item()), group["betas"][0], named.get("first_moment")
    covariances, grafted, of_gradient = state["preconditioner"], group["graft"] != "none", of_gradient_of(group)
    before, started = group["momentum_placement"] == "before", step >= group["start_preconditioning_step"]
    if of_gradient and before and not started:
        first = None  # which averages gradients, and no step is made of those yet
    size, lookahead = momentum_of(beta1, step, group["nesterov"]) if first is not None else (1.0, None)
    ema = Ema(beta1, 1.0 - beta1, step)
    x = scratch.empty("preconditioned", grad.shape, grad.dtype, grad.device)
    whole = Matrix(x)

    if of_gradient:
        gather(full(grad, whole).view(p.shape))
    rms, root = graft(grad, rule, state, named, whole, not of_gradient or not started), p.numel() ** 0.5
    if grafted:
        scale = scale_of(p, grad, rms, group)
        norm = rms * scale * root
        if not of_gradient or not started:
            x.mul_(scale)
    if not of_gradient:
        gather(x.view(p.shape))
    if first is not None and before:
        average(whole, grad, first, state["first_moment"], ema, lookahead)
        if not of_gradient and grafted:
            norm = norm_of(whole, grad) * size  # that of the averaged update
    missing = None
    if started:
        exponent = -(group["exponent"] or 0.5 / len(preconditioner.dims))
        missing = preconditioner.turn(covariances, x, exponent, group["matrix_eps"], group["tail"], sizes=not grafted)
    now = norm_of(whole, grad)
    if not grafted:
        # As a logarithm: roots of covariances have any size, and what is left of it is up to `update_clip`.
        length = now.to(torch.float64 if missing is None else missing[0].dtype).log()
        if missing is not None:
            length = length + missing[0] - missing[1] * math.log(2.0)
        if before:
            length = length + math.log(size)
        if group["update_clip"]:
            length = length.clamp(max=math.log(group["update_clip"]) + math.log(p.numel()) / 2)
        norm = length.clamp(max=math.log(torch.finfo(x.dtype).max) / 2).exp().to(x.dtype)
        norm = norm * scale_of(p, grad, torch.zeros_like(norm), group)
    x.mul_(torch.where(now > 0, norm / now, 0.0))
    if first is not None and not before:
        average(whole, grad, first, state["first_moment"], ema, lookahead)
        x.mul_(size)
    take(p.data, grad, whole, rate(group), rule, state, group)


def of_gradient_of(group: Mapping[str, Any]) -> bool:
    """Whether the gradient is preconditioned, and not an update made of it. Without a graft the two are the same."""
    return group["input"] == "gradient" and group["graft"] != "none"


def momentum_of(beta1: float, step: float | Tensor, nesterov: bool) -> tuple[float | Tensor, float | None]:
    """``(size, lookahead)``: ``size * m``, or ``size * (x + lookahead * m)``, is an average of all x so far."""
    if nesterov and beta1 > 0:
        # beta1 * m + (1 - beta1) * x: its weights add up to 1 - beta1 ** (step + 1).
        return (1.0 - beta1) / (1.0 - beta1 ** (step + 1)), beta1 / (1.0 - beta1)
    return 1.0 / (1.0 - beta1**step), None


def graft(
    grad: Gradient,
    rule: Rule,
    state: Mapping[str, Any],
    named: Mapping[str, Store],
    whole: Matrix,
    of_update: bool,
) -> Tensor:
    """Write the second moment, and into ``whole`` the update (or the gradient); returns the update's RMS."""
    second, count = named.get("second_moment"), grad.shape[0] * grad.shape[1]
    if second is None or rule.second is None:
        for at in grad.batches():
            whole.put(at, grad.get(at))
        return torch.zeros((), dtype=grad.dtype, device=grad.device)  # of no use without a graft
    if second.write_first:
        second.write(state["second_moment"], grad, rule.second)
    working = dict(state)
    if not second.write_first:
        working["second_moment"] = second.begin(state["second_moment"], grad)
    period = second.period(grad.shape[0])
    factors, parts = Factors(second, rule, working, period), []
    for at in grad.batches(period, second.align):
        g = grad.get(at)
        u = torch.mul(g, factors.get(at, g), **scratch.out("update", g))
        whole.put(at, u if of_update else g)
        parts.append(root_mean_square(u, None, count))  # which may change ``u``
    if not second.write_first:
        second.finish(state["second_moment"], working["second_moment"], grad)
    return joined(parts)


def scale_of(p: Part, grad: Gradient, rms: Tensor, group: Mapping[str, Any]) -> Tensor:
    """What `update_clip` and `scale_parameter` multiply an update of this RMS by, 0-d."""
    size = torch.ones_like(rms)
    if group["update_clip"]:
        size /= (rms / group["update_clip"]).clamp_(min=1.0)
    if group["scale_parameter"]:
        matrix, count = grad.like(p.data), p.numel()
        # Contiguous: the same bits for any layout.
        parts = [root_mean_square(matrix.get(at).to(grad.dtype).contiguous(), None, count) for at in grad.batches()]
        size *= joined(parts).clamp(min=SCALE_FLOOR)
    return size


def norm_of(whole: Matrix, grad: Gradient) -> Tensor:
    """The Frobenius norm."""
    return joined([root_mean_square(whole.get(at), None, 1) for at in grad.batches()])


def full(grad: Gradient, whole: Matrix) -> Tensor:
    """The gradient as one contiguous tensor: itself, or a copy in ``whole``."""
    tensor = grad.matrix._flat
    if tensor is not None and tensor.is_contiguous() and tensor.dtype == grad.dtype and not grad.negate:
        return tensor
    for at in grad.batches():
        whole.put(at, grad.get(at))
    return whole.tensor


def average(
    whole: Matrix, grad: Gradient, first: Store, state: dict[str, Tensor], ema: Ema, lookahead: float | None
) -> None:
    """``whole <- m``, or Nesterov's ``whole + lookahead * m``, with m averaging it, tile by tile."""
    for at in grad.batches(align=first.align):
        x = first.view(whole.get(at))
        slices = first.slices(state, at, ema.step)
        x.copy_(numerator_of(x, first.blend(slices, x, ema), lookahead))
        first.write_back(state, at, slices)


def take(
    p: Tensor,
    grad: Gradient,
    whole: Matrix,
    size: float | Tensor,
    rule: Rule,
    state: Mapping[str, Any],
    group: Mapping[str, Any],
) -> None:
    """``p <- (1 - decay) * p - size * whole``."""
    shrink = None
    if isinstance(rule.decay, Tensor) or rule.decay != 0:
        shrink = number(1.0 - rule.decay, grad)
    factor = number(size, grad)
    matrix = grad.like(p)
    for at in grad.batches():
        part, in_place = matrix.get(at), matrix.views(at) and p.dtype == grad.dtype
        if not in_place:
            part = scratch.cast("parameter", part, grad.dtype)
        update(part, whole.get(at), {}, factor, shrink, None, None, None)
        if not in_place:
            write_tile(matrix, at, part, group, state)

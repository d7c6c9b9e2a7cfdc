"""The eager step, which defines what the kernels compute: one parameter after the other, in tiles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.kernels.rounding import round_to_bf16
from sketch_plugins.kernels.tile import numerator_of
from sketch_plugins.kernels.weight_code import Corrected
from sketch_plugins.optim.clipping import bounded, excess
from sketch_plugins.optim.measuring import Sizes, keep, last_of, of_matrix
from sketch_plugins.optim.options import held
from sketch_plugins.optim.pending import Pending
from sketch_plugins.optim.rule import Rule
from sketch_plugins.optim.weight_bits import matrix_of
from sketch_plugins.sharding.blocks import At, Matrix, Rows
from sketch_plugins.stores import Ema, Gradient, Store
from sketch_plugins.stores.base import State


def update(
    p: Tensor,
    g: Tensor,
    slices: State,
    factor: Tensor,
    shrink: Tensor | None,
    first: Store | None,
    ema: Ema | None,
    lookahead: float | None,
    inner: Tensor | None = None,
    sign: bool = False,
) -> None:
    """``p <- shrink * p - factor * numerator`` with the numerator m, g (no first moment) or ``g + lookahead * m``.

    With ``inner`` (a preconditioner before the momentum) ``inner * g`` replaces g everywhere.

    Args:
        p: tile of the parameter, ``(cycles, rows, columns)`` or ``(n, columns)``, in the arithmetic dtype.
        g: tile of the gradient, of the same shape.
        slices: the first moment's state for the tile, which is changed in place.
        factor: learning rate divided by the denominator, in a shape that broadcasts to ``p``.
        shrink: 0-d, one minus the decoupled weight decay; None stands for 1.
        first: store of the first moment.
        ema: its average.
        lookahead: Nesterov's momentum.
        inner: None, or a tensor that broadcasts to ``g``.
        sign: replace the numerator by its sign.
    """
    if inner is not None:
        g = torch.mul(g, inner, **scratch.out("preconditioned", g))
    numerator = numerator_of(g, first.blend(slices, g, ema) if first and ema else None, lookahead, sign)
    if shrink is not None:
        p.mul_(shrink)
    p.addcmul_(numerator, factor, value=-1.0)


class Factors:
    """``step_size / denominator`` of each tile. Consecutive tiles over the same buckets share one result."""

    def __init__(
        self,
        second: Store | None,
        rule: Rule,
        state: Mapping[str, Any],
        period: int,
        peek: bool = False,
        slot: str = "factor",
        rows: Tensor | None = None,
    ) -> None:
        self.second, self.rule, self.state, self.period, self.slot = second, rule, state, period, slot
        self.peek, self.rows = peek, rows
        self._factor: Tensor | None = None
        self._place: tuple[int, int, int] | None = None

    def get(self, at: At, g: Tensor, step_size: float | Tensor = 1.0) -> Tensor:
        """The factor of one tile. The second moment is read, and also written if its rows have cells of their own.

        ``step_size`` is the same for all tiles over the same buckets.
        """
        assert self.second is not None and self.rule.second is not None and self.rule.denominator is not None
        place = None
        if self.second.by_bucket and self.period and not isinstance(at, Rows):
            place = (self.second.bucket_of(at), at.rows, at.lo)
        if self._factor is None or place is None or place != self._place:
            look = self.second.peek if self.peek else self.second.advance
            v = look(self.state["second_moment"], at, g, self.rule.second)
            if self.rule.floor:
                root = torch.add(v, self.rule.floor, **scratch.out(self.slot, v)).sqrt_()
            else:
                root = torch.sqrt(v, **scratch.out(self.slot, v))
            self._factor, self._place = self.rule.denominator.of(root).reciprocal_(), place
            if isinstance(step_size, Tensor) or step_size != 1.0:
                self._factor.mul_(step_size)
        if self.rows is None:
            return self._factor
        own = at.get(self.rows, 0, 1)
        shape = torch.broadcast_shapes(self._factor.shape, own.shape)
        out = scratch.empty("factor of rows", shape, self._factor.dtype, self._factor.device)
        return torch.mul(self._factor, own, out=out)


def take(one: Pending) -> None:
    """Write the moments that have to be written before they are read, then take the step in tiles."""
    p, rule, state, named = matrix_of(one), one.rule, one.state, one.named
    assert rule is not None
    grad = one.grad if one.grad.l2 is None else one.grad.of(p)
    first, second = named.get("first_moment"), named.get("second_moment")
    rows = second.step_factors(state["second_moment"], grad) if second else None
    for name, store in named.items():
        ema = rule.first if name == "first_moment" else rule.second
        if store.write_first and ema is not None:
            store.write(state[name], grad, ema)
    apply(p, grad, rule, state, first, second, one.group, rows)


def apply(
    p: Matrix,
    grad: Gradient,
    rule: Rule,
    state: Mapping[str, Any],
    first: Store | None,
    second: Store | None,
    group: Mapping[str, Any],
    rows: Tensor | None = None,
) -> None:
    """Change the parameter and its state, one tile after the other. ``rows`` are what `Store.step_factors` returned."""
    period = max((s.period(p.shape[0]) for s in (first, second) if s is not None), default=0)
    align = max((s.align for s in (first, second) if s is not None), default=1)
    step_size: float | Tensor = rule.step_size * rule.correction
    if not isinstance(step_size, Tensor):
        step_size = held(step_size, grad.dtype)
    # Whether the tiles' factors come before the first moment. Without one the order makes no difference.
    before = rule.precondition_first and first is not None
    inner_scale: float | Tensor = 1.0
    lagged = group.get("lagged_rms", False)
    apart = bool(lagged or group.get("scale_parameter") or group.get("update_clip"))
    # A first step has no previous values, and touched rows differ from step to step.
    once = lagged and grad.rows is None and int(state["step"]) > 1
    looks = Factors(second, rule, state, period, peek=True, slot="peeked factor" if once else "factor", rows=rows)

    def measure(sizes: Sizes, matrix: int, at: At, g: Tensor) -> None:
        m = None
        if first and rule.first and not before:
            m = first.peek(state["first_moment"], at, g, rule.first)
        numerator = numerator_of(g, m, rule.lookahead, rule.sign)
        sizes.add(matrix, numerator, looks.get(at, g) if rule.denominator else None, grad.run)

    updates, sizes = Sizes(grad), Sizes(grad)
    rms: Any
    size: Any
    rms, size = last_of(state, grad).unbind(-1) if once else (None, None)
    if not once and (lagged or group.get("scale_parameter")):
        for matrix, at in grad.of_matrices():
            sizes.add(matrix, p.get(at).to(grad.dtype))
        size = sizes.all()
    if not once and (lagged or group.get("update_clip")):
        for matrix, at in grad.of_matrices(period, align):
            measure(updates, matrix, at, grad.get(at))
        rms = updates.all() * rule.correction
    if group.get("scale_parameter"):
        step_size = bounded(size, group) * step_size
    if (clip := excess(rms, group)) is not None:
        if before:
            inner_scale = clip.reciprocal_()
        else:
            step_size = step_size / clip
    if rule.gate is not None:
        step_size = rule.gate.size(step_size, grad.device, grad.dtype)
    shrink = shrink_of(rule, grad)
    ema = rule.first and rule.first._replace(step=0)  # otherwise every step would be compiled again
    working = dict(state)
    if second and not second.write_first:
        working["second_moment"] = second.begin(state["second_moment"], grad)
    factors = Factors(second, rule, working, period, rows=rows)
    factor = number(step_size, grad)
    scale = inner_scale if before else step_size
    run = grad.run(update)
    for matrix, at in grad.of_matrices(period, align, apart):
        g = grad.get(at)
        slices = first.slices(state["first_moment"], at, rule.first.step) if first and rule.first else {}
        part, in_place = p.get(at), p.views(at) and p.dtype == grad.dtype
        if not in_place and not isinstance(p, Corrected):
            part = scratch.cast("parameter", part, grad.dtype)
        if once:
            measure(updates, matrix, at, g)
            sizes.add(matrix, part)
        own = of_matrix(factor, matrix, grad)
        scaled = factors.get(at, g, of_matrix(scale, matrix, grad)) if rule.denominator else own
        if first:
            scaled = first.view(scaled) if scaled.ndim else scaled
            scaled, inner = (own, scaled) if before else (scaled, None)
            run(first.view(part), first.view(g), slices, scaled, shrink, first, ema, rule.lookahead, inner, rule.sign)
        else:
            run(part, g, slices, scaled, shrink, None, None, None, None, rule.sign)
        if first and slices:
            first.write_back(state["first_moment"], at, slices)
        if not in_place:
            write_tile(p, at, part, group, state)
    if second and not second.write_first:
        second.finish(state["second_moment"], working["second_moment"], grad)
    if lagged:
        keep(state, p, grad, updates.all() * rule.correction, sizes.all())


def number(value: float | Tensor, grad: Gradient) -> Tensor:
    """A 0-d tensor in the arithmetic dtype and on the device of a gradient.

    A Python number is filled in and not copied, because copying would wait for the device.
    """
    if isinstance(value, Tensor):
        return value.to(device=grad.device, dtype=grad.dtype)
    return torch.full((), held(float(value), grad.dtype), dtype=grad.dtype, device=grad.device)


def shrink_of(rule: Rule, grad: Gradient) -> Tensor | None:
    """0-d: one minus the decoupled weight decay; None if there is none."""
    if not isinstance(rule.decay, Tensor) and rule.decay == 0:
        return None
    shrink = number(1.0 - rule.decay, grad)
    return shrink if rule.gate is None else rule.gate.shrink(shrink)


def write_tile(p: Matrix, at: At, part: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a tile of the new parameter. ``part`` has the arithmetic dtype, and is rounded as the options say."""
    if group["stochastic_rounding"] and p.dtype == torch.bfloat16:
        part = round_to_bf16(part, at, p.shape[1], group["seed"], int(state["step"]))
    p.put(at, part)

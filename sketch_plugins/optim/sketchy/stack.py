"""The step of preconditioned tensors of equal shape, as a stack: graft, statistics, momentum, roots, write-back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Annotated, Any, TypedDict

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sketch_plugins import scratch
from sketch_plugins.kernels.work import Work
from sketch_plugins.linalg import kronecker
from sketch_plugins.linalg.kronecker import Kronecker, Root
from sketch_plugins.optim.declaring import count, option, unused
from sketch_plugins.optim.deferred import DEFERRED
from sketch_plugins.optim.fused import Backend
from sketch_plugins.optim.options import step_rate
from sketch_plugins.optim.pending import Batch, Pending
from sketch_plugins.optim.rule import Rule
from sketch_plugins.optim.sketchy import axes, graft, kernels, momentum, write_back
from sketch_plugins.sharding.blocks import Matrix
from sketch_plugins.sharding.tensors import is_fake
from sketch_plugins.stores import Ema


class Preconditioned(TypedDict, total=False):
    """Options of the preconditioned step itself."""

    start_preconditioning_step: Annotated[
        int | None, count(1, "the first step that is preconditioned (with 1, from the first solve on).", 0)
    ]
    exponent: Annotated[
        float | None,
        option(
            0.0,
            "a of :math:`(L_i + \\epsilon)^{-a}`; 0: :math:`1 / (2 r)`.",
            allowed="a number in [0, 1]",
            check=lambda v: 0 <= v <= 1,
        ),
    ]
    matrix_eps: Annotated[
        float | None,
        option(
            1e-6,
            ":math:`\\epsilon`, relative to the largest eigenvalue.",
            allowed="a number >= 0",
            check=lambda v: v >= 0,
        ),
    ]
    stack_bytes: Annotated[
        int | None,
        option(
            -1,
            "tensors of equal shape and options take their preconditioned step together, in stacks of at most this "
            "many bytes in the arithmetic dtype, or of one tensor (0: one by one; -1: 32 MiB on a CPU, 256 MiB "
            "elsewhere). Larger stacks take fewer operations and more memory in a step: the stack itself, a few copies "
            "of its covariances' directions and of products with them, and, for tensors of 16,384 elements or less, "
            "copies to undo an error, which count towards the limit.",
            allowed="an integer >= -1",
            check=lambda v: v >= -1,
        ),
    ]
    nonfinite: Annotated[
        str | None,
        option(
            "error",
            "what happens if a gradient has a NaN or an infinity, or a norm of 1e18 or more, whose covariance float32 "
            'cannot hold. ``"error"``: an error; ``"skip"``: the whole step is skipped. Either way nothing changes, '
            'and for this the host waits for one number in each step. ``"deferred"`` and ``"deferred_skip"``: the host '
            "does not wait. The device takes such a step with a learning rate and a weight decay of 0 and with "
            "gradients of 0, which it writes in place of the gradients: no weight moves, momentum and covariances "
            "decay, and the step counts. The host looks before the next step (and in `state_dict` and "
            '`check_last_step`). ``"deferred"`` then raises an error; ``"deferred_skip"`` counts the step '
            "(`skipped_steps`) and warns once.",
            choices=("error", "skip", *DEFERRED),
        ),
    ]
    capturable: Annotated[bool, unused((False,), "decompositions cannot be captured in a CUDA graph")]


#: Adds ``x``, ``(c, R, D)``, to the members' covariances or to their buffers; returns whether covariances changed.
Gather = Callable[[Sequence[Pending], kronecker.Stack, Tensor], bool]


class Stack(Batch):
    """The step of preconditioned tensors of equal shape and options.

    Args:
        members: the members' steps. Learning rates and weight decays may differ.
        preconditioner: the layout of each member's covariances.
        gather: see `Gather`.
        backend: kernels that may take the elementwise parts, or None.
        programs: the last step's program of each part, and the parts that kernels took. This object replaces them.
        marks: see `kernels.prepare`.
    """

    def __init__(
        self,
        members: list[Pending],
        preconditioner: Kronecker,
        gather: Gather,
        backend: Backend | None,
        programs: dict[str, Any],
        marks: Any,
    ) -> None:
        super().__init__(_never, members)
        self.preconditioner, self.gather, self.backend = preconditioner, gather, backend
        self.programs, self.marks = programs, marks
        #: Returns the roots, which are computed together with those of other stacks (see `stacking`).
        self.shared: Callable[[], Mapping[kronecker.Side, Root]] | None = None
        #: For each part that a kernel takes, the function that launches it, made for a stack at the address `place`.
        self.taken: dict[str, Callable[[], None]] = {}
        self.place = 0
        group, step = members[0].group, members[0].step
        first = members[0].named.get("first_moment")
        self.started = step >= group["start_preconditioning_step"]
        self.grafted = group["graft"] != "none"
        #: Whether the gradient is preconditioned, not the graft's update.
        self.of_gradient = graft.is_of_gradient(group)
        self.before = group["momentum_placement"] == "before"
        if self.of_gradient and self.before and not self.started:
            first = None  # it averages gradients, and no step uses their average yet
        self.averages, beta1 = first is not None, group["betas"][0]
        self.size, lookahead = momentum.debiased(beta1, step, group["nesterov"]) if self.averages else (1.0, None)
        self.ema = Ema(beta1, 1.0 - beta1, step)
        self.momentum = Rule(
            first=self.ema, second=None, step_size=1.0, correction=1.0, decay=0.0, lookahead=lookahead, denominator=None
        )
        #: Options and layouts that `parts` depends on; None if they cannot be compared with another step's.
        self.looks: Any = None
        self.tried: list[str] = []
        #: Parts that kernels take, if their stores and options allow it.
        self.parts = self._parts()

    @property
    def samples(self) -> bool:
        """Whether the covariances change within the step."""
        return self.members[0].group["statistics"] == "sample"

    @property
    def exponent(self) -> float:
        """The exponent of the covariances, which is negative."""
        return -(self.members[0].group["exponent"] or 0.5 / len(self.preconditioner.dims))

    @property
    def way(self) -> Any:
        """See `Batch`."""
        return self.parts, self.started

    def _parts(self) -> tuple[str, ...]:
        """The parts that kernels take. Parts that were not tried yet with these options are added to the trials."""
        one = self.members[0]
        if self.backend is None or one.rule is None:
            return ()
        if self.marks is not None:  # this object stays the same as long as the options are equal
            lies = [(member.p.data.stride(), member.p.dtype) for member in self.members]
            self.looks = self.backend, self.marks, self._fills, self.averages, self.momentum.lookahead is None, lies
        known = self.programs.get("parts")
        if known is not None and self.looks is not None and known[0] == self.looks:
            return known[1]
        exists = {
            "graft": one.rule.second is not None and "second_moment" in one.named and not self._fills,
            "momentum": self.averages,
            "write_back": all(member.p.dtype == one.p.dtype for member in self.members),
        }
        for part in kernels.PARTS:
            if exists[part] and (work := self._trial(part)) is not None:
                self.trials.append(replace(one, backend=self.backend, work=work))
                self.tried.append(part)
        return tuple(self.tried)

    def _trial(self, part: str) -> Work | None:
        """The work of a part of the first member, as a kernel would get it; None if no kernel takes it."""
        one, backend = self.members[0], self.backend
        assert backend is not None and one.rule is not None
        rule, changed = kernels.rule_of(part, one.rule, self.momentum)
        with _disable_current_modes() if is_fake(one.p.data) else nullcontext():
            device = one.p.device
            if is_fake(one.p.data):  # kernels read addresses, so they are asked about a stand-in that has one
                one, device = kernels.with_memory(one), torch.device("cpu")
            like = torch.empty(one.grad.shape, dtype=one.grad.dtype, device=device)
            work = kernels.work_of(part, one, like, rule, {**one.group, **changed})
            return work if work is not None and backend.unsupported(work) is None else None

    def settle(self) -> None:
        """See `Batch`."""
        if self.tried:
            found = zip(self.tried, self.trials, strict=True)
            self.parts = tuple(part for part, trial in found if trial.backend is not None)
            self.trials, self.tried = [], []
        if self.backend is not None:
            self.programs["parts"] = self.looks, self.parts

    @property
    def _fills(self) -> bool:
        """Whether the stack is filled with the gradient in place of the graft's update."""
        return self.of_gradient and self.started

    def twin(self) -> Stack:
        """See `Batch`."""
        other = Stack(self.members, self.preconditioner, self.gather, None, {}, None)
        other.taken = dict.fromkeys(self.parts, _nothing)
        return other

    def covariances(self, members: Sequence[Pending]) -> kronecker.Stack:
        """The covariances of the members, or of copies of them."""
        return kronecker.Stack(self.preconditioner, [one.state["preconditioner"] for one in members])

    @property
    def count(self) -> int:
        """The number of matrices of each member. In a batch (experts) each matrix has its own graft norm."""
        return self.preconditioner.count

    def _empty(self, members: Sequence[Pending]) -> Tensor:
        grad = members[0].grad
        return scratch.empty("preconditioned", (len(members), *grad.shape), grad.dtype, grad.device)

    def prepare(self) -> None:
        """See `Batch`."""
        self.taken = {}
        x = self._empty(self.members)
        if is_fake(x):
            self.taken = dict.fromkeys(self.parts, _nothing)  # fake tensors have no memory to work on
            return
        self.place = x.data_ptr()
        for part in self.parts:
            assert self.backend is not None
            made = kernels.prepare(
                part, self.backend, self.members, x, self.momentum, self.marks, self.programs.get(part)
            )
            if made is not None:
                self.programs[part], self.taken[part] = made
        if len(self.taken) < len(self.parts):  # the other parts are eager and need the temporaries of eager parts
            self.parts = tuple(self.taken)

    def take(self, members: Sequence[Pending]) -> None:
        """See `Batch`."""
        group, x = members[0].group, self._empty(members)
        if self.taken and not (x.is_meta or is_fake(x)) and x.data_ptr() != self.place:
            self.prepare()  # a larger buffer has replaced the one that the programs were made for
        covariances = self.covariances(members)
        # Everything that can run out of memory comes before the first write.
        covariances.fetch()
        roots = self.shared() if self.started and self.shared is not None else None
        changed = False
        if self.of_gradient:
            for one, place in _each(members, x):
                graft.fill(one.grad, Matrix(place))
            changed = self.gather(members, covariances, x)
        norm = self._graft(members, x)
        if not self.of_gradient:
            changed = self.gather(members, covariances, x)
        if self.averages and self.before:
            self._average(members, x)
        power, each = None, x.view(-1, x[0].numel() // self.count)
        if self.of_gradient or not self.grafted or not group["update_clip"]:
            power = kronecker.moderate(each)  # otherwise the numbers are those of a clipped update
        if norm is None and self.grafted:
            norm = _norms(each) if power is None else _norms(each).ldexp(power.to(x.dtype))
        missing = None
        if self.started:
            if changed or roots is None:
                roots = covariances.roots(self.exponent, group["matrix_eps"], group["tail"])
            missing = covariances.turn(x, roots, sizes=not self.grafted)
        covariances.forget()
        now = _norms(each)
        if not self.grafted:
            norm = self._length(members, now, missing, power)
        assert norm is not None
        factor: Tensor | None = torch.where(now > 0, norm / now, 0.0)
        if self.averages and not self.before:
            _scale(each, factor, [1.0])
            self._average(members, x)
            factor = None
        if self.averages and not (self.before and self.of_gradient):
            if factor is None:
                x.mul_(self.size)
            else:
                factor.mul_(self.size)
        rates = _rates(members, x, axes.factor_of(self.preconditioner, group))
        _scale(each, factor, [rate for rate in rates for _ in range(self.count)])
        self._write(members, x)

    def _graft(self, members: Sequence[Pending], x: Tensor) -> Tensor | None:
        """Write the second moments. ``x`` becomes the update, or stays the gradient.

        Returns:
            The norm of each matrix's update; None if that is the norm of what ``x`` holds.
        """
        group, each = members[0].group, x.view(len(x) * self.count, -1)
        sizes = None
        if group["scale_parameter"] and self.grafted:
            sizes = self._sizes(members, x.dtype)
        if "graft" in self.taken:
            graft.stacked([one.grad for one in members], x)
            self.taken["graft"]()
        else:
            found = [graft.write(one, Matrix(place), not self._fills) for one, place in _each(members, x)]
            rms = (torch.stack(found) if len(found) == len(x) else found[0].expand(len(x), *found[0].shape)).reshape(-1)
            if not self.grafted:
                return None
            clip = graft.clipped(rms, group)
            if clip is not None:
                sizes = clip if sizes is None else sizes * clip
            if self._fills:
                return rms * (each.shape[1] ** 0.5) * (1.0 if sizes is None else sizes)
        if sizes is not None:
            each.mul_(sizes.unsqueeze(-1))
        return None

    def _average(self, members: Sequence[Pending], x: Tensor) -> None:
        if "momentum" in self.taken:
            self.taken["momentum"]()
            return
        for one, place in _each(members, x):
            momentum.average(one, Matrix(place), self.ema, self.momentum.lookahead)

    def _length(self, members: Sequence[Pending], now: Tensor, missing: Tensor | None, power: Tensor | None) -> Tensor:
        """Without a graft: the lengths of the steps, ``(c)``.

        They are computed as logarithms, because roots of covariances have any size. `update_clip` then limits them.
        """
        group, wide = members[0].group, torch.float32 if now.device.type == "mps" else torch.float64
        length = now.to(wide).log()
        if power is not None:
            length = length + power.to(wide) * math.log(2.0)
        if missing is not None:
            length = length + missing
        if self.before:
            length = length + math.log(self.size)
        if group["update_clip"]:
            length = length.clamp(max=math.log(group["update_clip"]) + math.log(members[0].p.numel() // self.count) / 2)
        norm = length.clamp(max=math.log(torch.finfo(now.dtype).max) / 2).exp().to(now.dtype)
        if group["scale_parameter"]:
            norm = norm * self._sizes(members, now.dtype)
        return norm / self.size if self.averages and self.before else norm

    def _sizes(self, members: Sequence[Pending], dtype: torch.dtype) -> Tensor:
        """For each matrix, the factor of `scale_parameter`."""
        return graft.sizes([one.p.data for one in members], dtype, members[0].group, self.count)

    def _write(self, members: Sequence[Pending], x: Tensor) -> None:
        if "write_back" in self.taken:
            self.taken["write_back"]()
            return
        for one, place in _each(members, x):
            write_back.take(one, Matrix(place), 1.0)


def _each(members: Sequence[Pending], x: Tensor) -> list[tuple[Pending, Tensor]]:
    """Each member with its place in the stack. In a rehearsal one pair stands for all."""
    return [(members[0], x[0])] if x.is_meta else list(zip(members, x, strict=True))


def _norms(x: Tensor) -> Tensor:
    """``(c)``: Frobenius norms."""
    return torch.linalg.vector_norm(x.view(len(x), -1), dim=1)


def _rates(members: Sequence[Pending], x: Tensor, factor: float) -> list[float | Tensor]:
    """The learning rate of each member, times ``factor``. Members of one group get the same object."""
    of_group: dict[int, float | Tensor] = {}
    for one in members:
        if id(one.group) not in of_group:
            value = step_rate(one.group) * factor
            if one.rule is not None and one.rule.gate is not None:
                value = one.rule.gate.size(value, x.device, x.dtype)
            of_group[id(one.group)] = value.to(x.device, x.dtype) if isinstance(value, Tensor) else value
    return [of_group[id(one.group)] for one in members]


def _scale(x: Tensor, factor: Tensor | None, rates: Sequence[float | Tensor]) -> None:
    """``x <- rate * factor * x`` for ``x`` of shape ``(n, *)``, with a rate and a factor for each of the n."""
    rate = rates[0]
    tensors = any(isinstance(one, Tensor) for one in rates)
    if all(one is rate or (not tensors and one == rate) for one in rates):
        if factor is not None:
            x.mul_((factor * rate).unsqueeze(-1))
        else:
            x.mul_(rate)
        return
    if factor is not None:
        x.mul_(factor.unsqueeze(-1))
    if tensors:  # they are not read, because that would wait for the device
        each = [one.view(()) if isinstance(one, Tensor) else x.new_full((), one) for one in rates]
        x.mul_(torch.stack(each).unsqueeze(-1))
    else:
        torch._foreach_mul_(list(x.unbind(0)), [float(one) for one in rates])


def _never(one: Pending) -> None:
    raise AssertionError("a stack takes the steps of all its members at once")


def _nothing() -> None:
    """Stands for a kernel in a rehearsal."""

"""Prepares and takes the steps of all parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.optim.ambient import outside_graphs, uninterrupted
from sketch_plugins.optim.fused import Backend, numbers, vector
from sketch_plugins.optim.measuring import rms_of
from sketch_plugins.optim.pending import Batch, Pending, copied_aside
from sketch_plugins.optim.remembered import Again, Counters
from sketch_plugins.optim.resolved import Resolution, Rules
from sketch_plugins.optim.self_check import confirm
from sketch_plugins.optim.weight_bits import matrix_of
from sketch_plugins.sharding.dtensors import local_grad
from sketch_plugins.sharding.parts import Part, opened
from sketch_plugins.sharding.state_names import CORRECTION, flattened
from sketch_plugins.stores import Gradient

# (group, index in the group) of each parameter with a gradient.
Members = Sequence[tuple[dict[str, Any], int]]
# Stands for a row of numbers that is on a device.
EMPTY: tuple[float, ...] = ()
# A part with its group and its gradient, or the result of resolving its eager step.
Work = tuple[Part, dict[str, Any], Gradient] | Pending


class StepOfAll:
    """Everything that takes part in a step, collected before anything changes.

    Attributes:
        groups: (group, gradients of all its parameters, None if there is none) of groups that are recalled as a whole.
        single: (group, index) of each other parameter.
        work: their parts that have to be described, or whose eager steps are repeated.
        again: their parts that look as they did in the last step, by backend.
        outliving: gradients that were made for this step. Kernels only know addresses, so this keeps them alive.
    """

    def __init__(self) -> None:
        self.groups: list[tuple[dict[str, Any], list[Any]]] = []
        self.single: list[tuple[dict[str, Any], int]] = []
        self.work: list[Work] = []
        self.again: dict[Backend, Again] = {}
        self.outliving: list[Tensor | None] = []

    @property
    def members(self) -> Members:
        """(group, index) of each parameter that takes part."""
        whole = [(group, i) for group, grads in self.groups for i, grad in enumerate(grads) if grad is not None]
        return [*whole, *self.single]

    def gradients(self) -> Iterator[tuple[dict[str, Any], Tensor, Gradient | None]]:
        """The tensors that the step reads gradients from, each with its group.

        The third is the `Gradient` that holds the tensor; None if the part's step is recalled, which reads its address.
        """
        described = set()
        for one in self.work:
            p, group, grad = (one.p, one.group, one.grad) if isinstance(one, Pending) else one
            described.add(id(p.owner))
            yield group, grad.matrix.tensor, grad
        for group, index in self.members:
            owner = group["params"][index]
            if id(owner) not in described:
                yield group, local_grad(owner), None


class Taking(Resolution):
    """Takes the steps that have been resolved, and the steps of parts that look as they did in the last step."""

    @outside_graphs
    def _update(self, work: list[Work], again: dict[Backend, Again], only: int | None = None) -> None:
        """Change state and parameters. ``only`` is the id of the one parameter that takes a step, if it is only one.

        Everything that can fail comes first. Until `_commit` nothing has changed.
        """
        large = self._has_large() if work else False
        rules: Rules = {}
        pending = [
            self._repeat(one, rules) if isinstance(one, Pending) else self._resolve(*one, rules, large) for one in work
        ]
        eager = [one for one in pending if one.backend is None and not one.idle]
        batches = self._together(eager) if eager else []
        if pending:
            confirm(self, [*pending, *(trial for batch in batches for trial in batch.trials)])
        for batch in batches:
            batch.settle()
        known = set(map(id, eager))
        refused = [one for one in pending if one.backend is None and not one.idle and id(one) not in known]
        batches += [Batch(self._eager, [one]) for one in refused]
        fused: dict[Backend, list[Pending]] = {backend: [] for backend in again}
        for one in pending:
            if one.backend is not None:
                fused.setdefault(one.backend, []).append(one)
        takes: list[tuple[list[Pending], list[Tensor], Callable[[], None]]] = []
        for backend, members in fused.items():
            self._fill_numbers(members)
            takes += self._prepare(backend, members, again.get(backend), only)
        slots = self._reserve(batches)
        ways = [batch.way for batch in batches]
        for batch in batches:
            batch.prepare()
        if ways != [batch.way for batch in batches]:  # kernels have refused, so more is eager than was planned
            slots = self._reserve(batches)
            for batch in batches:
                batch.prepare()
        # The options of everything that is described for the next step.
        assert self._step_cache is not None
        cache = self._step_cache
        marks = [None if one.repeated else cache.marks(self.OPTIONS, one.group) for one in pending]
        changed = [tensor for one in pending for tensor in (one.p.owner, one.p.data)]
        for those in again.values():
            changed += those.changed
        # Kernels write to addresses, and shards are written in place of their parameters. autograd has to know, because
        # a backward through a graph that needs the old weights would otherwise be silently wrong.
        torch.autograd.graph.increment_version(changed)
        with uninterrupted():
            idle = [counter for those in again.values() for counter in those.idle]
            if idle:
                torch._foreach_add_(idle, 1.0)
            stepped: list[Pending] = []
            try:
                self._commit([one for one in pending if one.idle], batches, takes, stepped)
            finally:
                # They are adopted in their own order, whoever took them: that of the pieces in a partition's state.
                places = {id(one): place for place, one in enumerate(pending)}
                for one in sorted(stepped, key=lambda one: places[id(one)]):
                    self._adopt(one)
                if self._unmeasured:
                    self._unmeasured -= {one.p.identity for one in stepped}
        if slots is not None:
            slots.update(scratch.used())
        self._describe(pending, marks)

    def _describe(self, pending: Sequence[Pending], marks: Sequence[Any]) -> None:
        assert self._step_cache is not None
        for one, options in zip(pending, marks, strict=True):
            if one.backend is None and not one.idle:
                self._step_cache.used += 1
                if not one.repeated:
                    self._step_cache.describe(one, options)

    def _prepare(
        self, backend: Backend, pending: list[Pending], known: Again | None, only: int | None
    ) -> list[tuple[list[Pending], list[Tensor], Callable[[], None]]]:
        """(parts, their step counters, the function that takes their steps) for each launch."""
        assert self._step_cache is not None
        alone, described = [], []
        for new in pending:
            assert new.work is not None
            # A step that will not come again in this form is not described for the next one.
            counted = new.rule is not None or new.group["capturable"]
            likely = backend.prepare is None or (counted and self._step_cache.marks(self.OPTIONS, new.group))
            task = backend.task(new.work) if likely else None
            if task is None:
                alone.append(new)
            else:
                described.append((new, task))
        takes = []
        if known or described:
            takes += self._prepare_tasks(backend, described, known or Again(), only)
        if alone:
            assert backend.prepare is not None
            for places, take in backend.prepare([one.work for one in alone if one.work is not None], self._moves):
                members = [alone[i] for i in places]
                takes.append((members, [one.state["step"] for one in members], take))
        return takes

    def _prepare_tasks(
        self, backend: Backend, described: list[tuple[Pending, Any]], known: Again, only: int | None
    ) -> list[tuple[list[Pending], list[Tensor], Callable[[], None]]]:
        assert self._step_cache is not None
        cache = self._step_cache
        rows: list[Sequence[float]] = []
        filled: list[tuple[int, Tensor]] = []  # places in `rows`, and the rows that are on a device
        for group, step, factor in known.rules:
            l2 = group["weight_decay"] if self._couples(group) else None
            if isinstance(step, list):
                filled.append((len(rows), self._numbers_on_device(group, step, False, l2, factor)[0]))
                rows += [EMPTY] * len(step)
                continue
            row, _ = vector(numbers(self._rule(group, step, False).times(factor), group, step, l2), torch.device("cpu"))
            if isinstance(row, Tensor):
                filled.append((len(rows), row[None]))
            rows.append(EMPTY if isinstance(row, Tensor) else row)
        tasks, which = list(known.tasks), list(known.which)
        gradients, counters = list(known.gradients), list(known.counters)
        before = len(tasks)
        given: dict[int, int] = {}  # parts of one group share their numbers
        for new, task in described:
            assert new.work is not None
            values = new.work.numbers
            if id(values) not in given:
                given[id(values)] = len(rows)
                if isinstance(values, Tensor):
                    filled.append((len(rows), values[None]))
                rows.append(EMPTY if isinstance(values, Tensor) else values)
            tasks.append(task)
            which.append(given[id(values)])
            gradients.append(new.work.g.data_ptr())
            counters.append(new.state["step"])
        last = cache.programs.get((backend, only))
        program, takes = backend.prepare_tasks(
            tasks, rows, which, gradients, last, moves=self._moves, **({"filled": filled} if filled else {})
        )

        marks = {id(new.group): cache.marks(self.OPTIONS, new.group) for new, _ in described}

        def learning(take: Callable[[], None], members: list[tuple[Pending, Any]], count: int) -> None:
            take()
            cache.programs[backend, only] = program
            cache.used += count
            for new, task in members:
                assert new.work is not None
                if new.work.last is not None and not new.work.once:
                    continue  # a first step with lagged_rms differs from those that follow
                options = marks[id(new.group)]
                # `new.p.grad` may communicate, and the other ranks would not take part.
                own = flattened(new.state, new.p.key)
                cache.learn(new.p, new.grad.matrix.tensor, options, own, backend, task, new.factor)

        out: list[tuple[list[Pending], list[Tensor], Callable[[], None]]] = []
        again = not described and program is cache.programs.get((backend, only))
        for number, (places, take) in enumerate(takes):
            members = [described[i - before] for i in places if i >= before] if described else []
            run = partial(learning, take, members, len(places))
            steps = [counters[i] for i in places]
            if again and len(steps) > 1:
                steps = self._counted_at_once((backend, only, number), steps)
            out.append(([new for new, _ in members], steps, run))
        return out

    def _counted_at_once(self, launch: Any, counters: list[Tensor]) -> list[Tensor]:
        """The counters of a launch that is repeated, as one tensor if possible."""
        assert self._step_cache is not None
        known = self._step_cache.counters.get(launch)
        if known is None or not known.holds(counters):
            if len({counter.device for counter in counters}) > 1:  # some groups are capturable, others are not
                return counters
            if self._step_cache.captured:  # replays increase the counters where they were during the capture
                return counters
            if any(counter.is_cpu and counter.is_shared() for counter in counters):  # other processes count there, too
                self._step_cache.counters.pop(launch, None)
                return counters
            known = self._step_cache.counters[launch] = Counters(counters)
        return [known.all]

    def _fill_numbers(self, pending: list[Pending]) -> None:
        shared: dict[tuple[int, Any, bool, float, torch.device], tuple[list[float] | Tensor, int]] = {}
        on_device: dict[tuple[int, bool, float, torch.device], list[Pending]] = {}
        for one in pending:
            assert one.work is not None
            sparse = one.grad.rows is not None
            if one.rule is None:
                on_device.setdefault((id(one.group), sparse, one.factor, one.step.device), []).append(one)
                continue
            key = (id(one.group), one.step, sparse, one.factor, one.work.p.device)
            if key not in shared:
                shared[key] = vector(numbers(one.rule, one.group, one.step, _l2(one.grad)), one.work.p.device)
            one.work.numbers, one.work.flags = shared[key]
        for (_, sparse, factor, _), members in on_device.items():
            counters, l2 = [one.step for one in members], _l2(members[0].grad)
            rows, flags = self._numbers_on_device(members[0].group, counters, sparse, l2, factor)
            for one, row in zip(members, rows, strict=True):
                assert one.work is not None
                one.work.numbers, one.work.flags = row, flags

    def _numbers_on_device(
        self, group: dict[str, Any], counters: list[Tensor], sparse: bool, l2: float | None, factor: float
    ) -> tuple[Tensor, int]:
        """`vector` with a row for each step counter. The counters stay on their device."""
        steps = torch.stack(counters) + 1
        rows, flags = vector(
            numbers(self._rule(group, steps.double(), sparse).times(factor), group, steps, l2),
            steps.device,
            len(counters),
        )
        assert isinstance(rows, Tensor)
        return rows, flags

    def _commit(
        self,
        idle: Sequence[Pending],
        batches: Sequence[Batch],
        takes: Sequence[tuple[list[Pending], list[Tensor], Callable[[], None]]],
        stepped: list[Pending],
    ) -> None:
        """Take the steps. A part's step counter changes together with its state, so an error leaves no part half-way.

        (Members of a stack that are too large to be undone are an exception: see docs/architecture.md.)

        ``stepped`` collects the parts that have taken their step.
        """
        for one in idle:
            one.state["step"] += 1
            if one.p.numel():
                self._clean(one)
            if one.group.get("lagged_rms") and one.step == 1:  # no row was measured, and the next step is not the first
                one.state["rms"]["last"][..., 1] = rms_of(matrix_of(one), one.grad)
            stepped.append(one)
        for batch in batches:
            with self._undone_by_an_error(batch.members), ExitStack() as copies:
                members = []
                torch._foreach_add_([one.state["step"] for one in batch.members], 1.0)
                for one in batch.members:
                    self._clean(one)
                    p = copies.enter_context(opened(one.p))
                    members.append(one if p is one.p else one.at(p, one.grad.of(one.grad.like(p.data))))
                batch.take(members)
            stepped += batch.members
        for members, counters, take in takes:
            for one in members:
                self._clean(one)
            take()
            if counters:
                torch._foreach_add_(counters, 1.0)
            stepped += members

    @contextmanager
    def _undone_by_an_error(self, members: Sequence[Pending]) -> Iterator[None]:
        """Restore the parts after an error in the block, as far as `Pending.undone` goes."""
        copies = copied_aside(members)
        try:
            yield
        except BaseException:
            for one in members:
                one.state["step"].fill_(one.step - 1)
            for tensors, before in copies:
                torch._foreach_copy_(tensors, before)
            for one in members:
                # Corrections of a tile may have been written without their weights.
                if CORRECTION in one.state and not one.undone:
                    one.state[CORRECTION]["codes"].zero_()
            raise

    def _clean(self, one: Pending) -> None:
        if not one.group["capturable"] and one.cleans:
            one.named["second_moment"].clean(one.state["second_moment"], one.group["clean_factor"], one.step)

    def _adopt(self, one: Pending) -> None:
        """Make state that was created in this step the optimizer's state."""
        if one.fresh:
            self.state[one.p.owner].update(flattened(one.state, one.p.key))


def _l2(grad: Gradient) -> float | None:
    return None if grad.l2 is None else grad.l2[1]

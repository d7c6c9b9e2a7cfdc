"""A row of a plan: the peak of one optimizer, from timelines of its passes, and its largest batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sketch_plugins.memory.plan_checks import PRECISIONS
from sketch_plugins.memory.plan_cuda import WORKSPACE
from sketch_plugins.memory.plan_model import Described
from sketch_plugins.memory.plan_optimizers import Choice, Cost, cost, sharded_cost
from sketch_plugins.memory.plan_table import Row
from sketch_plugins.memory.plan_trace import CUDA_BLOCK, Subject, Timeline
from sketch_plugins.memory.search import largest

_MOST = 1 << 20


class Runs:
    """The passes that have run so far, by dtype of the weights, kind and batch."""

    def __init__(self, model: Described, cuda: bool, precision: str, accumulation: int) -> None:
        self.model, self.cuda, self.precision, self.accumulation = model, cuda, precision, accumulation
        self._subjects: dict[torch.dtype, Subject] = {}
        self._seen: dict[Any, Timeline] = {}

    def dtypes(self, choice: Choice) -> tuple[torch.dtype, torch.dtype | None]:
        """The dtypes of the weights and of autocast."""
        return PRECISIONS["bf16" if choice.pure_bf16 else self.precision]

    def subject(self, choice: Choice) -> Subject:
        """The model in the dtype of the choice."""
        dtype, _ = self.dtypes(choice)
        if dtype not in self._subjects:
            self._subjects[dtype] = Subject(self.model.build, dtype)
        return self._subjects[dtype]

    def timeline(self, choice: Choice, in_backward: bool, batch: int) -> Timeline:
        """The timeline of one pass, which runs once."""
        dtype, autocast = self.dtypes(choice)
        key = dtype, autocast, in_backward, batch
        if key not in self._seen:

            def loss(model: nn.Module, given: Any) -> Tensor:
                if autocast is None:
                    return self.model.loss(model, given)
                with torch.autocast("cpu", dtype=autocast):
                    return self.model.loss(model, given)

            self._seen[key] = self.subject(choice).trace(
                lambda: self.model.sample(batch),
                loss,
                cuda=self.cuda,
                in_backward=in_backward,
                accumulation=self.accumulation,
            )
        return self._seen[key]

    def expected(self, choice: Choice, in_backward: bool, near: int) -> Callable[[int], Timeline | None]:
        """Timelines of other batches, computed from two batches that run."""
        # A batch of one is special: some operators return a view there that would be a copy for larger batches.
        first = max(near, 2)
        pair = first, 2 * first
        one, two = (self.timeline(choice, in_backward, batch) for batch in pair)
        return lambda batch: one.between(two, pair, batch)


@dataclass(frozen=True)
class _Peak:
    gradients: int
    activations: int
    total: int
    at_peak: dict[str, int]
    when: str


def row_of(choice: Choice, runs: Runs, batch: int, most: int | None, sharding: tuple[int, int]) -> Row:
    """The row of an optimizer, for passes of ``batch`` samples.

    Args:
        choice: the optimizer.
        runs: the passes so far; further ones are added.
        batch: samples of a pass.
        most: bytes that the peak may have, for the largest batch; None: no budget.
        sharding: stage of ZeRO (0: none) and number of ranks.
    """
    stage, world = sharding
    subject = runs.subject(choice)
    spent = sharded_cost(choice, subject, runs.cuda, stage, world) if stage else cost(choice, subject, runs.cuda)
    in_backward = choice.in_backward or stage >= 2
    parameters = parameter_bytes(runs, choice, sharding)

    def of(timeline: Timeline) -> _Peak:
        return _peak(timeline, runs, choice, spent, sharding)

    peak = of(runs.timeline(choice, in_backward, batch))
    found = None
    if most is not None:
        limit = most

        def fits(size: int) -> bool:
            return of(runs.timeline(choice, in_backward, size)).total <= limit

        found = _largest(fits, runs.expected(choice, in_backward, batch), lambda t: of(t).total <= limit, batch)
    return Row(
        optimizer=choice.label,
        parameters=parameters,
        gradients=peak.gradients,
        state=spent.state,
        activations=peak.activations,
        peak=peak.total,
        at_peak=peak.at_peak,
        when=peak.when,
        largest_batch=found,
        precision="bf16" if choice.pure_bf16 else runs.precision,
    )


def _largest(
    fits: Callable[[int], bool],
    expected: Callable[[int], Timeline | None],
    would: Callable[[Timeline], bool],
    batch: int,
) -> int:
    """Search with timelines computed from two runs, and confirm the result by runs of this batch and the next one."""
    if expected(batch) is None:
        return largest(fits, batch, _MOST, max_trials=60)

    def might(size: int) -> bool:
        timeline = expected(size)
        return timeline is not None and would(timeline)

    found = largest(might, batch, _MOST, max_trials=60)
    if (found == 0 or fits(found)) and (found == _MOST or not fits(found + 1)):
        return found
    return largest(fits, max(found, 1), _MOST, max_trials=60)


def parameter_bytes(runs: Runs, choice: Choice, sharding: tuple[int, int]) -> int:
    """Bytes of the weights on one rank, each rounded up to blocks of the allocator."""
    block = CUDA_BLOCK if runs.cuda else 1
    whole = sum(-(-p.nbytes // block) * block for p in runs.subject(choice).model.parameters())
    return -(-whole // sharding[1]) if sharding[0] == 3 else whole


def _peak(timeline: Timeline, runs: Runs, choice: Choice, spent: Cost, sharding: tuple[int, int]) -> _Peak:
    stage, world = sharding
    block = CUDA_BLOCK if runs.cuda else 1
    subject = runs.subject(choice)
    gradients = [-(-p.nbytes // block) * block for p in subject.parameters]
    parameters = parameter_bytes(runs, choice, sharding)
    # ZeRO-3 gathers the next parameter while it works on one, so the largest parameter counts twice.
    gathered = 2 * max(gradients, default=0) if stage == 3 else 0
    share = -(-sum(gradients) // world) if stage >= 2 else 0
    workspace = WORKSPACE if runs.cuda else 0
    ratio = spent.step / max(gradients, default=1) if choice.in_backward else 0.0
    moment = timeline.peak(ratio)
    weights = timeline.base - timeline.other
    passing = {
        "parameters": parameters,
        "gradients": moment.gradients + share,
        "state": spent.state,
        "activations": moment.total - weights - moment.gradients + gathered + workspace,
    }
    left = 0 if choice.in_backward else share or sum(gradients)
    in_pass = sum(passing.values())
    step = {
        "parameters": parameters,
        "gradients": left,
        "state": spent.state,
        "activations": timeline.other + workspace,
    }
    if not choice.in_backward and sum(step.values()) + spent.bound > in_pass:
        step["activations"] += spent.step
    in_step = sum(step.values())
    return _Peak(
        gradients=max(moment.most_gradients + share, left),
        activations=max(moment.most_others + gathered + workspace, step["activations"]),
        total=max(in_pass, in_step),
        at_peak=passing if in_pass >= in_step else step,
        when="forward and backward" if in_pass >= in_step else "step",
    )

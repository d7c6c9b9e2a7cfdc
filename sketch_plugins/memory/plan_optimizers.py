"""Memory of optimizers: ours by their own accounting, torch's by a step on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

from sketch_plugins import registry
from sketch_plugins.memory.plan_trace import CUDA_BLOCK, Recorder, Subject, without_collector
from sketch_plugins.optim import SketchOptimizer, Sketchy
from sketch_plugins.optim.fused import CPU_MIN_SIZE, backend
from sketch_plugins.optim.gradients import ACCELERATOR_CHUNK, CPU_CHUNK
from sketch_plugins.sharding.blocks import matrix_shape
from sketch_plugins.sharding.parts import Part
from sketch_plugins.sharding.pieces import Fragment, Piece, pieces
from sketch_plugins.sharding.state_names import PLACE

IN_BACKWARD = "_layerwise"
#: torch's optimizers for comparison: class and arguments.
TORCH: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW", {"fused": True}),
    "adamw_foreach": ("AdamW", {"foreach": True}),
    "adafactor": ("Adafactor", {}),
    "sgd": ("SGD", {"momentum": 0.9, "fused": True}),
}
# Entries of "all" beside the names of the registry.
_MORE = ("cs_adam:preset=lean", f"cs_adam{IN_BACKWARD}", f"cs_adam{IN_BACKWARD}:preset=lean")


@dataclass(frozen=True)
class Choice:
    """One optimizer of a plan.

    Attributes:
        label: name in the table.
        name: name in the registry, or in `TORCH`.
        options: its options.
        in_backward: it takes its steps in backward, and gradients are freed one by one.
        pure_bf16: weights are bfloat16 in any precision of the plan: with stochastic rounding, or with corrections in
            the state (``weight_bits``), there is no float32 copy.
        offloaded: state, and the weights that are stepped, are in host memory, and so is the step: 0 bytes here.
    """

    label: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    in_backward: bool = False
    pure_bf16: bool = False
    offloaded: bool = False

    def build(self, parameters: Sequence[Tensor], cuda: bool) -> torch.optim.Optimizer:
        """The optimizer for parameters that are fake tensors."""
        if self.name in TORCH:
            name, arguments = TORCH[self.name]
            return getattr(torch.optim, name)(parameters, lr=1e-3, **arguments)
        cls: Any = registry.get(self.name).cls
        chunk = {"chunk_size": ACCELERATOR_CHUNK} if cuda and "chunk_size" in cls.OPTIONS else {}
        return cls(parameters, **{"lr": 1e-3, **chunk, **self.options})


class Cost:
    """Bytes of an optimizer; with sharding, those of a rank's part.

    Args:
        state: bytes of its state.
        step: function that returns the temporary bytes of a step. It takes seconds for an optimizer that works in
            tiles.
        bound: upper bound of ``step``.
    """

    def __init__(self, state: int, step: int | Callable[[], int], bound: int | None = None) -> None:
        self.state, self._step, self._bound = state, step, bound

    @property
    def step(self) -> int:
        """Temporary bytes of a step."""
        if not isinstance(self._step, int):
            self._step = self._step()
        return self._step

    @property
    def bound(self) -> int:
        """An upper bound of `step` that takes no time to compute."""
        return self._step if isinstance(self._step, int) else self.step if self._bound is None else self._bound


def known() -> list[str]:
    """All names that `choices` accepts."""
    return ["all", *registry.names(), *(f"{name}{IN_BACKWARD}" for name in registry.names()), *TORCH]


def choices(optimizers: str | Sequence[str | Choice], precision: str) -> list[Choice]:
    """The optimizers of a plan: ``"all"``, or names, with options after a colon: ``cs_adam:preset=lean,seed=1``.

    Raises:
        ValueError: an unknown name, option or value; the message lists the known ones.
    """
    wanted: list[Choice] = []
    for item in [optimizers] if isinstance(optimizers, str) else optimizers:
        if isinstance(item, Choice):
            wanted.append(item)
            continue
        for text in _split(item):
            if text == "all":
                wanted += [_choice(name) for name in ("adamw", "adafactor", *registry.names(), *_MORE)]
                if precision != "bf16":
                    rounded = _choice(f"cs_adam{IN_BACKWARD}:stochastic_rounding=true")
                    wanted.append(replace(rounded, label=f"cs_adam{IN_BACKWARD}, bf16 weights", pure_bf16=True))
            else:
                wanted.append(_choice(text))
    if not wanted:
        raise ValueError(f"no optimizer was given; the optimizers are {', '.join(known())}")
    return list({choice.label: choice for choice in wanted}.values())


def cost(choice: Choice, subject: Subject, cuda: bool) -> Cost:
    """State and temporaries of an optimizer without ZeRO."""
    if choice.offloaded:
        return Cost(0, 0)
    optimizer = choice.build(subject.parameters, cuda)
    if isinstance(optimizer, SketchOptimizer):
        state = 0
        for _, group, part, _ in optimizer.held():
            state += _bytes(optimizer._layout(part, group, part), CUDA_BLOCK if cuda else 1)
        if not takes_eager_steps(optimizer, cuda):
            return Cost(state, 0)
        largest = max((p.numel() for p in subject.parameters), default=0)
        chunk = max(group["chunk_size"] or 0 for group in optimizer.param_groups) or CPU_CHUNK
        # A dozen buffers of a tile. Sketchy also has some of the size of a tensor, and stacks the tensors that it
        # decomposes.
        bound = 12 * 4 * min(chunk, largest) + (8 * 4 * largest + 4 * state if isinstance(optimizer, Sketchy) else 0)
        return Cost(state, lambda: _step(optimizer, subject, cuda).step, bound)
    return _step(optimizer, subject, cuda)


def sharded_cost(choice: Choice, subject: Subject, cuda: bool, stage: int, world: int) -> Cost:
    """The maximum for a rank under DeepSpeed's ZeRO, which gives an optimizer float32 partitions.

    A rank's partition has consecutive elements of all parameters in a row (stages 1 and 2), or of each parameter (stage
    3). Our optimizers keep the state of the pieces of parameters in it (docs/deepspeed.md); torch's see a vector. The
    partition itself, which the optimizer steps, is counted as state: 4 bytes an element.
    """
    shapes = [tuple(p.shape) for p in subject.parameters]
    most = 0
    optimizer = choice.build([torch.nn.Parameter(torch.empty(1, device="meta"))], cuda)
    for rank in range(world):
        held = list(_pieces(optimizer, shapes, stage, rank, world))
        elements = sum(piece.numel for piece in held)
        if isinstance(optimizer, SketchOptimizer):
            group = optimizer.param_groups[0]
            kept = sum(_bytes(optimizer._layout(part, group, part), 1) for part in map(_part, held))
        else:  # a vector, which Adafactor cannot factor
            kept = {"adamw": 8, "adamw_foreach": 8}.get(choice.name, 4) * elements
        most = max(most, kept + 4 * elements)
    # Eager steps of our optimizers are bounded by a chunk, and those of torch's by the partition.
    whole = cost(choice, subject, cuda)
    if isinstance(optimizer, SketchOptimizer):
        return Cost(most, lambda: whole.step, whole.bound)
    return Cost(most, -(-whole.step // world))


def takes_eager_steps(optimizer: SketchOptimizer, cuda: bool) -> bool:
    """Whether a step allocates tiles; fused kernels allocate next to nothing."""
    groups = optimizer.param_groups
    if any(group["fused"] is False or group["compile"] for group in groups):
        return True
    if isinstance(optimizer, Sketchy) and any(group.get("precondition") != "none" for group in groups):
        return True
    if cuda:
        return False
    if not any(p.numel() >= CPU_MIN_SIZE for group in groups for p in group["params"]):
        return True
    if backend(torch.device("cpu"), None) is None:
        return True
    from sketch_plugins.kernels import cpu

    return any(
        part.dtype not in cpu.VIEWS
        or cpu.unkept(*optimizer._stores(part, group), matrix_shape(part.shape, optimizer._batch(part, group))[0])
        or optimizer._couples(group)
        or (group["stochastic_rounding"] and part.dtype == torch.bfloat16 and not group.get("weight_bits"))
        for _, group, part, _ in optimizer.held()
    )


def _split(text: str) -> Iterator[str]:
    """Split names at commas, except at those between options: ``adamw,cs_adam:preset=lean,seed=1,sm3``."""
    found: list[str] = []
    for token in filter(None, (t.strip() for t in text.split(","))):
        name, is_option, _ = token.partition("=")
        if is_option and ":" not in name:
            if not found:
                raise ValueError(f"{token!r} does not belong to an optimizer: write NAME:{token}")
            found[-1] += ("," if ":" in found[-1] else ":") + token
        else:
            found.append(token)
    return iter(found)


def _choice(text: str) -> Choice:
    full, _, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    given = {key.strip(): value.strip() for key, _, value in pairs}
    if len(given) < len(pairs):
        raise ValueError(f"{text!r} gives an option twice")
    name, in_backward = (full.removesuffix(IN_BACKWARD), True) if full.endswith(IN_BACKWARD) else (full, False)
    if name in TORCH and not in_backward:
        if given:
            raise ValueError(f"{name} takes no options here, but {rest} was given")
        return Choice(name, name)
    if name not in registry.names():
        near = get_close_matches(full.lower(), known(), 1)
        hint = f"Did you mean {near[0]!r}? Known" if near else "Known"
        raise ValueError(f"unknown optimizer {full!r}. {hint} are {', '.join(known())}")
    options = registry.parse_options(name, given)
    # Corrections belong to bfloat16 weights.
    choice = Choice(f"{full} {rest}".strip(), name, options, in_backward, bool(options.get("weight_bits")))
    # Raises an error for contradictions before anything runs.
    choice.build([torch.nn.Parameter(torch.empty(1, device="meta"))], False)
    return choice


def _bytes(layout: Mapping[str, Any], block: int) -> int:
    total = 0
    for name, entry in layout.items():
        if name == PLACE:  # this entry only says where a piece lies
            continue
        if isinstance(entry, Mapping):
            total += _bytes(entry, block)
        else:
            size, dtype = entry
            total += -(-prod(size) * dtype.itemsize // block) * block
    return total


def _step(optimizer: torch.optim.Optimizer, subject: Subject, cuda: bool) -> Cost:
    """A step on fake tensors: memory that stays allocated is state, and all other memory is temporary."""
    recorder = Recorder(CUDA_BLOCK if cuda else 1)
    for group in optimizer.param_groups if isinstance(optimizer, SketchOptimizer) else []:
        # Sketchy knows which parts of its steps run in kernels, and leaves these out.
        if not isinstance(optimizer, Sketchy) or group["fused"]:
            group["fused"] = None if isinstance(optimizer, Sketchy) else False
    # Steps refuse tensors without numbers, because they read some. Here the recorder answers these reads.
    optimizer._numbers_are_answered = True  # type: ignore[attr-defined]
    with subject.fake, without_collector():
        for p in subject.parameters:
            p.grad = torch.empty_like(p)
            recorder.number(p)
            recorder.number(p.grad)
        recorder.events.clear()
        with recorder, torch.no_grad() if cuda else nullcontext():
            optimizer.step()
        left, events = recorder.live(), list(recorder.events)
        for p in subject.parameters:
            p.grad = None
    passing = accumulate(size for number, size in events if number not in left)
    return Cost(sum(left.values()), max(passing, default=0))


def _pieces(
    optimizer: torch.optim.Optimizer, shapes: Sequence[tuple[int, ...]], stage: int, rank: int, world: int
) -> Iterator[Piece]:
    start = 0

    def batch(f: Fragment) -> int:
        ours = isinstance(optimizer, SketchOptimizer)
        return optimizer.batch_axes(f.whole, optimizer.param_groups[0]) if ours else 0  # type: ignore[attr-defined]

    share = -(-sum(map(prod, shapes)) // world)
    low, high = rank * share, (rank + 1) * share
    for index, shape in enumerate(shapes):
        n = prod(shape)
        if stage == 3:
            part = -(-n // world)
            first, last = min(rank * part, n), min((rank + 1) * part, n)
        else:
            first, last = max(low - start, 0), min(high - start, n)
        if first < last:
            yield from pieces([Fragment(index, shape, first, last - first, 0)], batch)
        start += n


def _part(piece: Piece) -> Part:
    data = torch.empty(piece.shape, dtype=torch.float32, device="meta")
    return Part(data, data, 0, piece.whole, piece, piece.key)

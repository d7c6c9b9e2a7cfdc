"""The allocations of one training pass, event by event, on tensors that have shapes but no memory.

torch's own tracker (``torch.distributed._tools.mem_tracker.MemTracker``) is not used, because it gives sums at the
borders of modules and one peak, but `plan` needs the order of the events. From the events of two batches it computes
the peak of any other batch, and how much of a peak is gradients. Moreover, torch's tracker is private, and absent from
builds of torch without distributed. A test compares the two.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sketch_plugins.memory.plan_cuda import CudaLike, workspace

#: A CUDA device's allocator returns multiples of this size.
CUDA_BLOCK = 512


#: The product of fused experts (one 3-D parameter for all of them), if this version of torch has it.
_GROUPED_MM = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)


class NotTraceable(ValueError):
    """The model cannot run on tensors without numbers."""


@dataclass
class Timeline:
    """Allocations in their order.

    Attributes:
        deltas: bytes that were allocated (positive) or freed (negative), event by event.
        gradient: whether an event belongs to the gradient of a parameter.
        base: bytes allocated before the first event: parameters, buffers and the batch.
        other: the part of ``base`` that does not belong to parameters: buffers and the batch.
    """

    deltas: list[int]
    gradient: list[bool]
    base: int
    other: int

    def peak(self, step: float = 0.0) -> Moment:
        """The moment of the peak.

        Args:
            step: temporary bytes when a gradient is consumed during the pass, for each byte of the gradient.
        """
        best = now = gradients = at_gradients = most_gradients = rest = 0
        for delta, gradient in zip(self.deltas, self.gradient, strict=True):
            now += delta
            if gradient:
                if step and delta < 0 and now - delta - int(step * delta) > best:
                    best, at_gradients = now - delta - int(step * delta), gradients
                gradients += delta
                most_gradients = max(most_gradients, gradients)
            rest = max(rest, now - gradients)
            if now > best:
                best, at_gradients = now, gradients
        return Moment(self.base + best, at_gradients, most_gradients, self.other + rest)

    def between(self, other: Timeline, batch: tuple[int, int], wanted: int) -> Timeline | None:
        """The timeline of another batch: each size is affine in the batch. None if the two have different events."""
        if self.gradient != other.gradient or len(self.deltas) != len(other.deltas):
            return None
        share = (wanted - batch[0]) / (batch[1] - batch[0])

        def at(a: int, b: int) -> int:
            return round(a + (b - a) * share)

        deltas = [at(a, b) for a, b in zip(self.deltas, other.deltas, strict=True)]
        return Timeline(deltas, self.gradient, at(self.base, other.base), at(self.other, other.other))


@dataclass(frozen=True)
class Moment:
    """The peak of a timeline: all bytes and gradients at the peak; maxima over time of gradients and of the rest."""

    total: int
    gradients: int
    most_gradients: int
    most_others: int


class Recorder(TorchDispatchMode):
    """Records the allocation and the release of every storage.

    Args:
        block: sizes are rounded up to a multiple of it.
        workspace: function that returns the bytes that an operator takes while it runs, beside its result.
    """

    def __init__(self, block: int = 1, workspace: Callable[[Any, Any], int] = lambda func, args: 0) -> None:
        super().__init__()
        self.block, self.workspace = block, workspace
        self.events: list[tuple[int, int]] = []  # number of the storage, bytes
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}  # identity of a storage -> (itself, its number)
        self._count = 0
        self._sums: list[tuple[int, int, int]] = []  # place of the event, number of the first term, number of the sum

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and record the storages of its result."""
        if func is torch.ops.aten._local_scalar_dense.default:
            # The code reads a number, but there is none. The answer 1 means "true", as in `mask.all()`, and a step that
            # is not the first one.
            return {torch.bool: True}.get(args[0].dtype, 1 if not args[0].is_floating_point() else 1.0)
        if func is _GROUPED_MM and args[0].dtype != torch.bfloat16:
            out: Any = _grouped_mm(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self.number(tensor)
        if func.is_view:
            for tensor in tree_leaves(out):
                tensor._of_another = True  # a view holds its base, so autograd sees that the storage has two owners
        elif func is torch.ops.aten.add.Tensor and _in_engine() and not hasattr(args[0], "_of_another"):
            self._sums.append((len(self.events) - 1, self.number(args[0]), self.number(out)))
        size = self.workspace(func, args)
        if size:
            self.events += [(-1, size), (-1, -size)]
        return out

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor's storage; a new storage is recorded."""
        storage = tensor.untyped_storage()
        key = id(storage)
        known = self._known.get(key)
        if known is not None and known[0]() is storage:
            return known[1]
        number, size = self._count, -(-storage.nbytes() // self.block) * self.block
        self._count += 1
        self.events.append((number, size))

        def gone(_: Any) -> None:
            self.events.append((number, -size))
            if key in self._known and self._known[key][1] == number:
                del self._known[key]

        # The Python object of a storage lives as long as the storage itself, even if only C++ refers to it.
        self._known[key] = weakref.ref(storage, gone), number
        return number

    def settle(self, marked: set[int]) -> list[tuple[int, int]]:
        """The events, with autograd's in-place sums.

        If several operators use a tensor, autograd sums the gradients that they send. It sums them into the first one
        if nothing else refers to it, but not for tensors of a subclass, such as fake tensors. After this call, numbers
        of sums in ``marked`` are the numbers of the storages that hold them.
        """
        events: list[tuple[int, int] | None] = list(self.events)
        same: dict[int, int] = {}
        for place, term, total in self._sums:
            if not 0 <= place < len(events) or events[place] is None or self.events[place][0] != total:
                continue
            after = place + 1
            while after < len(events) and self.events[after][1] < 0 and self.events[after][0] != term:
                after += 1
            if after < len(events) and self.events[after][0] == term and self.events[after][1] < 0:
                events[place] = events[after] = None
                same[total] = term
        for number in sorted(same):  # a sum may be a term of the next one
            same[number] = same.get(same[number], same[number])
        marked |= {same[number] for number in marked if number in same}
        return [(same.get(event[0], event[0]), event[1]) for event in events if event is not None]

    def live(self) -> dict[int, int]:
        """Number -> bytes of the storages that are allocated."""
        sizes: dict[int, int] = {}
        for number, size in self.events:
            if size < 0:
                sizes.pop(number, None)
            else:
                sizes[number] = size
        return sizes


def _grouped_mm(
    first: Tensor, second: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Tensor:
    """The result of ``torch._grouped_mm``, without numbers.

    torch's own implementation for tensors without memory accepts bfloat16 only. Its kernels accept float32 and float16,
    too: they multiply group by group into the result, and need no other memory.
    """
    if first.ndim == 2 and second.ndim == 2:  # the gradient of the weights: a matrix for each group
        assert offs is not None
        shape = [offs.shape[0], first.shape[0], second.shape[1]]
    elif first.ndim == 3 and second.ndim == 3:
        shape = [first.shape[0], first.shape[1], second.shape[2]]
    else:
        shape = [first.shape[-2], second.shape[-1]]
    return torch.empty(shape, dtype=out_dtype or first.dtype, device=first.device)


@contextmanager
def without_collector() -> Iterator[None]:
    """Disable the garbage collector, which would free reference cycles at arbitrary times."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Subject:
    """A model whose tensors have shapes, dtypes and a device, and no memory.

    Args:
        build: makes the model. It is called on the meta device, where this costs nothing.
        dtype: dtype to cast floating point parameters and buffers to; None: no cast.
    """

    def __init__(self, build: Callable[[], nn.Module], dtype: torch.dtype | None = None) -> None:
        with torch.device("meta"):
            model = build()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            _materialize(model, dtype)
        self.model = model.train()
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def trace(
        self,
        sample: Callable[[], Any],
        loss: Callable[[nn.Module, Any], Tensor],
        *,
        cuda: bool = False,
        in_backward: bool = False,
        accumulation: int = 1,
    ) -> Timeline:
        """Run one pass forward and backward, from no gradients until the gradients are consumed.

        Args:
            sample: makes a batch.
            loss: computes the loss from the model and the batch.
            cuda: use CUDA's sizes and kernels.
            in_backward: a gradient is freed as soon as it is complete.
            accumulation: number of passes before gradients are consumed; more than two give the same result as two.

        Raises:
            NotTraceable: the model reads numbers.
        """
        for p in self.parameters:
            p.grad = None
        recorder = Recorder(CUDA_BLOCK, workspace) if cuda else Recorder()
        marked: set[int] = set()
        last = False

        def consume(p: Tensor) -> None:
            if last and p.grad is not None:
                marked.add(recorder.number(p.grad))
                p.grad = None

        hooks = [p.register_post_accumulate_grad_hook(consume) for p in self.parameters if in_backward]
        try:
            with self.fake, without_collector():
                batch = sample()
                weights = {recorder.number(p) for p in self.model.parameters()}
                for tensor in (*self.model.buffers(), *tree_leaves(batch)):
                    if isinstance(tensor, Tensor):
                        recorder.number(tensor)
                there = recorder.live()
                base, other = sum(there.values()), sum(size for key, size in there.items() if key not in weights)
                recorder.events.clear()
                with recorder, CudaLike() if cuda else nullcontext():
                    for number in range(min(accumulation, 2)):
                        last = number == min(accumulation, 2) - 1
                        value = loss(self.model, batch)
                        if accumulation > 1:
                            value = value / accumulation
                        _backward(value)
                        del value
                        marked.update(recorder.number(p.grad) for p in self.parameters if p.grad is not None)
                events = recorder.settle(marked)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise NotTraceable(
                f"the model's control flow depends on the values in its tensors ({error}), so its memory cannot "
                "be planned without running it"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
            for p in self.parameters:
                p.grad = None
        return Timeline([size for _, size in events], [number in marked for number, _ in events], base, other)


def _backward(value: Tensor) -> None:
    """Like ``value.backward()``, within which `CudaLike` would be off while checkpoints run layers again."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (value,), (torch.ones_like(value),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _in_engine() -> bool:
    """Whether autograd itself calls: in a backward, but not in a forward that a checkpoint runs again."""
    return torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()


def _materialize(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace tensors on the meta device by fake tensors on the CPU; tied ones stay tied."""
    done: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in done:
            to = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
            # Module.to would swap tensors, which tensors with weak references do not allow.
            new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=to, device="cpu")
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, tensor.requires_grad)
            done[id(tensor)] = new
        return done[id(tensor)]

    for module in model.modules():
        held: tuple[dict[str, Any], ...] = module._parameters, module._buffers
        for tensors in held:
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)

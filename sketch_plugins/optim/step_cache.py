"""What an optimizer remembers of its last step, so that the next one need not describe each parameter again.

Describing one takes 70 microseconds of Python or more, and in a training loop only the gradient's address changes from
step to step. Each step compares everything that a description was made from (addresses, shapes, dtypes, layouts,
options, the tensors of the state), and describes again what differs. Only step counters are kept alive. The cache is
not state: a copy of the optimizer starts without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sketch_plugins.optim.checks import steps_taken
from sketch_plugins.optim.fused import Backend
from sketch_plugins.optim.pending import Pending
from sketch_plugins.optim.remembered import Again, Counters, Remembered
from sketch_plugins.optim.remembered_group import RememberedGroup, is_counter, remember
from sketch_plugins.scratch import Slot
from sketch_plugins.sharding.blocks import Matrix
from sketch_plugins.sharding.parts import Part
from sketch_plugins.sharding.state_names import flattened, is_step
from sketch_plugins.stores import Gradient

# Options that are read in every step. They are not compared.
_NUMBERS = ("lr", "betas", "eps")
_PLAIN = (Tensor, torch.nn.Parameter)
# The fewest parts of a group that is remembered as a whole, and after how many failures it is not any more.
GROUP, FAILURES = 4, 20
# After so many recalled steps, earlier failures are forgotten.
LASTING = 100


class LikeGradient(NamedTuple):
    """What a `Gradient` is made from, apart from the tensor."""

    batch: int
    dtype: torch.dtype
    chunk: int
    shape: tuple[int, int]
    negate: bool
    matrices: int
    measured: int


class Described:
    """The result of resolving a part's eager step: stores, what its gradient is made from, names in the state."""

    def __init__(self, one: Pending, names: Sequence[str]) -> None:
        grad = one.grad
        self.named = one.named
        self.gradient = LikeGradient(
            grad.matrix.batch, grad.dtype, grad.chunk, grad.shape, grad.negate, grad.matrices, grad.measured
        )  # fmt: skip
        self._names = list(zip(_paths(one.state), names, strict=True))

    def fits(self, gradient: int) -> bool:
        """See `Remembered`."""
        return True

    def state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The part's state, `nested`, from the state of its owner."""
        out: dict[str, Any] = {}
        for (kind, inner), name in self._names:
            if inner is None:
                out[kind] = state[name]
            else:
                out.setdefault(kind, {})[inner] = state[name]
        return out


def _paths(state: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """(kind, name within it) of each tensor of a nested state, in the order of `flattened`."""
    out: list[tuple[str, str | None]] = []
    for kind, value in state.items():
        out += [(kind, inner) for inner in value] if isinstance(value, Mapping) else [(kind, None)]
    return out


class StepCache:
    """Remembers what each part looked like, and its task."""

    def __init__(self) -> None:
        #: Programs of whole steps (None), and of the steps of single parameters (their id).
        self.programs: dict[tuple[Backend, int | None], Any] = {}
        #: Whether the optimizer has a tensor that is large enough to compile kernels for; None: not known.
        self.large: bool | None = None
        #: Whether a step has been captured in a graph.
        self.captured = False
        #: The number of tasks in the present step, and the largest of the last numbers.
        self.used = self.lately = 0
        #: Identity of a group -> the group, and its options in the last step.
        self.options: dict[int, tuple[Any, dict[str, Any]]] = {}
        #: Members of a stack of preconditioned tensors -> for each part of its step, its program.
        self.stacks: dict[tuple[Any, ...], dict[str, Any]] = {}
        #: Parts of an eager step -> the temporaries that it took.
        self.temporaries: dict[tuple[Any, ...], dict[Slot, int]] = {}
        #: (backend, only, number of a launch) -> the counters of its parts.
        self.counters: dict[Any, Counters] = {}
        #: Identities of a group and its first parameter -> its remembered steps, and how often recalling them failed.
        self._groups: dict[tuple[int, int], RememberedGroup] = {}
        self._failed: dict[tuple[int, int], int] = {}
        self._sparse: set[tuple[int, int]] = set()
        self._tasks: dict[Any, Remembered] = {}
        #: Parts whose steps are eager.
        self._described: dict[Any, Remembered] = {}
        self._marks: dict[int, tuple[Any, ...] | None] = {}

    def marks(self, options: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """`group_marks`, as the same object as long as they are equal. None during the capture of a graph.

        Replays read again what was uploaded in the capture, so a later step must not upload to the same place.
        """
        if group["capturable"] and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            self.captured = True
            return None
        now = group_marks(options, group)
        last = self._marks.get(id(group))
        if last == now:
            return last
        self._marks[id(group)] = now
        return now

    def recall_group(
        self,
        again: dict[Backend, Again],
        given: Sequence[Tensor],
        grads: list[Any],
        group: dict[str, Any],
        options: Any,
        state: Any,
    ) -> bool:
        """`recall` for all parameters of a group that have a gradient. If one is not recalled, nothing is added."""
        key = _key(group)
        known = self._groups.get(key)
        if known is None or options is None:
            return False
        those = again.get(known.backend)
        if those is None:
            those = again[known.backend] = Again()
        if known.recall(those, given, grads, group, options, state, [*self.counters.values()]):
            if known.times == LASTING:  # the group is stable, so earlier failures do not count any more
                self._failed.pop(key, None)
            return True
        if not those.tasks:
            del again[known.backend]
        del self._groups[key]
        self._failed[key] = self._failed.get(key, 0) + 1
        return False

    def dense(self, grads: list[Any], group: Mapping[str, Any]) -> list[Any]:
        """The gradients of a group, with None in place of sparse ones, whose rows differ from step to step.

        Groups in which `see_sparse` has not seen any are not searched: the result is then the list itself.
        """
        if not self._sparse or not grads or _key(group) not in self._sparse:
            return grads
        return [None if grad is None or is_sparse(grad) else grad for grad in grads]

    def see_sparse(self, group: Mapping[str, Any]) -> None:
        """Note that a parameter of the group has a sparse gradient."""
        self._sparse.add(_key(group))

    def may_learn(self, given: Sequence[Tensor], group: dict[str, Any]) -> bool:
        """Whether to call `learn_group`. It is no use if a group changes all the time, or cannot be remembered."""
        return bool(given) and self._failed.get(_key(group), 0) < FAILURES

    def learn_group(self, given: Sequence[Tensor], parts: Sequence[Part], group: dict[str, Any], state: Any) -> None:
        """Remember a group as a whole. All parts of these parameters have just been recalled one by one."""
        full, key = [part for part in parts if part.numel()], _key(group)
        known = None
        if len(full) >= GROUP:
            known = remember(given, parts, [self._tasks[part.identity] for part in full], state)
        if known is None:
            self._failed[key] = FAILURES
        else:
            self._groups[key] = known

    def recall(
        self,
        again: dict[Backend, Again],
        key: Any,
        p: Tensor,
        owner: Tensor,
        grad: Any,
        group: dict[str, Any],
        options: tuple[Any, ...] | None,
        state: Any,
    ) -> bool:
        """Add the step of a part to those that are taken again, if the part looks as it did.

        Args:
            again: the steps that are taken again.
            key: the part's `sharding.parts.Part.identity`.
            p: the part.
            owner: the tensor in the parameter group.
            grad: its gradient.
            group: its group.
            options: what `marks` returns for the group.
            state: the owner's state.
        """
        found = self._tasks.get(key)
        if (
            found is None
            or found.options is not options
            or type(grad) is not Tensor
            or type(p) not in _PLAIN
            or grad.layout is not torch.strided
        ):
            return False
        address = grad.data_ptr()
        if not found.holds(p, grad, address, state):
            return False
        counter = state[found.step]
        if not is_counter(counter, group):
            return False
        step = None if group["capturable"] else steps_taken(counter)
        # A first step is not repeated, because with lagged_rms it has to measure.
        if step is not None and not 1 <= step < 1e18:
            return False
        those = again.get(found.backend)
        if those is None:
            those = again[found.backend] = Again()
        those.outliving += (grad, *[state[name] for name, _, _ in found.tensors])
        those.add(found.task, address, counter, step, group, p, owner, found.factor)
        return True

    def repeated(
        self, part: Part, grad: Any, group: dict[str, Any], options: tuple[Any, ...] | None, state: Any
    ) -> Pending | None:
        """The eager step of a part that looks as it did, without its number and rule; None if it looks different.

        Args:
            part: the part.
            grad: its gradient.
            group: its group.
            options: what `marks` returns for the group.
            state: the owner's state.
        """
        found = self._described.get(part.identity)
        if found is None or found.options is not options or type(grad) is not Tensor or type(part.data) not in _PLAIN:
            return None
        if grad.layout is not torch.strided or not found.holds(part.data, grad, grad.data_ptr(), state):
            return None
        if not 1 <= steps_taken(state[found.step]) < 1e18:
            return None
        named, like = found.task.named, found.task.gradient
        gradient = Gradient(Matrix(grad, like.batch), None, like.dtype, like.chunk, like.shape, False, like.negate)
        gradient.matrices, gradient.measured = like.matrices, like.measured
        try:
            own = found.task.state(state)
        except KeyError:  # the state has another layout now
            return None
        return Pending(part, group, gradient, own, False, named)

    def describe(self, one: Pending, options: tuple[Any, ...] | None) -> None:
        """Keep the result of resolving an eager step for the next one, without its tensors."""
        p, grad = one.p.data, one.grad.matrix.tensor
        if options is None or one.refused or one.grad.rows is not None or one.grad.l2 is not None or one.grad.compile:
            return
        state = flattened(one.state, one.p.key)
        if _is_rememberable(p, grad, state):
            task = Described(one, list(state))
            self._described[one.p.identity] = Remembered(p, grad, options, state, None, task)

    def forget_eager(self) -> None:
        """Forget eager steps, because with a new group small tensors may use kernels, too."""
        self.large, self._described = None, {}

    def learn(
        self,
        part: Part,
        grad: Tensor | None,
        options: tuple[Any, ...] | None,
        state: Mapping[str, Any],
        backend: Backend,
        task: Any,
        factor: float = 1.0,
    ) -> None:
        """Keep a task for the next step. ``state`` is the part's, with the names that it has in the owner's state."""
        p = part.data
        if options is not None and grad is not None and _is_rememberable(p, grad, state):
            self._tasks[part.identity] = Remembered(p, grad, options, state, backend, task, factor)

    def trim(self) -> None:
        """Forget everything if most of it was not used: parameters that are replaced all the time leave tasks."""
        # The step of a small group says little about what is used, because DeepSpeed steps its groups one by one.
        self.lately = max(self.used, self.lately * 63 // 64)
        if max(len(self._tasks), len(self._described), len(self.programs), len(self._marks)) > 2 * self.lately + 1000:
            self._tasks, self._described, self.programs, self._marks = {}, {}, {}, {}
            self._groups, self._failed, self.counters, self.stacks, self._sparse = {}, {}, {}, {}, set()
        if len(self.stacks) > 64 + self.lately:  # if gradients come and go, each step has other stacks
            self.stacks = {}
        self.used = 0


def is_sparse(grad: Any) -> bool:
    """Whether a gradient is row-sparse."""
    return getattr(grad, "layout", torch.strided) is not torch.strided


def _key(group: Mapping[str, Any]) -> tuple[int, int]:
    """The key of a group, with its first parameter: ZeRO-3 steps several partitions in one group, one by one."""
    return id(group), id(group["params"][0])


def group_marks(options: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The options that a description depends on; None if every step has to be described."""
    if group["compile"] or group["row_sparse"] is not False or group.get("clean_every"):
        return None
    for name in _NUMBERS:
        value = group.get(name)
        for one in value if isinstance(value, tuple | list) else (value,):
            on_device = isinstance(one, Tensor) and not one.is_cpu  # reading it would wait for the device
            if on_device and not (name == "lr" and group["capturable"]):
                return None
    return (*[group.get(name) for name in options if name not in _NUMBERS], *_ways(group))


def _ways(group: Mapping[str, Any]) -> tuple[bool, ...]:
    """What kernels are compiled for that depends on numbers: whether a momentum looks ahead (see `Rule.lookahead`)."""
    betas = group.get("betas")
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        return ()
    return bool(betas[0] == 0), bool(betas[0] == betas[1])


def _is_rememberable(p: Tensor, grad: Tensor, state: Mapping[str, Any]) -> bool:
    """Whether part, gradient and state are tensors of the kind that `Remembered` compares."""
    if not (_is_plain(p) and type(grad) is Tensor and _is_plain(grad) and grad.shape == p.shape):
        return False
    if p.is_inference():  # it may only be written in inference mode, which `check_writable` checks
        return False
    if any(type(tensor) is not Tensor or tensor.is_inference() for tensor in state.values()):
        return False
    return state[next(filter(is_step, state))].numel() == 1


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in _PLAIN and tensor.layout is torch.strided and tensor.is_contiguous() and not tensor.is_neg()

"""State of the communication hook: options, the error memory of each parameter, and the entries that were sent."""

from __future__ import annotations

import hashlib
import math
import pickle
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from sketch_plugins.comm.base import Compressor, check_seed
from sketch_plugins.comm.block_topk import BlockTopK
from sketch_plugins.comm.count_sketch import CountSketchTopK
from sketch_plugins.comm.randk import RandK
from sketch_plugins.comm.schedule import DensitySchedule
from sketch_plugins.comm.topk import TopK

#: Name in options -> class.
COMPRESSORS: dict[str, type[Compressor]] = {cls.name: cls for cls in (TopK, BlockTopK, RandK, CountSketchTopK)}
MEMORY_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VERSION = 1
FILE = "memsgd-{rank:05d}-of-{world:05d}.pt"
KINDS = ("error", "momentum")


class Sent(NamedTuple):
    """Entries that a parameter's memory has sent in an iteration, kept until it is known whether they have arrived.

    Attributes:
        slot: memory of the parameter.
        where: ``(k,)`` positions; None if all entries were sent. Then the memory still has all of them.
        values: ``(k,)`` values at ``where``, not scaled. Without ``where``: whether anything was sent, 0-d.
        velocity: ``(k,)``, the velocities that factor masking has cleared.
        limit: 0-d; without ``where`` the largest number that could be sent, not scaled; None if there is no limit.
    """

    slot: dict[str, Tensor]
    where: Tensor | None
    values: Tensor
    velocity: Tensor | None = None
    limit: Tensor | None = None


class MemSGDState:
    r"""State of `memsgd_hook`: sparsified gradients with memory for DistributedDataParallel.

    Rank i of n keeps, for each parameter, a memory :math:`m_i` of the entries that it has not sent yet. In every
    iteration

    .. math::
        m_i \leftarrow m_i + g_i, \qquad \bar g = \frac{1}{n} \sum_i C(m_i), \qquad m_i \leftarrow m_i - C(m_i)

    and :math:`\bar g` replaces the averaged gradient: the optimizer gets k of d entries now, and the others later.
    The state on each rank takes 4 bytes a parameter (2 with ``memory_dtype="bf16"``; twice that with ``momentum``), and
    12 bytes (16 with ``momentum``) for each entry that the last iteration has sent. These entries are put back into the
    memory if another bucket is not finite and the step is skipped.

        ddp = DistributedDataParallel(model)
        state = MemSGDState(model.named_parameters(), density=0.01)
        ddp.register_comm_hook(state, memsgd_hook)

    Args:
        params: ``model.named_parameters()``, or (name, parameter) pairs. The memory is saved under the names. The order
            must be the same on every rank.
        process_group: the group of the DistributedDataParallel; None: the default group.
        compressor: ``"block_topk"`` (default), ``"topk"``, ``"randk"``, ``"count_sketch"``, or a `Compressor`.
        density: fraction of the entries that is sent, in (0, 1]; 1 averages everything, as without a hook.
        start: number of first iterations, in which everything is averaged, >= 2 (default 2). DistributedDataParallel
            rebuilds its buckets after the first one, and the first gradients of a training run are rarely sparse.
            PowerSGD recommends the length of the learning rate's warm-up.
        warmup: number of iterations after that in which the density falls from ``initial_density`` to ``density``; see
            `DensitySchedule` (default 0).
        initial_density: the density at the start of ``warmup`` (default 0.25).
        momentum: beta of DGC's momentum correction, in [0, 1) (default 0: off). Velocities are accumulated here, before
            sparsification, ``u <- beta * u + g, m <- m + u``; the optimizer then has to be plain SGD. When a gradient
            is sent whole (density 1, the ``start`` iterations, small parameters), ``m + u`` is sent, too: the mean of
            the velocities is the velocity of the mean, so this is SGD with momentum.
        factor_masking: clear the velocity of entries that were picked and sent (default True; only with ``momentum``).
            Parameters that are sent whole keep their velocity.
        clip: bound of each parameter's local gradient norm, times ``n ** -0.5`` (default 0: off), also for parameters
            that are sent whole.
        memory_dtype: ``"fp32"`` (default; float64 for float64 gradients) or ``"bf16"``, with stochastic rounding.
        min_size: parameters with fewer entries are sent whole (default 1024).
        seed: seed of ``randk``, of ``count_sketch`` and of rounding; equal on all ranks.
        scaler: the ``torch.amp.GradScaler`` that scales the loss, if there is one, because memories are kept unscaled.
            It can be set later (``state.scaler = scaler``).

    Attributes:
        iteration: number of finished iterations.
        memory: name -> ``error`` (what was not sent yet) and, with ``momentum``, ``momentum``: flat tensors.
        last_density: density of the last iteration; 1 before the first one.
        wire_bytes, dense_bytes: the bytes that this rank has given to collectives, and the bytes that averaging
            everything would have taken, in all iterations so far. ``last_wire_bytes`` and ``last_dense_bytes`` are
            those of the last iteration.

    Raises:
        ValueError: an option that is not allowed, or that has no effect because another one is off (``initial_density``
            without ``warmup``, ``factor_masking`` without ``momentum``); parameters without names, or given twice.

    Source: https://arxiv.org/abs/1809.07599 (error feedback), https://arxiv.org/abs/1712.01887 (DGC: momentum
    correction, factor masking, clipping, warm-up). Deviations: the memory holds gradients, not steps multiplied by the
    learning rate, because a hook does not know the learning rate (`MemSGD` is the paper's form); each parameter is
    sparsified by itself; clipping is by parameter, because no bucket has the norm of all.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]],
        *,
        process_group: Any = None,
        compressor: str | Compressor = "block_topk",
        density: float = 0.01,
        start: int = 2,
        warmup: int = 0,
        initial_density: float = 0.25,
        momentum: float = 0.0,
        factor_masking: bool = True,
        clip: float = 0.0,
        memory_dtype: str = "fp32",
        min_size: int = 1024,
        seed: int = 0,
        scaler: Any = None,
    ) -> None:
        for name, value, low in (("start", start, 2), ("min_size", min_size, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name}={value!r} is not allowed: {name} must be an integer >= {low}")
        if not _number(momentum) or not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum!r} is not allowed: momentum must be a number in [0, 1)")
        if not _number(clip) or not 0 <= clip < math.inf:
            raise ValueError(f"clip={clip!r} is not allowed: clip must be a number >= 0")
        if not isinstance(memory_dtype, str) or memory_dtype not in MEMORY_DTYPES:
            raise ValueError(f"memory_dtype={memory_dtype!r} is not one of {', '.join(map(repr, MEMORY_DTYPES))}")
        check_seed(seed)
        if not isinstance(factor_masking, bool):
            raise ValueError(f"factor_masking={factor_masking!r} is not allowed: it must be True or False")
        if momentum == 0 and not factor_masking:
            raise ValueError("factor_masking=False has no effect without momentum: set momentum, too")
        if scaler is not None and not (hasattr(scaler, "is_enabled") and hasattr(scaler, "get_scale")):
            raise ValueError(f"scaler is a {type(scaler).__name__}: expected a torch.amp.GradScaler or None")
        self.process_group = process_group
        self.compressor = make_compressor(compressor, seed)
        self.schedule = DensitySchedule(density, initial_density, warmup)
        if self.schedule.warmup == 0 and initial_density != DensitySchedule.initial:
            raise ValueError(f"initial_density={initial_density!r} has no effect without warmup: set warmup, too")
        self.start, self.min_size, self.seed = start, min_size, seed
        self.momentum, self.factor_masking, self.clip = float(momentum), factor_masking, float(clip)
        self.memory_dtype = memory_dtype
        self.scaler = scaler
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._sent: list[Sent] = []  # entries that the last iteration has sent
        self._flags: list[Tensor] = []  # for each of its buckets: whether it was not finite
        self._running = False
        self.iteration = 0
        self.last_density = 1.0
        self.wire_bytes = self.dense_bytes = 0
        self.last_wire_bytes = self.last_dense_bytes = 0
        self._wire = self._dense = 0  # bytes of the iteration in progress
        self._agreed = False
        self.scale: Tensor | float = 1.0
        self.bind(params)

    def bind(self, params: Iterable[tuple[str, Tensor]]) -> None:
        """Set, or set again, the name of each parameter: after unpickling, or if a framework has replaced parameters.

        An existing memory moves to the device of its parameter.

        Raises:
            ValueError: an entry is not a (name, parameter) pair; a name or a parameter appears twice; a parameter is
                complex; a memory belongs to a parameter that is missing, or that has another size. Nothing has changed
                then.
        """
        names: dict[int, tuple[int, str]] = {}
        bound: dict[str, Tensor] = {}
        for number, pair in enumerate(params):
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
                raise ValueError(
                    f"params must be (name, parameter) pairs, as model.named_parameters() yields them, not {pair!r}"
                )
            name, p = pair
            if id(p) in names or name in bound:
                raise ValueError(f"parameter {name!r} is given twice")
            if p.is_complex():
                raise ValueError(f"parameter {name!r} is complex ({p.dtype}); only real gradients can be compressed")
            names[id(p)] = number, name
            bound[name] = p
        if not bound:
            raise ValueError("params is empty: pass model.named_parameters()")
        memory = self.memory
        for name, slot in memory.items():
            if name not in bound or bound[name].numel() != slot["error"].numel():
                what = f"which now has {bound[name].numel()}" if name in bound else "which is no longer bound"
                raise ValueError(
                    f"there is a memory of {slot['error'].numel()} entries for parameter {name!r}, {what}: bind the "
                    "same parameters, or call state.reset() first"
                )
        for name, slot in memory.items():
            slot.update({kind: t.to(bound[name].device) for kind, t in slot.items()})
        self._names: dict[int, tuple[int, str]] = names
        # Kept alive, because another tensor could get the id of a freed one.
        self._bound: list[Tensor] = list(bound.values())

    def agree(self, device: torch.device) -> None:
        """Check that all ranks are at the same iteration with the same options: once, and after each load.

        The density, the collective and random choices depend on them, so ranks would wait for each other, or drift
        apart.

        Raises:
            ValueError: they differ. It is raised on every rank, and names the values of each rank.
        """
        if self._agreed or self.world_size == 1:
            return
        # The numbers of the compressor's options; ``fused`` may differ.
        own = {k: v for k, v in sorted(vars(self.compressor).items()) if k != "fused" and _number(v)}
        options = (type(self.compressor).__name__, own, self.schedule, self.start, self.min_size, self.seed,
                   self.momentum > 0)  # fmt: skip
        digest = int.from_bytes(hashlib.sha256(repr(options).encode()).digest()[:7], "big")
        mine = torch.tensor([self.iteration, digest], dtype=torch.int64, device=device)
        all_ = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(all_, mine, group=self.process_group)
        iterations, digests = torch.stack(all_).T.tolist()
        if len(set(iterations)) > 1:
            raise ValueError(
                "the ranks are at different iterations of the gradient compression "
                f"({', '.join(map(str, iterations))}): their memories come from different checkpoints, or some "
                "were not loaded. Load the memories of one checkpoint on every rank, or load none"
            )
        if len(set(digests)) > 1:
            raise ValueError("the ranks have different options of the gradient compression: use the same on every rank")
        self._agreed = True

    @property
    def world_size(self) -> int:
        """Number of ranks of the group; 1 without a group."""
        return dist.get_world_size(self.process_group) if dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        """Number of this rank in the group; 0 without a group."""
        return dist.get_rank(self.process_group) if dist.is_initialized() else 0

    @property
    def density(self) -> float:
        """Density of the next iteration: 1 until ``start``."""
        return 1.0 if self.iteration < self.start else self.schedule.at(self.iteration - self.start)

    @property
    def compression(self) -> float:
        """``wire_bytes / dense_bytes`` so far."""
        return self.wire_bytes / self.dense_bytes if self.dense_bytes else 1.0

    @property
    def memory(self) -> dict[str, dict[str, Tensor]]:
        """The memory of each parameter that has one, after the last iteration."""
        self.settle()
        return self._memory

    def reset(self) -> None:
        """Return to the beginning: all memories are empty, and the next iteration is the first."""
        self._memory, self._sent, self._flags, self.iteration, self._agreed = {}, [], [], 0, False
        self._running = False

    def memory_norm(self) -> float:
        """The L2 norm of everything that this rank has not sent yet. This waits for the device."""
        norms = [torch.linalg.vector_norm(slot["error"].float()) for slot in self.memory.values()]
        return float(torch.linalg.vector_norm(torch.stack([n.cpu() for n in norms]))) if norms else 0.0

    def memory_bytes(self) -> int:
        """Bytes of memory on this rank."""
        return sum(t.nbytes for slot in self.memory.values() for t in slot.values())

    def figures(self) -> dict[str, float]:
        """Figures of the last iteration, for monitors; ``memory_norm`` waits for the device."""
        return {
            "wire_bytes": self.last_wire_bytes,
            "dense_bytes": self.last_dense_bytes,
            "wire_over_dense": self.last_wire_bytes / self.last_dense_bytes if self.last_dense_bytes else 1.0,
            "density": self.last_density,
            "memory_norm": self.memory_norm(),
            "memory_bytes": self.memory_bytes(),
        }

    # -- what the hook uses ---------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start an iteration at its first bucket: finish the last one, and read the scale of these gradients."""
        self._running = False  # an iteration that was interrupted is over
        self.settle()
        self._running = True
        scaler = self.scaler
        if scaler is None or not scaler.is_enabled():
            self.scale = 1.0
            return
        # The tensor itself, because get_scale() would wait for the device. It does not exist before the first
        # scale(loss).
        scale = getattr(scaler, "_scale", None)
        self.scale = scaler.get_scale() if scale is None else scale.detach().clone()

    def sent(self, wire: int, dense: int) -> None:
        """Count the bytes of a bucket."""
        self._wire += wire
        self._dense += dense

    def remember(self, sent: Sent) -> None:
        """Keep entries that have to be put back if a bucket of this iteration is not finite."""
        self._sent.append(sent)

    def arrived(self, bad: Tensor) -> None:
        """A bucket has arrived; ``bad`` (0-d, equal on all ranks) says whether it has a non-finite entry."""
        self._flags.append(bad)

    @torch.no_grad()
    def settle(self) -> None:
        """Finish the last iteration: if one of its buckets was not finite, put back what all of them have sent.

        GradScaler, or other code that checks gradients, then skips the step on all ranks. All ranks have the same flags
        at this point. On a GPU the host does not read them, because it would have to wait.
        """
        if self._running or not (self._sent or self._flags):
            return
        sent, flags = self._sent, self._flags
        self._sent, self._flags = [], []
        bad: dict[torch.device, Tensor] = {}
        for one in sent:
            error = one.slot["error"]
            if error.device not in bad:
                bad[error.device] = _any(flags, error.device)
            lost = bad[error.device]
            if one.where is None:
                gone = one.values & ~lost
                if one.limit is None:
                    error.masked_fill_(gone, 0.0)
                else:
                    error.sub_(torch.where(gone, error.clamp(-one.limit, one.limit), 0.0))
            elif lost.is_cuda or bool(lost):
                error.index_add_(0, one.where, torch.where(lost, one.values, 0.0).to(error.dtype))
                if one.velocity is not None:
                    u = one.slot["momentum"]
                    u.index_add_(0, one.where, torch.where(lost, one.velocity, 0.0).to(u.dtype))

    def end(self) -> None:
        """Finish an iteration at its last bucket."""
        self.last_density = self.density
        self._running = False
        self.iteration += 1
        self.last_wire_bytes, self.last_dense_bytes = self._wire, self._dense
        self.wire_bytes += self._wire
        self.dense_bytes += self._dense
        self._wire = self._dense = 0

    def number(self, p: Tensor) -> int:
        """Number of a parameter, equal on all ranks.

        Raises:
            ValueError: the parameter is not one of ``params``.
        """
        return self._find(p)[0]

    def slot(self, p: Tensor) -> dict[str, Tensor]:
        """The memory of a parameter, flat: ``error`` and, with momentum, ``momentum``; zeros at first.

        Raises:
            ValueError: the parameter is not one of ``params``.
        """
        name = self._find(p)[1]
        if name not in self._memory:
            dtype = torch.float64 if p.dtype == torch.float64 else MEMORY_DTYPES[self.memory_dtype]
            kinds = KINDS if self.momentum else KINDS[:1]
            self._memory[name] = {kind: torch.zeros(p.numel(), dtype=dtype, device=p.device) for kind in kinds}
        return self._memory[name]

    def present(self, p: Tensor) -> dict[str, Tensor] | None:
        """The memory of a parameter, or None if it has none; with momentum all parameters have one."""
        return self.slot(p) if self.momentum else self._memory.get(self._find(p)[1])

    @property
    def empty(self) -> bool:
        """Whether there is no memory, so that only the gradients are averaged."""
        return not self._memory and not self.momentum

    def _find(self, p: Tensor) -> tuple[int, str]:
        if id(p) not in self._names:
            raise ValueError(
                f"a bucket contains a parameter of shape {tuple(p.shape)} that is not among the "
                f"{len(self._names)} parameters of this MemSGDState. Build it with the named_parameters() of the "
                "model that DistributedDataParallel wraps, or call state.bind(model.named_parameters())"
            )
        return self._names[id(p)]

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's memory and the number of iterations: tensors, numbers and strings. Tensors are not copied."""
        return {
            "version": VERSION,
            "world_size": self.world_size,
            "rank": self.rank,
            "iteration": self.iteration,
            "memory": {name: dict(slot) for name, slot in self.memory.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict` from this rank of as many ranks, or that of `redistribute`.

        The compressor, the density and the other options may differ from those of the run that saved the state.

        Raises:
            ValueError: the state was written by another rank, by another number of ranks or for other parameters; it is
                not finite, or lacks something. Nothing has changed then.
        """
        checked(state)
        world, rank = state["world_size"], state["rank"]
        if world is not None and (world, rank) != (self.world_size, self.rank):
            raise ValueError(
                f"the memory was saved by rank {rank} of {world}, but this is rank {self.rank} of "
                f"{self.world_size}, and each rank has a memory of its own. Load the file of this rank, or "
                "combine all of them with redistribute([...])"
            )
        sizes = {name: p for (_, name), p in zip(self._names.values(), self._bound, strict=True)}
        memory: dict[str, dict[str, Tensor]] = {}
        for name, saved in state["memory"].items():
            if name not in sizes:
                raise ValueError(f"the saved memory has a parameter {name!r}, which the model does not have")
            p = sizes[name]
            if "momentum" in saved and not self.momentum:
                raise ValueError(
                    f"the saved memory of {name!r} has a momentum, but this state has momentum={self.momentum}: use "
                    "the momentum of the saved run"
                )
            for kind, tensor in saved.items():
                if tensor.numel() != p.numel():
                    raise ValueError(f"the saved {kind} of {name!r} has {tensor.numel()} entries, expected {p.numel()}")
                if not bool(torch.isfinite(tensor).all()):
                    raise ValueError(f"the saved {kind} of {name!r} contains values that are not finite")
            dtype = torch.float64 if p.dtype == torch.float64 else MEMORY_DTYPES[self.memory_dtype]
            memory[name] = {k: t.detach().to(p.device, dtype, copy=True).contiguous() for k, t in saved.items()}
            if self.momentum and "momentum" not in saved:
                memory[name]["momentum"] = torch.zeros_like(memory[name]["error"])
        self._memory, self._sent, self._flags, self._running = memory, [], [], False
        self.iteration = int(state["iteration"])
        self._agreed = False

    def save(self, folder: str | Path) -> None:
        """Write this rank's file ``memsgd-RANK-of-WORLD.pt`` in ``folder``. Every rank has to call it.

        A folder holds the memories of one moment, so files of another number of ranks are removed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE.format(rank=self.rank, world=self.world_size)
        part = path.with_suffix(".part")
        torch.save(self.state_dict(), part)
        # Complete or absent: a process that is killed while it saves leaves no partial file under this name.
        part.replace(path)
        for world, files in _files(folder).items():
            if world != self.world_size:
                for old in files.values():
                    old.unlink(missing_ok=True)  # every rank removes them, because folders need not be shared

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote: this rank's file, or all of them if the number of ranks has changed.

        Raises:
            ValueError: there are no files, files of several numbers of ranks, or not the files of all ranks; a file
                cannot be read; see `load_state_dict`.
        """
        found = _files(Path(folder))
        if not found:
            raise ValueError(
                f"{folder} has no files memsgd-*-of-*.pt: give the folder in which the ranks of a run have saved theirs"
            )
        if len(found) > 1:
            raise ValueError(
                f"{folder} has files of runs of {' and of '.join(map(str, sorted(found)))} ranks, and it is not "
                "clear which of them belong to this checkpoint: remove the others"
            )
        ((world, files),) = found.items()
        ranks = [self.rank] if world == self.world_size else list(range(world))
        missing = [rank for rank in ranks if rank not in files]
        if missing:
            raise ValueError(
                f"{folder} lacks the memory of rank {missing[0]} of {world}. With {self.world_size} ranks, every "
                "rank needs the files of all ranks that saved: put them into one folder"
            )
        # Files are mapped, so that only the parts in use are in memory; of several files, one at a time is open.
        states = (_read(files[rank]) for rank in ranks)
        self.load_state_dict(next(states) if world == self.world_size else redistribute(states))

    def gather(self, dst: int = 0) -> list[dict[str, Any]] | None:
        """All ranks' `state_dict` on rank ``dst`` of the group, None elsewhere: for frameworks where one rank saves.

        Every rank has to call it. `load_gathered` takes the result. Rank ``dst`` holds all memories at once; `save` is
        the alternative that does not need this memory.
        """
        mine = self.state_dict()
        mine["memory"] = {name: {k: t.cpu() for k, t in slot.items()} for name, slot in mine["memory"].items()}
        if not dist.is_initialized():
            return [mine]
        states: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        group = self.process_group
        dist.gather_object(mine, states, dst if group is None else dist.get_global_rank(group, dst), group)
        return states

    def load_gathered(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Load what `gather` returned, on as many ranks or on another number of them.

        Raises:
            ValueError: see `load_state_dict`.
        """
        if isinstance(states, Mapping) or not isinstance(states, Sequence):
            raise ValueError(f"expected the list that gather() returns, not {_shorten(states)}")
        if len(states) == self.world_size:
            self.load_state_dict(states[self.rank])
        else:
            self.load_state_dict(redistribute(states))

    def __getstate__(self) -> dict[str, Any]:
        """Everything except the process group, the parameters and the scaler, which cannot be pickled."""
        self.settle()
        left = ("process_group", "scaler", "_names", "_bound", "_sent", "_flags")
        return {k: v for k, v in self.__dict__.items() if k not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Use the default group; `bind` has to be called before the next iteration."""
        self.__dict__.update(state, process_group=None, scaler=None, _names={}, _bound=[], _agreed=False)
        self._sent, self._flags = [], []


def redistribute(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    r"""Make one memory for each of any number of ranks from those of all ranks of another number.

    Each rank gets the mean :math:`\frac{1}{n} \sum_i m_i` of the old memories (and velocities). The mean over the ranks
    is the part that the parameters still lack. It stays the same up to rounding, and the share of a rank does not
    depend on its number.

    Args:
        states: `MemSGDState.state_dict` of all ranks, in any order. From an iterator, one state is taken at a time and
            none is kept, so this holds one state and the sums, 8 bytes an entry.

    Raises:
        ValueError: they are not the states of all ranks of one run, or one of them lacks something.
    """
    world: int | None = None
    ranks: list[int] = []
    iterations: set[int] = set()
    sums: dict[str, dict[str, Tensor]] = {}
    dtypes: dict[str, torch.dtype] = {}

    def add(state: Mapping[str, Any]) -> None:
        nonlocal world
        checked(state)
        world, rank = state["world_size"] if world is None else world, state["rank"]
        if rank is None or state["world_size"] != world or rank in ranks:
            raise ValueError(
                f"expected one state of each of the {world} ranks of a run; one of them comes from rank {rank} of "
                f"{state['world_size']}"
            )
        ranks.append(rank)
        iterations.add(state["iteration"])
        for name, slot in state["memory"].items():
            kept = sums.setdefault(name, {})
            dtypes.setdefault(name, slot["error"].dtype)
            for kind, tensor in slot.items():
                if kind not in kept:
                    kept[kind] = tensor.to("cpu", torch.float64, copy=True)
                elif kept[kind].numel() != tensor.numel():
                    raise ValueError(
                        f"the saved {kind} of {name!r} has {tensor.numel()} entries on rank {rank}, but "
                        f"{kept[kind].numel()} on another rank"
                    )
                else:
                    kept[kind] += tensor.cpu()

    for state in states:
        add(state)
        del state  # or it would stay in memory while the next one is read
    if world is None:
        raise ValueError("there are no states: pass the states of all ranks")
    if sorted(ranks) != list(range(world)) or len(iterations) != 1:
        raise ValueError(
            f"the states must come from all {world} ranks after the same iteration; they come from ranks "
            f"{sorted(ranks)} after iterations {sorted(iterations)}"
        )
    for name, kept in sums.items():
        for kind, total in kept.items():
            kept[kind] = total.div_(world).to(dtypes[name])
    return {"version": VERSION, "world_size": None, "rank": None, "iteration": iterations.pop(), "memory": sums}


def checked(state: Any) -> None:
    """Raise ValueError unless a state has everything that `MemSGDState.state_dict` returns."""
    if not isinstance(state, Mapping) or state.get("version") != VERSION:
        raise ValueError(f"this is not the state of a MemSGDState of version {VERSION}: {_shorten(state)}")
    for key in ("world_size", "rank", "iteration", "memory"):
        if key not in state:
            raise ValueError(f"the saved state of a MemSGDState lacks {key!r}; it contains {_shorten(state)}")
    whole = {key: state[key] for key in ("world_size", "rank", "iteration")}
    nobody = whole["world_size"] is None and whole["rank"] is None  # it comes from `redistribute`
    for key, value in whole.items():
        number = isinstance(value, int) and not isinstance(value, bool) and value >= (key == "world_size")
        if not number and not (nobody and key != "iteration"):
            raise ValueError(f"{key}={value!r} in the saved state of a MemSGDState is not allowed: it must be a number")
    if not isinstance(state["memory"], Mapping):
        raise ValueError(
            f"the saved memory is a {type(state['memory']).__name__}; expected a dict of names and tensors"
        )
    for name, slot in state["memory"].items():
        if not isinstance(slot, Mapping) or "error" not in slot:
            raise ValueError(f"the saved memory of {name!r} lacks 'error'; it contains {_shorten(slot)}")
        for kind, tensor in slot.items():
            if kind not in KINDS or not isinstance(tensor, Tensor):
                raise ValueError(
                    f"the saved memory of {name!r} contains {kind!r}, a {type(tensor).__name__}; expected the tensors "
                    "'error' and 'momentum'"
                )


def make_compressor(compressor: str | Compressor, seed: int = 0) -> Compressor:
    """A compressor by name.

    Raises:
        ValueError: there is no compressor of that name; lists the names.
    """
    if isinstance(compressor, Compressor):
        return compressor
    if not isinstance(compressor, str) or compressor not in COMPRESSORS:
        raise ValueError(f"compressor={compressor!r} is not one of {', '.join(map(repr, COMPRESSORS))}")
    cls = COMPRESSORS[compressor]
    return cls(seed=seed) if cls.shared else cls()  # type: ignore[call-arg]


def check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError unless `attach` accepts these options, for code that calls `attach` much later."""
    try:
        if "process_group" in options:
            raise TypeError(
                "process_group is not an option: the hook uses the process group of DistributedDataParallel"
            )
        MemSGDState([("a", torch.empty(0))], **options)
    except TypeError as error:
        raise ValueError(f"MemSGDState has no such option: {error}") from error


def _files(folder: Path) -> dict[int, dict[int, Path]]:
    """The files that `MemSGDState.save` has written: number of ranks -> rank -> file."""
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.glob("memsgd-*.pt")):
        match = re.fullmatch(r"memsgd-(\d+)-of-(\d+)\.pt", path.name)
        if match:
            found.setdefault(int(match[2]), {})[int(match[1])] = path
    return found


def _read(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read as a file of MemSGDState.save: {_shorten(error)}") from error


def _any(flags: Sequence[Tensor], device: torch.device) -> Tensor:
    """Whether one of the flags is set, on a device."""
    for flag in flags:
        if flag.is_cuda:  # made on another stream, which could reuse its memory
            flag.record_stream(torch.cuda.current_stream(flag.device))
    if not flags:
        return torch.zeros((), dtype=torch.bool, device=device)
    return torch.stack([flag.to(device, non_blocking=True) for flag in flags]).any()


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shorten(value: Any) -> str:
    text = (", ".join(map(str, value)) or "nothing") if isinstance(value, Mapping) else repr(value)
    return text if len(text) < 80 else text[:77] + "..."

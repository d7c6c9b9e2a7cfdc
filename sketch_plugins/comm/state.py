"""State of the communication hook: its options, and the iteration that it is at."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sketch_plugins.comm.base import Compressor, check_seed
from sketch_plugins.comm.compressors import make_compressor
from sketch_plugins.comm.memories import MEMORY_DTYPES, Memories
from sketch_plugins.comm.saved import VERSION, checked, read_files, redistribute, shorten, write_file
from sketch_plugins.comm.schedule import DensitySchedule


class MemSGDState(Memories):
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
        self.factor_masking, self.clip = factor_masking, float(clip)
        self.scaler = scaler
        self.iteration = 0
        self.last_density = 1.0
        self.wire_bytes = self.dense_bytes = 0
        self.last_wire_bytes = self.last_dense_bytes = 0
        self._wire = self._dense = 0  # bytes of the iteration in progress
        self._agreed = False
        self.scale: Tensor | float = 1.0
        super().__init__(params, float(momentum), memory_dtype)

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

    def reset(self) -> None:
        """Return to the beginning: all memories are empty, and the next iteration is the first."""
        self._put({})
        self.iteration, self._agreed = 0, False

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

    def end(self) -> None:
        """Finish an iteration at its last bucket."""
        self.last_density = self.density
        self._running = False
        self.iteration += 1
        self.last_wire_bytes, self.last_dense_bytes = self._wire, self._dense
        self.wire_bytes += self._wire
        self.dense_bytes += self._dense
        self._wire = self._dense = 0

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
            dtype = self._dtype_for(p)
            memory[name] = {k: t.detach().to(p.device, dtype, copy=True).contiguous() for k, t in saved.items()}
            if self.momentum and "momentum" not in saved:
                memory[name]["momentum"] = torch.zeros_like(memory[name]["error"])
        self._put(memory)
        self.iteration = int(state["iteration"])
        self._agreed = False

    def save(self, folder: str | Path) -> None:
        """Write this rank's file ``memsgd-RANK-of-WORLD.pt`` in ``folder``. Every rank has to call it.

        A folder holds the memories of one moment, so files of another number of ranks are removed.
        """
        write_file(self.state_dict(), Path(folder))

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote: this rank's file, or all of them if the number of ranks has changed.

        Raises:
            ValueError: there are no files, files of several numbers of ranks, or not the files of all ranks; a file
                cannot be read; see `load_state_dict`.
        """
        self.load_state_dict(read_files(Path(folder), self.rank, self.world_size))

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
            raise ValueError(f"expected the list that gather() returns, not {shorten(states)}")
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


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

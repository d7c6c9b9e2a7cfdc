"""``weight_bits``: corrections of bfloat16 and float16 weights among an optimizer's state, and when they are void.

A correction (`kernels.weight_code`) is right for the weight that it was written with. Whoever writes another weight
makes it void: it would move that weight by up to half the distance to the next number. `Written` finds that out before
a step, from what it remembers of each part after the last one: the address of its numbers and torch's counters of
in-place changes. Neither is state. A state dict has the fingerprint of the weights in place of them, which is compared
before the first step after it was loaded; a step removes it. docs/weight_bits.md says what is found out and what is
not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.kernels.weight_code import CODES, HALF, UNKNOWN, Corrected, fingerprint
from sketch_plugins.notices import warn
from sketch_plugins.optim.pending import Pending
from sketch_plugins.optim.rule import Layout
from sketch_plugins.sharding.blocks import Matrix
from sketch_plugins.sharding.parts import Part, Shaped, has_address, is_fake, local_of
from sketch_plugins.sharding.state_names import CORRECTION

logger = logging.getLogger(__name__)
#: Steps in a row before which a parameter's corrections were void, after which that is said.
OFTEN = 3


class WeightCorrection:
    """The state: a code for each weight, and the fingerprint of the weights that a state dict was made with."""

    def __init__(self, shape: tuple[int, int], bits: int) -> None:
        self.shape, self.bits = shape, bits

    def layout(self, dtype: torch.dtype) -> Layout:
        """``codes (R, D)``, one or two bytes each; ``mark (1,)``."""
        return {"codes": (self.shape, CODES[self.bits]), "mark": ((1,), torch.int64)}

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of both."""
        return self.shape[0] * self.shape[1] * CODES[self.bits].itemsize + 8

    def allocate(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Zeros: the weights are what they are, and nobody has taken their fingerprint."""
        return {name: torch.zeros(size, dtype=kind, device=device) for name, (size, kind) in self.layout(dtype).items()}


def corrects(p: Shaped, group: Mapping[str, Any]) -> bool:
    """Whether the options of a group mean corrections for a parameter, or for a part of one.

    None for subclasses that compute their numbers (quantized weights): those are rounded once more when they are
    written, and a correction would belong to another number than the one that is there.
    """
    return bool(group.get("weight_bits")) and p.dtype in HALF and not computes_its_numbers(p)


def computes_its_numbers(p: Shaped) -> bool:
    """Whether a parameter, or a part of one, is a subclass with operations of its own that keeps something else."""
    data = p.data if isinstance(p, Part) else local_of(p)
    return type(data).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not is_fake(data)


def matrix_of(one: Pending) -> Matrix:
    """The part as a step reads and writes it: with its corrections, where it has some."""
    matrix, kept = one.grad.like(one.p.data), one.state.get(CORRECTION)
    if kept is None:
        return matrix
    return Corrected(matrix, kept["codes"], one.group["seed"], int(one.state["step"]))


def recoded(
    state: dict[str, Any], part: Part, group: Mapping[str, Any], before: int | None, shape: tuple[int, int]
) -> None:
    """Make a part's state, `nested`, that was saved with ``weight_bits=before``, one of the group's.

    From None: zeros, for the weights are what they are. To None: the corrections are dropped. From 24 to 32: the same
    numbers. (32 to 24 would have to round them.)
    """
    now, kept = group["weight_bits"], state.get(CORRECTION)
    if now is None:
        state.pop(CORRECTION, None)
    elif before is None and corrects(part, group):
        state.setdefault(CORRECTION, WeightCorrection(shape, now).allocate(part.device, part.dtype))
    elif (before, now) == (24, 32) and isinstance(kept, Mapping):
        codes = kept.get("codes")
        if isinstance(codes, Tensor) and codes.dtype == CODES[24]:  # others are refused like any wrong state
            state[CORRECTION] = {**kept, "codes": codes.to(CODES[32]) * 256}


def corrections(part: Part, state: Mapping[str, Any] | None) -> tuple[Tensor, Tensor] | None:
    """``(codes, mark)`` of a part in the state of its owner; None: there are none."""
    if not state:
        return None
    before = f"{CORRECTION}." if part.key is None else f"{part.key}.{CORRECTION}."
    codes = state.get(f"{before}codes")
    return None if codes is None else (codes, state[f"{before}mark"])


class Written:
    """What weights looked like after the last step, and which corrections have become void since."""

    def __init__(self) -> None:
        self._seen: dict[Any, tuple[Any, ...]] = {}
        # Part's identity -> mark, and its version, of marks that may hold a fingerprint.
        self._marked: dict[Any, tuple[Tensor, int | None]] = {}
        # Part's identity -> before how many steps in a row its corrections were void.
        self._voids: dict[Any, int] = {}
        # Those whose next step that will be.
        self._before_step: set[Any] = set()
        self._warned: set[str] = set()

    def forget(self) -> None:
        """Other state is there: its fingerprints say which weights it belongs to."""
        self._seen, self._marked, self._voids, self._before_step = {}, {}, {}, set()

    def check(
        self,
        parts: Iterable[tuple[Part, Mapping[str, Any] | None]],
        label: Callable[[Part], str],
        stepping: bool = False,
        capturing: bool = False,
    ) -> None:
        """Set the corrections of parts to 0 whose weights somebody else has written.

        Args:
            parts: ``(part, owner's state)``.
            label: what to call a part.
            stepping: a step follows, which changes the weights: fingerprints are removed. Otherwise they stay, because
                a state dict that was made before has the same tensors.
            capturing: the step is recorded in a CUDA graph, with all that happens here.

        Raises:
            ValueError: a graph would repeat in each replay that corrections are compared, or set to 0.
        """
        for identity, (mark, version) in self._marked.items():
            # A checkpoint was read into the tensors of a state dict (torch.distributed.checkpoint).
            if _version(mark) != version:
                self._seen.pop(identity, None)
        void: list[Part] = []
        loaded: list[Part] = []
        marks: list[Tensor] = []
        for part, codes, mark in _corrected(parts):
            identity = part.identity
            known, now = self._seen.get(identity), looks(part)
            if capturing:
                marks.append(mark)
            if known == now:
                continue
            if capturing:
                raise ValueError(
                    f"step() is being captured in a CUDA graph, but the weights of {label(part)} were written, or its "
                    "state was loaded, after the last step. Its corrections (weight_bits) have to be compared with the "
                    "weights before they are used, and a graph would repeat that in each replay. Take one step before "
                    "the capture"
                )
            if not _belongs(part, mark, known is None):
                codes.zero_()
                mark.fill_(UNKNOWN)
                (loaded if known is None else void).append(part)
                if known is not None and identity not in self._before_step:
                    self._before_step.add(identity)
                    self._voids[identity] = self._voids.get(identity, 0) + 1
            self._seen[identity] = now
            self._marked[identity] = mark, None
        if capturing and marks:  # recorded, so that replays remove what a later state dict puts there
            torch._foreach_zero_(marks)
            self._marked = {}
        elif stepping:  # the weights will not be those of the fingerprints for long
            for mark, _ in self._marked.values():
                mark.fill_(UNKNOWN)
            self._marked = {}
        else:
            self._marked = {identity: (mark, _version(mark)) for identity, (mark, _) in self._marked.items()}
        if void or loaded:
            self._report(void, loaded, label)

    def note(self, parts: Iterable[tuple[Part, Mapping[str, Any] | None]]) -> None:
        """Remember what a step has left behind."""
        for part, _, _ in _corrected(parts):
            identity, now = part.identity, looks(part)
            if self._voids and self._seen.get(identity) != now:  # it has taken a step
                if identity in self._before_step:
                    self._before_step.remove(identity)
                else:
                    self._voids.pop(identity, None)
            self._seen[identity] = now

    def mark(self, parts: Iterable[tuple[Part, Mapping[str, Any] | None]]) -> None:
        """Before a state dict is made: the fingerprint of the weights beside their corrections."""
        for part, _, mark in _corrected(parts):
            if has_address(part.data) and part.device.type != "meta":
                mark.fill_(fingerprint(part.data))
                self._marked[part.identity] = mark, _version(mark)

    def _report(self, void: list[Part], loaded: list[Part], label: Callable[[Part], str]) -> None:
        """Log what is void, and warn where that is not what anybody can have meant."""
        for part in loaded:
            logger.info("weight_bits: the corrections of %s were saved with other weights: they are 0 now", label(part))
        for part in void:
            logger.info("weight_bits: something wrote the weights of %s: its corrections are 0 now", label(part))
        often = [part for part in void if self._voids.get(part.identity, 0) >= OFTEN]
        if often and "often" not in self._warned:
            self._warned.add("often")
            warn(
                f"weight_bits has no effect on {_listed(often, label)}: something wrote the weights in place before "
                f"each of the last {OFTEN} steps, and what a weight has beyond its dtype is lost when it is written. "
                "nn.Embedding(max_norm=...) does that, and p.clamp_() or p.renorm_() after a step. Give the parameter "
                "weight_bits=None in a group of its own, or keep it in float32"
            )
        copies = [part for part in void if part.piece is None]
        if copies and "replicas" not in self._warned and _processes() > 1:
            self._warned.add("replicas")
            warn(
                f"something wrote the weights of {_listed(copies, label)} after the last step, so that the further "
                "bits of weight_bits are 0 now on this process. With replicated parameters (DistributedDataParallel) "
                "every process has to write them alike and before the same step: otherwise the weights of the "
                "processes drift apart, by less than one unit in the last place of the dtype at first, and nothing "
                "brings them together again"
            )


def _listed(parts: list[Part], label: Callable[[Part], str]) -> str:
    said = "; ".join(label(part).rstrip(",") for part in parts[:3])
    return said + (f" and {len(parts) - 3} more" if len(parts) > 3 else "")


def _processes() -> int:
    distributed = torch.distributed
    there = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if there else 1


def _corrected(parts: Iterable[tuple[Part, Mapping[str, Any] | None]]) -> Iterator[tuple[Part, Tensor, Tensor]]:
    for part, state in parts:
        found = corrections(part, state)
        if found is not None:
            yield part, *found


def looks(part: Part) -> tuple[Any, ...]:
    """Where a part's numbers are, and how often torch has counted that they were changed."""
    address = part.data.data_ptr() if has_address(part.data) else None
    return address, _version(part.owner), _version(part.data)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _belongs(part: Part, mark: Tensor, trusted: bool) -> bool:
    """Whether corrections belong to the weights that are there; ``trusted``: also where no fingerprint says so."""
    saved = int(mark)
    if saved == UNKNOWN or not has_address(part.data):
        return trusted
    return saved == fingerprint(part.data)

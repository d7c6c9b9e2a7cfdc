"""``weight_bits``: corrections of bfloat16 and float16 weights in an optimizer's state, and when they are void.

A correction (`kernels.weight_code`) fits the weight that it was written with. It is void when other code has written
the weight: it would move the new weight by up to half the distance to the next number. `Written` finds void corrections
before a step. It compares what it remembers of each part after the last step: the address of its numbers, and torch's
counters of in-place changes. Neither is state. A state dict has the fingerprint of the weights instead, which is
compared before the first step after it was loaded, and which a step removes. docs/weight_bits.md says what is found and
what is not.
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
from sketch_plugins.sharding.dtensors import local_of
from sketch_plugins.sharding.parts import Part, Shaped
from sketch_plugins.sharding.state_names import CORRECTION
from sketch_plugins.sharding.tensors import has_address, is_fake

logger = logging.getLogger(__name__)
#: If a parameter's corrections were void before so many steps in a row, there is a warning.
OFTEN = 3


class WeightCorrection:
    """State of corrected weights: a code for each weight, and the fingerprint of the weights for a state dict."""

    def __init__(self, shape: tuple[int, int], bits: int) -> None:
        self.shape, self.bits = shape, bits

    def layout(self, dtype: torch.dtype) -> Layout:
        """``codes (R, D)``, one or two bytes each; ``mark (1,)``."""
        return {"codes": (self.shape, CODES[self.bits]), "mark": ((1,), torch.int64)}

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of codes and mark."""
        return self.shape[0] * self.shape[1] * CODES[self.bits].itemsize + 8

    def allocate(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Zeros: the weights have no correction yet, and no fingerprint was taken."""
        return {name: torch.zeros(size, dtype=kind, device=device) for name, (size, kind) in self.layout(dtype).items()}


def corrects(p: Shaped, group: Mapping[str, Any]) -> bool:
    """Whether the options of a group give corrections to a parameter, or to a part of one.

    Subclasses that compute their numbers (quantized weights) have none. They round once more when they are written, so
    a correction would belong to another number.
    """
    return bool(group.get("weight_bits")) and p.dtype in HALF and not computes_its_numbers(p)


def computes_its_numbers(p: Shaped) -> bool:
    """Whether a parameter, or a part of one, is a subclass with operations of its own, such as a quantized weight."""
    data = p.data if isinstance(p, Part) else local_of(p)
    return type(data).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not is_fake(data)


def matrix_of(one: Pending) -> Matrix:
    """The part as a step reads and writes it, with its corrections if it has some."""
    matrix, kept = one.grad.like(one.p.data), one.state.get(CORRECTION)
    if kept is None:
        return matrix
    return Corrected(matrix, kept["codes"], one.group["seed"], int(one.state["step"]))


def recoded(
    state: dict[str, Any], part: Part, group: Mapping[str, Any], before: int | None, shape: tuple[int, int]
) -> None:
    """Change a part's state, `nested`, from ``weight_bits=before`` to the group's ``weight_bits``.

    From None, corrections are zeros. To None, they are dropped. From 24 to 32, they stand for the same numbers. (From
    32 to 24 they would have to be rounded.)
    """
    now, kept = group["weight_bits"], state.get(CORRECTION)
    if now is None:
        state.pop(CORRECTION, None)
    elif before is None and corrects(part, group):
        state.setdefault(CORRECTION, WeightCorrection(shape, now).allocate(part.device, part.dtype))
    elif (before, now) == (24, 32) and isinstance(kept, Mapping):
        codes = kept.get("codes")
        if isinstance(codes, Tensor) and codes.dtype == CODES[24]:  # other dtypes are refused as wrong state later
            state[CORRECTION] = {**kept, "codes": codes.to(CODES[32]) * 256}


def corrections(part: Part, state: Mapping[str, Any] | None) -> tuple[Tensor, Tensor] | None:
    """``(codes, mark)`` of a part in the state of its owner, or None."""
    if not state:
        return None
    before = f"{CORRECTION}." if part.key is None else f"{part.key}.{CORRECTION}."
    codes = state.get(f"{before}codes")
    return None if codes is None else (codes, state[f"{before}mark"])


class Written:
    """Remembers what weights looked like after the last step, and which corrections have become void since."""

    def __init__(self) -> None:
        self._seen: dict[Any, tuple[Any, ...]] = {}
        # Part's identity -> its mark, which may hold a fingerprint, and the mark's version.
        self._marked: dict[Any, tuple[Tensor, int | None]] = {}
        # Part's identity -> before how many steps in a row its corrections were void.
        self._voids: dict[Any, int] = {}
        # Parts whose corrections were found void before the step that follows.
        self._before_step: set[Any] = set()
        self._warned: set[str] = set()

    def forget(self) -> None:
        """Forget the weights, because other state was loaded. Its fingerprints tell which weights it belongs to."""
        self._seen, self._marked, self._voids, self._before_step = {}, {}, {}, set()

    def check(
        self,
        parts: Iterable[tuple[Part, Mapping[str, Any] | None]],
        label: Callable[[Part], str],
        stepping: bool = False,
        capturing: bool = False,
    ) -> None:
        """Set the corrections of parts to 0 whose weights other code has written.

        Args:
            parts: ``(part, owner's state)``.
            label: returns the name of a part in messages.
            stepping: a step follows, which changes the weights, so fingerprints are removed. Otherwise they stay,
                because a state dict that was made before shares these tensors.
            capturing: the step is captured in a CUDA graph, with everything that happens here.

        Raises:
            ValueError: a graph would compare corrections, or set them to 0, in each replay.
        """
        for identity, (mark, version) in self._marked.items():
            # A checkpoint was read into the tensors of a state dict (torch.distributed.checkpoint does so).
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
        if capturing and marks:  # captured, so that replays remove what a later state dict writes there
            torch._foreach_zero_(marks)
            self._marked = {}
        elif stepping:  # after the step the fingerprints will not match any more
            for mark, _ in self._marked.values():
                mark.fill_(UNKNOWN)
            self._marked = {}
        else:
            self._marked = {identity: (mark, _version(mark)) for identity, (mark, _) in self._marked.items()}
        if void or loaded:
            self._report(void, loaded, label)

    def note(self, parts: Iterable[tuple[Part, Mapping[str, Any] | None]]) -> None:
        """Remember what the weights look like after a step."""
        for part, _, _ in _corrected(parts):
            identity, now = part.identity, looks(part)
            if self._voids and self._seen.get(identity) != now:  # the part has taken a step
                if identity in self._before_step:
                    self._before_step.remove(identity)
                else:
                    self._voids.pop(identity, None)
            self._seen[identity] = now

    def mark(self, parts: Iterable[tuple[Part, Mapping[str, Any] | None]]) -> None:
        """Write the fingerprint of the weights beside their corrections, before a state dict is made."""
        for part, _, mark in _corrected(parts):
            if has_address(part.data) and part.device.type != "meta":
                mark.fill_(fingerprint(part.data))
                self._marked[part.identity] = mark, _version(mark)

    def _report(self, void: list[Part], loaded: list[Part], label: Callable[[Part], str]) -> None:
        """Log which corrections are void, and warn if that is certainly not intended."""
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
    """The address of a part's numbers, and torch's counts of how often they were changed."""
    address = part.data.data_ptr() if has_address(part.data) else None
    return address, _version(part.owner), _version(part.data)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _belongs(part: Part, mark: Tensor, trusted: bool) -> bool:
    """Whether corrections belong to the present weights. Without a fingerprint the answer is ``trusted``."""
    saved = int(mark)
    if saved == UNKNOWN or not has_address(part.data):
        return trusted
    return saved == fingerprint(part.data)

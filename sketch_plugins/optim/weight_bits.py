"""``weight_bits``: corrections of bfloat16 and float16 weights among an optimizer's state, and when they are void.

A correction (`kernels.weight_code`) is right for the weight that it was written with. Whoever writes another weight
makes it void: it would move that weight by up to half the distance to the next number. `Written` finds that out before
a step, from what it remembers of each part after the last one: the address of its numbers and torch's counters of
in-place changes. Neither is state. A state dict has the fingerprint of the weights in place of them, which is compared
before the first step after it was loaded. docs/weight_bits.md says what is found out and what is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.kernels.weight_code import CODES, HALF, UNKNOWN, Corrected, fingerprint
from sketch_plugins.optim.pending import Pending
from sketch_plugins.optim.rule import Layout
from sketch_plugins.sharding.blocks import Matrix
from sketch_plugins.sharding.parts import Part, Shaped, has_address
from sketch_plugins.sharding.state_names import CORRECTION


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
    """Whether the options of a group mean corrections for a parameter, or for a part of one."""
    return bool(group.get("weight_bits")) and p.dtype in HALF


def matrix_of(one: Pending) -> Matrix:
    """The part as a step reads and writes it: with its corrections, where it has some."""
    matrix, kept = one.grad.like(one.p.data), one.state.get(CORRECTION)
    if kept is None:
        return matrix
    return Corrected(matrix, kept["codes"], one.group["seed"], int(one.state["step"]))


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
        self._marked: list[Tensor] = []

    def forget(self) -> None:
        """Other state is there: its fingerprints say which weights it belongs to."""
        self._seen, self._marked = {}, []

    def check(self, parts: Iterable[tuple[Part, Mapping[str, Any] | None]]) -> None:
        """Set the corrections of parts to 0 whose weights somebody else has written; ``(part, owner's state)``."""
        if self._marked:  # of a state dict; the weights will not be those of the mark for long
            for mark in self._marked:
                mark.fill_(UNKNOWN)
            self._marked = []
        for part, codes, mark in _corrected(parts):
            known, now = self._seen.get(part.identity), looks(part)
            if known == now:
                continue
            if known is not None or not _belongs(part, mark):
                codes.zero_()
            mark.fill_(UNKNOWN)
            self._seen[part.identity] = now

    def note(self, parts: Iterable[tuple[Part, Mapping[str, Any] | None]]) -> None:
        """Remember what a step has left behind."""
        for part, _, _ in _corrected(parts):
            self._seen[part.identity] = looks(part)

    def mark(self, parts: Iterable[tuple[Part, Mapping[str, Any] | None]]) -> None:
        """Before a state dict is made: the fingerprint of the weights beside their corrections."""
        for part, _, mark in _corrected(parts):
            if has_address(part.data) and part.device.type != "meta":
                mark.fill_(fingerprint(part.data))
                self._marked.append(mark)


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


def _belongs(part: Part, mark: Tensor) -> bool:
    saved = int(mark)
    return saved == UNKNOWN or not has_address(part.data) or saved == fingerprint(part.data)

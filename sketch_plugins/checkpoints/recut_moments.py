"""Recut moments and corrections of weights: those of a new piece, read from the old pieces tile by tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.checkpoints.recut_geometry import Held, Span
from sketch_plugins.sharding.blocks import At, Matrix, Rows, tiles
from sketch_plugins.sharding.state_names import CORRECTION
from sketch_plugins.stores import Dense, Gradient, Int8, Store
from sketch_plugins.stores.base import CHUNK


class _Source(NamedTuple):
    held: Held
    store: Store
    state: dict[str, Tensor]
    scale: float


class _Old(Matrix):
    """The estimates that the old pieces have for a new one, as a matrix."""

    def __init__(self, sources: Sequence[_Source], of: Held, dtype: torch.dtype, device: torch.device) -> None:
        self.sources, self.of, self.shape, self.dtype, self.device = sources, of, of.matrix, dtype, device

    def views(self, at: At) -> bool:
        """Always False: nothing is written into it."""
        return False

    def get(self, at: At) -> Tensor:
        """The estimates, valid until the next call; 0 where no old piece has any."""
        out = scratch.empty("recut", at.shape, self.dtype, self.device).zero_()
        matrix, box = out.flatten(0, -2), self.of.box
        numbers, rows = box.split(at.index(self.device))
        wanted = Span(box.columns.lo + at.lo, box.columns.lo + at.hi)
        for source in self.sources:
            there = source.held.box
            meet = wanted.meet(there.columns)
            here = there.has(numbers, rows).nonzero().squeeze(-1)
            if meet.size and len(here):
                theirs = there.number(numbers[here], rows[here])
                values = _read(source, theirs, meet.within(there.columns), self.dtype)
                matrix[:, meet.within(wanted)].index_copy_(0, here, values)
        return out


def _read(source: _Source, rows: Tensor, columns: slice, dtype: torch.dtype) -> Tensor:
    """Rows and columns of the piece's own matrix, read in whole blocks of its store."""
    align, end = source.store.align, source.held.matrix[1]
    lo, hi = columns.start // align * align, min(end, -(-columns.stop // align) * align)
    values = source.store.read(source.state, Rows(source.held.matrix[0], rows, lo, hi), dtype)
    values = values.expand(len(rows), hi - lo)[:, columns.start - lo : columns.stop - lo]
    return values if source.scale == 1.0 else values * source.scale


def moment(
    old: Sequence[Held], h: Held, name: str, store: Store, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Tensor], bool]:
    """The state of one moment, and whether it is bit for bit that of the old pieces."""
    sources = []
    for o in old:
        if not o.box.meet(h.box).size:
            continue
        if name in o.stores:
            state = o.state[name]
            sources.append(_Source(o, o.stores[name], state, o.stores[name].estimate_scale(state, o.matrix)))
        elif name != "first_moment":  # a momentum may start at 0 at any time, but an average of squares may not
            raise ValueError(f"the old piece at {o.at} has no {name}, but the new piece at {h.at} needs it")
    state = store.allocate(h.matrix, device, dtype)
    store.assign(state, Gradient(_Old(sources, h, dtype, device), None, dtype, CHUNK, h.matrix))
    copied = 0
    if isinstance(store, Int8):
        for source in sources:
            if isinstance(source.store, Int8) and source.store.block_size == store.block_size:
                copied += _copy_blocks(source, h, state, store.block_size)
    dense = isinstance(store, Dense) and all(source.store == store for source in sources)
    return state, dense or copied == h.piece.numel


def corrections(old: Sequence[Held], h: Held, device: torch.device) -> dict[str, Tensor]:
    """The corrections of the weights; each correction follows its weight."""
    there = [o for o in old if o.box.meet(h.box).size]
    # They are integers of at most 16 bits, which float32 holds exactly.
    sources = [_Source(o, Dense(), {"dense": o.state[CORRECTION]["codes"]}, 1.0) for o in there]
    whole = _Old(sources, h, torch.float32, device)
    dtype = there[0].state[CORRECTION]["codes"].dtype
    codes = torch.zeros(h.matrix, dtype=dtype, device=device)
    for at in tiles(*h.matrix, CHUNK):
        at.put(codes, whole.get(at))
    return {"codes": codes, "mark": torch.zeros(1, dtype=torch.int64, device=device)}


def _copy_blocks(source: _Source, h: Held, state: dict[str, Tensor], size: int) -> int:
    """Copy codes and scales of the blocks that an old and a new piece share, because encoding could change them.

    Returns:
        The number of codes.
    """
    box, there = h.box, source.held.box
    columns, old_columns, both = box.columns, there.columns, box.meet(there)
    shift = columns.lo - old_columns.lo
    if not both.size or shift % size:
        return 0
    blocks = []
    for number in range(-(-columns.size // size)):
        other = number + shift // size
        end = min(columns.lo + (number + 1) * size, columns.hi)
        if other >= 0 and old_columns.lo + other * size < old_columns.hi:
            if end == min(old_columns.lo + (other + 1) * size, old_columns.hi):
                blocks.append(number)
    if not blocks:
        return 0
    # The common blocks follow each other, because blocks can differ at the ends only.
    mine = Span(blocks[0], blocks[-1] + 1)
    theirs = Span(mine.lo + shift // size, mine.hi + shift // size)
    common = both.split(torch.arange(both.matrices.size * both.rows.size, device=state["codes"].device))
    to, origin = box.number(*common), there.number(*common)
    ends = min(mine.hi * size, columns.size), min(theirs.hi * size, old_columns.size)
    state["scales"][to, mine.lo : mine.hi] = source.state["scales"][origin, theirs.lo : theirs.hi]
    state["codes"][to, mine.lo * size : ends[0]] = source.state["codes"][origin, theirs.lo * size : ends[1]]
    return len(to) * (ends[0] - mine.lo * size)

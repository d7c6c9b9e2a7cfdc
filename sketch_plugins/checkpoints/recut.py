r"""Recut the state of a parameter's pieces: from a run that was sharded over W ranks to one over W' ranks.

Every piece (`sketch_plugins.sharding.pieces`) has stores of its own, made for its own rows. If a piece of the new
partition is also one of the old partition, its state is copied. Otherwise the new state is made from the *estimates* of
the old one:

=================== ================================================================================================
state               of a recut piece
=================== ================================================================================================
dense               exact, bit for bit
int8                bit for bit in blocks that are also blocks of the old pieces; in whole rows these are all blocks.
                    Blocks that were cut are encoded again, with an error of at most half a step of the new block
count-min, row      exact if every row has a bucket of its own. Otherwise the old estimates, averaged over the rows of
count-min           each new bucket: they lie between the smallest and the largest old estimate, and with one table the
                    sum over the rows stays the same. The rows' own scales of row count-min stay. ``bucket="sum"``, and
count-sketch        tables of signed sums: the same, with estimates scaled to values whose sketch is the old table
                    (`Store.estimate_scale`), so that nothing is counted once for each row of a bucket
cover               the maxima of the old estimates. They are never below the estimates, so upper bounds stay upper
                    bounds
covariances         see `sketch_plugins.checkpoints.recut_covariances`
weight corrections  exact, bit for bit (``weight_bits``). Their fingerprints are left out: the weights that they are
                    loaded with are taken to be those of the checkpoint
rms                 (``lagged_rms``) averaged over the old pieces that overlap the new one, weighted by their size; in a
                    batch (experts) for each matrix, over the old pieces that have a part of it
steps               have to be equal
=================== ================================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sketch_plugins import scratch
from sketch_plugins.checkpoints.recut_covariances import covariances
from sketch_plugins.checkpoints.recut_geometry import PRECONDITIONER, Held, copied
from sketch_plugins.checkpoints.recut_moments import corrections, moment
from sketch_plugins.sharding.state_names import CORRECTION

RMS = "rms"  # state of `lagged_rms`


def recut(old: Sequence[Held], new: Sequence[Held], dtype: torch.dtype = torch.float32) -> list[set[str]]:
    """Fill the state of ``new``, pieces of one parameter, from that of ``old``, as the module's docstring describes.

    Beside old and new state, only tiles, one table (``bucket="sum"``) and the factors of one covariance are allocated.
    If no old piece has state (no step was taken), the new ones get none.

    Args:
        old: pieces that do not overlap and together contain all of ``new``.
        new: pieces without state; they need not cover the whole parameter.
        dtype: arithmetic dtype: float64 for float64 parameters.

    Returns:
        For each new piece the names of the state that is bit for bit the old one.

    Raises:
        ValueError: pieces of different parameters; a new piece is not covered, or covered twice; some old pieces have
            state and others have none; step numbers differ; a state lacks what its stores need; a new piece has state,
            or needs a moment that the old ones did not keep.
    """
    old = [h for h in old if h.piece.numel]  # an empty piece has no state
    _check(old, new)
    exact: list[set[str]] = [set() for _ in new]
    started = [h for h in old if h.state]
    if not started:
        return exact
    drained: dict[int, Mapping[str, Tensor]] = {}
    with scratch.scratch():
        device = _device(started[0].state)
        for h, same in zip(new, exact, strict=True):
            if not h.piece.numel:
                continue
            state: dict[str, Any] = {"step": started[0].state["step"].clone()}
            if "place" in started[0].state:
                state["place"] = h.piece.place
            if "shape" in started[0].state:
                state["shape"] = torch.tensor(h.piece.shape, dtype=torch.int64)
            for name, store in h.stores.items():
                twin = next((o for o in old if _same(o, h) and o.stores.get(name) == store), None)
                if twin:
                    state[name], whole = copied(twin.state[name]), True
                else:
                    state[name], whole = moment(old, h, name, store, device, dtype)
                same |= {name} if whole else set()
            if h.preconditioner is not None:
                twin = next((o for o in old if _same(o, h) and o.preconditioner == h.preconditioner), None)
                state[PRECONDITIONER] = (
                    copied(twin.state[PRECONDITIONER]) if twin else covariances(old, h, drained, device, dtype)
                )
                same |= {PRECONDITIONER} if twin else set()
            if RMS in started[0].state:
                twin = next((o for o in old if _same(o, h)), None)
                state[RMS] = copied(twin.state[RMS]) if twin else {"last": _root_mean(started, h)}
                same |= {RMS} if twin else set()
            if CORRECTION in started[0].state:
                twin = next((o for o in old if _same(o, h)), None)
                state[CORRECTION] = copied(twin.state[CORRECTION]) if twin else corrections(old, h, device)
                same |= {CORRECTION}
            h.state.update(state)
    return exact


def _root_mean(old: Sequence[Held], new: Held) -> Tensor:
    if not new.apart:
        return _mean([(o.piece.numel, o.state[RMS]["last"]) for o in old])
    each = []
    for matrix in range(*new.rectangle[0]):
        near = [(o, o.rectangle[0]) for o in old if matrix in range(*o.rectangle[0])]
        parts = [
            (
                o.piece.numel // rows.size,
                o.state[RMS]["last"] if o.within_row else o.state[RMS]["last"][matrix - rows.lo],
            )
            for o, rows in near
        ]
        each.append(_mean(parts))
    return each[0] if new.within_row else torch.stack(each)


def _mean(parts: Sequence[tuple[int, Tensor]]) -> Tensor:
    squares = sum(weight * last.square() for weight, last in parts)
    assert isinstance(squares, Tensor)
    return (squares / sum(weight for weight, _ in parts)).sqrt()


def _check(old: Sequence[Held], new: Sequence[Held]) -> None:
    wholes = {h.piece.whole for h in (*old, *new)}
    if len(wholes) > 1:
        raise ValueError(
            f"the pieces belong to parameters of different shapes ({', '.join(map(str, sorted(wholes)))}); "
            "all of them must belong to one parameter"
        )
    for h in new:
        if h.state:
            raise ValueError(f"the new piece at {h.at} already has state: {', '.join(h.state)}")
        covered = sum(o.box.meet(h.box).size for o in old)
        if covered != h.piece.numel:
            raise ValueError(
                f"the new piece at {h.at} has {h.piece.numel} elements, but the old pieces contain {covered} of them"
                + (": they overlap" if covered > h.piece.numel else "")
            )
    started = [h for h in old if h.state]
    if started and len(started) < len(old):
        without = next(h for h in old if not h.state)
        raise ValueError(
            f"the old piece at {without.at} has no state, but other pieces of the same parameter have state"
        )
    steps = sorted({float(h.state["step"]) for h in started})
    if len(steps) > 1:
        raise ValueError(
            f"the old pieces of one parameter are at different steps: {', '.join(f'{s:g}' for s in steps)}"
        )
    for h in started:
        expected = {"step", *h.stores, *([PRECONDITIONER] if h.preconditioner else [])}
        if not expected <= set(h.state) <= expected | {"place", "shape", RMS, CORRECTION}:
            raise ValueError(
                f"the state of the old piece at {h.at} contains {', '.join(h.state)}; expected "
                f"{', '.join(sorted(expected))}"
            )
        if "place" in h.state and not torch.equal(h.state["place"].cpu(), h.piece.place):
            raise ValueError(
                f"the state of the old piece at {h.at} was saved for position {h.state['place'].tolist()}, but "
                f"the piece is at {h.piece.place.tolist()} (row, column, shape of the parameter)"
            )


def _same(one: Held, other: Held) -> bool:
    return one.piece.shape == other.piece.shape and one.rectangle == other.rectangle


def _device(state: Mapping[str, Any]) -> torch.device:
    for value in state.values():
        if isinstance(value, Mapping):
            for tensor in value.values():
                return tensor.device
    return torch.device("cpu")

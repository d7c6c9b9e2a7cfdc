"""What the kernels of a step are compiled for, and who takes note of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sketch_plugins.kernels import work as places
from sketch_plugins.kernels.work import Work
from sketch_plugins.optim.pending import Pending

# What the specialisation of a work depends on -> (kernels, the specialisation).
_TEXTS: dict[tuple[Any, ...], tuple[tuple[str, ...], str]] = {}


class Recorder:
    """Notes the specialisations of the steps that are taken while it is `watching`.

    Attributes:
        seen: (the tensor in the parameter group, its kernels, their specialisation).
    """

    def __init__(self, stop: bool = False) -> None:
        self.seen: list[tuple[Tensor, tuple[str, ...], str]] = []
        self._stop = stop

    def note(self, pending: Sequence[Pending]) -> None:
        """Called before anything changes; with ``stop`` nothing ever does."""
        for one in pending:
            if one.backend is not None and one.work is not None:
                self.seen.append((one.p.owner, *specialisation(one.backend.name, one.work)))
        if self._stop:
            raise Stopped


class Stopped(Exception):
    """A step was stopped before it changed anything."""


class _Local(threading.local):
    recorder: Recorder | None = None


_LOCAL = _Local()


def watched() -> Recorder | None:
    """The recorder of this thread's steps, where one is watching."""
    return _LOCAL.recorder


@contextmanager
def watching(recorder: Recorder) -> Iterator[Recorder]:
    """Steps of this thread are noted, and nothing is checked before them."""
    before, _LOCAL.recorder = _LOCAL.recorder, recorder
    try:
        yield recorder
    finally:
        _LOCAL.recorder = before


def specialisation(backend: str, w: Work) -> tuple[tuple[str, ...], str]:
    """The kernels that take a step, and what they are compiled for."""
    stores = tuple(pair and pair[0] for pair in (w.first, w.second))
    state = [t for pair in (w.first, w.second) if pair for t in pair[1].values()]
    key = (
        backend, stores, w.p.dtype, w.g.dtype, w.p.shape, w.p.stride(), w.g.stride(), w.rows is None, w.packed, w.after,
        w.measure, w.stochastic, w.last is None, w.correction is None or w.correction.dtype,
        w.flags & (1 << places.L2 | 1 << places.LOOKAHEAD | 1 << places.UNIT),
        any(t.data_ptr() % 16 for t in (w.p, w.g, *state, *([] if w.correction is None else [w.correction]))),
    )  # fmt: skip
    found = _TEXTS.get(key)
    if found is None:
        if len(_TEXTS) > 10_000:
            _TEXTS.clear()
        if backend == "triton":
            from sketch_plugins.kernels.gpu.launch import specialisation as of
        else:
            from sketch_plugins.kernels.cpu import specialisation as of
        found = _TEXTS[key] = of(w)
    return found

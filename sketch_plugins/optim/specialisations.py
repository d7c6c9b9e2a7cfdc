"""What the kernels of a step are compiled for, and a recorder of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sketch_plugins.kernels import work as places
from sketch_plugins.kernels.work import Work
from sketch_plugins.optim.pending import Pending

# Everything that the specialisation of a work depends on -> (kernels, the specialisation).
_TEXTS: dict[tuple[Any, ...], tuple[tuple[str, ...], str]] = {}


class Recorder:
    """Records the specialisations of steps that are taken within `watching`.

    Attributes:
        seen: (the tensor in the parameter group, its kernels, their specialisation) of each step.
    """

    def __init__(self, stop: bool = False) -> None:
        self.seen: list[tuple[Tensor, tuple[str, ...], str]] = []
        self._stop = stop

    def note(self, pending: Sequence[Pending]) -> None:
        """Record a step before it changes anything. With ``stop`` it is then stopped by `Stopped`."""
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
    """The recorder that watches this thread's steps, or None."""
    return _LOCAL.recorder


@contextmanager
def watching(recorder: Recorder) -> Iterator[Recorder]:
    """Record the steps of this thread. Their kernels are not checked."""
    before, _LOCAL.recorder = _LOCAL.recorder, recorder
    try:
        yield recorder
    finally:
        _LOCAL.recorder = before


def specialisation(backend: str, w: Work) -> tuple[tuple[str, ...], str]:
    """The kernels that take a step, and the text of everything that they are compiled for."""
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

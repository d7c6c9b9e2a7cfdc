"""The fused step on a CPU: one sweep over parameter and gradient, compiled by Numba. Optional (extra ``cpu``).

The eager path (the definition) makes a dozen passes over each tile. `sweeps` adds up the members of a bucket and takes
their step while they are in the cache, so p and g are read once and p is written once. This file describes each
parameter to the loops (`Task`), cuts the step into pieces, and gives the pieces to threads. One thread sweeps a unit of
a parameter, and sums have a fixed order, so the bits do not depend on the number of threads.

Why Numba: on BERT-base shapes torch.compile of the same sweep took 1.7 times as long, with 80 microseconds a call and
10 to 40 seconds of compilation; docs/architecture.md has the figures.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from sketch_plugins.kernels import cpu_table, sweeps
from sketch_plugins.kernels.cpu_table import Piece, Row
from sketch_plugins.kernels.sweeps import SPAN
from sketch_plugins.kernels.work import (
    APPLY,
    FOLD,
    L2,
    MEASURE,
    SHRINK,
    STANDING,
    STEP,
    Work,
    is_rows,
    misread,
    same_tasks,
)
from sketch_plugins.stores import CountMin, Store
from sketch_plugins.stores.base import State

# Numbers of a band of buckets with all their members. Gradient and parameter (8 bytes a number) stay in the
# second-level cache until they are read again.
BAND = 1 << 15
# Numbers of a band's table if each sweep reads a number once: long runs of memory are faster.
LONG = 1 << 15
# Numbers of a unit of a parameter that has no structure except blocks.
FLAT = 1 << 12
# Pieces of a step for each thread. When the first thread finds no more pieces, only a fraction of its share is left.
PIECES = 12

#: `Store.loop` of a first moment -> its branch in a loop; `Store.loop` of a second moment -> the name of the loop.
FIRST = {"dense": sweeps.DENSE, "int8": sweeps.INT8}
SECOND = {"dense": "exact", "count_min": "count_min", "cover": "cover"}

VIEWS = {torch.float32: np.float32, torch.bfloat16: np.uint16}
CODES = {None: np.float32, torch.int8: np.int8, torch.int16: np.int16}


class Task(NamedTuple):
    """One parameter's step as the loops get it. It holds addresses and no tensors, so it keeps no tensor alive.

    Attributes:
        sweep: the loop that takes the step.
        dtypes: of the parameter, the gradient, a dense first moment and the corrections (float32 without corrections).
        row: its row of `cpu_table`. The gradient's address is that of the step that the task was made for.
        measure: the update (and the parameter) is measured before the step is applied.
    """

    @property
    def once(self) -> bool:
        """See `Work.once`."""
        return self.row.LAST != 0 and not self.measure

    def fits(self, gradient: int) -> bool:
        """Whether the task can read a gradient at this address. Numba's loops can read any."""
        return True

    sweep: Callable[..., Any]
    dtypes: tuple[Any, Any, Any, Any]
    row: Row
    measure: bool


def unsupported(w: Work) -> str | None:
    """Why these loops cannot take this parameter's step; None if they can."""
    first, second = (pair and pair[0] for pair in (w.first, w.second))
    if w.p.dtype not in VIEWS or w.g.dtype not in VIEWS:
        return (
            f"the parameter is {w.p.dtype} and its gradient {w.g.dtype}: the Numba kernels take torch.float32 and "
            "torch.bfloat16"
        )
    if not (w.p.is_contiguous() and w.g.is_contiguous() and is_rows(w.p)):
        return "the parameter or its gradient is not contiguous"
    if w.rows is not None:
        return "the Numba kernels do not take row-sparse gradients"
    if w.flags & (1 << L2):
        return "the Numba kernels do not add the weight decay to the gradient"
    if w.stochastic:
        return "the Numba kernels do not round a parameter stochastically"
    return unkept(first, second, w.p.shape[0]) or misread(w)


def unkept(first: Store | None, second: Store | None, rows: int) -> str | None:
    """Why these loops cannot keep such moments of a matrix with this number of rows; None if they can."""
    if first is not None and first.loop(rows) not in FIRST:
        return f"the Numba kernels do not keep the first moment in {first}"
    if second is not None and second.loop(rows) not in SECOND:
        return f"the Numba kernels do not keep the second moment in {second}"
    return None


def prepare(w: Work) -> Task:
    """The task of a supported work. It is valid while addresses, shapes and dtypes of the tensors stay the same."""
    (rows, columns), size = w.p.shape, w.p.numel()
    first: Store | None
    second: Store | None
    state1: State
    state2: State
    (first, state1), (second, state2) = w.first or (None, {}), w.second or (None, {})
    kind = FIRST[first.loop(rows)] if first else sweeps.NONE
    sweep = getattr(sweeps, SECOND[second.loop(rows)] if second else "exact")
    block = min(first.block_size, columns) if first and first.block_size else SPAN
    width, band, column, matrices = 0, 0, 0, 1
    table = state2["dense"].data_ptr() if "dense" in state2 else 0
    if isinstance(second, CountMin):
        table = state2["table"].data_ptr()
        column = state2["row_means"].data_ptr() if "row_means" in state2 else 0
        matrices, width = second.matrices, second.buckets(rows) // second.matrices
        apart = w.measure and (kind == sweeps.NONE or w.after)
        long = LONG // 4 if column else LONG  # there are two buffers of that size
        band = max(1, min(width, long // columns if apart else BAND // (-(-rows // (matrices * width)) * columns)))
        units = matrices * -(-width // band)
    elif sweep is sweeps.cover:
        table, column, units = state2["axis_0"].data_ptr(), state2["axis_1"].data_ptr(), rows
    else:
        if kind != sweeps.INT8 or columns % block == 0:  # no row ends within a block: the matrix is like a vector
            columns = FLAT if kind != sweeps.INT8 else -(-FLAT // block) * block
        units = w.apart * -(-(size // w.apart) // columns)
    moment = state1.get("dense", state1.get("codes"))
    dense = state1["dense"].dtype if "dense" in state1 else torch.float32
    return Task(
        sweep,
        (
            VIEWS[w.p.dtype],
            VIEWS[w.g.dtype],
            VIEWS[dense],
            CODES[w.correction.dtype if w.correction is not None else None],
        ),
        Row(
            P=w.p.data_ptr(),
            G=w.g.data_ptr(),
            SIZE=size,
            COLUMNS=columns,
            KIND=int(kind),
            TABLE1=0 if moment is None else moment.data_ptr(),
            SCALES=state1["scales"].data_ptr() if "scales" in state1 else 0,
            BLOCK=block,
            TABLE2=table,
            COLUMN=column,
            WIDTH=width,
            BAND=band,
            UNITS=units,
            BASE=0,
            AFTER=int(w.after),
            NEW=0,
            LAST=0 if w.last is None else w.last.data_ptr(),
            CODES=0 if w.correction is None else w.correction.data_ptr(),
            SEED=w.seed & (1 << 64) - 1,
            MATRICES=matrices,
            APART=w.apart,
        ),
        w.measure,
    )


class Program:
    """The pieces of a step of certain tasks with a certain number of threads. It is valid as long as the tasks are.

    A thread applies what it has measured at once. Only a parameter that is a large part of the step is measured by all
    threads, which then wait for each other: ``pieces[0]`` runs before that, ``pieces[1]`` after it.
    """

    def __init__(self, tasks: Sequence[Task], threads: int) -> None:
        self.tasks, self.threads = list(tasks), threads
        self.table = table = np.array([task.row for task in tasks], np.uint64).reshape(len(tasks), cpu_table.FIELDS)
        units = table[:, cpu_table.UNITS].astype(np.int64)
        measured = units * np.array([task.measure or task.once for task in tasks], bool)
        rows = np.array([_new_rows(task) for task in tasks], np.int64)
        table[:, cpu_table.BASE], table[:, cpu_table.NEW] = (np.cumsum(n) - n for n in (measured, rows))
        self.units, self.rows, self.columns = int(measured.sum()), int(rows.sum()), 0
        # The task of each row of numbers, and the first row of each task: matrices that are handled one by one have
        # numbers of their own.
        apart = table[:, cpu_table.APART].astype(np.int64)
        self.owners = None if (apart == 1).all() else np.repeat(np.arange(len(tasks)), apart)
        begins = (np.cumsum(apart) - apart).tolist()
        share = -(-int(table[:, cpu_table.SIZE].sum()) // threads)
        limit = share if threads == 1 else max(1 << 16, -(-share // PIECES))
        pieces = _Pieces(limit), _Pieces(limit)
        divided, finish = [], []
        for t, task in enumerate(tasks):
            fold_first = task.measure and task.sweep is sweeps.count_min
            measure = (FOLD | MEASURE if fold_first else MEASURE) if task.measure else 0
            apply = APPLY if fold_first else FOLD | APPLY
            if task.once:
                apply |= MEASURE | int(sweeps.ONCE)
            alone = task.row.APART
            size, count = task.row.SIZE // alone, task.row.UNITS // alone
            together = threads == 1 or (task.measure and 2 * size <= share)
            cuts = [(0, count)] if together else _cuts(count, size, limit)
            divides = task.measure and not together
            for matrix in range(alone):
                own = begins[t] + matrix
                ranges = [(matrix * count + begin, matrix * count + end) for begin, end in cuts]
                if divides:
                    divided.append((t, matrix, own))
                    for begin, end in ranges:
                        pieces[0].add(task, Piece(t, begin, end, measure, 0, own))
                for begin, end in ranges:
                    phase = apply if divides else measure | apply
                    pieces[1].add(task, Piece(t, begin, end, phase, self.columns, own))
                    if task.sweep is sweeps.cover:
                        finish.append(Piece(t, begin, end, apply, self.columns, own))
                        self.columns += -(-task.row.COLUMNS // 16) * 16  # whole cache lines
        self.calls = pieces[0].calls(), pieces[1].calls()
        self.divided = np.array(divided, np.uint64).reshape(-1, 3)
        self.finish = np.array(finish, np.uint64).reshape(-1, len(Piece._fields))
        self.recalled = _matrices(self.tasks, begins, [task.once for task in tasks])
        self.recorded = _matrices(self.tasks, begins, [task.row.LAST != 0 for task in tasks])
        self.compiled = False

    def prepare(self, numbers: np.ndarray, gradients: Sequence[int]) -> Callable[[], None]:
        """Everything that can fail is done here: loops are compiled, memory is allocated. The result takes the step.

        Args:
            numbers: a row of numbers for each task. The step changes them.
            gradients: the address of each task's gradient.
        """
        table = self.table
        if self.owners is not None:
            numbers = numbers[self.owners]
        table[:, cpu_table.G] = gradients
        squares, norms = np.empty(self.units), np.empty(self.units)
        rows, maxima = np.empty(self.rows, np.float32), np.empty(self.columns, np.float32)
        common = table, numbers, squares, norms, rows, maxima
        if not self.compiled:
            self._compile(common)
            self.compiled = True
        before, after = (_Batch(calls, common, self.threads) for calls in self.calls)

        def run() -> None:
            if len(self.recalled):
                sweeps.recall(table, numbers, self.recalled)
            if self.calls[0]:
                before.run()
                sweeps.settle(table, numbers, self.divided, squares, norms)
            after.run()
            if len(self.finish):
                sweeps.finish(table, self.finish, rows, maxima)
            if len(self.recorded):
                sweeps.record(table, numbers, self.recorded, squares, norms)

        return run

    def _compile(self, common: tuple[np.ndarray, ...]) -> None:
        """Call every loop once without pieces, because Numba compiles a function in its first call."""
        table, numbers, squares, norms, rows, maxima = common
        seen = set()
        for call in (*self.calls[0], *self.calls[1]):
            key = call.sweep, *(like.dtype for like in call.likes)
            if key not in seen:
                seen.add(key)
                call.sweep(*call.likes, call.pieces[:0], *common, np.empty(0, np.float32))
        sweeps.recall(table, numbers, self.recalled[:0])
        sweeps.settle(table, numbers, self.divided[:0], squares, norms)
        sweeps.finish(table, self.finish[:0], rows, maxima)
        sweeps.record(table, numbers, self.recorded[:0], squares, norms)


def prepare_step(
    tasks: Sequence[Task],
    rows: Sequence[Sequence[float]],
    which: Sequence[int],
    gradients: Sequence[int],
    last: Program | None = None,
    moves: Callable[[torch.device], torch.Tensor] | None = None,
) -> tuple[Program, list[tuple[Sequence[int], Callable[[], None]]]]:
    """Make the steps ready. Only calling the result changes anything, and that call allocates nothing.

    Args:
        tasks: one for each parameter.
        rows: vectors of numbers.
        which: for each task, the place of its numbers in ``rows``.
        gradients: for each task, the address of its gradient.
        last: the program of another step, which is used again if it was made for the same tasks.
        moves: None, or a function that returns a flag for a device: if it is not set, no weight moves.

    Returns:
        The program, for the next step, and one pair: the places of all tasks, and the function that takes their steps.
    """
    threads = torch.get_num_threads()
    if last is None or last.threads != threads or not same_tasks(tasks, last.tasks):
        last = Program(tasks, threads)
    numbers = np.array(rows, np.float32)[which]
    if moves is not None:  # the flag is in the CPU's memory, so nothing waits for it
        flag, sizes = moves(torch.device("cpu")).numpy(), slice(STEP, SHRINK + 1)
        numbers[:, sizes] = np.where(flag, numbers[:, sizes], np.array(STANDING, np.float32))
    return last, [(range(len(tasks)), last.prepare(numbers, gradients))]


def moved(tasks: Sequence[Task], program: Program, further: int) -> list[Task]:
    """The same tasks for parameters that have moved by ``further`` bytes. ``program`` is changed to these tasks."""
    new = [task._replace(row=task.row._replace(P=task.row.P + further)) for task in tasks]
    program.tasks = list(new)
    program.table[:, cpu_table.P] = [task.row.P for task in new]
    return new


class _Call(NamedTuple):
    """Pieces for one call of a sweep.

    Attributes:
        sweep: the loop.
        likes: arrays whose dtypes specialise it.
        pieces: see `cpu_table`.
        room: number of float32 that its buffers take.
    """

    sweep: Callable[..., Any]
    likes: tuple[np.ndarray, ...]
    pieces: np.ndarray
    room: int


class _Pieces:
    """Collects pieces that one call can take, up to ``limit`` numbers."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._open: dict[Any, tuple[int, list[Piece], int]] = {}
        self._full: list[tuple[int, _Call]] = []

    def add(self, task: Task, piece: Piece) -> None:
        """Add a piece of a task."""
        row, kernel = task.row, (task.sweep, task.dtypes)
        cost = row.SIZE * (piece.END - piece.BEGIN) // row.UNITS
        # The factors of a band, and two more runs if the momentum comes after them; for other loops three runs.
        band, run = row.BAND * row.COLUMNS, max(SPAN, row.BLOCK)
        if task.sweep is sweeps.count_min and row.COLUMN:
            # The factors of a run, and those of the rows.
            band += band + row.BAND * -(-row.SIZE // (row.COLUMNS * row.MATRICES * row.WIDTH))
        need = band + 2 * run * row.AFTER if band else 3 * run
        size, pieces, room = self._open.pop(kernel, (0, [], 0))
        if pieces and size + cost > self.limit:
            self._close(kernel, size, pieces, room)
            size, pieces, room = 0, [], 0
        pieces.append(piece)
        self._open[kernel] = size + cost, pieces, max(room, need)

    def calls(self) -> list[_Call]:
        """All calls, the largest first."""
        for kernel, rest in self._open.items():
            self._close(kernel, *rest)
        self._open = {}
        return [call for _, call in sorted(self._full, key=lambda one: -one[0])]

    def _close(self, kernel: Any, size: int, pieces: list[Piece], room: int) -> None:
        sweep, dtypes = kernel
        likes = tuple(np.empty(0, dtype) for dtype in dtypes)
        self._full.append((size, _Call(sweep, likes, np.array(pieces, np.uint64), room)))


def _new_rows(task: Task) -> int:
    """How many numbers a task's step keeps for rows until it ends: their covers, or the means of their squares."""
    if task.sweep is sweeps.cover or (task.sweep is sweeps.count_min and task.row.COLUMN):
        return task.row.SIZE // task.row.COLUMNS
    return 0


def _matrices(tasks: Sequence[Task], begins: Sequence[int], chosen: Sequence[bool]) -> np.ndarray:
    """What `sweeps.recall` and `sweeps.record` get: all matrices of the chosen tasks that are measured one by one.

    ``begins`` are the places of the tasks' first numbers.
    """
    found = [
        (t, matrix, begins[t] + matrix)
        for t, task in enumerate(tasks)
        for matrix in range(task.row.APART if chosen[t] else 0)
    ]
    return np.array(found, np.uint64).reshape(-1, 3)


def _cuts(units: int, size: int, limit: int) -> list[tuple[int, int]]:
    """Ranges of units of about ``limit`` numbers."""
    n = max(1, min(units, -(-size // limit)))
    edges = [units * i // n for i in range(n + 1)]
    return list(pairwise(edges))


_POOL: tuple[int, int, ThreadPoolExecutor] | None = None


class _Batch:
    """Calls that are made by whichever thread is free."""

    def __init__(self, calls: Sequence[_Call], common: tuple[np.ndarray, ...], threads: int) -> None:
        self.calls, self.common = calls, common
        room = max((call.room for call in calls), default=0)
        self.buffers = [np.empty(room, np.float32) for _ in range(min(threads, len(calls)))]
        self.pool = _pool(threads) if len(self.buffers) > 1 else None

    def run(self) -> None:
        """Make all calls. The number of threads does not change the result."""
        waiting = deque(self.calls)

        def drain(buffer: np.ndarray) -> None:
            while True:
                try:
                    call = waiting.popleft()
                except IndexError:
                    return
                call.sweep(*call.likes, call.pieces, *self.common, buffer[: call.room])

        own, *others = self.buffers or [np.empty(0, np.float32)]
        working = []
        for buffer in others:
            try:
                working.append(self.pool.submit(drain, buffer))  # type: ignore[union-attr]
            except RuntimeError:
                # The interpreter is shutting down (a thread that trains may outlive the main one), or the system has no
                # thread left. This thread does the work.
                break
        try:
            drain(own)
        finally:
            for one in working:
                one.result()


def _pool(threads: int) -> ThreadPoolExecutor:
    """The threads of this process. A fork does not copy those of its parent, so they belong to a process id."""
    global _POOL
    if _POOL is None or _POOL[:2] != (os.getpid(), threads):
        _POOL = (os.getpid(), threads, ThreadPoolExecutor(threads - 1, "sketch-plugins"))
    return _POOL[2]


def specialisation(w: Work) -> tuple[tuple[str, ...], str]:
    """The loop that takes a supported step, and the text of everything that it is compiled for."""
    task = prepare(w)
    name = f"sweeps.{task.sweep.__name__}"
    dtypes = " ".join(dtype.__name__ for dtype in task.dtypes)
    return (name,), f"{name} {dtypes} moment={task.row.KIND} after={w.after} measure={w.measure} once={w.once}"

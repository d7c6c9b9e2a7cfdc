"""Turns a list of parameters into as few kernel launches as their stores allow. Only this file knows grids.

Nothing here waits for the device. Tables of pointers are uploaded from pinned memory and kept while the pointers stay
the same. The numbers of a step are uploaded with it (with ``capturable`` they are on the device already).
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from sketch_plugins.kernels import work as places
from sketch_plugins.kernels.gpu import common, first, fold, norms, second, step
from sketch_plugins.kernels.gpu.table import Row
from sketch_plugins.kernels.work import APPLY, FLOATS, FOLD, MEASURE, NUMBERS, Work, is_rows, misread, same_tasks
from sketch_plugins.stores import CountMin, CountSketch, Cover, Dense, Ema, Int8, RowCountMin
from sketch_plugins.stores.sketch import Sketch

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
CODES = {None: None, torch.int8: tl.int8, torch.int16: tl.int16}
# The largest number of elements in a program's tile: with g, p, a moment and the factor it still fits the registers.
TILE = 4096
# Columns of a tile without blocks of codes: 512 bytes of float32, which is a full transaction of a warp.
COLUMNS = 128
FLAT = 1024
TABLES = 32

FIELDS = len(Row._fields)
_G, _NEW, _AXES = map(Row.at, ("G", "NEW", "AXES"))

_Action = Callable[[], Any]
#: None, or a function that returns a flag for a device.
Moves = Callable[[torch.device], Tensor] | None


def unsupported(w: Work) -> str | None:
    """Why these kernels cannot take this parameter's step; None if they can."""
    if w.p.dtype not in TYPES or w.g.dtype not in TYPES:
        return (
            f"the parameter is {w.p.dtype} and its gradient {w.g.dtype}: the Triton kernels take "
            f"{', '.join(map(str, FLOATS))}"
        )
    if not is_rows(w.p) or not is_rows(w.g):
        return "the elements of a row of the parameter or of its gradient are not adjacent in memory"
    stores = [pair[0] for pair in (w.first, w.second) if pair]
    for store in stores:
        if not store.kernel:
            return f"there is no Triton kernel for {store}"
    if len({store.block_size for store in stores} - {0}) > 1:
        return "the Triton kernels need the same block size in both moments"
    if w.after and w.first and isinstance(w.first[0], CountSketch):
        # A count-sketch is written with the gradient itself, before the division.
        return (
            "the Triton kernels do not support first_moment='count_sketch' when the momentum follows the "
            "division by the denominator"
        )
    if w.rows is not None and w.apart > 1:
        return (
            "the Triton kernels do not take the touched rows of matrices (experts) that are measured one by one, or "
            "have covers of their own"
        )
    return misread(w)


@dataclass(frozen=True)
class Task:
    """One parameter's step, as addresses and no tensors, so that later steps can launch it again.

    Attributes:
        spec: what the kernel is compiled for.
        device: device of the parameter.
        row: its fields (see `table`). Those that depend on the launch are 0.
        programs: how many programs its step takes.
        axes: pointer, length and numbers of one slice, for each axis of its cover except the first.
        lengths: lengths of the buffers for the new covers, or for the sums of the rows' squares (``spec.scaled``).
        cover: the store of its covers, if it has any.
        gradient: address of the gradient that it was described with.
    """

    spec: _Specialisation
    device: torch.device
    row: Row
    programs: int
    axes: tuple[int, ...]
    lengths: tuple[int, ...]
    cover: Cover | None
    gradient: int

    @property
    def once(self) -> bool:
        """See `Work.once`."""
        return self.spec.lagged and not self.spec.measure

    @property
    def apart(self) -> int:
        """See `Work.apart`: the number of vectors of numbers that the task has."""
        return self.row.ROWS // self.row.HEIGHT if self.spec.batch else 1

    def fits(self, gradient: int) -> bool:
        """Whether the task can read a gradient at this address."""
        return not self.spec.align or gradient % 16 == 0


def task(w: Work) -> Task | None:
    """The task of a supported work. It is valid while addresses, shapes and dtypes of the tensors stay the same.

    None if other launches come before the step: sketches of several tables and of touched rows are written first.
    """
    if w.rows is not None or _folds(w):
        return None
    return _task(*_specialise(w))


def _task(spec: _Specialisation, w: Work) -> Task:
    row, programs = _describe(w, spec)
    cover = w.second[0] if w.second and isinstance(w.second[0], Cover) else None
    # With a row-sparse gradient there is one maximum for each touched row.
    axes = _axes(w) if cover else ()
    lengths = (_count(w), *(length for _, length, _ in axes)) if cover else ()
    if spec.scaled:
        lengths = (row.TILES * row.ROWS,)
    return Task(spec, w.p.device, row, programs, tuple(chain(*axes)), lengths, cover, w.g.data_ptr())


def prepare(works: Sequence[Work], moves: Moves = None) -> list[tuple[list[int], Callable[[], None]]]:
    """Make the steps ready. Every work must be supported.

    Everything that can fail is done here, before anything changes: memory is allocated, tables are uploaded, and
    kernels are compiled.

    Args:
        works: the steps.
        moves: see `prepare_step`.

    Returns:
        For each launch, the places of its works in the list, and the function that takes their steps.
    """
    groups: dict[tuple[torch.device, _Specialisation], tuple[list[int], list[Work], list[_Action]]] = {}
    for place, given in enumerate(works):
        if given.rows is not None and not len(given.rows):
            continue
        device = given.p.device
        with _on(device):
            folds = _fold(given)
            spec, w = _specialise(given)
            places_, members, actions = groups.setdefault((device, spec), ([], [], []))
            places_.append(place)
            members.append(w)
            actions += folds
    takes: list[tuple[list[int], Callable[[], None]]] = []
    for (device, spec), (places_, members, actions) in groups.items():
        with _on(device):
            takes.append((places_, partial(_run, device, [*actions, *_launch(spec, members, device, moves)])))
    return takes


def _run(device: torch.device, actions: Iterable[_Action]) -> None:
    with _on(device):
        for action in actions:
            action()


class Program:
    """The launches of a step of certain tasks. It is valid as long as the tasks are.

    The table, which is the same in every step, is already on the device. The gradients' addresses and the numbers
    follow it in memory, and are uploaded in one copy.
    """

    def __init__(self, tasks: Sequence[Task], which: Sequence[int]) -> None:
        self.tasks, self.which = list(tasks), list(which)
        places: dict[torch.device, list[int]] = {}
        for place, one in enumerate(tasks):
            places.setdefault(one.device, []).append(place)
        self.devices = [_Device(device, at, self.tasks, self.which) for device, at in places.items()]

    def prepare(
        self,
        rows: Sequence[Sequence[float]],
        gradients: Sequence[int],
        filled: Sequence[tuple[int, Tensor]],
        moves: Moves,
    ) -> list[tuple[list[int], _Action]]:
        """The steps, as `prepare` returns them."""
        return [take for device in self.devices for take in device.prepare(rows, gradients, filled, moves)]


def prepare_step(
    tasks: Sequence[Task],
    rows: Sequence[Sequence[float]],
    which: Sequence[int],
    gradients: Sequence[int],
    last: Program | None = None,
    filled: Sequence[tuple[int, Tensor]] = (),
    moves: Moves = None,
) -> tuple[Program, list[tuple[list[int], _Action]]]:
    """Make the steps ready. Only calling the returned functions changes anything.

    Args:
        tasks: one for each parameter.
        rows: vectors of numbers.
        which: for each task, the place of its numbers in ``rows``.
        gradients: for each task, the address of its gradient.
        last: the program of another step, which is used again if it was made for the same tasks.
        filled: matrices on a device and their places in ``rows``. A matrix holds the numbers of the rows from its place
            on, and these rows are empty.
        moves: None, or a function that returns a flag for a device (0-d bool): if it is not set, no weight moves. The
            host does not read it.

    Returns:
        The program, for the next step, and for each launch the places of its tasks and the function that takes their
        steps.
    """
    if last is None or which != last.which or not same_tasks(tasks, last.tasks):
        last = Program(tasks, which)
    return last, last.prepare(rows, gradients, filled, moves)


class _Device:
    """The part of a program that runs on one device.

    Its buffer of int64 holds: the tables of all launches (rows and axes); for each task its place among the numbers;
    for each task the address of its gradient; for each task with covers the address of its new covers; the numbers.
    """

    def __init__(self, device: torch.device, places_: list[int], tasks: list[Task], which: list[int]) -> None:
        self.device, self.places = device, places_
        groups: dict[_Specialisation, list[int]] = {}
        for place in places_:
            groups.setdefault(tasks[place].spec, []).append(place)
        values: list[int] = []
        self.launches = []
        slots: list[tuple[int, int, int]] = []  # where a row begins, the task's place, and where its launch begins
        for spec, members in groups.items():
            start, rows, axes, begin, vectors = len(values), [], [], 0, 0
            for i, place in enumerate(members):
                own = vectors if spec.apart else which[place]
                rows.append(tasks[place].row._replace(BEGIN=begin, ROW=own))
                begin += tasks[place].programs
                vectors += tasks[place].apart
                slots.append((start + i * FIELDS, place, start))
                axes.append(tasks[place].axes)
            values += _laid_out(rows, axes)
            self.launches.append(_Launch(spec, members, [tasks[place] for place in members], start, begin))
            values += [0] * (-len(values) % 2)  # tables begin at multiples of 16 bytes
        self.rows = {which[place] for place in places_}
        for one in self.launches:
            one.index = len(values)
            values += [which[place] for place, count in zip(one.places, one.apart, strict=True) for _ in range(count)]
        self.order = [place for _, place, _ in slots]
        self.changing = len(values)
        new = self.changing + len(slots)
        for i, (at, place, _) in enumerate(slots):
            values[at + _G] = self.changing + i - at
            if tasks[place].lengths:
                values[at + _NEW] = new - at
                new += 1
        self.numbers = new + new % 2
        self.fixed = values
        self.buffer: Tensor | None = None

    def prepare(
        self,
        rows: Sequence[Sequence[float]],
        gradients: Sequence[int],
        filled: Sequence[tuple[int, Tensor]],
        moves: Moves,
    ) -> list[tuple[list[int], _Action]]:
        with _on(self.device):
            covers = _covers_of([one.covers for one in self.launches], self.device)
            size = -(-len(rows) * NUMBERS // 2)
            first = self.buffer is None or self.buffer.numel() < self.numbers + size
            begin = 0 if first else self.changing
            host = np.zeros(self.numbers + size - begin, np.int64)
            if first:
                host[: self.changing] = self.fixed
                self.buffer = torch.empty(len(host), dtype=torch.int64, device=self.device)
            at = self.changing - begin
            host[at : at + len(self.order)] = [gradients[place] for place in self.order]
            at += len(self.order)
            new = [address for one in covers if one for address in one.places]
            host[at : at + len(new)] = new
            floats = host[self.numbers - begin :].view(np.float32)[: len(rows) * NUMBERS].reshape(-1, NUMBERS)
            if filled:
                for place, row in enumerate(rows):
                    if row:
                        floats[place] = row
            else:
                floats[:] = np.array(rows, np.float32)
            assert self.buffer is not None
            self.buffer[begin : begin + len(host)].copy_(_pinned(host, self.device), non_blocking=True)
            numbers = self.buffer[self.numbers :].view(torch.float32)[: len(rows) * NUMBERS].view(-1, NUMBERS)
            for place, matrix in filled:
                if not self.rows.isdisjoint(range(place, place + len(matrix))):
                    numbers[place : place + len(matrix)].copy_(matrix, non_blocking=True)
            if moves is not None:
                _hold(numbers, moves(self.device))
            return [
                (one.places, partial(_run, self.device, one.actions(self.buffer, numbers, cover)))
                for one, cover in zip(self.launches, covers, strict=True)
            ]


class _Launch:
    """Tasks that share a launch."""

    def __init__(self, spec: _Specialisation, places_: list[int], tasks: list[Task], start: int, programs: int) -> None:
        self.spec, self.places, self.start, self.programs = spec, places_, start, programs
        self.apart = [one.apart for one in tasks]
        self.vectors = sum(self.apart)
        self.covers = _CoverLayout(tasks) if tasks[0].lengths else None
        self.index = 0
        self.ready = False

    def actions(self, buffer: Tensor, numbers: Tensor, covers: _Covers | None) -> list[_Action]:
        """All kernels of the launch, in order."""
        table = buffer[self.start :]
        if self.spec.apart:
            numbers = numbers.index_select(0, buffer[self.index : self.index + self.vectors])
        launched = _actions(self.spec, self.apart, self.programs, table, numbers, covers, self.ready)
        self.ready = True
        return launched


def _hold(numbers: Tensor, moves: Tensor) -> None:
    """Replace the learning rate and the weight decay by numbers that move no weight, unless the flag is set."""
    sizes = numbers[:, places.STEP : places.SHRINK + 1]
    sizes.copy_(torch.where(moves, sizes, _standing(numbers.device)))


@lru_cache(maxsize=64)
def _standing(device: torch.device) -> Tensor:
    return _upload(places.STANDING, torch.float32, device)


def _pinned(values: np.ndarray, device: torch.device) -> Tensor:
    host = torch.from_numpy(values)
    # torch's allocator of pinned memory does not reuse a block before the copy from it is done.
    return host.pin_memory() if device.type == "cuda" else host


# The kernels that were compiled, with their constants and what Triton specialises their arguments for.
_COMPILED: set[tuple[Any, ...]] = set()


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _ready(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> _Action:
    """A launch that is already compiled and loaded, by a launch of no programs, which does nothing else."""
    _compile(kernel, grid, args, constants)
    return partial(kernel[grid], *args, **constants)


def _again(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> _Action:
    """`_ready` for a launch that a program has already made ready."""
    return partial(kernel[grid], *args, **constants)


def _compile(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
    key = (
        kernel, tuple(constants.items()),
        tuple(
            (v.dtype, v.device, v.data_ptr() % 16) if isinstance(v, Tensor) else (v == 1, v % 16 == 0, v >> 31 > 0)
            for v in args
        ),
    )  # fmt: skip
    if key not in _COMPILED:
        kernel[(0,) * len(grid)](*args, **constants)
        _COMPILED.add(key)


@dataclass(frozen=True)
class _Specialisation:
    """What a kernel is compiled for. Tensors with equal specialisations share a launch."""

    kernel: str
    first: Any
    second: Any
    p: torch.dtype
    g: torch.dtype
    f: torch.dtype
    s: torch.dtype
    mode: int
    ahead: bool
    unit: bool
    after: bool
    l2: bool
    noise: bool
    round: bool
    depth1: int
    depth2: int
    align: bool
    single: bool
    rows: int
    columns: int
    block: int
    measure: bool
    lagged: bool
    codes: torch.dtype | None = None
    batch: bool = False
    scaled: bool = False

    @property
    def apart(self) -> bool:
        """Whether the numbers of a launch are those of its tensors, or of their matrices, one after the other.

        A sweep writes what it measures into them.
        """
        return self.measure or self.lagged or self.batch


def _specialise(w: Work) -> tuple[_Specialisation, Work]:
    store1, state1 = w.first if w.first else (None, {})
    store2, state2 = w.second if w.second else (None, {})
    sketch = store2 if isinstance(store2, Sketch) else None
    owned = type(store2) is CountMin and store2.depth == 1 and w.rows is None
    elementwise = isinstance(store1, Dense | None) and isinstance(store2, Dense | None)
    flat = elementwise and w.rows is None and w.p.is_contiguous() and w.g.is_contiguous()
    batch = w.apart > 1
    if flat:
        w = _flat(w)
        state1, state2 = (w.first[1] if w.first else {}), (w.second[1] if w.second else {})
    r, d = w.p.shape
    blocks = [store.block_size for store in (store1, store2) if store and store.block_size]
    if blocks:
        block = min(blocks[0], d)
    else:
        block = FLAT if flat else min(COLUMNS, triton.next_power_of_2(d))
    n = triton.next_power_of_2(block)
    if owned:
        assert sketch is not None
        load = -(-(r // sketch.matrices) // (sketch.buckets(r) // sketch.matrices))
        rows = triton.next_power_of_2(load)
        single = rows * n <= TILE
        rows = rows if single else max(1, TILE // 2 // n)
    else:
        # The median of several tables keeps the numbers of all tables in registers.
        most = 16 if not isinstance(store1, CountSketch) else 4
        # A vector is one row. Matrices with few rows share the launch of the others: a mask leaves out what is missing.
        rows, single = 1 if flat else max(1, min(most, TILE // 2 // n)), False
        if batch:  # a tile has rows of one matrix
            rows = min(rows, triton.next_power_of_2(r // w.apart))
    state = [*state1.values(), *state2.values(), w.p, w.g, *([] if w.correction is None else [w.correction])]
    spec = _Specialisation(
        kernel="buckets" if owned else "tiles",
        first=getattr(first, store1.kernel) if store1 else first.none,
        second=getattr(second, store2.kernel) if store2 else None,
        p=w.p.dtype,
        g=w.g.dtype,
        f=_dtype(state1),
        s=_dtype(state2),
        mode=_mode(w),
        ahead=_has(w, places.LOOKAHEAD),
        unit=_has(w, places.UNIT),
        after=w.after,
        l2=_has(w, places.L2),
        noise=isinstance(store1, Int8) and store1.stochastic,
        round=w.stochastic and w.p.dtype == torch.bfloat16,
        depth1=store1.depth if isinstance(store1, CountSketch) else 1,
        depth2=len(store2.dims) if isinstance(store2, Cover) else sketch.depth if sketch else 1,
        align=d % 16 == 0
        and block % 16 == 0
        and all(t.data_ptr() % 16 == 0 for t in state)
        and all(t.stride(0) % 16 == 0 for t in (w.p, w.g)),
        single=single,
        rows=rows,
        columns=n,
        block=block,
        measure=w.measure,
        lagged=w.last is not None,
        codes=_codes(w),
        batch=batch,
        scaled=owned and "row_means" in state2,
    )
    return spec, w


def _dtype(state: dict[str, Tensor]) -> torch.dtype:
    return next((state[name].dtype for name in ("dense", "table") if name in state), torch.float32)


def _codes(w: Work) -> torch.dtype | None:
    """Dtype of the corrections, or None if there are none."""
    return None if w.correction is None else w.correction.dtype


def _has(w: Work, place: int) -> bool:
    return bool(w.flags & (1 << place))


def _flat(w: Work) -> Work:
    """The work as one row: elementwise state has no shape, and so small and large tensors can share a launch.

    Matrices that are measured one by one are a row each.
    """
    n = (w.apart, w.p.numel() // w.apart)

    def view(pair: Any) -> Any:
        return pair and (pair[0], {k: t.view(n) for k, t in pair[1].items()})

    return replace(
        w,
        p=w.p.view(n),
        g=w.g.view(n),
        first=view(w.first),
        second=view(w.second),
        correction=w.correction if w.correction is None else w.correction.view(n),
    )


def _launch(spec: _Specialisation, works: list[Work], device: torch.device, moves: Moves) -> list[_Action]:
    """The actions of works that share a launch, for this step alone."""
    tasks = [_task(spec, w) for w in works]
    covers = _Covers(_CoverLayout(tasks), device, works) if tasks[0].lengths else None
    apart, numbers = [one.apart for one in tasks], _numbers(works, device)
    if moves is not None:
        _hold(numbers, moves(device))
    if spec.batch:
        numbers = torch.cat([row.expand(n, -1) for row, n in zip(numbers.split(1), apart, strict=True)])
    rows, axes, begin, vectors = [], [], 0, 0
    for i, one in enumerate(tasks):
        rows.append(one.row._replace(BEGIN=begin, ROW=vectors))
        begin += one.programs
        vectors += one.apart
        axes.append((*one.axes, one.gradient, *([covers.places[i]] if covers else ())))
    values = _laid_out(rows, axes)
    for i, one in enumerate(tasks):
        behind = values[i * FIELDS + _AXES] + len(one.axes)
        values[i * FIELDS + _G], values[i * FIELDS + _NEW] = behind, behind + 1
    return _actions(spec, apart, begin, _table(device, values), numbers, covers)


def _laid_out(rows: Sequence[Row], more: Sequence[Sequence[int]]) -> list[int]:
    """The rows of a table one after the other, followed by the values that their axes refer to."""
    behind, laid = len(rows) * FIELDS, []
    for i, (row, values) in enumerate(zip(rows, more, strict=True)):
        laid.append(row._replace(AXES=behind - i * FIELDS))
        behind += len(values)
    return list(chain(*laid, *more))


@lru_cache(maxsize=256)
def _constants(spec: _Specialisation) -> dict[str, Any]:
    """The constants that the kernel of a spec is compiled for, except the phase."""
    shared: dict[str, Any] = {
        "FIRST": spec.first, "P_TYPE": TYPES[spec.p], "G_TYPE": TYPES[spec.g], "F_TYPE": TYPES[spec.f],
        "C_TYPE": CODES[spec.codes], "S_TYPE": TYPES[spec.s], "AHEAD": spec.ahead, "UNIT": spec.unit, "L2_ON": spec.l2,
        "NOISE": spec.noise, "ROUND": spec.round, "ALIGN": spec.align, "M": spec.rows, "N": spec.columns,
        "BLOCK": spec.block, "AFTER": spec.after, "BATCH": spec.batch,
        "num_warps": max(1, min(16, spec.rows * spec.columns // 256)),
    }  # fmt: skip
    if spec.kernel == "buckets":
        return {**shared, "SINGLE": spec.single, "SCALED": spec.scaled}
    return {**shared, "SECOND": spec.second, "MODE": spec.mode, "DEPTH1": spec.depth1, "DEPTH2": spec.depth2}


def _actions(
    spec: _Specialisation,
    apart: Sequence[int],
    programs: int,
    table: Tensor,
    numbers: Tensor,
    covers: _Covers | None,
    ready: bool = False,
) -> list[_Action]:
    """The launches of some tensors. With ``ready`` they were compiled before.

    ``apart`` has, for each tensor, the number of matrices that are handled one by one.
    """
    count, constants, owned = len(apart), _constants(spec), spec.kernel == "buckets"
    each = (max(apart), count) if spec.batch else (count,)  # programs that turn sums into numbers
    kernel = step.buckets if owned else step.tiles
    # A program that owns a bucket writes it when it measures.
    before, after = (FOLD | MEASURE, APPLY) if owned else (MEASURE, FOLD | APPLY)
    once = spec.lagged and not spec.measure
    # The dtype is float64, because it holds the squares of all float32.
    partial_ = table
    if spec.measure or once:
        partial_ = torch.empty(2 * programs, dtype=torch.float64, device=table.device)
    actions: list[_Action] = []
    launch = _again if ready else _ready

    def sweep(row_of_numbers: Tensor, phase: int, **changed: Any) -> None:
        actions.append(
            launch(kernel, (programs,), table, row_of_numbers, partial_, count, PHASE=phase, **{**constants, **changed})
        )

    if covers and spec.second is second.cover_estimate:
        # Variant I reads the new covers, so the maxima of g * g come first.
        sweep(numbers, FOLD, SECOND=second.cover_maxima)
        actions.append(covers.renew(launch, table, numbers, spec))
        covers = None
    if spec.measure:
        measured = numbers.clone()
        measured[:, places.STEP] = 1.0
        measured[:, places.INNER] = 1.0
        sweep(measured, before)
        actions.append(
            launch(
                norms.step_sizes, each, table, numbers, measured, partial_, count, programs,
                AFTER=spec.after, LAGGED=spec.lagged, BATCH=spec.batch, N=256,
            )
        )  # fmt: skip
    elif once:
        actions.append(launch(norms.recall, each, table, numbers, AFTER=spec.after, BATCH=spec.batch))
        after = FOLD | MEASURE | APPLY
    else:
        after = FOLD | APPLY
    sweep(numbers, after)
    if once:
        actions.append(launch(norms.record, each, table, numbers, partial_, count, programs, BATCH=spec.batch, N=256))
    if covers:
        actions.append(covers.renew(launch, table, numbers, spec))
    return actions


def _describe(w: Work, spec: _Specialisation) -> tuple[Row, int]:
    """The fields of a work, and how many programs its step takes. Fields of the launch or of the step are 0."""
    r, d = w.p.shape
    state1, state2 = (w.first[1] if w.first else {}), (w.second[1] if w.second else {})
    a1, b1 = (*(t.data_ptr() for t in state1.values()), 0, 0)[:2]
    a2, b2 = (*(t.data_ptr() for t in state2.values()), 0, 0)[:2]
    across = -(-d // spec.block)
    count = _count(w)
    sketch = next((s[0] for s in (w.second, w.first) if s and isinstance(s[0], Sketch)), None)
    width, hashes, matrices = 0, 0, 1
    if sketch is not None:
        width, hashes, matrices = sketch.buckets(r), _hashes(sketch, r, w.p.device).data_ptr(), sketch.matrices
    if spec.batch:
        matrices = w.apart
    along = width if spec.kernel == "buckets" else -(-count // spec.rows)
    if spec.batch and spec.kernel != "buckets":  # a tile has rows of one matrix
        along = matrices * -(-(r // matrices) // spec.rows)
    row = Row(
        P=w.p.data_ptr(),
        FIRST_A=a1,
        FIRST_B=b1,
        SECOND_A=a2,
        SECOND_B=b2,
        INDEX=0 if w.rows is None else w.rows.data_ptr(),
        HASHES=hashes,
        ROWS=r,
        COLUMNS=d,
        P_STRIDE=w.p.stride(0),
        G_STRIDE=w.g.stride(0),
        WIDTH=width,
        TILES=across,
        COUNT=count,
        SEED=_signed64(w.seed),
        CODES=0 if w.correction is None else w.correction.data_ptr(),
        LAST=0 if w.last is None else w.last.data_ptr(),
        HEIGHT=r // matrices,
        OWN=width // matrices,
    )
    return row, along * across


def _count(w: Work) -> int:
    return w.p.shape[0] if w.rows is None else len(w.rows)


def _axes(w: Work) -> list[tuple[int, int, int]]:
    """Pointer, length and numbers of one slice, for each axis of a cover except the first."""
    assert w.second is not None and isinstance(w.second[0], Cover)
    dims, state = w.second[0].dims, w.second[1]
    axes = [(state[f"axis_{k}"], math.prod(dims[k + 1 :])) for k in range(1, len(dims))]
    return [(axis.data_ptr(), axis.numel(), each) for axis, each in axes]


def _signed64(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


# -- sketches that several programs read, and that are therefore written before ---------------------------------------


def _folds(w: Work) -> bool:
    """Whether a sketch of a dense gradient is written before the step."""
    signed = w.first is not None and isinstance(w.first[0], Sketch)
    store = w.second[0] if w.second else None
    return signed or isinstance(store, RowCountMin) or (isinstance(store, Sketch) and store.depth > 1)


def _fold(w: Work) -> list[_Action]:
    actions: list[_Action] = []
    for pair, signed in ((w.first, True), (w.second, False)):
        if pair is None or not isinstance(pair[0], Sketch):
            continue
        store, state, weights = pair[0], pair[1], None
        if isinstance(store, RowCountMin):
            weights = torch.empty(2, _count(w), dtype=torch.float32, device=w.p.device)
            actions += _profile_weights(w, state, weights)
        if w.rows is not None:
            actions.append(_fold_touched(w, store, state["table"], signed, weights))
        elif store.depth > 1 or signed or weights is not None:
            actions.append(_fold_dense(w, store, state["table"], signed, weights))
    return actions


def _folding(w: Work, store: Sketch, table: Tensor, signed: bool, weights: Tensor | None) -> tuple[Tensor, Any]:
    """A table of one row that describes ``w``, and the constants that both kernels are compiled for."""
    row, _ = _describe(w, _FOLDING)
    width = store.buckets(w.p.shape[0])
    row = row._replace(
        TILES=-(-w.p.shape[1] // _fold_columns(w)),  # read by `fold.dense`
        WIDTH=width,
        HEIGHT=w.p.shape[0] // store.matrices,
        OWN=width // store.matrices,
        HASHES=_hashes(store, w.p.shape[0], w.p.device).data_ptr(),
        WEIGHTS=0 if weights is None else weights.data_ptr(),
    )
    return _alone(w, row), {
        "P_TYPE": TYPES[w.p.dtype], "C_TYPE": CODES[_codes(w)], "G_TYPE": TYPES[w.g.dtype], "TYPE": TYPES[table.dtype],
        "TARGET": Row.at("FIRST_A" if signed else "SECOND_A"),
        "SIGNED": signed, "WEIGHTED": weights is not None, "L2_ON": _has(w, places.L2), "N": _fold_columns(w),
    }  # fmt: skip


def _alone(w: Work, row: Row) -> Tensor:
    """The table of one tensor."""
    return _table(w.p.device, [*row._replace(G=FIELDS), w.g.data_ptr()])


def _fold_columns(w: Work) -> int:
    return min(COLUMNS, triton.next_power_of_2(w.p.shape[1]))


def _fold_dense(w: Work, store: Sketch, table: Tensor, signed: bool, weights: Tensor | None) -> _Action:
    width, (r, d) = store.buckets(w.p.shape[0]), w.p.shape
    description, shared = _folding(w, store, table, signed, weights)
    most = -(-(r // store.matrices) // (width // store.matrices))
    m, n = min(16, triton.next_power_of_2(most)), shared["N"]
    return _ready(
        fold.dense, (width * -(-d // n), store.depth), description, _numbers([w], w.p.device), 1,
        DECAY=places.DECAY1 if signed else places.DECAY2, GAIN=places.GAIN1 if signed else places.GAIN2,
        M=m, num_warps=max(1, min(8, m * n // 256)), **shared,
    )  # fmt: skip


def _profile_weights(w: Work, state: dict[str, Tensor], weights: Tensor) -> list[_Action]:
    """Write the rows' new scales, and to ``weights (2, rows)`` how much a row's squares count and how much is kept."""
    device, ema, m = w.p.device, w.emas[1], 16
    assert ema is not None
    row, _ = _describe(w, _FOLDING)
    row = row._replace(WEIGHTS=weights.data_ptr())
    measure = _ready(
        fold.row_means, (-(-_count(w) // m),), _alone(w, row), _numbers([w], device), 1,
        P_TYPE=TYPES[w.p.dtype], C_TYPE=CODES[_codes(w)], G_TYPE=TYPES[w.g.dtype], MODE=_mode(w),
        L2_ON=_has(w, places.L2), M=m, N=_fold_columns(w), num_warps=4,
    )  # fmt: skip

    def scale() -> None:
        means, scales = weights[0], state["row"].squeeze(-1)
        old = (scales if w.rows is None else scales.index_select(0, w.rows)) * ema.decay
        new = old.add(means, alpha=ema.gain)
        if w.rows is None:
            scales.copy_(new)
        else:
            scales.index_copy_(0, w.rows, new)
        weights[0] = torch.where(new > 1e-30, ema.gain / new, 0.0)
        weights[1] = torch.where(new > 1e-30, old / new, 1.0)

    return [measure, scale]


def _fold_touched(w: Work, store: Sketch, table: Tensor, signed: bool, weights: Tensor | None) -> _Action:
    ema, (r, d) = w.emas[0 if signed else 1], w.p.shape
    assert w.rows is not None and ema is not None
    hashes, height, own = _hashes(store, r, w.p.device), r // store.matrices, store.buckets(r) // store.matrices
    place = (w.rows % height * hashes[:, :1] + hashes[:, 1:2]) % height
    bucket, order = (w.rows // height * own + place % own).sort(dim=1, stable=True)
    powers = _powers(ema.decay, ema.gain, -(-height // own), w.p.device)
    description, shared = _folding(w, store, table, signed, weights)
    n = shared["N"] = min(256, triton.next_power_of_2(d))  # there are few rows, so longer pieces of them are better
    return _ready(
        fold.touched, (len(w.rows), -(-d // n), store.depth), description, _numbers([w], w.p.device), order, bucket,
        powers, MODE=_mode(w), M=4, num_warps=max(1, min(4, n // 32)), **shared,
    )  # fmt: skip


def _mode(w: Work) -> int:
    modes = (common.RANGE, common.PACKED if w.packed else common.TOUCHED)
    return modes[w.rows is not None].value


_FOLDING = _Specialisation(
    "tiles", None, None, torch.float32, torch.float32, torch.float32, torch.float32, 0,
    False, False, False, False, False, False, 1, 1, False, False, 16, COLUMNS, COLUMNS, False, False,
)  # fmt: skip


class _CoverLayout:
    """Where the new covers of one launch lie in a buffer: for each task, one axis after the other.

    The sums of the rows' squares, which become ``row_means``, lie in such a buffer, too: one row for each tile.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.lengths = [one.lengths for one in tasks]
        sizes = list(map(sum, self.lengths))
        self.offsets, self.size = [0, *accumulate(sizes)][:-1], sum(sizes)
        self.longest = max(map(max, self.lengths))
        self.variant = tasks[0].cover.variant if tasks[0].cover else ""


class _Covers:
    """Buffers for the maxima of one launch (of one variant, dense or row-sparse), because the old covers are read.

    `stores.cover` says how the maxima replace the covers.

    Args:
        layout: places of the maxima.
        device: device of the maxima.
        works: the works they belong to, which are only needed if rows are touched.
        buffer: zeros (for sums of squares, any memory), if the buffer is a part of a larger one.
    """

    def __init__(
        self, layout: _CoverLayout, device: torch.device, works: Sequence[Work] = (), buffer: Tensor | None = None
    ) -> None:
        self.layout, self.works = layout, works if works and works[0].rows is not None else ()
        self.buffer = torch.zeros(layout.size, dtype=torch.float32, device=device) if buffer is None else buffer
        first = self.buffer.data_ptr()
        self.places = [first + 4 * offset for offset in layout.offsets]

    def renew(self, launch: Callable[..., _Action], table: Tensor, numbers: Tensor, spec: _Specialisation) -> _Action:
        """The action that replaces the covers by their new values."""
        if self.works:
            return self._renew_touched
        n = 256
        grid = (len(self.places), max(1, min(64, -(-self.layout.longest // (4 * n)))))
        if spec.scaled:
            return partial(self._renew, launch(fold.row_means_of, grid, table, numbers, N=n, num_warps=4))
        kernel = launch(
            fold.covers, grid, table, numbers, AVERAGE=self.layout.variant == "I", DEPTH=spec.depth2, N=n, num_warps=4
        )
        return partial(self._renew, kernel)

    def _renew(self, kernel: _Action) -> None:
        # The kernel only knows the buffer's address. As a method of its owner, this action keeps the buffer alive.
        kernel()

    def _renew_touched(self) -> None:
        """Touched rows get new covers. The other axes keep the larger of old and new."""
        parts = iter(self.buffer.split([n for lengths in self.layout.lengths for n in lengths]))
        old = [list(w.second[1].values()) for w in self.works]  # type: ignore[index]
        new = [[next(parts) for _ in lengths] for lengths in self.layout.lengths]
        if self.layout.variant == "I":
            present, (flat_old, flat_new) = [], (list(chain.from_iterable(covers)) for covers in (old, new))
            present = flat_old
            decays, gains, first = [], [], 0
            for w, covers in zip(self.works, old, strict=True):
                ema = w.emas[1]
                assert ema is not None and w.rows is not None
                decays += [ema.decay] * len(covers)
                gains += [ema.gain] * len(covers)
                present[first] = covers[0].index_select(0, w.rows)
                first += len(covers)
            torch._foreach_mul_(flat_new, gains)
            torch._foreach_add_(flat_new, torch._foreach_mul(present, decays))
        for w, before, after in zip(self.works, old, new, strict=True):
            before[0].index_copy_(0, w.rows, after[0])  # type: ignore[arg-type]
            torch._foreach_maximum_(before[1:], after[1:])


def _covers_of(layouts: Sequence[_CoverLayout | None], device: torch.device) -> list[_Covers | None]:
    """The buffers of several launches: one allocation of zeros for covers, one for sums, which are written first."""
    out: list[_Covers | None] = [None] * len(layouts)
    for kind, allocate in ((True, torch.zeros), (False, torch.empty)):
        found = [(i, one) for i, one in enumerate(layouts) if one is not None and bool(one.variant) == kind]
        sizes = [one.size for _, one in found]
        if any(sizes):
            parts = allocate(sum(sizes), dtype=torch.float32, device=device).split(sizes)
            for (i, one), part in zip(found, parts, strict=True):
                out[i] = _Covers(one, device, buffer=part)
    return out


# -- uploads ----------------------------------------------------------------------------------------------------------

_TABLES: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor]] = OrderedDict()


def _table(device: torch.device, values: list[int]) -> Tensor:
    """A table on the device, which is kept for a few steps."""
    key = (device, *values)
    found = _TABLES.get(key)
    if found is None:
        host = torch.tensor(values, dtype=torch.int64)
        if device.type == "cuda":
            host = host.pin_memory()
        # The host's copy is kept, because a captured graph reads it again at every replay.
        found = _TABLES[key] = (host.to(device, non_blocking=True), host)
        while len(_TABLES) > TABLES:
            _TABLES.popitem(last=False)
    else:
        _TABLES.move_to_end(key)
    return found[0]


def _upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    host = torch.as_tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _numbers(works: Sequence[Work], device: torch.device) -> Tensor:
    """``(len(works), NUMBERS)``. Numbers that are already on the device stay there."""
    if any(isinstance(w.numbers, Tensor) for w in works):
        return torch.stack([
            w.numbers if isinstance(w.numbers, Tensor) else _upload(w.numbers, torch.float32, device) for w in works
        ]).to(device)  # fmt: skip
    return _upload([w.numbers for w in works], torch.float32, device).view(len(works), NUMBERS)


@lru_cache(maxsize=1024)
def _hashes(store: Sketch, rows: int, device: torch.device) -> Tensor:
    """``(depth, 4)``: a, b, the inverse of a modulo the rows of one matrix, and the seed of the signs."""
    hashes = store.hashes(rows)
    values = [[h.a, h.b, pow(h.a, -1, h.height) if h.height > 1 else 0, h.sign_seed] for h in hashes]
    return _upload(values, torch.int64, device)


@lru_cache(maxsize=64)
def _powers(decay: float, gain: float, most: int, device: torch.device) -> Tensor:
    """``(most + 1, 2)``: the decay and the gain of c steps with the same value."""
    c = torch.arange(most + 1)
    decays, gains = Ema(decay, gain).repeated(c)
    return _upload(torch.stack([decays, gains], 1), torch.float32, device)


# -- what kernels are compiled for ------------------------------------------------------------------------------------


def specialisation(w: Work) -> tuple[tuple[str, ...], str]:
    """The kernels that take a supported step, and the text of everything that they are compiled for.

    If the texts of two tensors are equal, in this process or in another one, they run the same compiled code.
    """
    spec, _ = _specialise(w)
    names, folds = [], []
    for pair, signed in ((w.first, True), (w.second, False)):
        if pair is None or not isinstance(pair[0], Sketch):
            continue
        store, columns = pair[0], w.p.shape[1]
        if isinstance(store, RowCountMin):
            names.append("fold.row_means")
            folds.append((_fold_columns(w), _mode(w)))
        if w.rows is not None:
            names.append("fold.touched")
            folds.append((min(256, triton.next_power_of_2(columns)), _mode(w)))
        elif store.depth > 1 or signed or isinstance(store, RowCountMin):
            names.append("fold.dense")
            load = -(-w.p.shape[0] // store.buckets(w.p.shape[0]))
            folds.append((_fold_columns(w), min(16, triton.next_power_of_2(load))))
    names.append(f"step.{spec.kernel}")
    if spec.measure:
        names.append("norms.step_sizes")
    elif spec.lagged:
        names += ["norms.recall", "norms.record"]
    if w.second is not None and isinstance(w.second[0], Cover) and w.rows is None:
        names.append("fold.covers")
    if spec.scaled:
        names.append("fold.row_means_of")
    fields = [f"{key}={getattr(getattr(value, 'fn', value), '__name__', value)}" for key, value in vars(spec).items()]
    return tuple(dict.fromkeys(names)), " ".join([*fields, f"folds={folds}"])

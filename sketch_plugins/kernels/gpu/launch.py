"""From a list of parameters to as few kernel launches as their stores allow. The only code that knows grids.

Nothing here waits for the device: tables of pointers are uploaded from pinned memory and kept while the pointers stay
the same, and the numbers of a step travel with it (or are on the device already: ``capturable``).
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketch_plugins.kernels import work as places
from sketch_plugins.kernels.gpu import common, first, fold, norms, second, step
from sketch_plugins.kernels.work import APPLY, FLOATS, FOLD, MEASURE, NUMBERS, Work, is_rows, misread
from sketch_plugins.stores import CountMin, CountSketch, Cover, Dense, Ema, Int8, RowCountMin
from sketch_plugins.stores.sketch import Sketch

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Numbers in a program's tile at most: what fits the registers with g, p, a moment and the factor alive.
TILE = 4096
# Columns of a tile where no block of codes asks for another number: 512 bytes of float32, a full transaction a warp.
COLUMNS = 128
FLAT = 1024
TABLES = 32


def unsupported(w: Work) -> str | None:
    """Why these kernels cannot take this parameter's step; None if they can."""
    if w.p.dtype not in TYPES or w.g.dtype not in TYPES:
        return (
            f"the parameter is {w.p.dtype} and its gradient {w.g.dtype}: the Triton kernels take "
            f"{', '.join(map(str, FLOATS))}"
        )
    if not is_rows(w.p) or not is_rows(w.g):
        return "the numbers of a row of the parameter or of its gradient are not adjacent in memory"
    if w.after and w.first and isinstance(w.first[0], CountSketch):
        # It is written with the gradient itself, before anything is divided.
        return "the Triton kernels do not keep a first moment of what was divided by the denominator in a count-sketch"
    return misread(w)


def prepare(works: Sequence[Work]) -> list[tuple[list[int], Callable[[], None]]]:
    """Make the steps ready. Every work must be supported.

    Whatever can fail is done here, before anything changes: memory is allocated, tables are uploaded, kernels compiled.

    Returns:
        For each launch, the places of its works in the list, and what takes their steps.
    """
    groups: dict[tuple[torch.device, _Plan], tuple[list[int], list[Work], list[_Action]]] = {}
    for place, given in enumerate(works):
        if given.rows is not None and not len(given.rows):
            continue
        device = given.p.device
        with _on(device):
            folds = _fold(given)
            plan, w = _plan(given)
            places_, members, actions = groups.setdefault((device, plan), ([], [], []))
            places_.append(place)
            members.append(w)
            actions += folds
    takes: list[tuple[list[int], Callable[[], None]]] = []
    for (device, plan), (places_, members, actions) in groups.items():
        with _on(device):
            takes.append((places_, partial(_run, device, [*actions, *_launch(plan, members, device)])))
    return takes


def _run(device: torch.device, actions: Iterable[_Action]) -> None:
    with _on(device):
        for action in actions:
            action()


_Action = Callable[[], Any]
# What has been compiled: kernel, constants, and what Triton compiles its arguments for.
_COMPILED: set[tuple[Any, ...]] = set()


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _ready(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> _Action:
    """A launch, compiled and loaded already: one of no programs does that, and nothing else."""
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
    return partial(kernel[grid], *args, **constants)


@dataclass(frozen=True)
class _Plan:
    """What a kernel is compiled for: tensors with equal plans share a launch."""

    kernel: str
    first: Any
    second: Any
    p: torch.dtype
    g: torch.dtype
    f: torch.dtype
    s: torch.dtype
    mode: int
    ahead: bool
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
    kept: bool


def _plan(w: Work) -> tuple[_Plan, Work]:
    store1, state1 = w.first if w.first else (None, {})
    store2, state2 = w.second if w.second else (None, {})
    sketch = store2 if isinstance(store2, Sketch) else None
    owned = type(store2) is CountMin and store2.depth == 1 and w.rows is None
    elementwise = isinstance(store1, Dense | None) and isinstance(store2, Dense | None)
    flat = elementwise and w.rows is None and w.p.is_contiguous() and w.g.is_contiguous()
    if flat:
        w = _flat(w)
        state1, state2 = (w.first[1] if w.first else {}), (w.second[1] if w.second else {})
    r, d = w.p.shape
    if isinstance(store1, Int8):
        block = min(store1.block_size, d)
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
        # The median of several tables keeps all their numbers in registers.
        most = 16 if not isinstance(store1, CountSketch) else 4
        rows, single = min(triton.next_power_of_2(r), max(1, min(most, TILE // 2 // n))), False
    state = [*state1.values(), *state2.values(), w.p, w.g]
    plan = _Plan(
        kernel="buckets" if owned else "tiles",
        first=_FIRST[type(store1)],
        second=_second(store2),
        p=w.p.dtype,
        g=w.g.dtype,
        f=_dtype(state1),
        s=_dtype(state2),
        mode=_mode(w),
        ahead=_has(w, places.LOOKAHEAD),
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
        kept=w.last is not None,
    )
    return plan, w


_FIRST = {type(None): first.none, Dense: first.dense, Int8: first.int8, CountSketch: first.count_sketch}
_SECOND = {Dense: second.dense, CountMin: second.count_min, RowCountMin: second.row_count_min}


def _second(store: Any) -> Any:
    if isinstance(store, Cover):
        return second.cover if store.variant == "II" else second.cover_estimate
    return store and _SECOND[type(store)]


def _dtype(state: dict[str, Tensor]) -> torch.dtype:
    return next((state[name].dtype for name in ("dense", "table") if name in state), torch.float32)


def _has(w: Work, place: int) -> bool:
    return bool(w.flags & (1 << place))


def _flat(w: Work) -> Work:
    """Elementwise state has no shape: any number of small tensors and large ones look alike as one row."""
    n = (1, w.p.numel())

    def view(pair: Any) -> Any:
        return pair and (pair[0], {k: t.view(n) for k, t in pair[1].items()})

    return replace(w, p=w.p.view(n), g=w.g.view(n), first=view(w.first), second=view(w.second))


def _launch(plan: _Plan, works: list[Work], device: torch.device) -> list[_Action]:
    covers = _Covers(works, device) if plan.second in (second.cover, second.cover_estimate) else None
    rows, begin = [], 0
    for i, w in enumerate(works):
        row, programs = _describe(w, plan, begin, covers.places[i] if covers else 0)
        rows.append(row)
        begin += programs
    table = _table(device, rows, [_axes(w) for w in works] if covers else ())
    numbers = _numbers(works, device)
    shared: dict[str, Any] = {
        "FIRST": plan.first, "P_TYPE": TYPES[plan.p], "G_TYPE": TYPES[plan.g], "F_TYPE": TYPES[plan.f],
        "S_TYPE": TYPES[plan.s], "AHEAD": plan.ahead, "L2_ON": plan.l2, "NOISE": plan.noise, "ROUND": plan.round,
        "ALIGN": plan.align, "M": plan.rows, "N": plan.columns, "BLOCK": plan.block,
        "num_warps": max(1, min(16, plan.rows * plan.columns // 256)),
    }  # fmt: skip
    if plan.kernel == "buckets":
        kernel: Any = step.buckets
        extra: dict[str, Any] = {"SINGLE": plan.single, "AFTER": plan.after}
        before, after = FOLD | MEASURE, APPLY
    else:
        kernel = step.tiles
        extra = {
            "SECOND": plan.second, "MODE": plan.mode, "AFTER": plan.after, "DEPTH1": plan.depth1,
            "DEPTH2": plan.depth2,
        }  # fmt: skip
        before, after = MEASURE, FOLD | APPLY
    once = plan.kept and not plan.measure
    # float64: squares of what float32 holds.
    partial_ = torch.empty(2 * begin, dtype=torch.float64, device=device) if plan.measure or once else table
    actions: list[_Action] = []

    def sweep(row_of_numbers: Tensor, phase: int, **changed: Any) -> None:
        actions.append(
            _ready(
                kernel, (begin,), table, row_of_numbers, partial_, len(works), PHASE=phase, **shared, **extra | changed
            )
        )

    if covers and plan.second is second.cover_estimate:
        # Variant I reads the new covers: the maxima of g * g come first.
        sweep(numbers, FOLD, SECOND=second.cover_maxima)
        actions.append(covers.keep)
        covers = None
    if plan.measure:
        measured = numbers.clone()
        measured[:, places.STEP] = 1.0
        measured[:, places.INNER] = 1.0
        sweep(measured, before)
        actions.append(
            _ready(
                norms.step_sizes, (len(works),), table, numbers, measured, partial_, len(works), begin,
                AFTER=plan.after, KEPT=plan.kept, N=256,
            )
        )  # fmt: skip
    elif once:
        actions.append(_ready(norms.recall, (len(works),), table, numbers, AFTER=plan.after))
        after = FOLD | MEASURE | APPLY
    else:
        after = FOLD | APPLY
    sweep(numbers, after)
    if once:
        actions.append(_ready(norms.keep, (len(works),), table, numbers, partial_, len(works), begin, N=256))
    if covers:
        actions.append(covers.keep)
    return actions


def _describe(w: Work, plan: _Plan, begin: int, new: int) -> tuple[list[int], int]:
    r, d = w.p.shape
    state1, state2 = (w.first[1] if w.first else {}), (w.second[1] if w.second else {})
    a1, b1 = (*(t.data_ptr() for t in state1.values()), 0, 0)[:2]
    a2, b2 = (*(t.data_ptr() for t in state2.values()), 0, 0)[:2]
    across = -(-d // plan.block)
    count = _count(w)
    sketch = next((s[0] for s in (w.second, w.first) if s and isinstance(s[0], Sketch)), None)
    width, hashes, matrices = 0, 0, 1
    if sketch is not None:
        width, hashes, matrices = sketch.buckets(r), _hashes(sketch, r, w.p.device).data_ptr(), sketch.matrices
    along = width if plan.kernel == "buckets" else -(-count // plan.rows)
    row = [
        w.p.data_ptr(), w.g.data_ptr(), a1, b1, a2, b2, new,
        0 if w.rows is None else w.rows.data_ptr(), hashes, 0,
        r, d, w.p.stride(0), w.g.stride(0), width, begin, across, count, _signed64(w.seed), 0,
        0 if w.last is None else w.last.data_ptr(), r // matrices, width // matrices,
    ]  # fmt: skip
    return row, along * across


def _count(w: Work) -> int:
    return w.p.shape[0] if w.rows is None else len(w.rows)


def _axes(w: Work) -> list[int]:
    """Pointer, length and numbers of one slice of a cover's axes but the first."""
    assert w.second is not None and isinstance(w.second[0], Cover)
    dims = w.second[0].dims
    return [
        value
        for k in range(1, len(dims))
        for value in (w.second[1][f"axis_{k}"].data_ptr(), dims[k], math.prod(dims[k + 1 :]))
    ]


def _signed64(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


# -- sketches that several programs read: written before --------------------------------------------------------------


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
    """The one row that describes ``w``, and what both kernels are compiled for."""
    row, _ = _describe(w, _FOLDING, 0, 0)
    row[common.TILES.value] = -(-w.p.shape[1] // _fold_columns(w))  # read by `fold.dense`
    row[common.WIDTH.value] = width = store.buckets(w.p.shape[0])
    row[common.HEIGHT.value] = w.p.shape[0] // store.matrices
    row[common.OWN.value] = width // store.matrices
    row[common.HASHES.value] = _hashes(store, w.p.shape[0], w.p.device).data_ptr()
    row[common.WEIGHTS.value] = 0 if weights is None else weights.data_ptr()
    return _table(w.p.device, [row]), {
        "P_TYPE": TYPES[w.p.dtype], "G_TYPE": TYPES[w.g.dtype], "TYPE": TYPES[table.dtype],
        "TARGET": common.FIRST_A.value if signed else common.SECOND_A.value,
        "SIGNED": signed, "WEIGHTED": weights is not None, "L2_ON": _has(w, places.L2), "N": _fold_columns(w),
    }  # fmt: skip


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
    """The rows' new scales; ``weights (2, rows)``: weight of a row's squares in its bucket, and what is kept of it."""
    device, ema, m = w.p.device, w.emas[1], 16
    assert ema is not None
    row, _ = _describe(w, _FOLDING, 0, 0)
    row[common.WEIGHTS.value] = weights.data_ptr()
    measure = _ready(
        fold.row_means, (-(-_count(w) // m),), _table(device, [row]), _numbers([w], device), 1,
        P_TYPE=TYPES[w.p.dtype], G_TYPE=TYPES[w.g.dtype], MODE=_mode(w), L2_ON=_has(w, places.L2), M=m,
        N=_fold_columns(w), num_warps=4,
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
    n = shared["N"] = min(256, triton.next_power_of_2(d))  # few rows: longer pieces of them
    return _ready(
        fold.touched, (len(w.rows), -(-d // n), store.depth), description, _numbers([w], w.p.device), order, bucket,
        powers, MODE=_mode(w), M=4, num_warps=max(1, min(4, n // 32)), **shared,
    )  # fmt: skip


def _mode(w: Work) -> int:
    modes = (common.RANGE, common.PACKED if w.packed else common.TOUCHED)
    return modes[w.rows is not None].value


_FOLDING = _Plan(
    "tiles", None, None, torch.float32, torch.float32, torch.float32, torch.float32, 0,
    False, False, False, False, False, 1, 1, False, False, 16, COLUMNS, COLUMNS, False, False,
)  # fmt: skip


class _Covers:
    """Buffers for the maxima of one launch (of one variant, dense or row-sparse): the old covers are still read.

    What becomes of them is said in `stores.cover`.
    """

    def __init__(self, works: Sequence[Work], device: torch.device) -> None:
        self.works, self.old = works, [list(w.second[1].values()) for w in works]  # type: ignore[index]
        # Of row-sparse gradients a maximum for each touched row.
        sizes = [[_count(w), *map(len, covers[1:])] for w, covers in zip(works, self.old, strict=True)]
        buffer = torch.zeros(sum(map(sum, sizes)), dtype=torch.float32, device=device)
        parts = iter(buffer.split([n for lengths in sizes for n in lengths]))
        self.new = [[next(parts) for _ in lengths] for lengths in sizes]
        self.places = [covers[0].data_ptr() for covers in self.new]

    def keep(self) -> None:
        """The covers take their new values."""
        old, new = (list(chain.from_iterable(covers)) for covers in (self.old, self.new))
        sparse, store = self.works[0].rows is not None, self.works[0].second[0]  # type: ignore[index]
        if isinstance(store, Cover) and store.variant == "I":
            present = list(old)
            decays, gains, first = [], [], 0
            for w, covers in zip(self.works, self.old, strict=True):
                ema = w.emas[1]
                assert ema is not None
                decays += [ema.decay] * len(covers)
                gains += [ema.gain] * len(covers)
                if w.rows is not None:
                    present[first] = covers[0].index_select(0, w.rows)
                first += len(covers)
            torch._foreach_mul_(new, gains)
            torch._foreach_add_(new, torch._foreach_mul(present, decays))
        if not sparse:
            torch._foreach_copy_(old, new)
            return
        for w, before, after in zip(self.works, self.old, self.new, strict=True):
            before[0].index_copy_(0, w.rows, after[0])  # type: ignore[arg-type]
            torch._foreach_maximum_(before[1:], after[1:])


# -- uploads ----------------------------------------------------------------------------------------------------------

_TABLES: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor]] = OrderedDict()


def _table(device: torch.device, rows: list[list[int]], axes: Sequence[list[int]] = ()) -> Tensor:
    """A row for each tensor; the axes of their covers, as long as they may be, come behind the last one."""
    fields = common.FIELDS.value
    behind = len(rows) * fields
    for i, more in enumerate(axes):
        rows[i][common.AXES.value] = behind - i * fields
        behind += len(more)
    key = (device, *map(tuple, rows), *map(tuple, axes))
    found = _TABLES.get(key)
    if found is None:
        host = torch.tensor([value for row in (*rows, *axes) for value in row], dtype=torch.int64)
        if device.type == "cuda":
            host = host.pin_memory()
        # The host's copy is kept: a captured graph reads it again at every replay.
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
    """``(len(works), NUMBERS)``; numbers that are on the device already stay there."""
    if any(isinstance(w.numbers, Tensor) for w in works):
        return torch.stack([
            w.numbers if isinstance(w.numbers, Tensor) else _upload(w.numbers, torch.float32, device) for w in works
        ]).to(device)  # fmt: skip
    return _upload([w.numbers for w in works], torch.float32, device).view(len(works), NUMBERS)


@lru_cache(maxsize=1024)
def _hashes(store: Sketch, rows: int, device: torch.device) -> Tensor:
    """``(depth, 4)``: a, b, the inverse of a modulo the rows of a matrix, and the seed of the signs."""
    hashes = store.hashes(rows)
    values = [[h.a, h.b, pow(h.a, -1, h.height) if h.height > 1 else 0, h.sign_seed] for h in hashes]
    return _upload(values, torch.int64, device)


@lru_cache(maxsize=64)
def _powers(decay: float, gain: float, most: int, device: torch.device) -> Tensor:
    """``(most + 1, 2)``: decay and gain of c steps with one value."""
    c = torch.arange(most + 1)
    decays, gains = Ema(decay, gain).repeated(c)
    return _upload(torch.stack([decays, gains], 1), torch.float32, device)

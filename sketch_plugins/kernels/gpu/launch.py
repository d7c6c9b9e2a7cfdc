"""From a list of parameters to as few kernel launches as their stores allow. The only code that knows grids.

Nothing here waits for the device: tables of pointers are uploaded from pinned memory and kept while the pointers stay
the same, and the numbers of a step travel with it (or are on the device already: ``capturable``).
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sketch_plugins.hashing import row_hashes
from sketch_plugins.kernels import work as places
from sketch_plugins.kernels.gpu import common, first, fold, norms, second, step
from sketch_plugins.kernels.work import APPLY, FLOATS, FOLD, MEASURE, NUMBERS, Work, is_rows
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
        return f"a parameter of {w.p.dtype} with a gradient of {w.g.dtype}: allowed are {', '.join(map(str, FLOATS))}"
    if not is_rows(w.p) or not is_rows(w.g):
        return "a layout whose rows are not contiguous"
    store = w.second[0] if w.second else None
    if isinstance(store, Cover) and (store.variant != "II" or len(store.dims) > 4):
        return f"covers of variant {store.variant!r} with {len(store.dims)} axes: allowed is 'II' with up to 4"
    if w.rows is not None and isinstance(store, (Cover, RowCountMin)):
        return f"row-sparse gradients with {type(store).__name__}"
    if w.rows is not None and w.measure:
        return "row-sparse gradients with update_clip or scale_parameter"
    return None


def run(works: Iterable[Work]) -> None:
    """Take the steps. Every work must be supported."""
    by_device: dict[torch.device, list[Work]] = {}
    for w in works:
        if w.rows is None or len(w.rows):
            by_device.setdefault(w.p.device, []).append(w)
    for device, there in by_device.items():
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            groups: dict[_Plan, list[Work]] = {}
            for w in there:
                _fold(w)
                plan, w = _plan(w)
                groups.setdefault(plan, []).append(w)
            for plan, members in groups.items():
                _launch(plan, members, device)


@dataclass(frozen=True)
class _Plan:
    """What a kernel is compiled for: tensors with equal plans share a launch."""

    kernel: str
    first: Any
    second: Any
    p: torch.dtype
    g: torch.dtype
    f: torch.dtype
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
        load = -(-r // sketch.buckets(r))
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
        second=None if store2 is None else _SECOND[type(store2)],
        p=w.p.dtype,
        g=w.g.dtype,
        f=state1["dense"].dtype if isinstance(store1, Dense) else torch.float32,
        mode=0 if w.rows is None else 2 if w.packed else 1,
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
    )
    return plan, w


_FIRST = {type(None): first.none, Dense: first.dense, Int8: first.int8, CountSketch: first.count_sketch}
_SECOND = {Dense: second.dense, CountMin: second.count_min, RowCountMin: second.row_count_min, Cover: second.cover}


def _has(w: Work, place: int) -> bool:
    return bool(w.flags & (1 << place))


def _flat(w: Work) -> Work:
    """Elementwise state has no shape: any number of small tensors and large ones look alike as one row."""
    n = (1, w.p.numel())

    def view(pair: Any) -> Any:
        return pair and (pair[0], {k: t.view(n) for k, t in pair[1].items()})

    return Work(
        w.p.view(n), w.g.view(n), None, False, view(w.first), view(w.second), w.numbers, w.after, w.measure,
        w.stochastic, w.seed, w.flags,
    )  # fmt: skip


def _launch(plan: _Plan, works: list[Work], device: torch.device) -> None:
    covers = _Covers(works, device) if plan.second is second.cover else None
    rows, begin = [], 0
    for i, w in enumerate(works):
        row, programs = _describe(w, plan, begin, covers.places[i] if covers else 0)
        rows.append(row)
        begin += programs
    table = _table(device, rows)
    numbers = _numbers(works, device)
    shared: dict[str, Any] = {
        "FIRST": plan.first, "P_TYPE": TYPES[plan.p], "G_TYPE": TYPES[plan.g], "F_TYPE": TYPES[plan.f],
        "AHEAD": plan.ahead, "L2_ON": plan.l2, "NOISE": plan.noise, "ROUND": plan.round, "ALIGN": plan.align,
        "M": plan.rows, "N": plan.columns, "BLOCK": plan.block,
        "num_warps": max(1, min(16, plan.rows * plan.columns // 256)),
    }  # fmt: skip
    if plan.kernel == "buckets":
        kernel: Any = step.buckets
        extra: dict[str, Any] = {"SINGLE": plan.single}
        before, after = FOLD | MEASURE, APPLY
    else:
        kernel = step.tiles
        extra = {
            "SECOND": plan.second, "MODE": plan.mode, "AFTER": plan.after, "DEPTH1": plan.depth1,
            "DEPTH2": plan.depth2,
        }  # fmt: skip
        before, after = MEASURE, FOLD | APPLY
    partial = table  # not written
    if plan.measure:
        partial = torch.empty(2 * begin, dtype=torch.float32, device=device)
        measured = numbers.clone()
        measured[:, places.STEP] = 1.0
        measured[:, places.INNER] = 1.0
        kernel[(begin,)](table, measured, partial, len(works), PHASE=before, **shared, **extra)
        sizes = _upload([float(w.p.numel()) for w in works], torch.float32, device)
        norms.step_sizes[(len(works),)](
            table, numbers, measured, partial, sizes, len(works), begin, AFTER=plan.after, N=256
        )
    else:
        after = FOLD | APPLY
    kernel[(begin,)](table, numbers, partial, len(works), PHASE=after, **shared, **extra)
    if covers:
        covers.keep()


def _describe(w: Work, plan: _Plan, begin: int, new: int) -> tuple[list[int], int]:
    r, d = w.p.shape
    store2 = w.second[0] if w.second else None
    state1, state2 = (w.first[1] if w.first else {}), (w.second[1] if w.second else {})
    a1, b1 = (*(t.data_ptr() for t in state1.values()), 0, 0)[:2]
    a2, b2, c2, d2 = (*(t.data_ptr() for t in state2.values()), 0, 0, 0, 0)[:4]
    across = -(-d // plan.block)
    count = r if w.rows is None else len(w.rows)
    sketch = next((s[0] for s in (w.second, w.first) if s and isinstance(s[0], Sketch)), None)
    width, hashes = 0, 0
    if sketch is not None:
        width, hashes = sketch.buckets(r), _hashes(sketch, r, w.p.device).data_ptr()
    along = width if plan.kernel == "buckets" else -(-count // plan.rows)
    dims = store2.dims if isinstance(store2, Cover) else ()
    row = [
        w.p.data_ptr(), w.g.data_ptr(), a1, b1, a2, b2, c2, d2, new,
        0 if w.rows is None else w.rows.data_ptr(), hashes, 0,
        r, d, w.p.stride(0), w.g.stride(0), width, begin, across,
        dims[2] if len(dims) > 2 else 1, dims[3] if len(dims) > 3 else 1, count, _signed64(w.seed),
    ]  # fmt: skip
    return row, along * across


def _signed64(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


# -- sketches that several programs read: written before --------------------------------------------------------------


def _fold(w: Work) -> None:
    for pair, signed in ((w.first, True), (w.second, False)):
        if pair is None or not isinstance(pair[0], Sketch):
            continue
        store: Sketch = pair[0]
        state = pair[1]
        if w.rows is not None:
            _fold_touched(w, store, state["table"], signed)
        elif isinstance(store, RowCountMin):
            _fold_profiles(w, store, state)
        elif store.depth > 1 or signed:
            _fold_dense(w, store, signed, None)


def _fold_dense(w: Work, store: Sketch, signed: bool, weights: Tensor | None) -> None:
    device, (r, d) = w.p.device, w.p.shape
    n = min(COLUMNS, triton.next_power_of_2(d))
    m = min(16, triton.next_power_of_2(-(-r // store.buckets(r))))
    across = -(-d // n)
    plan_row, _ = _describe(w, _FOLDING, 0, 0)
    plan_row[common.TILES.value] = across
    plan_row[common.WIDTH.value] = store.buckets(r)
    plan_row[common.HASHES.value] = _hashes(store, r, device).data_ptr()
    plan_row[common.WEIGHTS.value] = 0 if weights is None else weights.data_ptr()
    fold.dense[(store.buckets(r) * across, store.depth)](
        _table(device, [plan_row]), _numbers([w], device), 1,
        P_TYPE=TYPES[w.p.dtype], G_TYPE=TYPES[w.g.dtype],
        TARGET=common.FIRST_A.value if signed else common.SECOND_A.value,
        DECAY=places.DECAY1 if signed else places.DECAY2, GAIN=places.GAIN1 if signed else places.GAIN2,
        SIGNED=signed, WEIGHTED=weights is not None, L2_ON=_has(w, places.L2), M=m, N=n,
        num_warps=max(1, min(8, m * n // 256)),
    )  # fmt: skip


def _fold_profiles(w: Work, store: RowCountMin, state: dict[str, Tensor]) -> None:
    device, (r, d) = w.p.device, w.p.shape
    weights = torch.empty(2, r, dtype=torch.float32, device=device)
    n, m = min(COLUMNS, triton.next_power_of_2(d)), 16
    row, _ = _describe(w, _FOLDING, 0, 0)
    row[common.WEIGHTS.value] = weights.data_ptr()
    numbers = _numbers([w], device)
    fold.row_means[(-(-r // m),)](
        _table(device, [row]), numbers, 1, P_TYPE=TYPES[w.p.dtype], G_TYPE=TYPES[w.g.dtype], L2_ON=_has(w, places.L2),
        M=m, N=n, num_warps=4,
    )  # fmt: skip
    decay, gain = numbers[0, places.DECAY2], numbers[0, places.GAIN2]
    scale, means = state["row"].squeeze(-1), weights[0].clone()
    scale.mul_(decay).add_(means * gain)
    weights[0] = torch.where(scale > 1e-30, gain / scale, 0.0)
    weights[1] = means * weights[0]
    _fold_dense(w, store, False, weights)


def _fold_touched(w: Work, store: Sketch, table: Tensor, signed: bool) -> None:
    assert w.rows is not None
    (r, d), device = w.p.shape, w.p.device
    places_ = (places.DECAY1, places.GAIN1) if signed else (places.DECAY2, places.GAIN2)
    values = w.numbers.tolist() if isinstance(w.numbers, Tensor) else w.numbers
    powers = _powers(values[places_[0]], values[places_[1]], -(-r // store.buckets(r)), device)
    n = min(256, triton.next_power_of_2(d))
    for j, h in enumerate(store.hashes(r)):
        bucket, order = h.bucket(w.rows).sort(stable=True)
        fold.touched[(len(w.rows), -(-d // n))](
            w.g, w.g.stride(0), order, w.rows, bucket, len(w.rows), table[j], d,
            _hashes(store, r, device)[j], powers, values[places.SIGN], w.p, w.p.stride(0), values[places.L2],
            PACKED=w.packed, SIGNED=signed, L2_ON=_has(w, places.L2), N=n, num_warps=1 if n <= 64 else 4,
        )  # fmt: skip


_FOLDING = _Plan(
    "tiles", None, None, torch.float32, torch.float32, torch.float32, 0, False, False, False, False, False, 1, 1,
    False, False, 16, COLUMNS, COLUMNS, False,
)  # fmt: skip


class _Covers:
    """Buffers for the new covers of one launch: the old ones are read until its end."""

    def __init__(self, works: Sequence[Work], device: torch.device) -> None:
        self.old = [t for w in works for t in w.second[1].values()]  # type: ignore[index]
        self.buffer = torch.zeros(sum(t.numel() for t in self.old), dtype=torch.float32, device=device)
        self.new = list(self.buffer.split([t.numel() for t in self.old]))
        firsts, at = [], 0
        for w in works:
            firsts.append(self.new[at])
            at += len(w.second[1])  # type: ignore[index]
        self.places = [t.data_ptr() for t in firsts]

    def keep(self) -> None:
        torch._foreach_copy_(self.old, self.new)


# -- uploads ----------------------------------------------------------------------------------------------------------

_TABLES: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor]] = OrderedDict()


def _table(device: torch.device, rows: list[list[int]]) -> Tensor:
    key = (device, tuple(map(tuple, rows)))
    found = _TABLES.get(key)
    if found is None:
        host = torch.tensor(rows, dtype=torch.int64)
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
    host = torch.tensor(values, dtype=dtype)
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
    """``(depth, 4)``: a, b, the inverse of a modulo the rows, and the seed of the signs."""
    hashes = row_hashes(rows, store.buckets(rows), store.depth, store.hash, store.seed)
    values = [[h.a, h.b, pow(h.a, -1, rows) if rows > 1 else 0, h.sign_seed] for h in hashes]
    return _upload(values, torch.int64, device)


@lru_cache(maxsize=64)
def _powers(decay: float, gain: float, most: int, device: torch.device) -> Tensor:
    """``(most + 1, 2)``: decay and gain of c steps with one value."""
    c = torch.arange(most + 1)
    decays, gains = Ema(decay, gain).repeated(c)
    return torch.stack([decays, gains], 1).to(torch.float32).to(device)

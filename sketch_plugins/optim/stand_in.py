"""A small optimizer that stands in for another one: it has the same options and kernels, and small tensors."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.kernels.agreement import HALF, rate_for
from sketch_plugins.optim.pending import Pending
from sketch_plugins.optim.resolved import Resolution
from sketch_plugins.optim.specialisations import Recorder, Stopped, watching
from sketch_plugins.optim.written import MARK

# The largest tensor that is tried out, in elements, and how many kinds of tensors are tried to find one.
_LARGEST, _TRIED = 1 << 20, 1 << 9

# A shape, whether small tensors are compressed, and the gap between rows (in elements, modulo 16; 0: no gap).
Kind = tuple[tuple[int, ...], bool, int]


def like(optimizer: Resolution, one: Pending, text: str) -> Kind | None:
    """The smallest kind of tensor whose step has this specialisation, or None if there is none.

    Kinds with several buckets and several tiles, as the part has, are tried first.
    """
    rows = -2 if _is_batch(one) else 0
    whole = tuple(one.p.shape)

    def worth(kind: Kind) -> tuple[bool, int]:
        shape = kind[0]
        few = len(shape) > 1 and (shape[rows] < min(whole[rows], 80) or _size(shape[1:]) <= 128 < _size(whole[1:]))
        return few, _size(shape)

    kinds = sorted(_kinds(one), key=worth)[:_TRIED]
    for begin in range(0, len(kinds), 8):
        small, given = small_optimizer(optimizer, one, kinds[begin : begin + 8], False)
        give_gradients(small, one, 0)
        if one.work is not None and one.work.once:
            # The step uses what the step before has measured, so it cannot be a first step.
            take_step(small)
        for group in small.param_groups:
            group["fused"] = True
        recorder = Recorder(stop=True)
        with contextlib.suppress(Stopped), watching(recorder):
            take_step(small)
        matching = {id(p) for p, _, seen in recorder.seen if seen == text}
        for p, kind in given:
            if id(p) in matching:
                return kind
    return None


def _is_batch(one: Pending) -> bool:
    """Whether the matrices of a batch have buckets of their own, or are measured one by one."""
    return one.grad.matrices > 1 or (one.work is not None and one.work.apart > 1)


def _size(shape: Sequence[int]) -> int:
    n = 1
    for length in shape:
        n *= length
    return n


def _kinds(one: Pending) -> Iterator[Kind]:
    shape = tuple(one.p.shape)
    work = one.work
    assert work is not None
    plain = work.p.is_contiguous() and work.g.is_contiguous()
    block = one.group.get("block_size", 1)
    small_shapes = _shapes(shape, block)
    if _is_batch(one):  # two matrices of the batch, made smaller
        small_shapes = ((*(min(n, 2) for n in shape[:-2]), *small) for small in _shapes(shape[-2:], block))
    for small in small_shapes:
        if _size(small) <= _LARGEST:
            for compressed in (True, False):
                yield (small, compressed, 0)
                if not plain and len(small) == 2:
                    yield (small, compressed, 16)
                    yield (small, compressed, 1)


def _shapes(shape: tuple[int, ...], block: int) -> Iterator[tuple[int, ...]]:
    """Smaller shapes with as many axes: rows for every load of a bucket, columns for every width of a tile."""
    if len(shape) < 2:
        lengths = {*shape, 40, 37, 1040, 1025, 8208} if shape else set()
        yield from ((n,) for n in lengths if n <= max(shape))
        if not shape:
            yield ()
        return
    rows = [n for n in (4, 8, 16, 17, 32, 33, 40, 64, 80, 100, 160, 320, 640, 1280, 2560) if n < shape[0]]
    rows += [shape[0]] if shape[0] <= 5120 else []
    last = shape[-1]
    widths: set[int] = set()
    for width in (min(128, 1 << (last - 1).bit_length()), 256, min(block, last), 16):
        # One tile, and one tile with a part of another, with rows that begin at multiples of 16 bytes and without.
        widths |= {width, width - 1, width + 1, width + 16}
    ends = {n for n in (*widths, last) if 1 <= n <= min(last, 1056)}
    middle = tuple(min(n, 3) for n in shape[1:-1])
    behind = {(*middle, n) for n in ends}
    if _size(shape[1:]) <= 1056:
        behind.add(shape[1:])
    yield from ((n, *rest) for n in rows for rest in sorted(behind))


def small_optimizer(
    optimizer: Resolution, one: Pending, kinds: Sequence[Kind], fused: bool
) -> tuple[Any, list[tuple[Tensor, Kind]]]:
    """An optimizer of the same class and options. It is made as a copy is made, so that no hook notices it."""
    group, device, dtype = one.group, one.p.device, one.p.dtype
    generator = torch.Generator().manual_seed(0)
    scale = 0.1 if dtype in HALF else 1.0
    given: list[tuple[Tensor, Kind]] = []
    for kind in kinds:
        shape, _, gap = kind
        values = scale * torch.randn(shape, generator=generator)
        if gap:
            place = torch.empty(shape[0], shape[1] + 16, dtype=dtype, device=device)[:, gap % 16 : gap % 16 + shape[1]]
        else:
            place = torch.empty(shape, dtype=dtype, device=device)
        given.append((torch.nn.Parameter(place.copy_(values)), kind))
    options = {name: value for name, value in group.items() if name not in ("params", MARK, "param_names")}
    options |= {
        "lr": rate_for(dtype), "fused": fused, "compile": False, "capturable": False,
        "row_sparse": one.grad.rows is not None,
    }  # fmt: skip
    if "row_scales" in options:  # an embedding has none, but a smaller matrix of as many columns would
        options["row_scales"] = "row_means" in one.state.get("second_moment", {})
    if "reference_rms" in options:
        options["reference_rms"] = 1.0  # steps then have the size that the bounds are made for
    if "nonfinite" in options:
        options["nonfinite"] = "error"  # its gradients are finite, and nobody looks at flags that are late
    if _is_batch(one):
        options["batch_dims"] = 1
    if "precondition" in options:
        # Preconditioned tensors only take the parts that kernels take, because products would magnify rounding errors.
        own = optimizer._further(one.p, group)
        options |= {"precondition": "all" if own else "none", "start_preconditioning_step": 1 << 30, "input": "update"}
    groups = [
        {**options, "params": [p for p, (_, c, _) in given if c is compressed], "min_compress_size": size}
        for compressed, size in ((True, 0), (False, 1 << 62))
    ]
    small: Any = object.__new__(type(optimizer))
    small.__setstate__(
        {
            "defaults": dict(optimizer.defaults),
            "state": defaultdict(dict),
            "param_groups": [group for group in groups if group["params"]],
        }
    )
    small._introduced, small._watches_rates = True, False
    return small, given


def give_gradients(small: Any, one: Pending, step: int) -> None:
    """Set gradients of the kind that the part has: dense, row-sparse, or with rows that are zero."""
    generator = torch.Generator().manual_seed(1 + step)
    for p in (p for group in small.param_groups for p in group["params"]):
        values = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        if one.grad.rows is not None and p.ndim:
            rows = torch.arange(step % 2, p.shape[0], 3, device=p.device)
            if one.grad.packed:
                values = torch.sparse_coo_tensor(
                    rows.unsqueeze(0), values[rows], p.shape, is_coalesced=True, check_invariants=False
                )
            else:
                touched = torch.zeros_like(values)
                touched[rows] = values[rows]
                values = touched
        elif not p.is_contiguous():
            values = torch.empty_strided(p.shape, p.stride(), dtype=values.dtype, device=p.device).copy_(values)
        p.grad = values


def take_step(small: Any) -> None:
    """Take a step with the class's own `step`, without what other code has added to it."""
    base = next(c for c in reversed(type(small).__mro__) if "step" in vars(c) and issubclass(c, Resolution))
    base.step(small)

"""Kernels are compared with the eager definition before a step relies on them, once for each device and version.

`confirm` is called when a step is resolved and nothing has changed yet. What each part's kernels are compiled for (the
specialisation) is looked up: in this process, then in the file of `verdicts`. What nobody knows is tried out: a small
optimizer of the same class with the same options takes two steps with the same specialisation, and two eagerly. Parts
whose kernels fail to compile or differ take their steps eagerly.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sketch_plugins.kernels import work as places
from sketch_plugins.kernels.agreement import HALF, is_rounded, parameter_difference, rate_for, state_difference
from sketch_plugins.kernels.work import Work
from sketch_plugins.notices import warn
from sketch_plugins.optim import verdicts
from sketch_plugins.optim.pending import Pending
from sketch_plugins.optim.resolved import Resolution
from sketch_plugins.optim.written import MARK
from sketch_plugins.sharding.parts import is_fake

logger = logging.getLogger(__name__)

#: Environment variable: 0: kernels are used unseen; 1: those of Numba and of Triton's interpreter are checked, too.
SWITCH = "SKETCH_PLUGINS_CHECK"
# Elements of a tensor that is tried out, and how many kinds of tensors are looked at to find one.
_LARGEST, _TRIED = 1 << 20, 1 << 9

# In the store of a job's processes.
_RIGHT = "right"

_Key = tuple[tuple[tuple[str, str], ...], str]

# What is wrong with a specialisation (None: nothing), for each combination.
_known: dict[_Key, str | None] = {}
_read: set[tuple[tuple[str, str], ...]] = set()
_warned: set[_Key] = set()
# Those of the above that the processes of a job have agreed on.
_settled: set[_Key] = set()
# What the specialisation of a work depends on -> (kernels, the specialisation).
_texts: dict[tuple[Any, ...], tuple[tuple[str, ...], str]] = {}


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
            raise _Stop


class _Stop(Exception):
    pass


class _Local(threading.local):
    recorder: Recorder | None = None


_LOCAL = _Local()


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
        w.measure, w.stochastic, w.last is None,
        w.flags & (1 << places.L2 | 1 << places.LOOKAHEAD | 1 << places.UNIT),
        any(t.data_ptr() % 16 for t in (w.p, w.g, *state)),
    )  # fmt: skip
    found = _texts.get(key)
    if found is None:
        if len(_texts) > 10_000:
            _texts.clear()
        if backend == "triton":
            from sketch_plugins.kernels.gpu.launch import specialisation as of
        else:
            from sketch_plugins.kernels.cpu import specialisation as of
        found = _texts[key] = of(w)
    return found


def confirm(optimizer: Resolution, pending: Sequence[Pending]) -> None:
    """Take the kernels from the parts that they are wrong for, before a step changes anything.

    Raises:
        ValueError: the part is ``capturable``, which nothing but the kernels can be.
    """
    if _LOCAL.recorder is not None:
        _LOCAL.recorder.note(pending)
        return
    asked = os.environ.get(SWITCH, "")
    if asked == "0":
        return
    found: list[tuple[Pending, tuple[str, ...], _Key]] = []
    for one in pending:
        if one.backend is not None and one.work is not None and (asked == "1" or _compiles_for(one)):
            try:
                names, text = specialisation(one.backend.name, one.work)
                what = verdicts.combination(one.work.p.device, one.backend.name)
            except Exception as error:  # a check that fails by itself is no reason for a training to stop
                logger.debug("the kernels of a step could not be named: %r", error)
                continue
            found.append((one, names, (what, text)))
    unknown = [entry for entry in found if entry[2] not in _settled]
    if unknown and not _is_recording():
        _find_out(optimizer, unknown)
    wrong = [(one, names, key) for one, names, key in found if _known.get(key) is not None]
    for one, names, key in wrong:
        if one.group["capturable"]:
            raise ValueError(
                f"capturable=True needs kernels that are right on {dict(key[0])['device']}, and these are not: "
                f"{_said(names, key)}. {_advice(key)}"
            )
    for one, _, _ in wrong:
        one.backend = one.work = None
    new = {key: names for _, names, key in wrong if key not in _warned}
    if new:
        _warned.update(new)
        first = next(iter(new))
        said = "; ".join(dict.fromkeys(_said(names, key) for key, names in new.items()))
        warn(
            f"{type(optimizer).__name__} takes the eager path on {dict(first[0])['device']}: kernels of sketch-plugins "
            f"differ from their definition there, or do not compile ({said}). The numbers of the step are right, and "
            f"it is slower. {_advice(first)}"
        )


def forget() -> None:
    """Forget what this process has found; the files stay."""
    _known.clear()
    _read.clear()
    _warned.clear()
    _settled.clear()


def _compiles_for(one: Pending) -> bool:
    """Interpreted kernels, and Numba's, are seen by the tests of every change."""
    assert one.backend is not None
    return one.backend.name == "triton" and one.p.device.type == "cuda" and not is_fake(one.p.data)


def _is_recording() -> bool:
    """Whether nothing can be tried out now: a graph would hold it."""
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return capturing or torch.compiler.is_compiling()


def _said(names: Sequence[str], key: _Key) -> str:
    return f"{', '.join(names)}: {_known[key]}"


def _advice(key: _Key) -> str:
    return (
        "Run `sketch-plugins check`, which compares all kernels, and report what it prints; other versions of torch "
        f"and Triton may be right. fused=False says nothing, {SWITCH}=0 uses the kernels in spite of this, and the "
        f"finding is forgotten when {verdicts.path(key[0])} is removed"
    )


def _find_out(optimizer: Resolution, unknown: Sequence[tuple[Pending, tuple[str, ...], _Key]]) -> None:
    """Verdicts on specialisations, from the file, or else by trying them out."""
    for what in {key[0] for _, _, key in unknown} - _read:
        _read.add(what)
        _known.update({(what, text): why for text, why in verdicts.read(what).items()})
    todo: dict[_Key, list[Pending]] = {}
    for one, _, key in unknown:
        if key not in _known:
            todo.setdefault(key, []).append(one)
    lasting: dict[Any, dict[str, str | None]] = {}
    for key, those in todo.items():
        if key in _known:  # seen on the way
            continue
        what, text = key
        try:
            results = _try_out(optimizer, those[0], text, len(those))
        except Exception as error:  # a check that fails by itself is no reason for a training to stop
            logger.debug("%s could not be checked: %r", text, error)
            results = {}
        for seen, (why, lasts) in results.items():
            # Of several processes this one alone would go another way: the step itself may fail, and says so then.
            _known.setdefault((what, seen), why if lasts or not _is_one_of_several() else None)
            if lasts:
                lasting.setdefault(what, {})[seen] = why
        _known.setdefault(key, None)
    for what, verdict in lasting.items():
        if not verdicts.write(what, verdict):
            logger.debug("%s cannot be written: the kernels are checked once more in the next process", what)
    for key in dict.fromkeys(key for _, _, key in unknown):
        _known[key] = _agreed(key[1], _known[key])
        _settled.add(key)


def _is_one_of_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _agreed(text: str, why: str | None) -> str | None:
    """The verdict of the process that was first: replicas that took different paths would drift apart.

    It is in the store that the processes of a job have found each other by; nobody waits for another one.
    """
    if not _is_one_of_several():
        return why
    key = f"sketch_plugins/{hashlib.sha256(text.encode()).hexdigest()}"
    try:
        store = dist.distributed_c10d._get_default_store()
        said = store.compare_set(key, "", _RIGHT if why is None else why).decode()
    except Exception as error:  # a store that has no such operation, or a torch without this name
        logger.debug("the processes could not agree on %s: %r", text, error)
        return why
    return None if said == _RIGHT else said


def _try_out(optimizer: Resolution, one: Pending, text: str, number: int) -> dict[str, tuple[str | None, bool]]:
    """Specialisation -> (what is wrong with it, whether another process would find the same); empty: nobody knows."""
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = _like(optimizer, one, text)
        if kind is None:
            return {}
        # As many tensors as make Triton compile for the same number of them: one, a multiple of 16, or others.
        copies = 1 if number == 1 else 16 if number % 16 == 0 else 2
        steps = 3 if one.group.get("lagged_rms") else 2
        eager, _ = _small(optimizer, one, [kind] * copies, False)
        ours, _ = _small(optimizer, one, [kind] * copies, True)
        out: dict[str, tuple[str | None, bool]] = {}
        for step in range(steps):
            _give_gradients(eager, one, step)
            _take_step(eager)
            _give_gradients(ours, one, step)
            recorder = Recorder()
            why, lasts = None, True
            try:
                with watching(recorder):
                    _take_step(ours)
                why = _difference(ours, eager)
            except torch.OutOfMemoryError:
                return {}
            except Exception as error:
                why, lasts = _first_line(error), _lasts(error)
            seen = {text for _, _, text in recorder.seen}
            out.update({text: (why, lasts) for text in seen if text not in out or out[text][0] is None})
            if why is not None:
                break
        return out


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"


def _lasts(error: BaseException) -> bool:
    """Whether an error is the kernel's; a full disk or a compiler that is missing is not."""
    return type(error).__module__.partition(".")[0] == "triton" or "CUDA error" in str(error)


def _difference(ours: Any, eager: Any) -> str | None:
    """What differs between two small optimizers."""
    for p, q in zip(ours.param_groups[0]["params"], eager.param_groups[0]["params"], strict=True):
        if not q.isfinite().all():
            continue  # options under which nothing can be told
        found = parameter_difference(p.detach(), q.detach(), is_rounded(eager.state[q]))
        found = found or state_difference(ours.state[p], eager.state[q], q.dtype)
        if found is not None:
            return found
    return None


# -- a small optimizer ------------------------------------------------------------------------------------------------

# A shape, whether small tensors are compressed, and how many numbers lie before a row that belong to no parameter.
_Kind = tuple[tuple[int, ...], bool, int]


def _like(optimizer: Resolution, one: Pending, text: str) -> _Kind | None:
    """The smallest kind of tensor whose step has this specialisation; None: none was found.

    Those come first that have several buckets and several tiles, as the part has.
    """
    rows = -2 if one.grad.matrices > 1 else 0
    whole = tuple(one.p.shape)

    def worth(kind: _Kind) -> tuple[bool, int]:
        shape = kind[0]
        few = len(shape) > 1 and (shape[rows] < min(whole[rows], 80) or _size(shape[1:]) <= 128 < _size(whole[1:]))
        return few, _size(shape)

    kinds = sorted(_kinds(one), key=worth)[:_TRIED]
    for begin in range(0, len(kinds), 8):
        small, given = _small(optimizer, one, kinds[begin : begin + 8], False)
        _give_gradients(small, one, 0)
        if one.work is not None and one.work.once:
            # No first step is like this one, which goes by what another one has measured.
            _take_step(small)
        for group in small.param_groups:
            group["fused"] = True
        recorder = Recorder(stop=True)
        with contextlib.suppress(_Stop), watching(recorder):
            _take_step(small)
        matching = {id(p) for p, _, seen in recorder.seen if seen == text}
        for p, kind in given:
            if id(p) in matching:
                return kind
    return None


def _size(shape: Sequence[int]) -> int:
    n = 1
    for length in shape:
        n *= length
    return n


def _kinds(one: Pending) -> Iterator[_Kind]:
    shape = tuple(one.p.shape)
    work = one.work
    assert work is not None
    plain = work.p.is_contiguous() and work.g.is_contiguous()
    block = one.group.get("block_size", 1)
    small_shapes = _shapes(shape, block)
    if one.grad.matrices > 1:  # a batch: two of its matrices, made smaller
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
        # A tile, a tile and a part of another one; with rows that begin on 16 bytes, and not.
        widths |= {width, width - 1, width + 1, width + 16}
    ends = {n for n in (*widths, last) if 1 <= n <= min(last, 1056)}
    middle = tuple(min(n, 3) for n in shape[1:-1])
    behind = {(*middle, n) for n in ends}
    if _size(shape[1:]) <= 1056:
        behind.add(shape[1:])
    yield from ((n, *rest) for n in rows for rest in sorted(behind))


def _small(
    optimizer: Resolution, one: Pending, kinds: Sequence[_Kind], fused: bool
) -> tuple[Any, list[tuple[Tensor, _Kind]]]:
    """An optimizer of the same class with the same options, made as a copy is made: nobody's hooks know of it."""
    group, device, dtype = one.group, one.p.device, one.p.dtype
    generator = torch.Generator().manual_seed(0)
    scale = 0.1 if dtype in HALF else 1.0
    given: list[tuple[Tensor, _Kind]] = []
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
    if one.grad.matrices > 1:
        options["batch_dims"] = 1
    if "precondition" in options:
        options["precondition"] = "none"  # of Sketchy; tensors with covariances have no kernels
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
    small._introduced = True
    return small, given


def _give_gradients(small: Any, one: Pending, step: int) -> None:
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


def _take_step(small: Any) -> None:
    """A step without what others have hung on to the steps of its class."""
    base = next(c for c in reversed(type(small).__mro__) if "step" in vars(c) and issubclass(c, Resolution))
    base.step(small)

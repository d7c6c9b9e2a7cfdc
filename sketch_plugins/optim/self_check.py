"""Compares kernels with the eager definition before a step relies on them, once for each device and version.

`confirm` is called after a step is resolved and before anything changes. It looks up what each part's kernels are
compiled for (the specialisation), first in this process, then in the file of `verdicts`. An unknown specialisation is
tried out: a small optimizer of the same class with the same options takes two steps with these kernels, and two eager
steps. Parts whose kernels fail to compile, or compute other values, take their steps eagerly.
"""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from sketch_plugins.kernels.agreement import is_rounded, state_difference, weight_difference
from sketch_plugins.notices import warn
from sketch_plugins.optim import verdicts
from sketch_plugins.optim.pending import Pending
from sketch_plugins.optim.resolved import Resolution
from sketch_plugins.optim.specialisations import Recorder, specialisation, watched, watching
from sketch_plugins.optim.stand_in import give_gradients, like, small_optimizer, take_step
from sketch_plugins.sharding.tensors import is_fake

logger = logging.getLogger(__name__)

#: Environment variable. 0: kernels are not checked. 1: those of Numba and of Triton's interpreter are checked, too.
SWITCH = "SKETCH_PLUGINS_CHECK"
# The value for correct kernels in the store of a job's processes.
_RIGHT = "right"

_Key = tuple[tuple[tuple[str, str], ...], str]

# What is wrong with a specialisation (None: nothing), for each combination of versions.
_known: dict[_Key, str | None] = {}
_read: set[tuple[tuple[str, str], ...]] = set()
_warned: set[_Key] = set()
# The verdicts that the processes of a job have agreed on.
_settled: set[_Key] = set()


def confirm(optimizer: Resolution, pending: Sequence[Pending]) -> None:
    """Remove the backend of parts whose kernels are wrong, before a step changes anything.

    Raises:
        ValueError: such a part is ``capturable``, and therefore needs kernels.
    """
    if (recorder := watched()) is not None:
        recorder.note(pending)
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
            except Exception as error:  # a failure of the check itself must not stop a training
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
                f"capturable=True needs correct kernels, and on {dict(key[0])['device']} these are not: "
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
            f"{type(optimizer).__name__} takes eager steps on {dict(first[0])['device']}: some kernels of "
            f"sketch-plugins compute other values than eager torch there, or do not compile ({said}). The "
            f"results are correct, but the steps are slower. {_advice(first)}"
        )


def forget() -> None:
    """Forget the verdicts of this process. The files stay."""
    _known.clear()
    _read.clear()
    _warned.clear()
    _settled.clear()


def _compiles_for(one: Pending) -> bool:
    """Whether the kernels are compiled by Triton for a GPU. Tests of every change run the interpreter's and Numba's."""
    assert one.backend is not None
    return one.backend.name == "triton" and one.p.device.type == "cuda" and not is_fake(one.p.data)


def _is_recording() -> bool:
    """Whether nothing can be tried out now, because a graph would record it."""
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    return capturing or torch.compiler.is_compiling()


def _said(names: Sequence[str], key: _Key) -> str:
    return f"{', '.join(names)}: {_known[key]}"


def _advice(key: _Key) -> str:
    return (
        "Run `sketch-plugins check`, which compares all kernels, and report its output; other versions "
        f"of torch and Triton may work. fused=False avoids this message, {SWITCH}=0 uses the kernels in "
        f"spite of it, and removing {verdicts.path(key[0])} makes the next process check them again"
    )


def _find_out(optimizer: Resolution, unknown: Sequence[tuple[Pending, tuple[str, ...], _Key]]) -> None:
    """Find verdicts on specialisations in the file, or by trying them out."""
    for what in {key[0] for _, _, key in unknown} - _read:
        _read.add(what)
        _known.update({(what, text): why for text, why in verdicts.read(what).items()})
    todo: dict[_Key, list[Pending]] = {}
    for one, _, key in unknown:
        if key not in _known:
            todo.setdefault(key, []).append(one)
    lasting: dict[Any, dict[str, str | None]] = {}
    for key, those in todo.items():
        if key in _known:  # it was found while another one was tried out
            continue
        what, text = key
        try:
            results = _try_out(optimizer, those[0], text, len(those))
        except Exception as error:  # a failure of the check itself must not stop a training
            logger.debug("%s could not be checked: %r", text, error)
            results = {}
        for seen, (why, lasts) in results.items():
            # An error of this process alone must not make it differ from the others. The step itself may fail then.
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
    """The verdict of the process that was first, because replicas that take different paths would drift apart.

    The verdicts are in the store through which the processes of a job found each other, so no process waits.
    """
    if not _is_one_of_several():
        return why
    key = f"sketch_plugins/{hashlib.sha256(text.encode()).hexdigest()}"
    try:
        store = dist.distributed_c10d._get_default_store()
        said = store.compare_set(key, "", _RIGHT if why is None else why).decode()
    except Exception as error:  # the store has no such operation, or torch lacks this name
        logger.debug("the processes could not agree on %s: %r", text, error)
        return why
    return None if said == _RIGHT else said


def _try_out(optimizer: Resolution, one: Pending, text: str, number: int) -> dict[str, tuple[str | None, bool]]:
    """What is wrong with each specialisation, and whether other processes would find the same. Empty: unknown."""
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = like(optimizer, one, text)
        if kind is None:
            return {}
        # Triton compiles differently for one tensor, for a multiple of 16, and for other numbers of tensors.
        copies = 1 if number == 1 else 16 if number % 16 == 0 else 2
        steps = 3 if one.group.get("lagged_rms") else 2
        eager, _ = small_optimizer(optimizer, one, [kind] * copies, False)
        ours, _ = small_optimizer(optimizer, one, [kind] * copies, True)
        out: dict[str, tuple[str | None, bool]] = {}
        for step in range(steps):
            give_gradients(eager, one, step)
            take_step(eager)
            give_gradients(ours, one, step)
            recorder = Recorder()
            why, lasts = None, True
            try:
                with watching(recorder):
                    take_step(ours)
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
    """Whether an error belongs to the kernel. A full disk or a missing compiler does not."""
    return type(error).__module__.partition(".")[0] == "triton" or "CUDA error" in str(error)


def _difference(ours: Any, eager: Any) -> str | None:
    """What differs between two small optimizers, or None."""
    for p, q in zip(ours.param_groups[0]["params"], eager.param_groups[0]["params"], strict=True):
        if not q.isfinite().all():
            continue  # under these options values overflow, and cannot be compared
        found = weight_difference(p.detach(), ours.state[p], q.detach(), eager.state[q], is_rounded(eager.state[q]))
        found = found or state_difference(ours.state[p], eager.state[q], q.dtype)
        if found is not None:
            return found
    return None

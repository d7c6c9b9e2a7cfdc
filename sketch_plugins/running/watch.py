"""Which optimizers the processes of a run have built, and the warning of ``sketch-plugins run`` at its end.

The process of ``run`` itself keeps this in memory. The processes that it starts append lines to a file, whose name they
inherit.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from typing import Any

from sketch_plugins.import_hooks import when_imported

PROGRAM = "sketch-plugins run"
#: Kinds of lines in the file: an optimizer of ours was built, or another one; the program got an error.
OURS, OTHERS, REFUSED = "ours", "others", "refused"

_seen: set[tuple[int, str, str]] = set()  # (process, kind, name); a fork has its parent's entries
_files: Sequence[str] = ()
_own_file: str | None = None
_own_process: int | None = None


def begin(file: str) -> None:
    """Mark this process as that of ``run``; its children write to ``file``."""
    global _own_file, _own_process
    _own_file, _own_process = file, os.getpid()


def note(kind: str, name: str) -> None:
    """Remember ``name``, once for each process."""
    entry = (os.getpid(), kind, name)
    if entry in _seen:
        return
    _seen.add(entry)
    for file in _files:
        if file == _own_file and os.getpid() == _own_process:
            continue
        try:
            # No other user can have made the file: its name is random, and links are not followed.
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            descriptor = os.open(file, flags, 0o600)
            try:
                os.write(descriptor, f"{kind} {name}\n".encode())
            finally:
                os.close(descriptor)
        except OSError:  # a full or removed folder must not stop a training run
            continue


def watch_constructors(files: Sequence[str]) -> None:
    """Note every torch optimizer that is built in this process from now on.

    ``torch.optim.Optimizer.__init__``, which every optimizer calls, is wrapped. Its behaviour does not change
    otherwise.
    """
    global _files
    from torch.optim import Optimizer

    _files = tuple(files)
    construct = Optimizer.__init__

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        # Some optimizers train nothing: placeholders of frameworks, and those that only check options (ours, too).
        if any(p.requires_grad for group in self.param_groups for p in group["params"]):
            note(OURS if is_ours(type(self)) else OTHERS, type(self).__name__)

    Optimizer.__init__ = __init__  # type: ignore[method-assign]
    when_imported("sketch_plugins.comm.state", _watch_communication)


def _watch_communication() -> None:
    # Gradient compression is a feature of ours, so a program that uses it with any optimizer gets no warning.
    from sketch_plugins.comm.state import MemSGDState

    construct = MemSGDState.__init__

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        note(OURS, type(self).__name__)

    MemSGDState.__init__ = __init__  # type: ignore[method-assign]


def is_ours(cls: type) -> bool:
    """Whether a class is an optimizer of this package, or a subclass of one. Imports nothing."""
    return any(base.__module__.partition(".")[0] == "sketch_plugins" for base in cls.__mro__)


def end(optim: str | None) -> None:
    """Warn if no optimizer of ours was built although one was expected, and remove the file of notes.

    One is expected if ``--optim`` was given, or if the program built any optimizer. A program that got an error of ours
    gets no warning.
    """
    if os.getpid() != _own_process or _own_file is None:  # this is a fork of the program
        return
    noted = {(kind, name) for process, kind, name in _seen if process == _own_process}
    try:
        with open(_own_file, encoding="utf-8") as file:
            noted |= {(kind, name) for kind, _, name in (line.strip().partition(" ") for line in file)}
        os.unlink(_own_file)
    except OSError:  # no child had anything to note
        pass
    kinds = {kind for kind, _ in noted}
    if OURS in kinds or REFUSED in kinds or not is_first_rank():
        return
    others = ", ".join(sorted(name for kind, name in noted if kind == OTHERS))
    if others:
        what = f"no optimizer of sketch-plugins was built, only {others}"
    elif optim is not None:
        what = f"no optimizer was built that {optim} could replace"
    else:
        return
    remedy = (
        (
            "If the program accepts the name of an optimizer (optim, strategy, a DeepSpeed configuration), "
            "set one of ours there; or replace torch's optimizers: sketch-plugins run --optim cs_adam ..."
        )
        if optim is None
        else "--optim reaches torch.optim's Adam, AdamW, SGD and Adagrad, in this Python environment"
    )
    say("WARNING", f"{what}. {remedy}")


def say(level: str, message: str) -> None:
    """Print a line to stderr, because most programs do not show the log of a library that they do not know."""
    print(f"{level} {PROGRAM}: {message}", file=sys.stderr, flush=True)


def refuse(optim: str, error: ValueError) -> None:
    """Print what is wrong with the options of ``run``, in one of several ranks."""
    if is_first_rank():
        print(f"{PROGRAM}: --optim {optim}: {error}", file=sys.stderr)


def is_first_rank() -> bool:
    """Whether this process is the first rank, by torch.distributed or else by the variables of launchers."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return bool(distributed.get_rank() == 0)
    for variable in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        rank = os.environ.get(variable, "")
        if rank.isdigit():
            return int(rank) == 0
    return True

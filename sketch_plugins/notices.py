"""Warnings that name a line of the user's program, not a line of ours."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

#: Packages whose lines a warning does not name: our own, and those between them and a program.
_BETWEEN = frozenset({
    "sketch_plugins", "sketch_transformers", "sketch_lightning", "sketch_accelerate", "sketch_deepspeed", "torch",
    "contextlib", "functools", "importlib",
})  # fmt: skip


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Like `warnings.warn`, for the innermost line outside of `sketch_plugins`, its integrations and torch.

    ``stacklevel`` would not do, because the number of frames of ours and of torch (hooks, schedulers, decorators)
    depends on how a step is called, and ``skip_file_prefixes`` exists only from Python 3.12 on.
    """
    frame: FrameType = sys._getframe(1)
    while _package(frame) in _BETWEEN and frame.f_back is not None:
        frame = frame.f_back
    # The registry of that module, as `warnings.warn` uses it: by default a warning is shown once for each line.
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    module = str(frame.f_globals.get("__name__", "<unknown>"))
    warnings.warn_explicit(message, category, frame.f_code.co_filename, frame.f_lineno, module, registry)


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]

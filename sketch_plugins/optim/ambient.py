"""Modes that are in force around a step and must not change what it computes.

A training loop may call ``step`` inside `torch.autocast` (Lightning's manual optimization does), under another default
device or dtype, or in `torch.inference_mode`. The arithmetic of a step and where its state lives depend on none of
these.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

# torch.compile leaves the step alone, as it does torch.optim's. The public decorator imports the compiler at once, two
# seconds that few scripts need; torch.optim's own one does so when something is compiled.
outside_graphs: Callable[..., Any] = getattr(torch, "_disable_dynamo", None) or torch.compiler.disable

# Kinds of device on which a step may compute.
_KINDS = ("cpu", "cuda", "xpu", "mps", "hpu")


def _autocasting() -> list[str]:
    found = []
    for kind in _KINDS:
        try:
            if torch.is_autocast_enabled(kind):
                found.append(kind)
        except RuntimeError:  # this build of torch does not know the kind
            continue
    return found


@contextmanager
def neutral() -> Iterator[None]:
    """No autocast, and tensors are on the CPU unless said otherwise.

    The default dtype belongs to the whole process and stays: everything in a step says its own.
    Inference mode stays: parameters may have been made in it. Who allocates state leaves it for that moment.
    """
    device = torch.get_default_device()
    with ExitStack() as stack:
        for kind in _autocasting():
            stack.enter_context(torch.autocast(kind, enabled=False))
        if device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block: many save a checkpoint then, of whole steps."""
    before = signal.getsignal(signal.SIGINT)
    # Python runs handlers in the main thread only, and only it may set them.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pressed: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *args: pressed.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        before(*pressed[0])

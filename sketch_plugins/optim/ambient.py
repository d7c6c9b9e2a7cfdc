"""Modes around a step that must not change what it computes.

A training loop may call ``step`` inside `torch.autocast` (Lightning's manual optimization does), with another default
device or dtype, or in `torch.inference_mode`. The arithmetic of a step, and the device of its state, depend on none of
these.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

# torch.compile does not trace the step, as it does not trace torch.optim's. The public decorator would import the
# compiler at once, which takes two seconds; torch.optim's private one imports it when something is compiled.
outside_graphs: Callable[..., Any] = getattr(torch, "_disable_dynamo", None) or torch.compiler.disable

# Types of devices on which a step may compute.
_KINDS = ("cpu", "cuda", "xpu", "mps", "hpu")


def _autocasting() -> list[str]:
    found = []
    for kind in _KINDS:
        try:
            if torch.is_autocast_enabled(kind):
                found.append(kind)
        except RuntimeError:  # this build of torch does not know the device type
            continue
    return found


@contextmanager
def neutral() -> Iterator[None]:
    """Disable autocast, and make the CPU the default device.

    The default dtype belongs to the whole process and stays, because every tensor of a step has an explicit dtype.
    Inference mode stays, because parameters may have been made in it. State is allocated outside of it.
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
    """Delay Ctrl-C to the end of the block, because programs often save a checkpoint then, which needs whole steps."""
    before = signal.getsignal(signal.SIGINT)
    # Python runs handlers in the main thread only, and only that thread may set them.
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

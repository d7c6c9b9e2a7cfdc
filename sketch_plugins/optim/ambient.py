"""Modes that are in force around a step and must not change what it computes.

A training loop may call ``step`` inside `torch.autocast` (Lightning's manual optimization does), under another default
device or dtype, or in `torch.inference_mode`. The arithmetic of a step and where its state lives depend on none of
these.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

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
    """No autocast, tensors on the CPU and in float32 unless said otherwise, and none of them an inference tensor."""
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    with ExitStack() as stack:
        for kind in _autocasting():
            stack.enter_context(torch.autocast(kind, enabled=False))
        if device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield

"""Whether Triton interprets its kernels in this process."""

from __future__ import annotations

import os


def interpreted() -> bool:
    """Whether ``TRITON_INTERPRET`` is set: kernels then run on a CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

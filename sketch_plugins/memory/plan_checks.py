"""Checks of what a plan is asked for: precision, device, budget, ZeRO."""

from __future__ import annotations

import re
from typing import Any

import torch

from sketch_plugins.memory.meter import parse_budget, total_memory
from sketch_plugins.memory.report import format_bytes

#: Name -> (dtype of the weights, dtype of autocast).
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "fp16-mixed": (torch.float32, torch.float16),
}
#: Memory of a CUDA context, into which kernels are loaded. torch's allocator does not know about it.
RESERVE = 512 * 2**20


class BudgetBelowWeights(ValueError):
    """The budget is less than the weights alone.

    Attributes:
        finding: the figures, without advice.
    """

    def __init__(self, finding: str, advice: str) -> None:
        super().__init__(f"{finding}: {advice}")
        self.finding = finding


def check_choices(precision: Any, gradient_checkpointing: Any, device: Any) -> None:
    """Check arguments that `plan` and `sketch_plugins.advise` share.

    Raises:
        ValueError: one of them is not allowed.
    """
    if not isinstance(precision, str) or precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")
    if not isinstance(gradient_checkpointing, bool):
        raise ValueError(f"gradient_checkpointing={gradient_checkpointing!r} is not allowed: it must be True or False")
    if device not in ("cuda", "cpu"):
        raise ValueError(f"device={device!r} is not one of cuda, cpu")


def budget_and_reserve(gpu_memory: Any, reserve: Any, device: str) -> tuple[int | None, int]:
    """Both in bytes, as `plan` takes them; ``(None, 0)`` without a budget.

    Raises:
        ValueError: one of them is not allowed, or there is no budget to subtract ``reserve`` from, or none is left.
    """
    if gpu_memory is None:
        if reserve is not None:
            raise ValueError(
                f"reserve={reserve!r} is subtracted from a budget, and there is none: set gpu_memory, too, as in "
                "gpu_memory='16GiB'"
            )
        return None, 0
    budget = _budget(gpu_memory, device, "gpu_memory")
    kept_back = _budget((RESERVE if device == "cuda" else 0) if reserve is None else reserve, device, "reserve")
    if kept_back >= budget:
        raise ValueError(
            f"gpu_memory={gpu_memory!r} is not larger than the {format_bytes(kept_back)} of reserve, which "
            "torch cannot use: use more memory or a smaller reserve"
        )
    return budget, kept_back


def check_zero(stage: int, world_size: int | None) -> None:
    """Check the stage of ZeRO and its number of ranks.

    Raises:
        ValueError: one of them is not allowed, or has no effect without the other.
    """
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ValueError(f"zero_stage={stage!r} is not one of 0, 1, 2, 3")
    if stage and world_size is None:
        raise ValueError(f"zero_stage={stage} needs world_size, the number of processes")
    if world_size is not None and (isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1):
        raise ValueError(f"world_size={world_size!r} is not allowed: world_size must be an integer of at least 1")
    if not stage and world_size not in (None, 1):
        raise ValueError(
            f"world_size={world_size} has no effect without zero_stage, because nothing is shared between the "
            "processes: set zero_stage=1, 2 or 3"
        )


def _budget(given: Any, device: str, name: str) -> int:
    if name == "reserve" and re.fullmatch(r"0+(\.0*)?\s*([KMGT]?i?B)?", str(given).strip()):
        return 0
    total = 0
    if device == "cpu" or torch.cuda.is_available():
        total = total_memory(torch.device(device))
    size = parse_budget(given, total, name)
    if size <= 0:
        raise ValueError(
            f"{name}={given!r} is a fraction of a GPU's memory, and there is no GPU here: give a size, as in 16GiB"
        )
    return size

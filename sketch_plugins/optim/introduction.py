"""The line that an optimizer logs after its first step: its name, its bytes of state, its learning rate."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from sketch_plugins.memory.report import ParameterState, StateReport, format_bytes, state_report
from sketch_plugins.optim.gradients import Gradients
from sketch_plugins.sharding.pieces import is_lazy
from sketch_plugins.sharding.tensors import is_fake

logger = logging.getLogger(__name__)

#: Stands for a logger if the present steps are only tried out. The line is then logged after a later one.
LATER = object()

ROW_SPARSE = (
    "row_sparse={!r}: rows of an embedding without a gradient are not updated, and their moments do "
    "not decay (lazy Adam). Where most rows are rare, learning is much slower: with cs_adam, 60 "
    "steps of a sentence-transformers model ended at a loss of 1.90, but at 0.12 with "
    "row_sparse=False, which updates every row"
)


def introduce(optimizer: Gradients) -> bool:
    """Log a line at level INFO once the optimizer has state. Returns whether nothing is left to log.

    Only the first process logs it, to the logger of this module or to that of the framework that runs the optimizer
    (`hand_over`). If the logger does not log INFO, nothing is computed.
    """
    if optimizer._numbers_are_answered:  # this is a step of `sketch_plugins.plan`, not of a training
        return True
    if not any(optimizer._has_state(p) for p in optimizer.state if isinstance(p, Tensor)):
        return False
    said_to = optimizer._introduces_to() if optimizer._introduces_to is not None else logger
    if said_to is LATER:
        return False
    if said_to is None or not said_to.isEnabledFor(logging.INFO) or not _is_first_process():
        return True
    if any(is_lazy(p) for group in optimizer.param_groups for p in group["params"]):
        return False
    parts = list(optimizer.held())
    if not _is_whole(optimizer, parts):
        return False
    report = state_report(optimizer)
    spread = any(part.piece is not None for _, _, part, _ in parts)
    said_to.info("%s", line(report, optimizer.param_groups, spread))
    for value in dict.fromkeys(_row_sparse(optimizer)):
        said_to.info("%s", f"{report.optimizer}: {ROW_SPARSE.format(value)}")
    return True


def hand_over(optimizer: Any, to: Any) -> None:
    """Log the line of an optimizer's first step elsewhere.

    Args:
        optimizer: the optimizer. If it is not ours, nothing happens.
        to: called when the line is ready. It returns a logger, or `LATER`, or None if the framework reports it in
            another way.
    """
    if hasattr(optimizer, "_introduces_to"):
        optimizer._introduces_to = to


def line(report: StateReport, groups: list[dict[str, Any]], spread: bool = False) -> str:
    """The line: name, bytes of state a parameter, what it saves compared with AdamW, learning rate."""
    presets = sorted({str(group["preset"]) for group in groups if group.get("preset", "default") != "default"})
    preset = f" (preset {', '.join(presets)})" if presets else ""
    saved = report.saved_bytes / report.adamw_bytes if report.adamw_bytes else 0.0
    beside = f"{_percent(abs(saved))} {'more than AdamW' if saved < 0 else 'saved against AdamW'}"
    if abs(saved) < 5e-4:
        beside = "0 % saved against AdamW"
    return (
        f"{report.optimizer}{preset}: {report.bytes_per_param:.3g} bytes of state a parameter "
        f"({format_bytes(report.state_bytes)} for {report.params:,} parameters{' on this rank' if spread else ''}), "
        f"{beside}{_why_so_little(report, groups, saved)}; learning rate {_rates(groups)}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %".replace(".0 ", " ")


def _why_so_little(report: StateReport, groups: list[dict[str, Any]], saved: float) -> str:
    """The share of parameters that are kept exactly, if that is most of the state; otherwise an empty string."""
    exact = [p for p in report.parameters if _is_exact(p, groups[p.group])]
    share = sum(p.params for p in exact) / report.params if report.params else 0.0
    if saved >= 0.5 or share < 0.5:
        return ""
    sizes = sorted({groups[p.group]["min_compress_size"] for p in exact})
    return (
        f" ({_percent(share)} of them are in vectors and in tensors of fewer than min_compress_size="
        f"{' or '.join(map(str, sizes))} elements, which are kept exactly)"
    )


def _is_exact(p: ParameterState, group: dict[str, Any]) -> bool:
    return len(p.shape) < 2 or prod(p.shape) < group["min_compress_size"]


def _rates(groups: list[dict[str, Any]]) -> str:
    def of(key: str) -> str | None:
        found = [group[key] for group in groups if key in group]
        if any(isinstance(rate, Tensor) and (rate.device.type != "cpu" or is_fake(rate)) for rate in found):
            return "a tensor"  # reading it would wait for the device
        rates = sorted({float(rate) for rate in found})
        if not rates:
            return None
        return f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"

    now, initial = of("lr"), of("initial_lr")
    return f"{now}" if initial in (None, now) else f"{now} ({initial} before its schedule)"


def _row_sparse(optimizer: Gradients) -> Iterator[Any]:
    """The values of ``row_sparse`` that skip rows (True, "auto") and apply to a parameter."""
    for _, group, part, _ in optimizer.held():
        if len(part.whole) > 1 and (value := optimizer._row_sparse(part, group)) is not False:
            yield value


def _is_first_process() -> bool:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"  # set by a launcher


def _is_whole(optimizer: Gradients, parts: list[tuple[int, dict[str, Any], Any, dict[str, Any] | None]]) -> bool:
    """Whether every part that will have state has been seen. ZeRO-3 steps an optimizer's parts one after the other."""
    pieces = [(part, state) for _, _, part, state in parts if part.key is not None]
    if not pieces or len({part.piece.index for part, _ in pieces}) == len(optimizer._parts.originals):
        return True
    return any(state is not None and float(state["step"]) > 1 for _, state in pieces)

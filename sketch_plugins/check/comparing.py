"""One case: kernels and eager definition take the same steps, and the row says whether they agree."""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sketch_plugins import registry
from sketch_plugins.check.cases import Case
from sketch_plugins.comm.block_topk import BlockTopK
from sketch_plugins.kernels.agreement import HALF, is_rounded, rate_for, state_difference, weight_difference
from sketch_plugins.optim.fused import EAGERLY, backend, interpreted
from sketch_plugins.optim.specialisations import Recorder, watching

AGREES, DIFFERS, FAILS, LEFT_OUT = "agrees", "DIFFERS", "FAILS", "left out"


@dataclass
class Row:
    """The result of a case.

    Attributes:
        case: its name.
        result: `AGREES`, `DIFFERS`, `FAILS` (a kernel does not compile, or does not run) or `LEFT_OUT`.
        kernels: the kernels that were launched, or were about to be.
        note: the difference, the error, or the reason why the case is left out.
        seconds: time that it took.
        lost: this process cannot use the device any more.
    """

    case: str
    result: str
    kernels: tuple[str, ...] = ()
    note: str = ""
    seconds: float = 0.0
    lost: bool = False

    @property
    def wrong(self) -> bool:
        """Whether a kernel is wrong."""
        return self.result in (DIFFERS, FAILS)

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        return asdict(self)


def compare(case: Case, device: torch.device) -> Row:
    """The row of a case. A failing kernel gives a row, too, and no exception."""
    start = time.perf_counter()
    recorder = Recorder()
    row = Row(case.name, AGREES)
    try:
        with watching(recorder), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = _message(case, device) if case.message is not None else _steps(case, device)
        row.result, row.note = found
        if row.result == AGREES and case.message is None:
            eager = [str(one.message) for one in said if EAGERLY in str(one.message)]
            if eager:
                row.note = "eagerly: " + eager[0].partition(EAGERLY)[2].strip(" ():")
            if not recorder.seen:
                row.result = LEFT_OUT
    except Exception as error:  # every error becomes a row
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        row.result, row.note = FAILS, f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
        row.lost = "CUDA error" in str(error) or "HIP error" in str(error)
    names = dict.fromkeys(name for _, kernels, _ in recorder.seen for name in kernels)
    row.kernels = ("block_topk.select",) if case.message is not None else tuple(names)
    row.seconds = round(time.perf_counter() - start, 3)
    return row


def _steps(case: Case, device: torch.device) -> tuple[str, str]:
    if case.options.get("capturable") and (device.type == "cpu" and not interpreted()):
        return LEFT_OUT, "capturable=True needs the Triton kernels"
    try:
        backend(device, True)
    except ValueError as error:
        return LEFT_OUT, str(error)
    if case.dtype == torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return LEFT_OUT, "this device does not support bfloat16"
    ours, eager = _Training(case, device, True), _Training(case, device, False)
    for step in range(case.steps):
        eager.step(step)
        ours.step(step)
        found = ours.unlike(eager)
        if found is not None:
            return DIFFERS, f"step {step + 1}: {found}"
    return AGREES, ""


class _Training:
    def __init__(self, case: Case, device: torch.device, fused: bool) -> None:
        self.case, self.device = case, device
        generator = torch.Generator().manual_seed(0)
        self.params = []
        for shape in case.shapes:
            values = torch.randn(shape, generator=generator) * (0.1 if case.dtype in HALF else 1.0)
            self.params.append(torch.nn.Parameter(self._place(values)))
        options = {"lr": rate_for(case.dtype), "min_compress_size": 0, **case.options}
        if not fused:
            options.pop("capturable", None)
        cls: Any = registry.get(case.optimizer).cls
        if "reference_rms" in cls.OPTIONS:  # the bounds are made for steps of this size
            options.setdefault("reference_rms", 1.0)
        self.optimizer = cls(self.params, fused=fused, **options)

    def _place(self, values: Tensor) -> Tensor:
        if self.case.gradients != "gaps":
            return values.to(self.device, self.case.dtype)
        wide = torch.empty(values.shape[0], values.shape[1] + 24, dtype=self.case.dtype, device=self.device)
        return wide[:, 3 : 3 + values.shape[1]].copy_(values)

    def step(self, step: int) -> None:
        generator = torch.Generator().manual_seed(100 + step)
        for p in self.params:
            values = self._place(torch.randn(p.shape, generator=generator))
            rows = torch.randperm(p.shape[0], generator=generator)[: (12, 3, 7)[step % 3]] if p.ndim else None
            if self.case.gradients == "packed" and rows is not None:
                # With repeated rows, because coalescing is part of the step.
                index = torch.cat([rows, rows[:2]]).to(self.device)
                values = torch.sparse_coo_tensor(index.unsqueeze(0), values[index], p.shape, check_invariants=False)
            elif self.case.gradients == "rows" and rows is not None:
                touched = torch.zeros_like(values)
                touched[rows.to(self.device)] = values[rows.to(self.device)]
                values = touched
            p.grad = values
        self.optimizer.step()

    def unlike(self, eager: _Training) -> str | None:
        """The difference from the eager run; None if there is none."""
        for p, q in zip(self.params, eager.params, strict=True):
            if p.numel() == 0:
                continue
            state = eager.optimizer.state[q]
            own = self.optimizer.state[p]
            found = weight_difference(p.detach(), own, q.detach(), state, is_rounded(state))
            found = found or state_difference(own, state, q.dtype)
            if found is not None:
                return f"shape {tuple(q.shape)}: {found}"
        return None


def _message(case: Case, device: torch.device) -> tuple[str, str]:
    assert case.message is not None
    block, dtype, with_momentum = case.message
    if device.type == "cpu" and not interpreted():
        return LEFT_OUT, "there is a kernel for cuda only"
    kinds = BlockTopK(block, fused=True), BlockTopK(block, fused=False)
    size = 2 * block + block // 3
    memories = [torch.zeros(size, dtype=dtype, device=device) for _ in kinds]
    momenta = [torch.zeros(size, dtype=dtype, device=device) if with_momentum else None for _ in kinds]
    for step in range(2):
        g = torch.randn(size, generator=torch.Generator().manual_seed(step)).to(device)
        gain, sent = torch.tensor(0.5, device=device), []
        for kind, memory, momentum in zip(kinds, memories, momenta, strict=True):
            payload = kind.take(memory, g, gain, 0.05, step=step, key=3, momentum=momentum, beta=0.5)
            sent.append(kind.decompress(payload, size, 0.05))
        found: list[tuple[str, list[Any]]] = [("message", sent), ("memory", memories), ("momentum", momenta)]
        for name, (a, b) in found:
            # Products with 0.5 are exact, and each number is rounded once, so all bits are equal.
            if a is not None and not torch.equal(a, b):
                return DIFFERS, f"step {step + 1}: {int((a != b).sum())} values of the {name} differ in their bits"
    return AGREES, ""


def describe(device: torch.device) -> dict[str, str]:
    """The circumstances of the rows: device, versions, and the kind of kernels."""
    from sketch_plugins.optim.verdicts import combination

    compiler = "triton" if device.type == "cuda" or interpreted() else "numba"
    found = dict(combination(device, compiler))
    if os.environ.get("TRITON_INTERPRET") and device.type == "cpu":
        found["kernels"] = "Triton's, interpreted"
    return found

"""Time of one step on BERT-base's tensors, beside ``torch.optim.AdamW(fused=True)`` in the same process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sketch_plugins import registry

#: (name in the registry, options, dtype) of each measurement.
TIMED: list[tuple[str, dict[str, Any], torch.dtype]] = [
    ("cs_adam", {}, torch.float32),
    ("cs_adam", {"preset": "lean"}, torch.float32),
    ("cs_adam", {"preset": "lean", "lagged_rms": True}, torch.float32),
    ("sm3", {}, torch.float32),
    ("cs_adam", {}, torch.bfloat16),
    ("cs_adam", {"preset": "lean"}, torch.bfloat16),
]


@dataclass
class Time:
    """Medians of one optimizer.

    Attributes:
        optimizer: name, with its options.
        dtype: dtype of the parameters.
        step_ms: milliseconds of a step.
        adamw_ms: milliseconds of a step of AdamW on the same parameters.
        first_s: seconds of the first step, which compiles.
        error: the reason why there are no figures.
    """

    optimizer: str
    dtype: str
    step_ms: float = 0.0
    adamw_ms: float = 0.0
    first_s: float = 0.0
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The times as plain values."""
        return asdict(self)


def bert_base(layers: int = 12, width: int = 768, vocabulary: int = 30522) -> Iterator[tuple[int, ...]]:
    """The shapes of BERT-base's parameters."""
    inner = 4 * width
    yield from ((vocabulary, width), (512, width), (2, width), (width,), (width,))
    for _ in range(layers):
        yield from ((width, width), (width,)) * 4
        yield from ((width,), (width,), (inner, width), (inner,), (width, inner), (width,), (width,), (width,))
    yield from ((width, width), (width,))


def measure(
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    shapes: Sequence[tuple[int, ...]],
    steps: int = 15,
) -> Time:
    """Medians of ``steps`` pairs of steps, alternately ours and AdamW's. An error is returned in the result."""
    words = "".join(f" {key}={value}" for key, value in options.items())
    out = Time(name + words, str(dtype).removeprefix("torch."))
    try:
        params = [torch.nn.Parameter(torch.full(shape, 0.02, device=device, dtype=dtype)) for shape in shapes]
        for p in params:
            p.grad = torch.full_like(p, 1e-3)
        cls: Any = registry.get(name).cls
        ours, adamw = cls(params, lr=1e-4, **options), torch.optim.AdamW(params, lr=1e-4, fused=True)
        start = time.perf_counter()
        ours.step()
        _wait(device)
        out.first_s = round(time.perf_counter() - start, 2)
        times = [[_timed(take.step, device) for take in (ours, adamw)] for _ in range(steps + 3)][3:]
        out.step_ms, out.adamw_ms = (round(statistics.median(t[i] for t in times), 3) for i in range(2))
    except (RuntimeError, ValueError) as error:
        out.error = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return out


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(take: Callable[[], object], device: torch.device) -> float:
    """Milliseconds from an idle device to an idle device: the time of a training loop, with the host's part."""
    _wait(device)
    start = time.perf_counter()
    take()
    _wait(device)
    return 1e3 * (time.perf_counter() - start)

"""Measuring the peak of memory, and memory budgets."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any, Protocol

import torch

_UNITS = {"": 1, "B": 1, **{f"{p}iB": 2 ** (10 * i) for i, p in enumerate("KMGT", 1)}}
_UNITS |= {f"{p}B": 10 ** (3 * i) for i, p in enumerate("KMGT", 1)}


class Meter(Protocol):
    """An object that measures the peak of memory."""

    def start(self) -> None:
        """Start a new peak."""

    def read(self) -> int:
        """Bytes at the peak since `start`."""


class CudaMeter:
    """The peak memory of tensors on a CUDA device, from the allocator's statistics."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        """Start a new peak."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> int:
        """Bytes at the peak since `start`."""
        return int(torch.cuda.max_memory_allocated(self.device))


class ResidentMeter:
    """The peak of the resident memory of this process, on Linux."""

    def start(self) -> None:
        """Start a new peak."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the present resident memory

    def read(self) -> int:
        """Bytes at the peak since `start`."""
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise ValueError("/proc/self/status has no entry VmHWM: pass another meter")


class AllocatorMeter:
    """The peak memory of tensors on the CPU: every allocation of torch's allocator, as its profiler records them.

    It is the counterpart of ``torch.cuda.max_memory_allocated``, exact to the byte if everything is allocated after
    `start`. Tensors that Python knows at `start` are counted with their size at that time until `read`, because the
    allocator does not say when they are freed. Allocations of numpy and other libraries are not counted. Recording
    costs a few microseconds for each operator and stores an event for each, so use it for a few steps only. It must not
    be nested in another profile.

    Attributes:
        live: bytes of the tensors that existed at `start`.
        left: bytes of `live`, and of allocations since `start` that have not been freed at `read`.
    """

    def __init__(self) -> None:
        self.live = self.left = 0
        self._profile: torch.profiler.profile | None = None

    def start(self) -> None:
        """Start a new peak, and start the recording."""
        self._stop()
        gc.collect()
        self.live = _bytes_of_tensors()
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def read(self) -> int:
        """Bytes at the peak since `start`; ends the recording.

        Raises:
            RuntimeError: there was no `start`.
        """
        if self._profile is None:
            raise RuntimeError("AllocatorMeter.read() was called before start()")
        peak = now = self.live
        for size in self._stop():
            now += size
            peak = max(peak, now)
        self.left = now
        return peak

    def _stop(self) -> list[int]:
        profile, self._profile = self._profile, None
        if profile is None:
            return []
        profile.stop()
        # The only public way to get single allocations in their order is a trace in a file.
        recorded: Any = profile.profiler
        events = recorded.kineto_results.events()
        cpu = torch.autograd.DeviceType.CPU
        found = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]" and e.device_type() == cpu]
        return [size for _, size in sorted(found, key=lambda event: event[0])]


def _bytes_of_tensors() -> int:
    sizes: dict[int, int] = {}
    plain = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    for found in gc.get_objects():
        if type(found) not in plain:  # isinstance would call objects that warn, or that no longer exist
            continue
        for tensor in (found, found.grad if found.is_leaf else None):
            if tensor is not None and tensor.device.type == "cpu" and tensor.layout is torch.strided:
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    sizes.pop(0, None)
    return sum(sizes.values())


def meter_for(device: torch.device) -> Meter:
    """The meter for a device: CUDA's allocator, or the resident memory of this process.

    Raises:
        ValueError: there is no meter for the device.
    """
    if device.type == "cuda":
        return CudaMeter(device)
    if device.type == "cpu" and Path("/proc/self/clear_refs").exists():
        return ResidentMeter()
    raise ValueError(f"the memory of {device} cannot be measured on this system: pass a meter")


def total_memory(device: torch.device) -> int:
    """Bytes of memory of a device, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def parse_budget(budget: int | float | str, total: int, name: str = "budget") -> int:
    """Bytes of ``16GiB``, ``"512MB"``, 2**30, or a fraction of ``total`` (0.5, ``"0.5"``).

    Raises:
        ValueError: it is not a size.
    """
    number: Any = budget
    if isinstance(budget, str):
        digits = budget.strip().rstrip("BKMGTi ")
        unit = budget.strip()[len(digits) :].strip()
        try:
            number = float(digits) * _UNITS[unit]
            number = float(budget) if not unit and 0 < number <= 1 else int(number)
        except (KeyError, ValueError, OverflowError):
            number = None
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not number > 0:
        number = None
    if isinstance(number, float) and number > 1:
        number = None
    if number is None:
        raise ValueError(
            f"{name}={budget!r} is not allowed: {name} must be a number of bytes (an integer, or text with a unit "
            "such as '2GiB') or a fraction of the memory in (0, 1]"
        )
    return int(number * total) if isinstance(number, float) else number

"""Peaks by torch's CPU allocator, against allocations whose sizes are known."""

import pytest
import torch

from sketch_plugins.memory.meter import AllocatorMeter, parse_budget
from sketch_plugins.memory.search import largest, split

MIB = 2**20


def test_the_peak_is_exact():
    kept = torch.zeros(MIB)  # before the start: counted as live
    meter = AllocatorMeter()
    meter.start()
    before = meter.live
    assert before >= 4 * MIB
    a = torch.ones(MIB)
    b = a + kept
    del a
    c = torch.zeros(MIB // 2)
    assert meter.read() == before + 8 * MIB
    assert meter.left == before + 6 * MIB and b.numel() + c.numel() == MIB + MIB // 2


def test_a_peak_in_the_backward_pass_is_seen():
    meter = AllocatorMeter()
    x = torch.ones(256, 256, requires_grad=True)
    meter.start()
    (x.exp().sum()).backward()
    peak = meter.read()
    # exp's result is kept; its gradient is the third, next to the scalars.
    assert 2 * x.nbytes <= peak - meter.live <= 3 * x.nbytes + 4096
    assert x.grad.nbytes <= meter.left - meter.live <= x.grad.nbytes + 4096


def test_starting_again_forgets():
    meter = AllocatorMeter()
    meter.start()
    torch.ones(4 * MIB)
    meter.start()
    torch.ones(MIB)
    assert meter.read() - meter.live == 4 * MIB
    with pytest.raises(RuntimeError, match="before start"):
        meter.read()


@pytest.mark.parametrize(
    "given, wanted",
    [("16GiB", 16 * 2**30), ("1.5 MB", 1500000), (7, 7), (0.5, 500), ("0.25", 250), ("1KiB", 1024), ("200", 200)],
)
def test_budgets(given, wanted):
    assert parse_budget(given, 1000) == wanted


@pytest.mark.parametrize("given", ["", "GiB", "16 GX", "-1GiB", 0, -3, 1.5, True, "nan", "inf", "1e999GiB", None])
def test_what_is_no_budget(given):
    with pytest.raises(ValueError, match="gpu_memory="):
        parse_budget(given, 1000, "gpu_memory")


def test_the_search():
    for most in range(0, 40):
        assert largest(lambda size, most=most: size <= most, 4, 32) == min(most, 32)
    assert split(32, 12) == (8, 4) and split(32, 64) == (32, 1) and split(7, 3) == (1, 7)

"""The 8-bit logarithmic store: its grid, its range, unbiased rounding, infinities and NaN, cuts and rows."""

import math

import pytest
import torch

from sketch_plugins import CSAdam, state_report
from sketch_plugins.sharding.blocks import Matrix, Rows
from sketch_plugins.stores import Ema, Gradient, Log8

CPU = torch.device("cpu")


def gradient(g, rows=None, chunk=64):
    return Gradient(Matrix(g), rows, g.dtype, chunk, tuple(g.shape))


def whole(store, state, shape, dtype=torch.float64):
    return store.read(state, Rows(shape[0], torch.arange(shape[0]), 0, shape[1]), dtype)


def assigned(store, v):
    state = store.allocate(tuple(v.shape), CPU, torch.float32)
    store.assign(state, v)
    return state


def test_every_number_of_the_grid_is_itself():
    """Sixteen in each octave, 255 below the largest of the block; none of them changes when it is written again."""
    k = torch.arange(2000 - 254, 2001, dtype=torch.int32)
    v = (k << 19).view(torch.float32).reshape(1, -1)
    assert torch.allclose(v[0, 16:] / v[0, :-16], torch.full((239,), 2.0), rtol=0, atol=0)
    store = Log8(block_size=255)
    state = assigned(store, v)
    assert torch.equal(whole(store, state, v.shape, torch.float32), v)
    for step in range(1, 6):  # and stochastic rounding leaves it there
        store.write(state, gradient(torch.zeros_like(v)), Ema(1.0, 1.0, step))
    assert torch.equal(whole(store, state, v.shape, torch.float32), v)


@pytest.mark.parametrize("block", [1, 7, 128])
@pytest.mark.parametrize("shape", [(1, 1), (5, 31), (33, 130), (3, 1025)])
def test_the_error_is_half_a_step_within_its_range(shape, block):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(shape, generator=generator).square() * torch.logspace(-6, 6, shape[1])
    store = Log8(block_size=block)
    read = whole(store, assigned(store, v), shape)
    for lo in range(0, shape[1], block):
        part = slice(lo, lo + block)
        exact, got = v[:, part].double(), read[:, part]
        near = exact >= exact.amax(1, keepdim=True) * 2.0**-15
        assert ((got - exact).abs()[near] <= exact[near] / 32 * (1 + 1e-6)).all()
        # Numbers that are too small are read as too large, which makes a smaller step. 0 stays 0.
        assert (got[~near] >= exact[~near] * (1 - 1 / 31)).all()
        assert ((got == 0) == (exact == 0)).all()


def test_an_average_moves_where_rounding_to_nearest_would_stand_still():
    """1,000 steps of 0.999 without a gradient, and with one: unbiased, although each is a fiftieth of a code's step."""
    store, shape = Log8(seed=3), (100, 128)
    for square, end in ((0.0, 0.999**1000), (2.0, 2.0 - 0.999**1000)):
        state = assigned(store, torch.ones(shape))
        g = torch.full(shape, math.sqrt(square))
        for step in range(1, 1001):
            store.write(state, gradient(g, chunk=1 << 16), Ema(0.999, 0.001, step))
        read = whole(store, state, shape)
        assert read.mean().item() == pytest.approx(end, rel=0.01)
        assert (read / end).log().std().item() < 0.25  # of single numbers
    stuck = assigned(store, torch.ones(shape))
    for _ in range(100):
        store.write(stuck, gradient(torch.zeros(shape)), Ema(0.999, 0.001, 0))
    assert (whole(store, stuck, shape) == 1).all()


def test_a_larger_number_in_the_block_moves_no_other():
    store = Log8(block_size=8)
    v = torch.full((1, 8), 0.3)
    state = assigned(store, v)
    before = whole(store, state, v.shape)
    g = torch.zeros(1, 8)
    g[0, 5] = 10.0
    store.write(state, gradient(g), Ema(1.0, 1.0, 1))
    after = whole(store, state, v.shape)
    assert torch.equal(after[:, :5], before[:, :5]) and after[0, 5] > 90


def test_what_is_not_finite_stays_so_within_its_block():
    store = Log8(block_size=4)
    v = torch.ones(1, 12)
    state = assigned(store, v)
    g = torch.zeros(1, 12)
    g[0, 1], g[0, 9] = float("nan"), float("inf")
    store.write(state, gradient(g), Ema(0.9, 0.1, 1))
    read = whole(store, state, v.shape)
    assert read[0, 1].isnan() and read[0, 9].isinf() and read[0, 4:8].isfinite().all()


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, -(1 << 22)])
def test_every_nan_is_kept_as_the_same_one(bits):
    """The further bits of a NaN depend on the processor, and state does not."""
    store, nan = Log8(block_size=4), torch.tensor([[bits]], dtype=torch.int32).view(torch.float32)
    assert nan.isnan()
    state = store.allocate((1, 1), torch.device("cpu"), torch.float32)
    store.write(state, Gradient(Matrix(nan), None, torch.float32, 8, (1, 1)), Ema(0.9, 0.1, 1))
    assert state["tops"].item() == 0x7FC00000 >> 19 and store.why_impossible("tops", state["tops"]) == "NaN"


@pytest.mark.parametrize("chunk", [40, 10**6])
def test_chunks_and_touched_rows_change_no_bit(chunk):
    shape, store = (13, 300), Log8(block_size=16, seed=7)
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    one, other = (store.allocate(shape, CPU, torch.float32) for _ in range(2))
    for step in (1, 2, 3):
        store.write(one, gradient(g, chunk=4800), Ema(0.9, 0.1, step))
        store.write(other, gradient(g, chunk=chunk), Ema(0.9, 0.1, step))
    assert all(torch.equal(one[key], other[key]) for key in one)
    rows = torch.tensor([2, 3, 11])
    before = {key: tensor.clone() for key, tensor in one.items()}
    store.write(one, gradient(g, rows, chunk), Ema(0.9, 0.1, 4))
    store.write(other, gradient(g, chunk=4800), Ema(0.9, 0.1, 4))
    rest = [i for i in range(13) if i not in rows]
    for key in one:
        assert torch.equal(one[key][rows], other[key][rows]) and torch.equal(one[key][rest], before[key][rest])


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, 3e4])
def test_filled_with_a_number(value):
    store = Log8()
    state = store.allocate((5, 200), CPU, torch.float32)
    store.fill(state, value)
    assert whole(store, state, (5, 200)).unique().numel() == 1
    assert float(whole(store, state, (5, 200))[0, 0]) == pytest.approx(value, rel=1 / 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_with_it_is_adam_within_its_error(dtype):
    steps, ends = 30, []
    for second in ("dense", "log8"):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(64, 300).to(dtype))
        start = p.detach().clone().double()
        optimizer = CSAdam([p], 0.01, first_moment="fp32", second_moment=second, min_compress_size=0, fused=False)
        for step in range(steps):
            p.grad = (torch.randn(64, 300, generator=torch.Generator().manual_seed(step)) + 0.5).to(dtype)
            optimizer.step()
        ends.append(p.detach().double() - start)
    # 30 roundings of 3 % and less, half of it in the root.
    assert (ends[1] - ends[0]).norm() < 0.05 * ends[0].norm()


def test_bytes():
    p = torch.nn.Parameter(torch.randn(1000, 768))
    assert state_report(CSAdam([p], first_moment="none", second_moment="log8")).bytes_per_param == 1 + 2 / 128
    assert Log8(block_size=64).nbytes((1000, 768)) / 768_000 == 1 + 2 / 64


def test_the_largest_numbers_stay_finite():
    most = torch.finfo(torch.float32).max
    store, v = Log8(block_size=4), torch.full((1, 4), torch.finfo(torch.float32).max)
    state = assigned(store, v)
    for step in range(1, 20):
        store.write(state, gradient(torch.zeros(1, 4)), Ema(1.0, 1.0, step))
        assert whole(store, state, v.shape).isfinite().all() and whole(store, state, v.shape).min() > most / 1.1


@pytest.mark.parametrize("tops", [-1, 4081, 4095, 5000])
def test_exponents_that_no_number_has_are_not_loaded(tops):
    p = torch.nn.Parameter(torch.randn(64, 70))
    optimizer = CSAdam([p], second_moment="log8", min_compress_size=0)
    p.grad = torch.randn_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["second_moment.tops"] = torch.full_like(saved["state"][0]["second_moment.tops"], tops)
    with pytest.raises(ValueError, match=f"impossible values in 'tops': {'NaN' if 4080 < tops < 4096 else tops}"):
        optimizer.load_state_dict(saved)
    # For any codes, no number that is read is negative.
    saved["state"][0]["second_moment.tops"] = torch.full_like(saved["state"][0]["second_moment.tops"], 3)
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert p.isfinite().all()

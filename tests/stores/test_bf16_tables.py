"""bfloat16 tables: stochastic rounding, once a write, with noise that is a function of (seed, step, cell)."""

import math

import pytest
import torch

from sketch_plugins.hashing import TABLE1, TABLE2, random32
from sketch_plugins.sharding.blocks import Matrix, Rows
from sketch_plugins.stores import CountMin, CountSketch, Ema, Gradient, RowCountMin

CPU = torch.device("cpu")
STORES = {
    "count_min": CountMin(width=5, bucket="sum"),
    "count_min_mean": CountMin(width=4),  # 24 rows in 4 buckets: shares of 1/6, the same for any order
    "count_min_affine": CountMin(width=5, bucket="sum", hash="affine", seed=3),
    "count_min_3": CountMin(width=5, depth=3, bucket="sum", seed=-1),
    "count_sketch": CountSketch(width=5),
    "count_sketch_2": CountSketch(width=7, depth=2, hash="affine", seed=2**40),
}
SPARSE = torch.tensor([0, 1, 5, 6, 10, 11, 15, 16, 20, 23])  # bucket 0 and 1 of 5 have most of them


def twin(store):
    """The same store in float32."""
    return type(store)(**{**vars(store), "bf16": False})


def bf16(store):
    return type(store)(**{**vars(store), "bf16": True})


def gradient(g, rows=None, chunk=64):
    return Gradient(Matrix(g), rows, g.dtype, chunk, tuple(g.shape))


def rounded(table, store, step):
    """The definition, cell by cell of the flat table: add 16 random bits, cut off 16."""
    index = torch.arange(table.numel())
    noise = random32(index, store.seed ^ (TABLE1 if store.order == 1 else TABLE2), step) & 0xFFFF
    bits = table.flatten().view(torch.int32).long() + noise
    return (bits & 0xFFFF0000).to(torch.uint32).view(torch.float32).to(torch.bfloat16).view(table.shape)


def numbers(shape, seed):
    """Small integers: sums of them and of their squares are exact in any order."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("chunk", [1, 6, 25, 10**6])
@pytest.mark.parametrize("name", STORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_write_is_the_float32_write_rounded_once(name, chunk, dtype):
    """A cell is rounded once, however many tiles or batches of rows its numbers come from."""
    shape, store = (24, 6), bf16(STORES[name])
    wide = twin(store)
    state = store.allocate(shape, CPU, dtype)
    assert state["table"].dtype == torch.bfloat16
    for step, rows in enumerate([None, SPARSE, None, SPARSE, torch.tensor([2])], 1):
        exact = {"table": state["table"].to(dtype)}
        # With decay 1/2 and gain 1 (and sums of integers), float32 is exact in any order.
        ema = Ema(0.5, 1.0 if store.bucket == "sum" else 6.0, step)
        g = numbers(shape, step).to(dtype)
        if rows is not None:
            ema = Ema(1.0, 1.0, step)
        wide.write(exact, gradient(g, rows, chunk), ema)
        expected = rounded(exact["table"].float(), store, step)
        store.write(state, gradient(g, rows, chunk), ema)
        assert torch.equal(state["table"], expected), step
        # and what is read are those cells
        at = Rows(24, torch.arange(24), 0, 6)
        assert torch.equal(store.read(state, at, dtype), wide.read({"table": expected.to(dtype)}, at, dtype))


@pytest.mark.parametrize("chunk", [1, 7, 60])
def test_profiles_do_not_depend_on_the_chunk(chunk):
    shape, store = (24, 4), RowCountMin(width=5, bf16=True)
    # Rows alike but for their place: means, scales and weights are powers of 2, sums exact.
    g = torch.tensor([[1.0, -1.0, 1.0, 1.0], [2.0, 2.0, -2.0, 2.0]]).repeat(12, 1)
    tables = []
    for size in (chunk, 10**6):
        state = store.allocate(shape, CPU, torch.float32)
        assert state["table"].dtype == torch.bfloat16 and state["row"].dtype == torch.float32
        for step, rows in enumerate([None, SPARSE, None], 1):
            store.write(state, gradient(g, rows, size), Ema(0.5, 0.5, step))
        tables.append(state["table"])
    assert torch.equal(*tables)


def expect_mean(cells, exact, variance):
    """Within 4 standard errors: ``variance`` of one cell, cells independent."""
    error = math.sqrt(variance / cells.numel())
    assert abs(cells.double().mean().item() - exact) < 4 * error, (cells.double().mean().item(), exact, error)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_rounding_is_unbiased(fraction, sign):
    """65536 cells that should hold one number: they hold its two neighbours, in the right proportion."""
    store, shape = CountSketch(compression=1.0, bf16=True), (256, 256)
    ulp = 2.0**-7  # of numbers in [1, 2)
    exact = sign * (1.5 + fraction * ulp)
    state = store.allocate(shape, CPU, torch.float32)
    h = store.hashes(256)[0]
    g = torch.full(shape, exact) * h.sign(torch.arange(256)).unsqueeze(-1)
    store.write(state, gradient(g, chunk=10**4), Ema(0.0, 1.0, 7))
    assert set(state["table"].unique().tolist()) == {sign * 1.5, sign * (1.5 + ulp)}
    expect_mean(state["table"], exact, fraction * (1 - fraction) * ulp**2)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_table_without_gradients_decays_as_beta_to_the_t(sparse):
    """0.999 of a cell is nearer to the cell than to the next bfloat16, so rounding to nearest would never move it."""
    store, shape, beta, steps = CountMin(compression=1.0, bf16=True), (256, 128), 0.999, 300
    state = store.allocate(shape, CPU, torch.float32)
    store.fill(state, 1.0)
    assert (state["table"] == 1).all()
    nearest = torch.ones(shape, dtype=torch.bfloat16)
    rows = torch.arange(256) if sparse else None
    for step in range(1, steps + 1):
        store.write(state, gradient(torch.zeros(shape), rows, 10**4), Ema(beta, 1 - beta, step))
        nearest.mul_(beta)
    assert (nearest == 1).all()
    # Each step rounds a number of [1/2, 1): a unit is 2**-8, and the variance of a rounding at most a quarter of its
    # square.
    expect_mean(state["table"], beta**steps, steps * (2.0**-8) ** 2 / 4)
    assert state["table"].unique().numel() > 10


def test_cleaning_and_filling_are_unbiased_and_cleaning_has_noise_of_its_own():
    """If both roundings of a step used the same noise, the second one would depend on the first."""
    shape = (256, 256)
    store = CountMin(compression=1.0, bf16=True, seed=5)
    ulp = 2.0**-9  # of numbers in [1/4, 1/2)
    state = store.allocate(shape, CPU, torch.float32)
    store.fill(state, 0.3)
    assert state["table"].unique().numel() == 2
    expect_mean(state["table"], 0.3, ulp**2 / 4)
    state["table"].fill_(1.0)
    store.clean(state, 0.3, 4)
    expect_mean(state["table"], 0.3, ulp**2 / 4)
    once = state["table"].clone()
    store.write(state, gradient(torch.zeros(shape), chunk=10**5), Ema(0.999, 0.001, 4))
    expect_mean(state["table"], 0.3 * 0.999, 2 * ulp**2 / 4)
    # Cells that were rounded up fall as often as those that were rounded down (4 standard errors of a proportion).
    fell = state["table"] < once
    proportions = [fell[once == value].float().mean().item() for value in once.unique()]
    smallest = min((once == value).sum().item() for value in once.unique())
    assert abs(proportions[0] - proportions[1]) < 4 * math.sqrt(2 * 0.25 / smallest)


def test_noise_differs_between_steps_seeds_and_moments():
    shape, g = (64, 64), torch.full((64, 64), 1.001)
    tables = []
    for store, step in ((CountMin, 1), (CountMin, 2), (CountSketch, 1)):
        for seed in (0, 1):
            sketch = store(compression=1.0, bf16=True, seed=seed)
            state = sketch.allocate(shape, CPU, torch.float32)
            sketch.write(state, gradient(g), Ema(0.0, 1.0, step))
            tables.append((state["table"].abs() == 1).flatten())
    for i, a in enumerate(tables):
        for b in tables[:i]:
            # 4096 independent coins a pair: a correlation of 0 has a standard error of 1/64
            assert abs(torch.corrcoef(torch.stack([a, b]).double())[0, 1]) < 5 / 64


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("rows", [None, SPARSE])
def test_a_gradient_that_is_not_finite_is_not_hidden(bad, rows):
    for store in STORES.values():
        sketch = bf16(store)
        state = sketch.allocate((24, 6), CPU, torch.float32)
        g = torch.ones(24, 6)
        g[5, 2] = bad
        sketch.write(state, gradient(g, rows), Ema(0.5, 0.5, 1))
        estimate = sketch.read(state, Rows(24, torch.tensor([5]), 0, 6), torch.float32)
        assert not state["table"][:, :, 2].isfinite().all() and estimate[0, [0, 1, 3, 4, 5]].isfinite().all()


def test_bytes():
    for store in STORES.values():
        assert bf16(store).nbytes((24, 6)) * 2 == twin(store).nbytes((24, 6))
    assert CountMin(compression=0.05, bf16=True).nbytes((1000, 768)) == 2 * 50 * 768
    assert RowCountMin(compression=0.05, bf16=True).nbytes((1000, 768)) == 2 * 50 * 768 + 4 * 1000

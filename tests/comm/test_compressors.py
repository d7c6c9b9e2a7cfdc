"""Compressors: contraction, telescoping, bytes, odd sizes, and the kernel against its definition."""

import math
import os

import pytest
import torch

from sketch_plugins.comm import COMPRESSORS, BlockTopK, CountSketchTopK, DensitySchedule, RandK, TopK
from sketch_plugins.comm.base import take_all, write_rounded
from sketch_plugins.kernels.rounding import round_stochastically
from sketch_plugins.memory.meter import AllocatorMeter

SIZES = (1, 2, 31, 33, 1024, 1025, 5000)
EVERY = {name: cls() for name, cls in COMPRESSORS.items()} | {"block_topk_small": BlockTopK(block=64)}


def vector(size, seed=0, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(params=EVERY)
def compressor(request):
    return EVERY[request.param]


@pytest.mark.parametrize("density", (0.01, 1.0))
@pytest.mark.parametrize("momentum", [False, True])
def test_of_an_empty_vector_nothing_is_sent(compressor, density, momentum):
    x = vector(0)
    payload = compressor.compress(x, density, step=3, key=5, reduce=lambda tensor: None)
    assert len(payload.values) == len(compressor.positions(payload.at, 0, density)) == compressor.count(0, density) == 0
    assert compressor.decompress(payload, 0, density).shape == (0,) and compressor.wire_bytes(0, density) == 0
    u = vector(0) if momentum else None
    assert len(compressor.take(vector(0), x, 0.5, density, momentum=u, beta=0.9).values) == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", (0.01, 0.3, 1.0))
def test_sends_distinct_entries_as_they_are(compressor, size, density):
    x = vector(size)
    payload = compressor.compress(x, density, step=3, key=5)
    positions = compressor.positions(payload.at, size, density)
    assert len(payload.values) == len(positions) == compressor.count(size, density) >= 1
    assert len(positions.unique()) == len(positions) and positions.min() >= 0 and positions.max() < size
    assert torch.equal(payload.values, x[positions])
    sent = compressor.decompress(payload, size, density)
    assert torch.equal(sent[positions], x[positions]) and sent.count_nonzero() <= len(positions)
    if density == 1.0:
        assert torch.equal(sent, x)


@pytest.mark.parametrize("size", (1 << 15, (1 << 15) + 1, 1 << 16, (1 << 16) + 1, 3 << 16, 300_001))
@pytest.mark.parametrize("density", (1e-5, 0.01, 1.0))
def test_positions_of_the_largest_survive_two_bytes(size, density):
    """All of them in one run, in the last one, and spread: the message determines their positions."""
    c, k = TopK(), TopK().count(size, density)
    spread = vector(size)
    for x in (spread, spread * (torch.arange(size) >= size - k), spread * (torch.arange(size) < max(k, 70_000))):
        payload = c.compress(x, density)
        assert payload.at.dtype == torch.int16 and payload.at.nbytes == c.wire_bytes(size, density) - 4 * k
        positions = c.positions(payload.at, size, density)
        assert torch.equal(positions, positions.unique()) and len(positions) == k
        assert torch.equal(payload.values, x[positions])
        assert torch.equal(payload.values.abs().sort().values, x.abs().topk(k).values.sort().values)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["topk", "block_topk", "block_topk_small"])
def test_contraction_of_the_largest(name, size):
    """||x - C(x)||^2 <= (1 - k/d) ||x||^2 for any x; for blocks with the share that each of them sends."""
    compressor = EVERY[name]
    for seed in range(3):
        x = vector(size, seed, torch.float64) ** 3
        left = x - compressor.decompress(compressor.compress(x, 0.1), size, 0.1)
        if name == "topk":
            bound = 1 - compressor.count(size, 0.1) / size
            assert left.square().sum() <= bound * x.square().sum() * (1 + 1e-12)
            continue
        for run, rest in zip(x.split(compressor.block), left.split(compressor.block), strict=True):
            bound = 1 - max(1, round(0.1 * len(run))) / len(run)
            assert rest.square().sum() <= bound * run.square().sum() * (1 + 1e-12)


def test_contraction_of_random_entries():
    """In expectation exactly 1 - k/d: the mean of 4000 draws lies within 5 standard errors."""
    x, draws = vector(50, 0, torch.float64), 4000
    for density in (0.04, 0.5):
        left = torch.stack([
            (x - RandK().decompress(RandK().compress(x, density, step=i), 50, density)).square().sum()
            for i in range(draws)
        ])  # fmt: skip
        expected = (1 - round(50 * density) / 50) * x.square().sum()
        assert abs(left.mean() - expected) < 5 * left.std() / math.sqrt(draws)


def test_random_entries_are_uniform_and_shared():
    counts, draws = torch.zeros(40), 5000
    for i in range(draws):
        counts[RandK(seed=1).compress(counts, 0.1, step=i).at] += 1
    # chi-square with 39 degrees of freedom (a little less, as draws are without replacement): 99.99 % quantile 80
    assert ((counts - draws / 10) ** 2 / (draws / 10)).sum() < 80
    x = vector(1000)
    a, b = RandK(seed=1).compress(x, 0.05, step=7, key=2), RandK(seed=1).compress(x + 1, 0.05, step=7, key=2)
    assert torch.equal(a.at, b.at)
    for other in (RandK(seed=2).compress(x, 0.05, step=7, key=2), RandK(seed=1).compress(x, 0.05, step=8, key=2),
                  RandK(seed=1).compress(x, 0.05, step=7, key=3)):  # fmt: skip
        assert not torch.equal(a.at, other.at)


def test_sketches_are_linear_and_unbiased():
    c, x, y = CountSketchTopK(depth=3), vector(1000, 1, torch.float64), vector(1000, 2, torch.float64)
    assert torch.allclose(c.sketch(x, 64) + 2 * c.sketch(y, 64), c.sketch(x + 2 * y, 64), rtol=0, atol=1e-12)
    assert torch.equal(c.estimate(c.sketch(x, 1000), 1000), x)  # as wide as the vector, so no entries share a cell
    one = CountSketchTopK(depth=1)
    mean = torch.stack([one.estimate(one.sketch(x, 64, key), 1000, key) for key in range(3000)]).mean(0)
    # the standard deviation of one estimate is about ||x|| / sqrt(64) = 4, of the mean 0.07
    assert (mean - x).abs().max() < 5 * x.norm() / 8 / math.sqrt(3000)


def test_rotations_at_once_are_those_one_by_one(monkeypatch):
    c, x = CountSketchTopK(depth=3), vector(1000, 1, torch.float64)
    for cells in (7, 64, 1000):
        monkeypatch.setattr("sketch_plugins.comm.count_sketch.MANY", 0)
        tables = c.sketch(x, cells, 5)
        estimate = c.estimate(tables, 1000, 5)
        monkeypatch.undo()
        for batch in (1 << 20, 130):
            monkeypatch.setattr("sketch_plugins.comm.count_sketch.BATCH", batch)
            assert torch.allclose(c.sketch(x, cells, 5), tables, rtol=0, atol=1e-12)
            assert torch.equal(c.estimate(tables, 1000, 5), estimate)


def test_sketches_find_the_heavy_hitters_of_the_sum():
    """Each rank's entries are small, but some of their sums are large."""
    noise = [vector(4000, i) for i in range(4)]
    heavy = torch.arange(0, 4000, 410)
    ranks = [n - sum(noise) / 4 + 0.05 * vector(4000, 9 + i) for i, n in enumerate(noise)]
    for x in ranks:
        x[heavy] += 2.5
    c = CountSketchTopK(depth=5, width=4)
    tables = sum(c.sketch(x, c.cells(4000, 0.01)) for x in ranks)
    found = c.compress(ranks[0], 0.01, reduce=lambda t: t.copy_(tables))
    assert set(heavy.tolist()) <= set(found.at.tolist())
    # Among the largest entries of a rank alone there are few of these.
    assert len(set(TopK().compress(ranks[0], 0.01).at.tolist()) & set(heavy.tolist())) < 8


def test_wire_bytes(compressor):
    """Bytes of values and indices in the form that is sent; a table is sent before."""
    for size, density in ((100_000, 0.01), (1000, 0.25), (65, 0.001)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            tables = []
            # The hook's memory is float32 for half precision, and so are tables; values have the gradient's dtype.
            x = vector(size, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            payload = compressor.compress(x, density, reduce=tables.append)
            sent = payload.values.to(dtype).nbytes + (0 if compressor.shared else payload.at.nbytes)
            sent += sum(t.nbytes for t in tables)
            assert compressor.wire_bytes(size, density, dtype.itemsize) == sent
    expected = {"topk": 0.015, "block_topk": 0.015, "randk": 0.01, "count_sketch": 0.07}[compressor.name]
    assert compressor.wire_bytes(1 << 20, 0.01) / (4 << 20) == pytest.approx(expected, rel=0.35)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("momentum", (False, True))
def test_take_loses_nothing(compressor, dtype, momentum):
    """Sent and kept entries together are the input: m + sent = sum of the gradients (or of their momenta)."""
    size, density = 3000, 0.02
    m = torch.zeros(size, dtype=dtype)
    u = torch.zeros_like(m) if momentum else None
    total, sent, velocity = (torch.zeros(size, dtype=torch.float64) for _ in range(3))
    for step in range(30):
        g = vector(size, step, torch.float64 if dtype == torch.float64 else torch.float32)
        payload = compressor.take(m, g, 0.5, density, step=step, momentum=u, beta=0.9 * momentum, masking=False)
        positions = compressor.positions(payload.at, size, density)
        sent[positions] += payload.values.double()
        velocity = 0.9 * momentum * velocity + 0.5 * g.double()
        total += velocity
    # Rounding of 30 additions. Stochastic rounding to bfloat16 has 8 bits, and its errors add up as a random walk.
    atol = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 1.2 if momentum else 0.25}[dtype]
    assert (m.double() + sent - total).abs().max() < atol
    assert abs(float((m.double() + sent - total).mean())) < atol / 30


def test_factor_masking(compressor):
    m, u = torch.zeros(500), torch.zeros(500)
    payload = compressor.take(m, vector(500), 1.0, 0.1, momentum=u, beta=0.9)
    positions = compressor.positions(payload.at, 500, 0.1)
    assert not m[positions].any() and not u[positions].any()
    assert torch.equal(u, m)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("momentum", (False, True))
@pytest.mark.parametrize("gain", (0.0, torch.tensor(0.0)))
def test_a_gain_of_nothing_adds_nothing(compressor, dtype, momentum, gain):
    """With any gradient: the present memory is sent, and nothing grows or decays."""
    m = vector(500).to(dtype)
    u = vector(500, 1).to(dtype) if momentum else None
    before, velocity = m.clone(), None if u is None else u.clone()
    bad = torch.full((500,), math.inf)
    bad[3] = math.nan
    payload = compressor.take(m, bad, gain, 0.1, momentum=u, beta=0.9, masking=False)
    positions = compressor.positions(payload.at, 500, 0.1)
    assert torch.equal(payload.values.to(dtype), before[positions])
    before[positions] = 0.0
    assert torch.equal(m, before) and (u is None or torch.equal(u, velocity))


@pytest.mark.parametrize("gain", (0.5, torch.tensor(0.5)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_take_all(gain, dtype):
    """Sending everything at once clears nothing; a beta in float64 differs from one in float32."""
    g = vector(500, dtype=torch.float64)
    m, u = vector(500, 1).to(dtype), vector(500, 2).to(dtype)
    velocity = 0.9 * u.double() + 0.5 * g
    total = m.double() + velocity
    sent = take_all(m, g.to(torch.float64 if dtype == torch.float64 else torch.float32), gain, momentum=u, beta=0.9)
    rtol = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    exact = 1e-14 if dtype == torch.float64 else 2e-6  # what is sent of a bfloat16 memory has not been rounded yet
    assert (sent.double() - total).abs().max() < exact
    assert torch.allclose(m.double(), total, rtol=rtol, atol=rtol)
    assert torch.allclose(u.double(), velocity, rtol=rtol, atol=rtol)


@pytest.mark.gpu
@pytest.mark.parametrize("momentum", (False, True))
def test_nobody_waits_for_the_device(compressor, momentum):
    """Tensors from the CPU (random entries, rotations) are copied through pinned memory."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    m, g, gain = torch.zeros(50_000, device="cuda"), vector(50_000).cuda(), torch.tensor(0.5, device="cuda")
    u = torch.zeros_like(m) if momentum else None
    compressor.take(m, g, gain, 0.01, momentum=u, beta=0.9)  # what is compiled or allocated the first time
    torch.cuda.set_sync_debug_mode("error")
    try:
        payload = compressor.take(m, g, gain, 0.01, step=1, momentum=u, beta=0.9)
        compressor.positions(payload.at, 50_000, 0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert payload.values.isfinite().all()


def test_density_schedule():
    schedule = DensitySchedule(0.001, warmup=5)
    assert [schedule.at(i) for i in (0, 5, 1000)] == [0.25, 0.001, 0.001]
    ratios = [schedule.at(i + 1) / schedule.at(i) for i in range(5)]
    assert max(ratios) == pytest.approx(min(ratios))
    assert DensitySchedule(0.01).at(0) == 0.01


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BlockTopK(block=1), "block=1"),
        (lambda: BlockTopK(block=1 << 16), "block=65536"),
        (lambda: BlockTopK(fused="yes"), "fused='yes'"),
        (lambda: CountSketchTopK(depth=0), "depth=0"),
        (lambda: CountSketchTopK(width=0.5), "width=0.5"),
        (lambda: CountSketchTopK(seed=None), "seed=None"),
        (lambda: RandK(seed=0.5), r"seed=0\.5"),
        (lambda: DensitySchedule(0.0), r"density=0\.0"),
        (lambda: DensitySchedule(0.1, initial=2), "initial_density=2"),
        (lambda: DensitySchedule(0.1, warmup=-1), "warmup=-1"),
        (lambda: BlockTopK(fused=True).take(torch.zeros(4), torch.ones(4), 1.0, 0.5), "fused=True"),
    ],
)
def test_errors(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.fixture
def kernel(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("the kernels of this process are compiled, not interpreted")
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    return lambda block: BlockTopK(block, fused=True)


@pytest.mark.parametrize("size", (1, 15, 64, 257, 640, 1000))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("momentum", (False, True))
def test_kernel_is_the_definition(kernel, size, dtype, momentum):
    """The same bits of memory, momentum and message; the last of the blocks of 256 has all, some or few entries."""
    eager = BlockTopK(256, fused=False)
    for density in (0.004, 0.1, 1.0):
        states = [(torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype) if momentum else None) for _ in "ab"]
        for step in range(3):
            g = vector(size, step)
            sent = []
            for c, (m, u) in zip((kernel(256), eager), states, strict=True):
                payload = c.take(m, g, torch.tensor(0.5), density, step=step, key=3, momentum=u, beta=0.5)
                sent.append(c.decompress(payload, size, density))
            assert torch.equal(*sent)
        assert torch.equal(states[0][0], states[1][0])
        assert not momentum or torch.equal(states[0][1], states[1][1])


@pytest.mark.parametrize("momentum", (False, True))
def test_kernel_with_a_gradient_that_is_not_finite(kernel, momentum):
    """With a gain of 0 the gradient is not read, as in the definition; with an inexact beta before and after."""
    eager = BlockTopK(256, fused=False)
    states = [(torch.zeros(600), torch.zeros(600) if momentum else None) for _ in "ab"]
    for step, gain in enumerate((0.5, 0.0, 2.0)):
        g = vector(600, step) if gain else torch.full((600,), math.nan)
        sent = []
        for c, (m, u) in zip((kernel(256), eager), states, strict=True):
            payload = c.take(m, g, torch.tensor(gain), 0.02, step=step, momentum=u, beta=0.9, masking=False)
            sent.append(c.decompress(payload, 600, 0.02))
        assert torch.equal(*sent) and sent[0].isfinite().all()
        assert torch.equal(states[0][0], states[1][0])
        assert not momentum or torch.allclose(states[0][1], states[1][1], rtol=1e-6)


def test_kernel_with_equal_magnitudes(kernel):
    """Exactly k of each block with equal magnitudes, with zeros only, and with infinities and NaN first."""
    x = torch.ones(600)
    x[::2] = -1
    for g in (x, torch.zeros(600)):
        m = torch.zeros(600)
        payload = kernel(256).take(m, g, 1.0, 0.1)
        positions = eager_positions = BlockTopK(256).positions(payload.at, 600, 0.1)
        assert len(positions.unique()) == len(payload.values) == 26 + 26 + 9
        assert torch.equal(payload.values, g[eager_positions])
    x[[5, 300]] = torch.tensor([math.nan, -math.inf])
    payload = kernel(256).take(torch.zeros(600), x, 1.0, 1 / 256)
    assert {5, 300} <= set(BlockTopK(256).positions(payload.at, 600, 1 / 256).tolist())


def test_rounding_a_memory_takes_its_noise_in_blocks():
    """The bits are those of one call for all entries, without 40 bytes of noise for each."""
    x = vector(200_000)
    whole = round_stochastically(x.clone(), torch.arange(len(x)), 5, 7).bfloat16()
    memory, meter = torch.empty(len(x), dtype=torch.bfloat16), AllocatorMeter()
    meter.start()
    write_rounded(memory, x, 5, 7)
    assert meter.read() - meter.live < 8 * len(x)
    assert torch.equal(memory, whole)

"""Stores alone: bytes, exactness with a bucket for each row, and sketches against a naive reference per row."""

import itertools
import statistics

import pytest
import torch

from sketch_plugins.hashing import row_hashes
from sketch_plugins.sharding.blocks import Matrix, Rows, Tile, tiles
from sketch_plugins.stores import CountMin, CountSketch, Dense, Ema, Gradient, Int8, Log8, RowCountMin

SHAPES = [(1, 1), (1, 31), (31, 1), (33, 31), (1025, 3), (5, 1025), (64, 128)]
STORES = {
    "fp32": Dense(1),
    "bf16": Dense(1, bf16=True),
    "dense2": Dense(2),
    "int8": Int8(),
    "int8_16": Int8(block_size=16),
    "count_sketch": CountSketch(depth=3, compression=0.2),
    "count_min": CountMin(compression=0.2),
    "count_min_affine": CountMin(compression=0.2, hash="affine"),
    "count_min_3": CountMin(depth=3, compression=0.2, bucket="sum"),
    "count_min_scaled": CountMin(compression=0.2, scaled=True),
    "row_count_min": RowCountMin(compression=0.2),
    "log8": Log8(block_size=16),
}


def gradient(g, rows=None, chunk=64):
    return Gradient(Matrix(g), rows, g.dtype, chunk, tuple(g.shape))


def whole(store, state, shape):
    return store.read(state, Rows(shape[0], torch.arange(shape[0]), 0, shape[1]), torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", STORES)
def test_nbytes_is_what_is_allocated(name, shape):
    store = STORES[name]
    state = store.allocate(shape, torch.device("cpu"), torch.float32)
    assert store.nbytes(shape) == sum(t.numel() * t.element_size() for t in state.values())
    assert all(not t.any() for t in state.values())


def test_bytes_a_parameter_as_documented():
    shape, n = (1000, 768), 1000 * 768
    assert Dense(1).nbytes(shape) / n == 4
    assert Dense(1, bf16=True).nbytes(shape) / n == 2
    for block in (64, 128, 256):
        assert Int8(block_size=block).nbytes(shape) / n == 1 + 4 / block
    assert CountMin(compression=0.05).nbytes(shape) / n == pytest.approx(0.2)
    assert CountMin(compression=0.2 / 3, depth=3).nbytes(shape) / n == pytest.approx(0.8, rel=0.01)
    assert RowCountMin(compression=0.05).nbytes(shape) / n == pytest.approx(0.2 + 4 / 768)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1, 50, 10**6])
@pytest.mark.parametrize("period", [0, 1, 3, 7])
def test_tiles_cover_every_element_once(shape, chunk, period):
    period = min(period, shape[0])
    seen = torch.zeros(shape, dtype=torch.int64)
    for at in tiles(*shape, chunk, period, align=4):
        at.get(seen).add_(1)
        assert at.lo % 4 == 0 and ((at.hi - at.lo) % 4 == 0 or at.hi - at.lo < 4)
        if period and period < shape[0]:  # a slice of the table fits the tile
            first = at.start % period
            assert first + at.rows <= period and (at.cycles == 1 or (first == 0 and at.rows == period))
    assert (seen == 1).all()


# -- int8 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_error_is_at_most_half_a_step_of_its_block(shape):
    store, block = Int8(block_size=16), 16
    torch.manual_seed(0)
    g = torch.randn(shape, dtype=torch.float64) * torch.logspace(-3, 3, shape[1], dtype=torch.float64)
    state = store.allocate(shape, g.device, g.dtype)
    store.write(state, gradient(g), Ema(0.0, 1.0))
    error = (whole(store, state, shape) - g).abs()
    for lo in range(0, shape[1], block):
        part = slice(lo, lo + block)
        # scales are float32: a relative 2**-24 of the value on top of half a step
        bound = g[:, part].abs().amax(1, keepdim=True) / 254 + 1e-7 * g[:, part].abs().amax(1, keepdim=True)
        assert (error[:, part] <= bound).all()
        # the block's maximum itself is exact up to float32
        top = g[:, part].abs().argmax(1, keepdim=True)
        assert (error[:, part].gather(1, top) <= 1e-7 * g[:, part].abs().amax(1, keepdim=True)).all()


def test_int8_zero_denormal_and_non_finite_blocks():
    store = Int8(block_size=4)
    g = torch.tensor([[0.0, 0, 0, 0, 1e-42, 0, 0, 0, 1, 2, 3, 4], [1, 1, 1, 1, 1, float("nan"), 1, 1, 1, 1, 1, 1]])
    state = store.allocate((2, 12), g.device, g.dtype)
    store.write(state, gradient(g), Ema(0.0, 1.0))
    out = whole(store, state, (2, 12))
    assert (out[0, :8] == 0).all() and torch.allclose(out[0, 8:].float(), g[0, 8:], atol=0.02)
    # a NaN is not swallowed, and stays within its block
    assert out[1, 4:8].isnan().all() and out[1, :4].isfinite().all() and out[1, 8:].isfinite().all()


def test_int8_stochastic_rounding_is_unbiased_where_nearest_is_stuck():
    # One column of 1 sets the scale, so a step is 1/127; the others decay by less than half a step each time.
    g = torch.cat([torch.ones(200, 1), torch.full((200, 15), 0.5)], 1)
    results = {}
    for stochastic in (False, True):
        store = Int8(block_size=16, stochastic=stochastic, seed=3)
        state = store.allocate((200, 16), g.device, g.dtype)
        store.write(state, gradient(g), Ema(0.0, 1.0, 1))
        keep = torch.cat([torch.ones(200, 1), torch.zeros(200, 15)], 1)
        for step in range(2, 102):
            store.write(state, gradient(keep), Ema(0.995, 0.005, step))
        results[stochastic] = whole(store, state, (200, 16))[:, 1:].mean().item()
    exact = 0.5 * 0.995**100
    assert abs(results[True] - exact) < 0.01 < abs(results[False] - exact)


@pytest.mark.parametrize("stochastic", [False, True])
def test_int8_does_not_depend_on_the_chunk(stochastic):
    g = torch.randn(50, 37)
    store = Int8(block_size=8, stochastic=stochastic)
    states = []
    for chunk in (8, 100, 10**6):
        state = store.allocate((50, 37), g.device, g.dtype)
        for step in (1, 2, 3):
            store.write(state, gradient(g * step, chunk=chunk), Ema(0.9, 0.1, step))
        states.append(state)
    for state in states[1:]:
        assert all(torch.equal(state[k], states[0][k]) for k in state)


# -- exact with a bucket a row ---------------------------------------------------------------------------------------

INJECTIVE = {
    "count_sketch": CountSketch(compression=1.0),
    "count_sketch_3": CountSketch(compression=1.0, depth=3, hash="affine"),
    "count_sketch_4": CountSketch(compression=1.0, depth=4),
    "count_min": CountMin(compression=1.0),
    "count_min_sum_3": CountMin(compression=1.0, depth=3, bucket="sum"),
    "count_min_width": CountMin(width=10**9, hash="affine"),
    "row_count_min": RowCountMin(compression=1.0),
    "row_count_min_3": RowCountMin(compression=1.0, depth=3, hash="affine"),
}


@pytest.mark.parametrize("ema", [Ema(0.9, 0.1), Ema(1.0, 1.0), Ema(0.8, 1.0)], ids=["average", "sum", "momentum"])
@pytest.mark.parametrize("name", INJECTIVE)
@pytest.mark.parametrize("shape", [(33, 31), (1, 5), (7, 1)])
def test_a_bucket_for_every_row_is_the_dense_store(name, ema, shape):
    store = INJECTIVE[name]
    torch.manual_seed(1)
    state = store.allocate(shape, torch.device("cpu"), torch.float64)
    exact = torch.zeros(shape, dtype=torch.float64)
    for step in range(8):
        g = torch.randn(shape, dtype=torch.float64)
        rows = torch.randperm(shape[0])[: max(1, shape[0] // 3)].sort().values if step % 2 else None
        if step == 6:
            g.zero_()  # zero gradients only decay
        x = g if store.order == 1 else g * g
        index = torch.arange(shape[0]) if rows is None else rows
        exact[index] = ema.decay * exact[index] + ema.gain * x[index]
        store.write(state, gradient(g, rows), ema)
        torch.testing.assert_close(whole(store, state, shape), exact, rtol=1e-12, atol=1e-14)


# -- collisions, against an oracle that knows nothing of tiles, tables or tensors ------------------------------------


class Oracle:
    """Buckets as dictionaries of lists of floats, one row at a time."""

    def __init__(self, store, shape):
        self.store, self.shape = store, shape
        self.hashes = row_hashes(shape[0], store.buckets(shape[0]), store.depth, store.hash, store.seed)
        self.cells = [{} for _ in self.hashes]
        # Each row is read by itself, and once.
        rows = [torch.tensor(i) for i in range(shape[0])]
        self.bucket = {h: [int(h.bucket(i)) for i in rows] for h in self.hashes}
        self.sign = {h: [int(h.sign(i)) if store.order == 1 else 1 for i in rows] for h in self.hashes}

    def members(self, h, rows):
        out = {}
        for i in rows:
            out.setdefault(self.bucket[h][i], []).append(i)
        return out

    def write(self, g, rows, ema):
        touched = range(self.shape[0]) if rows is None else rows.tolist()
        for h, cells in zip(self.hashes, self.cells, strict=True):
            for bucket, members in self.members(h, touched).items():
                for d in range(self.shape[1]):
                    xs = [self.sign[h][i] * float(g[i, d]) ** self.store.order for i in members]
                    old = cells.get((bucket, d), 0.0)
                    if rows is None:
                        total = sum(xs) if self.store.bucket == "sum" else sum(xs) / len(xs)
                        new = ema.decay * old + ema.gain * total
                    else:
                        mean, new = sum(xs) / len(xs), old
                        for _ in xs:
                            new = ema.decay * new + ema.gain * mean
                    cells[bucket, d] = new

    def read(self):
        out = torch.zeros(self.shape, dtype=torch.float64)
        for i, d in itertools.product(range(self.shape[0]), range(self.shape[1])):
            values = []
            for h, cells in zip(self.hashes, self.cells, strict=True):
                values.append(self.sign[h][i] * cells.get((self.bucket[h][i], d), 0.0))
            out[i, d] = statistics.median(values) if self.store.order == 1 else min(values)
        return out


@pytest.mark.parametrize("ema", [Ema(0.9, 0.1), Ema(1.0, 1.0), Ema(0.7, 1.0)], ids=["average", "sum", "momentum"])
@pytest.mark.parametrize("hash", ["strided", "affine"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("kind", ["count_sketch", "mean", "sum"])
def test_collisions_against_the_oracle(kind, depth, hash, ema):
    shape = (23, 3)  # 23 rows in 5 buckets: the last group is not full
    common = {"width": 5, "depth": depth, "hash": hash, "seed": 11}
    store = CountSketch(**common) if kind == "count_sketch" else CountMin(**common, bucket=kind)
    torch.manual_seed(2)
    oracle, steps = Oracle(store, shape), []
    for step in range(4):
        g = torch.randn(shape, dtype=torch.float64)
        rows = torch.randperm(23)[:13].sort().values if step in (1, 2) else None
        oracle.write(g, rows, ema)
        steps.append((g, rows))
    right = oracle.read()
    for chunk in (1, 12, 1000):
        state = store.allocate(shape, torch.device("cpu"), torch.float64)
        for g, rows in steps:
            store.write(state, gradient(g, rows, chunk), ema)
        torch.testing.assert_close(whole(store, state, shape), right, rtol=1e-12, atol=1e-13)
        # tiles and rows give the same estimates
        for at in tiles(*shape, chunk, store.period(23)):
            expected = at.get(right)
            torch.testing.assert_close(
                store.read(state, at, torch.float64).expand(at.shape), expected, rtol=1e-12, atol=1e-13
            )


@pytest.mark.parametrize("depth", [1, 3])
def test_row_count_min_against_its_formula(depth):
    shape, ema = (23, 4), Ema(0.9, 0.1)
    store = RowCountMin(width=5, depth=depth, hash="affine", seed=5)
    hashes = row_hashes(23, 5, depth, "affine", 5)
    row, profile = torch.zeros(23, dtype=torch.float64), torch.zeros(depth, 5, 4, dtype=torch.float64)
    state = store.allocate(shape, torch.device("cpu"), torch.float64)
    torch.manual_seed(3)
    for step in range(6):
        g = torch.randn(shape, dtype=torch.float64) * torch.logspace(-2, 2, 23, dtype=torch.float64).unsqueeze(1)
        g[4] = 0  # a row that never had a gradient
        rows = torch.tensor([1, 4, 6, 9, 14, 19]) if step % 2 else None
        touched = list(range(23)) if rows is None else rows.tolist()
        old = row.clone()
        for i in touched:
            row[i] = ema.decay * row[i] + ema.gain * (g[i] ** 2).mean()
        for j, h in enumerate(hashes):
            before = profile[j].clone()
            for b in range(5):
                members = [i for i in touched if int(h.bucket(torch.tensor(i))) == b]
                if members:
                    parts = [
                        (ema.decay * old[i] * before[b] + ema.gain * g[i] ** 2) / row[i] if row[i] else before[b]
                        for i in members
                    ]
                    profile[j, b] = torch.stack(parts).mean(0)
        store.write(state, gradient(g, rows, chunk=10), ema)
        index = torch.arange(23)
        expected = row.unsqueeze(1) * torch.stack([profile[j][h.bucket(index)] for j, h in enumerate(hashes)]).amin(0)
        torch.testing.assert_close(whole(store, state, shape), expected, rtol=1e-11, atol=1e-14)


def test_row_count_min_keeps_the_scale_of_a_rare_row_beside_a_frequent_one():
    g = torch.ones(2, 8, dtype=torch.float64)
    g[0] *= 100
    errors = {}
    for store in (CountMin(width=1), RowCountMin(width=1)):
        state = store.allocate((2, 8), g.device, g.dtype)
        for _ in range(5):
            store.write(state, gradient(g), Ema(0.9, 0.1))
        exact = (1 - 0.9**5) * g[1] ** 2
        errors[type(store)] = ((whole(store, state, (2, 8))[1] - exact).abs() / exact).max().item()
    assert errors[RowCountMin] < 1e-12 and errors[CountMin] > 1000


def test_the_first_gradient_of_a_row_does_not_turn_a_shared_profile_negative():
    """The row's share of its scale is then 1, and was 1 + 1e-7 by rounding: minus a little of what others left."""
    torch.manual_seed(9)
    store = RowCountMin(width=1)
    for _ in range(30):
        state = store.allocate((2, 8), torch.device("cpu"), torch.float32)
        store.write(state, gradient(torch.randn(2, 8), torch.tensor([0])), Ema(0.999, 0.001))
        g = torch.randn(2, 8)
        g[1, 3] = 0.0
        store.write(state, gradient(g, torch.tensor([1])), Ema(0.999, 0.001))
        assert (state["table"] >= 0).all()


# -- hazards of algorithms.md ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("touched", [1, 21, 25, 200])
@pytest.mark.parametrize("store", [CountSketch(width=1), CountMin(width=1)], ids=["signed", "minimum"])
def test_co_touched_rows_of_one_bucket_stay_bounded(store, touched):
    """Reading all old values and adding all updates multiplies the bucket by 1 - c * 0.1: divergence for c > 20."""
    state = store.allocate((300, 2), torch.device("cpu"), torch.float64)
    torch.manual_seed(4)
    for _ in range(300):
        rows = torch.randperm(300)[:touched].sort().values
        store.write(state, gradient(torch.rand(300, 2, dtype=torch.float64) * 2 - 1, rows), Ema(0.9, 0.1))
        assert state["table"].abs().max() <= 1.0


def test_the_co_touched_rule_has_no_order():
    torch.manual_seed(5)
    g, rows = torch.randn(40, 3, dtype=torch.float64), torch.arange(0, 40, 2)
    store = CountSketch(width=2, depth=2)
    results = []
    for order in (rows, rows.flip(0), rows[torch.randperm(20)]):
        state = store.allocate((40, 3), g.device, g.dtype)
        store.write(state, gradient(g, order), Ema(0.9, 0.1))
        results.append(state["table"])
    torch.testing.assert_close(results[1], results[0], rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(results[2], results[0], rtol=1e-13, atol=1e-15)


def test_untouched_buckets_are_bit_identical():
    torch.manual_seed(6)
    store = CountMin(width=10)
    state = store.allocate((40, 3), torch.device("cpu"), torch.float32)
    store.write(state, gradient(torch.randn(40, 3)), Ema(0.9, 0.1))
    before = state["table"].clone()
    store.write(state, gradient(torch.randn(40, 3), torch.tensor([3, 13, 25])), Ema(0.9, 0.1))
    same = (state["table"] == before).all(-1)[0]
    assert same.nonzero().squeeze(1).tolist() == [0, 1, 2, 4, 6, 7, 8, 9]


@pytest.mark.parametrize("depth", [1, 3])
def test_count_min_sums_never_underestimate(depth):
    torch.manual_seed(7)
    store = CountMin(width=7, depth=depth, bucket="sum", hash="affine")
    state = store.allocate((60, 4), torch.device("cpu"), torch.float64)
    exact = torch.zeros(60, 4, dtype=torch.float64)
    for step in range(20):
        g = torch.randn(60, 4, dtype=torch.float64)
        rows = torch.randperm(60)[:17].sort().values if step % 3 else None
        index = torch.arange(60) if rows is None else rows
        exact[index] += g[index] ** 2
        store.write(state, gradient(g, rows), Ema(1.0, 1.0))
        assert (whole(store, state, (60, 4)) >= exact * (1 - 1e-12)).all()


def test_linear_count_sketch_is_unbiased_over_seeds():
    torch.manual_seed(8)
    g = torch.randn(30, 2, dtype=torch.float64)
    total = torch.zeros_like(g)
    seeds = 400
    for seed in range(seeds):
        store = CountSketch(width=10, seed=seed, hash="affine")
        state = store.allocate((30, 2), g.device, g.dtype)
        store.write(state, gradient(g), Ema(0.0, 1.0))
        total += whole(store, state, (30, 2))
    # noise of one estimate: two colliding rows of size about 1, so 1.4 / 20 in the mean; 5 standard deviations
    assert (total / seeds - g).abs().max() < 5 * 2**0.5 * g.abs().max() / seeds**0.5


@pytest.mark.parametrize("shape", [(4, 6), (6, 4, 3, 3), (9,), ()])
def test_matrix_reads_and_writes_any_layout(shape):
    base = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    layouts = [base.clone()]
    if base.ndim == 2:
        layouts += [base.t().contiguous().t(), base.repeat_interleave(2, 1)[:, ::2]]
    if base.ndim == 4:
        layouts += [base.clone(memory_format=torch.channels_last), base.transpose(0, 1).contiguous().transpose(0, 1)]
    for tensor in layouts:
        matrix, flat = Matrix(tensor), base.reshape(Matrix(tensor).shape)
        rows, columns = flat.shape
        for n, chunk in enumerate((5, 1000)):
            for at in tiles(rows, columns, chunk):
                assert torch.equal(matrix.get(at), at.get(flat) + n)
                matrix.put(at, matrix.get(at) + 1)
        assert torch.equal(tensor, base + 2)
        index = torch.arange(0, rows, 2)
        for at in (Rows(rows, index, 0, columns), Rows(rows, index, columns // 2, columns)):
            matrix.put(at, matrix.get(at) - 1)
        expected = flat + 2
        expected[::2] -= 1
        expected[::2, columns // 2 :] -= 1
        assert torch.equal(tensor.reshape(rows, -1), expected)


def test_tile_is_a_view_of_state():
    table = torch.zeros(6, 4)
    Tile(6, 2, 2, 2, 1, 3).get(table).fill_(1)
    assert table.sum() == 8 and table[2:, 1:3].sum() == 8

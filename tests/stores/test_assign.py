"""`Store.assign`: state made from values, against the state that the same gradients would have written."""

import math

import pytest
import torch

from sketch_plugins.sharding.blocks import Matrix, Rows, Tile, matrix_shape
from sketch_plugins.stores import CountMin, CountSketch, Cover, Dense, Ema, Gradient, Int8, Log8, RowCountMin
from sketch_plugins.stores.base import Estimates

SHAPES = [(1, 1), (1, 31), (31, 1), (31, 33), (1025, 3), (5, 1025)]
CPU = torch.device("cpu")
FIRST = {
    "fp32": Dense(1),
    "bf16": Dense(1, bf16=True),
    "int8": Int8(),
    "int8_16": Int8(block_size=16, stochastic=True),
    "count_sketch": CountSketch(compression=0.2, depth=3, hash="affine"),
    "count_sketch_mean": CountSketch(compression=0.2, bucket="mean"),
    "count_sketch_bf16": CountSketch(compression=0.2, depth=2, bf16=True),
}
SECOND = {
    "dense": Dense(2),
    "count_min": CountMin(compression=0.2),
    "count_min_affine": CountMin(compression=0.2, hash="affine"),
    "count_min_3": CountMin(compression=0.2, depth=3),
    "count_min_sum_3": CountMin(compression=0.2, depth=3, bucket="sum"),
    "count_min_bf16": CountMin(compression=0.2, bf16=True),
    "count_min_scaled": CountMin(compression=0.2, scaled=True),
    "row_count_min": RowCountMin(compression=0.2, depth=2),
    "log8": Log8(block_size=16),
    "cover_II": "II",
    "cover_I": "I",
}


def store_of(name, shape):
    store = {**FIRST, **SECOND}[name]
    return Cover(dims=shape, variant=store) if isinstance(store, str) else store


def values(shape, order=1, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=dtype) * torch.logspace(-3, 2, shape[-1], dtype=dtype)
    return x.square() if order == 2 else x


def assigned(store, x):
    state = store.allocate(matrix_shape(x.shape), x.device, torch.promote_types(x.dtype, torch.float32))
    store.assign(state, x)
    return state


def whole(store, state, shape, dtype=torch.float32):
    rows, columns = matrix_shape(shape)
    return store.read(state, Rows(rows, torch.arange(rows), 0, columns), dtype).expand(rows, columns)


def as_gradient(x, chunk):
    return Gradient(Matrix(x), None, x.dtype, chunk, matrix_shape(x.shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*FIRST, *SECOND])
def test_bytes_and_layout_stay(name, shape):
    store = store_of(name, shape)
    state = assigned(store, values(shape, store.order))
    layout = store.layout(shape, torch.float32)
    assert {k: (tuple(t.shape), t.dtype) for k, t in state.items()} == layout
    assert store.nbytes(shape) == sum(t.numel() * t.element_size() for t in state.values())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [*FIRST, *SECOND])
def test_the_cut_into_tiles_makes_no_difference(name, shape):
    store = store_of(name, shape)
    x = values(shape, store.order)
    one, other = (store.allocate(shape, CPU, torch.float32) for _ in range(2))
    store.assign(one, as_gradient(x, 10**6))
    store.assign(other, as_gradient(x, 40))
    for key in one:
        # Sums of a bucket have one order; bfloat16 may round a last bit of float32 to its neighbour.
        torch.testing.assert_close(
            one[key], other[key], rtol=1e-2 if one[key].dtype == torch.bfloat16 else 1e-6, atol=0
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "store",
    [
        Dense(1),
        Dense(2),
        CountMin(compression=1.0, depth=2, hash="affine"),
        CountMin(compression=1.0, bucket="sum"),
        CountSketch(compression=1.0, depth=3),
        CountMin(width=10**6),
    ],
    ids=str,
)
def test_a_bucket_a_row_is_exact(store, shape):
    x = values(shape, store.order)
    assert torch.equal(whole(store, assigned(store, x), shape), x)


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_the_nearest(shape):
    x = values(shape)
    assert torch.equal(assigned(Dense(1, bf16=True), x)["dense"], x.bfloat16())


def test_dense_keeps_every_bit():
    x = torch.tensor([[-0.0, math.inf, -math.inf, math.nan, 1e-45]])
    assert torch.equal(assigned(Dense(1), x)["dense"].view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [1, 16, 128])
def test_int8_encodes_as_a_step_does_and_codes_survive(block, shape):
    store = Int8(block_size=block)
    x = values(shape)
    state, written = assigned(store, x), store.allocate(shape, CPU, torch.float32)
    store.write(written, as_gradient(x, 64), Ema(0.0, 1.0))
    assert all(torch.equal(state[k], written[k]) for k in state)
    again = assigned(store, whole(store, state, shape).clone())
    assert torch.equal(again["codes"], state["codes"])
    # fl(127 * s) / 127 is s or its neighbour
    torch.testing.assert_close(again["scales"], state["scales"], rtol=2**-23, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "store",
    [
        CountMin(compression=0.2),
        CountMin(compression=0.2, hash="affine", depth=2),
        CountMin(compression=0.2, depth=3, bucket="sum"),
        CountSketch(compression=0.2, depth=3),
        CountSketch(compression=0.2, bucket="mean"),
        Dense(1),
        Dense(2),
    ],
    ids=str,
)
def test_linear_stores_hold_what_the_gradients_would_have_written(store, shape):
    """Warm start: the average of a few gradients, assigned, is the same sketch as after each of them."""
    ema = Ema(0.9, 1 - 0.9)
    written, exact = store.allocate(shape, CPU, torch.float64), torch.zeros(shape, dtype=torch.float64)
    for t in range(4):
        g = values(shape, dtype=torch.float64, seed=t)
        store.write(written, as_gradient(g, 64), ema)
        exact = 0.9 * exact + (1 - 0.9) * (g * g if store.order == 2 else g)
    state = assigned(store, exact)
    for key in state:
        torch.testing.assert_close(state[key], written[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_count_min_means_bound_and_keep_the_mass(shape):
    store = CountMin(compression=0.2)
    v = values(shape, 2, torch.float64)
    est = whole(store, assigned(store, v), shape, torch.float64)
    torch.testing.assert_close(est.sum(0), v.sum(0), rtol=1e-12, atol=0)
    assert (est <= v.amax(0) * (1 + 1e-12)).all() and (est >= v.amin(0) * (1 - 1e-12)).all()
    # Estimates are means already, so assigning them again does not change them.
    torch.testing.assert_close(whole(store, assigned(store, est), shape, torch.float64), est, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_count_min_sums_are_an_upper_bound(shape):
    store = CountMin(compression=0.2, depth=3, bucket="sum")
    v = values(shape, 2, torch.float64)
    assert (whole(store, assigned(store, v), shape, torch.float64) >= v * (1 - 1e-12)).all()


@pytest.mark.parametrize("variant", ["I", "II"])
@pytest.mark.parametrize("shape", [*SHAPES, (4, 3, 5), (6, 4, 3, 3)])
def test_covers_are_the_maxima_and_bound(shape, variant):
    store, v = Cover(dims=shape, variant=variant), values(shape, 2)
    state = assigned(store, v)
    for k in range(len(shape)):
        others = [d for d in range(len(shape)) if d != k]
        assert torch.equal(state[f"axis_{k}"], v.amax(others))
    est = whole(store, state, shape)
    assert (est.view(shape) >= v).all()
    again = store.allocate(matrix_shape(shape), CPU, torch.float32)
    store.assign(again, Gradient(Estimates(store, state, matrix_shape(shape), v.dtype), None, v.dtype, 64, est.shape))
    assert all(torch.equal(again[k], state[k]) for k in state)  # these are the smallest covers of their own estimates


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("depth", [1, 2])
def test_row_count_min_keeps_the_rows_means(shape, depth):
    store = RowCountMin(compression=0.2, depth=depth)
    v = values(shape, 2, torch.float64)
    state = assigned(store, v)
    torch.testing.assert_close(state["row"], v.mean(1, keepdim=True), rtol=1e-12, atol=0)
    one = RowCountMin(compression=1.0, depth=depth)
    torch.testing.assert_close(whole(one, assigned(one, v), shape, torch.float64), v, rtol=1e-12, atol=1e-300)
    # Profiles are means of rows whose own mean is 1.
    torch.testing.assert_close(state["table"].mean(-1), torch.ones_like(state["table"][..., 0]), rtol=1e-9, atol=0)


def test_rows_of_nothing_leave_the_profile_to_the_others():
    v = values((8, 5), 2, torch.float64)
    v[1::2] = 0
    store = RowCountMin(width=1)
    est = whole(store, assigned(store, v), v.shape, torch.float64)
    assert (est[1::2] == 0).all()
    torch.testing.assert_close(est[::2].mean(1), v[::2].mean(1))
    assert not assigned(store, torch.zeros(4, 3))["table"].any()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("kind", [CountMin, CountSketch])
def test_estimates_of_sums_are_scaled_before_they_are_summed_again(kind, depth):
    """One table: the least-norm values of which it is the sketch, so that it comes out as it was."""
    shape = (60, 7)
    store = kind(width=12, depth=depth, bucket="sum")
    state = assigned(store, values(shape, store.order, torch.float64))
    scale = store.estimate_scale(state, shape)
    est = whole(store, state, shape, torch.float64)
    again = assigned(store, est * scale)
    if depth == 1:
        assert scale == pytest.approx(12 / 60)
        torch.testing.assert_close(again["table"], state["table"], rtol=1e-12, atol=1e-12)
    # It is the nearest of all multiples.
    error = (again["table"] - state["table"]).norm()
    for other in (0.9, 1.1):
        assert error <= (again["table"] * other - state["table"]).norm()
    assert kind(width=12, depth=depth, bucket="mean").estimate_scale(state, shape) == 1.0
    assert store.estimate_scale(store.allocate(shape, CPU, torch.float32), shape) == 1.0


def test_bfloat16_tables_round_without_bias():
    store, x = CountMin(compression=1.0, bf16=True), torch.full((1000, 8), 1.0 + 2**-10)
    table = assigned(store, x)["table"].float()
    assert set(table.unique().tolist()) <= {1.0, 1.0 + 2**-7}
    assert table.mean() - 1 == pytest.approx(2**-10, rel=0.2)  # 8000 coins of 1/8: 4 standard deviations are 12 %


def test_no_temporary_as_large_as_the_values():
    """The largest request for memory, while a matrix of 2^22 numbers is assigned in tiles of 2^14."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(t, torch.Tensor) and t._base is None and not any(t is a for a in args):
                    known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
                    if t.untyped_storage().data_ptr() not in known:
                        self.numel = max(self.numel, t.untyped_storage().nbytes() // 4)
            return out

    shape, chunk = (1 << 12, 1 << 10), 1 << 14
    x = values(shape).abs()
    for name in ("fp32", "int8", "count_min", "count_min_affine", "row_count_min", "cover_II"):
        store = store_of(name, shape)
        state = store.allocate(shape, CPU, torch.float32)
        with Largest() as seen:
            store.assign(state, as_gradient(x, chunk))
        assert seen.numel <= 4 * chunk, name  # int64 row numbers and gathered rows beside the tile


def test_what_cannot_be_assigned():
    for store in (CountMin(), Dense(2), Cover(dims=(2, 2))):
        state = store.allocate((2, 2), CPU, torch.float32)
        with pytest.raises(ValueError, match="second moment has the value -1"):
            store.assign(state, torch.tensor([[1.0, -1.0], [0.0, 2.0]]))
        grad = Gradient(Matrix(torch.ones(2, 2)), torch.tensor([0]), torch.float32, 64, (2, 2))
        with pytest.raises(ValueError, match="1 touched rows"):
            store.assign(state, grad)
        assert not any(t.any() for t in state.values())


def test_a_convolution_and_a_transposed_tensor():
    x = values((6, 4, 3, 3)).contiguous(memory_format=torch.channels_last)
    assert torch.equal(assigned(Dense(1), x)["dense"], x.reshape(6, 36))
    y = values((33, 31)).t()
    assert torch.equal(assigned(Dense(1), y)["dense"], y)
    assert whole(Dense(1), assigned(Dense(1), y), y.shape).shape == (31, 33)
    at = Tile(31, 3, 1, 2, 5, 9)
    assert torch.equal(Dense(1).read(assigned(Dense(1), y), at, torch.float32)[0], y[3:5, 5:9])

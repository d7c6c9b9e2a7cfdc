"""Covers alone: the invariants of the paper, bytes, tiles, and the updates against loops over single elements."""

import itertools
import math

import pytest
import torch

from sketch_plugins.sharding.blocks import Matrix, Rows, matrix_shape, tiles
from sketch_plugins.stores import Cover, Dense, Ema, Gradient
from sketch_plugins.stores.cover import _boxes

SHAPES = [(7, 5), (1, 6), (6, 1), (1, 1), (31, 33), (4, 3, 5), (6, 4, 3, 3), (1, 1, 7), (5, 1, 1, 2), (2, 3, 2, 2, 2)]
SUM, AVERAGE = Ema(1.0, 1.0), Ema(0.9, 1.0 - 0.9)
CPU = torch.device("cpu")


def gradient(g, rows=None, chunk=64):
    return Gradient(Matrix(g), rows, g.dtype, chunk, matrix_shape(g.shape))


def new(shape, variant="II", dtype=torch.float64):
    store = Cover(dims=shape, variant=variant)
    return store, store.allocate(matrix_shape(shape), CPU, dtype)


def step(store, state, g, ema, rows=None, chunk=64):
    """One step as the optimizer takes it; the estimate that it used, NaN where nothing was touched."""
    grad = gradient(g, rows, chunk)
    used = torch.full(matrix_shape(g.shape), math.nan, dtype=g.dtype)
    working = state
    if store.write_first:
        store.write(state, grad, ema)
    else:
        working = store.begin(state, grad)
    for at in grad.batches():
        x = grad.get(at)
        seen = store.peek(state, at, x, ema).clone()
        nu = store.advance(working, at, x, ema)
        # Reading ahead gives the estimates of the step, bit for bit, and changes nothing.
        torch.testing.assert_close(seen, nu.expand(at.shape), rtol=0, atol=0, equal_nan=True)
        at.put(used, nu)
    if not store.write_first:
        store.finish(state, working, grad)
    return used.view(g.shape)


def gradients(shape, n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    for t in range(n):
        x = torch.randn(shape, dtype=torch.float64, generator=g) * 3.0 ** ((-1) ** t)
        yield x * (torch.rand(shape, generator=g) < 0.7)  # some zeros


def naive(shape, g, mu, variant, ema, rows=None):
    """One step on dictionaries of floats: ``mu[axis, index]``; returns the estimates of the touched elements."""
    every = list(itertools.product(*map(range, shape)))
    touched = [i for i in every if rows is None or i[0] in rows]
    slices = [(k, j) for k, n in enumerate(shape) for j in range(n)]
    square = {i: float(g[i]) ** 2 for i in touched}
    axes = range(len(shape)) if rows is None else [0]
    new, nu = {}, {}
    if variant == "II":
        nu = {i: ema.decay * min(mu[k, i[k]] for k in axes) + ema.gain * square[i] for i in touched}
    for k, j in slices:
        members = [i for i in touched if i[k] == j]
        if not members:
            continue
        if variant == "II":
            new[k, j] = max(nu[i] for i in members)
        else:
            new[k, j] = ema.decay * mu[k, j] + ema.gain * max(square[i] for i in members)
        if rows is not None and k > 0:
            new[k, j] = max(mu[k, j], new[k, j])
    mu.update(new)
    if variant == "I":
        nu = {i: min(mu[k, i[k]] for k in axes) for i in touched}
    return nu


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_one_vector_an_axis(shape):
    store, state = new(shape, dtype=torch.float32)
    assert store.nbytes(matrix_shape(shape)) == 4 * sum(shape)
    assert sum(t.numel() * t.element_size() for t in state.values()) == 4 * sum(shape)
    assert [tuple(state[f"axis_{k}"].shape) for k in range(len(shape))] == [(n,) for n in shape]
    assert store.nbytes(matrix_shape(shape), torch.float64) == 8 * sum(shape)


def test_a_shape_that_is_not_the_matrix_is_refused():
    for dims in [(), (6,), (6, 4), (12, 2)]:
        with pytest.raises(ValueError, match=r"dims=.*6 x 12 matrix"):
            Cover(dims=dims).allocate((6, 12), CPU, torch.float32)


@pytest.mark.parametrize("dims", [(5,), (1,), (3, 4), (2, 1, 3), (3, 2, 4), (1, 5, 1), (2, 3, 2, 2)])
def test_boxes_are_the_flat_range_in_order(dims):
    n = math.prod(dims)
    positions = torch.arange(n).view(dims)
    for lo in range(n):
        for hi in range(lo + 1, n + 1):
            boxes = list(_boxes(lo, hi, dims))
            found = [int(i) for box in boxes for i in positions[box].flatten()]
            assert found == list(range(lo, hi)) and len(boxes) <= 2 * len(dims) - 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1, 4, 7, 50, 10**6])
def test_invariants_of_the_paper(shape, chunk):
    """sum g^2 <= nu_II <= nu_I, element by element, and none of them ever falls."""
    two, one = new(shape), new(shape, "I")
    exact, before = torch.zeros(shape, dtype=torch.float64), (0.0, 0.0)
    strict = False
    for g in gradients(shape):
        exact += g * g
        nus = tuple(step(*pair, g, SUM, chunk=chunk) for pair in (two, one))
        assert (exact <= nus[0] * (1 + 1e-12)).all() and (nus[0] <= nus[1] * (1 + 1e-12)).all()
        assert all((nu >= old).all() for nu, old in zip(nus, before, strict=True))
        strict |= bool((nus[0] < 0.99 * nus[1]).any())
        before = nus
    assert strict == (sum(n > 1 for n in shape) >= 2)  # where an axis holds one slice an element, both are exact


@pytest.mark.parametrize("variant", ["II", "I"])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_average_covers_the_exact_average(shape, variant):
    store, state = new(shape, variant)
    exact = torch.zeros(shape, dtype=torch.float64)
    for g in gradients(shape):
        exact = AVERAGE.decay * exact + AVERAGE.gain * g * g
        assert (exact <= step(store, state, g, AVERAGE, chunk=5) * (1 + 1e-12)).all()


@pytest.mark.parametrize("ema", [SUM, AVERAGE], ids=["sum", "average"])
@pytest.mark.parametrize("variant", ["II", "I"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if math.prod(s) <= 216])
def test_steps_against_loops_over_elements(shape, variant, ema):
    g = torch.Generator().manual_seed(1)
    for chunk in (3, 1000):
        store, state = new(shape, variant)
        mu = {(k, j): 0.0 for k, n in enumerate(shape) for j in range(n)}
        for t, grad in enumerate(gradients(shape)):
            rows = None
            if t % 2:  # dense and sparse steps alternate
                rows = torch.randperm(shape[0], generator=g)[: (shape[0] + 1) // 2].sort().values
            expected = naive(shape, grad, mu, variant, ema, None if rows is None else rows.tolist())
            used = step(store, state, grad, ema, rows, chunk)
            for i, nu in expected.items():
                assert float(used[i]) == pytest.approx(nu, rel=1e-13, abs=0)
            assert int(used.isfinite().sum()) == len(expected)
            for (k, j), value in mu.items():
                assert float(state[f"axis_{k}"][j]) == pytest.approx(value, rel=1e-13, abs=0)


@pytest.mark.parametrize("variant", ["II", "I"])
@pytest.mark.parametrize("shape", [(31, 33), (6, 4, 3, 3), (4, 3, 5)])
def test_tiles_do_not_change_a_bit(shape, variant):
    states = []
    for chunk in (1, 2, 5, 11, 36, 100, 10**6):
        store, state = new(shape, variant, torch.float32)
        for t, g in enumerate(gradients(shape)):
            step(store, state, g.float(), AVERAGE, torch.tensor([0, 2, 3]) if t == 3 else None, chunk)
        states.append(state)
    for state in states[1:]:
        assert all(torch.equal(state[k], states[0][k]) for k in states[0])


@pytest.mark.parametrize("variant", ["II", "I"])
@pytest.mark.parametrize("shape", [(9, 4), (6, 2, 3)])
def test_dense_and_sparse_steps_in_any_mixture_cover_the_sum(shape, variant):
    g = torch.Generator().manual_seed(5)
    for ema in (SUM, AVERAGE):
        store, state = new(shape, variant)
        exact = torch.zeros(shape, dtype=torch.float64)
        for grad in gradients(shape, 40, seed=2):
            rows = torch.randperm(shape[0], generator=g)[:3].sort().values
            if torch.rand((), generator=g) < 0.3:
                rows = None
            index = torch.arange(shape[0]) if rows is None else rows
            before = state["axis_0"].clone()
            exact[index] = ema.decay * exact[index] + ema.gain * grad[index] ** 2  # lazy rows, as the optimizers have
            used = step(store, state, grad, ema, rows, chunk=7)
            assert (exact[index] <= used[index] * (1 + 1e-12)).all()
            # The estimates of the next dense step cover every row, touched or not.
            least = store.read(state, Rows(shape[0], torch.arange(shape[0]), 0, math.prod(shape[1:])), torch.float64)
            assert (exact <= least.view(shape) * (1 + 1e-12)).all()
            untouched = torch.ones(shape[0], dtype=torch.bool)
            untouched[index] = False
            assert torch.equal(state["axis_0"][untouched], before[untouched])


@pytest.mark.parametrize("variant", ["II", "I"])
def test_averages_fall_where_gradients_do(variant):
    """Covers with max(old, new) would keep the peak for ever."""
    store, state = new((5, 4, 3), variant)
    step(store, state, torch.full((5, 4, 3), 10.0, dtype=torch.float64), AVERAGE)
    for _ in range(100):
        step(store, state, torch.zeros(5, 4, 3, dtype=torch.float64), AVERAGE)
    for tensor in state.values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, 0.1 * 100 * 0.9**100), rtol=1e-12, atol=0)


def test_a_matrix_of_one_row_is_exact():
    for shape in [(1, 6), (6, 1), (1, 6, 1)]:
        store, state = new(shape)
        dense = Dense(order=2)
        exact = dense.allocate(matrix_shape(shape), CPU, torch.float64)
        for g in gradients(shape):
            dense.write(exact, gradient(g), AVERAGE)
            assert torch.equal(step(store, state, g, AVERAGE).flatten(), exact["dense"].flatten())


def test_reading_tiles_and_rows_agree():
    shape = (6, 4, 3, 3)
    store, state = new(shape)
    for g in gradients(shape):
        step(store, state, g, SUM)
    whole = torch.stack(
        [state[f"axis_{k}"].view([-1 if d == k else 1 for d in range(4)]).expand(shape) for k in range(4)]
    ).amin(0)
    flat = whole.reshape(6, 36)
    for chunk in (1, 5, 17, 1000):
        for at in tiles(6, 36, chunk):
            assert torch.equal(store.read(state, at, torch.float64), at.get(flat))
    index = torch.tensor([4, 1])
    assert torch.equal(store.read(state, Rows(6, index, 5, 30), torch.float64), flat[index, 5:30])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_hidden(bad):
    for variant in ("II", "I"):
        store, state = new((4, 5), variant)
        g = torch.ones(4, 5, dtype=torch.float64)
        g[1, 2] = bad
        used = step(store, state, g, SUM, chunk=3)
        assert not used[1, 2].isfinite()
        assert not state["axis_0"][1].isfinite() and not state["axis_1"][2].isfinite()
        assert state["axis_0"][[0, 2, 3]].isfinite().all() and state["axis_1"][[0, 1, 3, 4]].isfinite().all()


def test_fill_is_what_every_estimate_starts_from():
    store, state = new((4, 5))
    store.fill(state, 0.25)
    g = torch.ones(4, 5, dtype=torch.float64)
    assert (step(store, state, g, SUM) == 1.25).all()

"""Preconditioners of whole tensors against dense mode products; their allocations, statistics and solves."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sketch_plugins.linalg import frequent_directions as fd
from sketch_plugins.linalg import kronecker, singular_pairs, solving
from sketch_plugins.linalg.cutting import cut, merged
from sketch_plugins.linalg.kronecker import Kronecker, Side, Stack
from sketch_plugins.linalg.solving import solve

CPU = torch.device("cpu")
F64 = torch.float64

# Derandomized: the same examples on every run and machine.
examples = settings(max_examples=300, deadline=None, derandomize=True, database=None)

# name -> dims, cuts, ranks: one axis or all, whole or in blocks, equal or not, ranks below, at and above the axis
PLANS = {
    "2d": Kronecker((9, 6), ((0, 9), (0, 6)), (3, 2)),
    "2d_exact": Kronecker((9, 6), ((0, 9), (0, 6)), (9, 99)),
    "2d_rows": Kronecker((9, 6), ((0, 9), (0, 6)), (4, 0)),
    "2d_columns": Kronecker((9, 6), ((0, 9), (0, 6)), (0, 4)),
    "2d_blocks": Kronecker((9, 6), ((0, 4, 9), (0, 3, 6)), (2, 3)),
    "2d_blocks_one_sided": Kronecker((9, 6), ((0, 3, 6, 9), (0, 6)), (0, 3)),
    "3d": Kronecker((5, 4, 3), ((0, 5), (0, 4), (0, 3)), (2, 2, 1)),
    "3d_middle": Kronecker((5, 4, 3), ((0, 5), (0, 4), (0, 3)), (0, 3, 0)),
    "3d_blocks": Kronecker((5, 4, 6), ((0, 2, 5), (0, 4), (0, 3, 6)), (2, 3, 2)),
    "4d": Kronecker((3, 4, 2, 5), ((0, 3), (0, 4), (0, 2), (0, 5)), (2, 3, 1, 4)),
    "4d_blocks": Kronecker((3, 4, 2, 5), ((0, 3), (0, 2, 4), (0, 2), (0, 2, 5)), (3, 2, 0, 2)),
    "sampled": Kronecker((9, 6), ((0, 9), (0, 3, 6)), (3, 2), buffered=False),
}
# reverse the axes, make the tensor contiguous and reverse them again, so that every stride changes
LAYOUTS = {
    "contiguous": lambda x: x,
    "reversed": lambda x: x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim))),
    "sliced": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@pytest.fixture(params=PLANS)
def plan(request):
    return PLANS[request.param]


@pytest.fixture(params=[name for name, plan in PLANS.items() if plan.buffered])
def buffered(request):
    return PLANS[request.param]


@pytest.fixture(autouse=True)
def power_of_small_matrices(monkeypatch):
    """Matrices here are small, and the solver would leave all of them to eigh."""
    monkeypatch.setattr(singular_pairs, "SMALL", 0)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def unfolding(block, axis):
    """The naive unfolding: the axis in front, all others flat."""
    return block.movedim(axis, 0).reshape(block.shape[axis], -1)


def covariance(x, plan, side):
    """Covariance of one axis of one block of a tensor, by the naive unfolding."""
    part = unfolding(x.reshape(plan.dims)[plan.blocks[side.block]], side.axis)
    return part @ part.mT


def dense(sketch):
    return (sketch.vectors * sketch.values) @ sketch.vectors.mT


def power(matrix, exponent, eps):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * (values + eps * values[-1]).pow(exponent)) @ vectors.mT


def mode_products(x, plan, roots):
    """Every block times the matrices of its axes, by `tensordot`."""
    out = x.reshape(plan.dims).clone()
    for side, root in roots.items():
        at = plan.blocks[side.block]
        out[at] = torch.tensordot(root, out[at], dims=([1], [side.axis])).movedim(0, side.axis)
    return out.reshape(x.shape)


def filled(plan, steps=3, decay=0.9, tail="trace", scale=1.0):
    """A state after some solves."""
    state = plan.allocate(CPU, F64)
    for t in range(steps):
        x = scale * normal(*plan.dims, seed=t)
        if plan.buffered:
            plan.gather(state, x, decay)
            solve([(side, state, None) for side in plan.sides], 1.0, tail, "svd")
        else:
            solve([(side, state, c) for side, c in plan.columns(x).items()], decay, tail, "svd")
    return state


# -- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, most, expected",
    [
        ((64, 32, 3, 3), 1024, (64, 288)),
        ((64, 32, 3, 3), 287, (64, 32, 9)),
        ((64, 32, 3, 3), 8, (64, 32, 3, 3)),
        ((64, 32, 3, 3), 1, (64, 32, 3, 3)),
        ((768, 3072), 1024, (768, 3072)),
        ((4, 5, 6), 30, (4, 30)),
        ((4, 5, 6), 29, (4, 5, 6)),
        ((8, 16, 16, 1024), 1024, (8, 256, 1024)),
        ((3, 1, 5, 1), 1, (3, 5)),
        ((3, 1, 1), 10, (3, 1)),
        ((1, 5), 10, (5, 1)),
        ((1, 12, 9), 10, (12, 9)),
        ((1, 1), 10, (1, 1)),
        ((7,), 10, (7, 1)),
    ],
)
def test_merged(shape, most, expected):
    assert merged(shape, most) == expected


@examples
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 2000))
def test_merged_keeps_the_order_and_the_number_of_elements(shape, most):
    dims = merged(shape, most)
    assert dims[0] == next((n for n in shape if n > 1), 1) and math.prod(dims) == math.prod(shape) and len(dims) >= 2
    # each size is a product of neighbours, within the limit unless it is one axis; no two neighbours could be merged
    assert all(n <= most or n in shape for n in dims[1:])
    assert all(a * b > most for a, b in pairwise(dims[1:]))
    assert 1 not in dims[1:] or dims[1:] == (1,)


@examples
@given(st.integers(1, 20000), st.integers(0, 5000))
def test_cut_is_as_few_and_as_equal_blocks_as_can_be(n, most):
    bounds = cut(n, most)
    sizes = [b - a for a, b in pairwise(bounds)]
    assert bounds[0] == 0 and bounds[-1] == n
    assert len(sizes) == (math.ceil(n / most) if most else 1)
    assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1 and (not most or max(sizes) <= most)


def test_blocks_cover_every_element_once(plan):
    seen = torch.zeros(plan.dims, dtype=torch.int64)
    for block in plan.blocks:
        seen[block] += 1
    assert (seen == 1).all()


def test_sides_are_the_axes_with_a_rank_no_larger_than_the_axis(plan):
    assert len(plan.sides) == len(plan.blocks) * sum(rank > 0 for rank in plan.ranks)
    for side in plan.sides:
        at = plan.blocks[side.block][side.axis]
        assert side.size == at.stop - at.start and side.rank == min(plan.ranks[side.axis], side.size)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_layout_and_nbytes_are_what_is_allocated(plan, dtype):
    state = plan.allocate(CPU, dtype)
    assert {name: (tuple(t.shape), t.dtype) for name, t in state.items()} == plan.layout(dtype)
    assert plan.nbytes(dtype) == sum(t.numel() * t.element_size() for t in state.values())
    # no two tensors share memory, because a checkpoint would contain it twice
    assert len({t.untyped_storage().data_ptr() for t in state.values()}) == len(state)
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in state.values())


def test_bytes_as_documented():
    # Sketchy: 4 * k * (m + n), twice that with buffers, and some scalars
    m, n, k = 768, 3072, 32
    for buffered, times in ((False, 1), (True, 2)):
        plan = Kronecker((m, n), ((0, m), (0, n)), (k, k), buffered)
        scalars = 2 * (k + 2 + (2 if buffered else 0))
        assert plan.nbytes(torch.float32) == times * 4 * k * (m + n) + 4 * scalars


# -- precondition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", fd.TAILS)
def test_precondition_is_mode_products_with_dense_inverse_roots(plan, tail):
    exponent, eps = -0.5 / len(plan.dims), 1e-3
    state, roots = filled(plan, tail=tail), {}
    for side in plan.sides:
        sketch = side.get(state)
        outside = torch.eye(side.size, dtype=F64) - sketch.vectors @ sketch.vectors.mT
        inside = sketch.values.clamp_min(sketch.tail) if tail == "trace" else sketch.values + sketch.tail
        matrix = (sketch.vectors * inside) @ sketch.vectors.mT + sketch.tail * outside
        roots[side] = power(matrix, exponent, eps)
    x = normal(*plan.dims, seed=9)
    expected = mode_products(x, plan, roots)
    assert plan.precondition(state, x, exponent, eps, tail) is None  # in place
    # condition 1 / eps to the power of a half at most, times rounding of eigh
    assert torch.allclose(x, expected, rtol=0, atol=1e-11 * expected.abs().max())


@pytest.mark.parametrize("name", ["2d", "2d_blocks", "2d_rows", "3d_blocks", "4d", "4d_blocks", "sampled"])
def test_precondition_of_full_rank_is_shampoo(name):
    """The reference does not use `frequent_directions`: decayed covariances of naive unfoldings, and their roots."""
    base, decay, eps = PLANS[name], 0.9, 1e-2
    plan = Kronecker(base.dims, base.cuts, tuple(99 if rank else 0 for rank in base.ranks), base.buffered)
    state, exponent = filled(plan, steps=4, decay=decay), -0.5 / len(plan.dims)
    roots = {}
    for side in plan.sides:
        exact = sum(decay ** (3 - t) * covariance(normal(*plan.dims, seed=t), plan, side) for t in range(4))
        roots[side] = power(exact, exponent, eps)
    x = normal(*plan.dims, seed=9)
    expected = mode_products(x, plan, roots)
    plan.precondition(state, x, exponent, eps, "trace")
    # Gathered covariances lose about the root of the precision if an eigenvalue is that small; eps hides this.
    assert torch.allclose(x, expected, rtol=0, atol=1e-10 * expected.abs().max())


def test_precondition_takes_the_tensor_in_its_own_shape():
    plan = Kronecker(merged((4, 3, 2, 2), 12), ((0, 4), (0, 12)), (2, 5))
    state = filled(plan)
    x = normal(4, 3, 2, 2, seed=9)
    flat = x.reshape(4, 12).clone()
    plan.precondition(state, x, -0.25, 1e-6, "trace")
    plan.precondition(state, flat, -0.25, 1e-6, "trace")
    assert torch.equal(x.reshape(4, 12), flat)


def test_covariances_of_nothing_leave_the_tensor_as_it_is(plan):
    x = normal(*plan.dims)
    got = x.clone()
    plan.precondition(plan.allocate(CPU, F64), got, -0.25, 1e-6, "trace")
    # V V^T x is added and subtracted again
    assert torch.allclose(got, x, rtol=0, atol=1e-14)


# -- gather and columns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_is_the_decayed_covariance_of_every_side(buffered, layout):
    plan = buffered
    decay, state = 0.9, filled(plan)
    before = {name: t.clone() for name, t in state.items()}
    exact = {side: torch.zeros(side.size, side.size, dtype=F64) for side in plan.sides}
    for t in range(3):
        x = LAYOUTS[layout](normal(*plan.dims, seed=20 + t))
        kept = x.clone()
        plan.gather(state, x, decay)
        assert torch.equal(x, kept)
        for side in plan.sides:
            exact[side] = decay * exact[side] + covariance(x, plan, side)
    for side, matrix in exact.items():
        tolerance = 1e-13 * matrix.trace()
        buffer, vectors = state[side.key("buffer")], state[side.key("vectors")]
        assert torch.allclose(buffer, matrix @ vectors, rtol=0, atol=tolerance)
        assert abs(state[side.key("mass")] - matrix.trace()) <= tolerance
        assert state[side.key("decay")].item() == pytest.approx(decay**3, rel=1e-15)
        for name in fd.Covariance._fields:  # only solves write these
            assert torch.equal(state[side.key(name)], before[side.key(name)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_are_the_unfoldings(plan, layout):
    x = LAYOUTS[layout](normal(*plan.dims))
    got = plan.columns(x)
    assert tuple(got) == plan.sides
    for side, columns in got.items():
        expected = unfolding(x[plan.blocks[side.block]], side.axis)
        # the same columns in any order: an unfolding's covariance does not depend on it
        assert columns.shape == expected.shape
        assert torch.allclose(columns @ columns.mT, expected @ expected.mT, rtol=0, atol=1e-13)
        order, other = (sorted(c.mT.tolist()) for c in (columns, expected))
        assert order == other


def test_gather_takes_the_matrices_of_a_middle_axis_in_parts():
    # 64 matrices of (4, 1): one at a time, because of the bound on the products' size; the decay is applied once for
    # all.
    plan = Kronecker((64, 4, 1), ((0, 64), (0, 4), (0, 1)), (0, 4, 0))
    state, x = plan.allocate(CPU, F64), normal(64, 4, 1)
    for _ in range(2):
        plan.gather(state, x, 0.5)
    (side,) = plan.sides
    expected = 1.5 * covariance(x, plan, side) @ state[side.key("vectors")]
    assert torch.allclose(state[side.key("buffer")], expected, rtol=0, atol=1e-12)


# -- solve -----------------------------------------------------------------------------------------------------------


def test_solve_folds_what_was_gathered_and_empties_the_buffers(buffered):
    plan = buffered
    state = filled(plan)
    for t in (5, 6):
        plan.gather(state, normal(*plan.dims, seed=t), 0.9)
    expected = {}
    for side in plan.sides:
        columns = fd.drain(state[side.key("buffer")], state[side.key("vectors")])
        mass = state[side.key("mass")]
        expected[side] = fd.fold(side.get(state), columns, 0.9**2, solver="svd", mass=mass)
    solve([(side, state, None) for side in plan.sides], 1.0, "trace", "svd")
    for side, new in expected.items():
        assert_same(side.get(state), new)
        assert not state[side.key("buffer")].any() and state[side.key("mass")] == 0 and state[side.key("decay")] == 1


def assert_same(one, other):
    # The same operations, in a batch or alone: rounding only.
    top = other.values.max()
    assert torch.allclose(dense(one), dense(other), rtol=0, atol=1e-12 * top)
    for name in ("values", "tail", "trace"):
        assert torch.allclose(getattr(one, name), getattr(other, name), rtol=1e-12, atol=1e-12 * top)


def many():
    """States of tensors of different shapes, some of which share sides: (side, state, columns or None)."""
    due = []
    for number, name in enumerate(["2d", "2d_blocks", "3d", "2d", "2d_columns", "2d", "2d"]):
        plan = PLANS[name]
        state = filled(plan, scale=10.0**number)
        plan.gather(state, normal(*plan.dims, seed=30 + number), 0.9)
        due += [(side, state, None) for side in plan.sides]
    for seed in (40, 41):
        state = filled(PLANS["sampled"])
        x = normal(*PLANS["sampled"].dims, seed=seed)
        due += [(side, state, c) for side, c in PLANS["sampled"].columns(x).items()]
    return due


@pytest.mark.parametrize("stack", [1, 60, 150, 10**6])
@pytest.mark.parametrize("solver", fd.SOLVERS)
def test_solve_of_mixed_shapes_is_one_by_one_in_bounded_stacks(stack, solver, monkeypatch):
    monkeypatch.setattr(solving, "STACK", stack)
    together, apart, sizes = many(), many(), []
    fold = fd.fold

    def counted(old, columns, *args, **kwargs):
        batch = len(old.values) if old.values.ndim > 1 else 1
        sizes.append((batch, old.vectors.shape[-2] * (old.vectors.shape[-1] + columns.shape[-1])))
        return fold(old, columns, *args, **kwargs)

    monkeypatch.setattr(fd, "fold", counted)
    solve(together, 0.8, "trace", solver)
    assert sum(batch for batch, _ in sizes) == len(together)
    assert all(batch == 1 or batch * numbers <= stack for batch, numbers in sizes)
    if stack == 1:
        assert len(sizes) == len(together)
    if stack == 10**6:  # one call for each shape, and one for each number of columns
        shapes = {(s.size, s.rank, None if c is None else c.shape[-1]) for s, _, c in together}
        assert len(sizes) == len(shapes)
    for item in apart:
        solve([item], 0.8, "trace", solver)
    for (side, state, _), (_, other, _) in zip(together, apart, strict=True):
        assert_same(side.get(state), side.get(other))


def test_solve_of_sampled_columns_is_fold():
    plan = PLANS["sampled"]
    state, x = filled(plan), normal(*plan.dims, seed=7)
    columns = plan.columns(x)
    expected = {side: fd.fold(side.get(state), c, 0.8, tail="paper", solver="svd") for side, c in columns.items()}
    solve([(side, state, c) for side, c in columns.items()], 0.8, "paper", "svd")
    for side, new in expected.items():
        assert_same(side.get(state), new)


def test_solve_writes_in_place_and_the_same_bits_twice(plan):
    states = []
    for _ in range(2):
        state = plan.allocate(CPU, torch.float32)
        places = {name: t.data_ptr() for name, t in state.items()}
        for t in range(3):
            x = normal(*plan.dims, seed=t, dtype=torch.float32)
            if plan.buffered:
                plan.gather(state, x, 0.9)
            due = [(s, state, None if plan.buffered else c) for s, c in plan.columns(x).items()]
            solve(due, 0.9, "trace", "eigh")
        assert places == {name: t.data_ptr() for name, t in state.items()}
        states.append(state)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_failure_leaves_every_state_as_it_was_or_whole(monkeypatch):
    due = many()
    before = [{name: t.clone() for name, t in state.items()} for _, state, _ in due]
    fold = fd.fold

    def failing(old, *args, **kwargs):
        if old.vectors.shape[-2] == 6:
            raise RuntimeError("out of memory")
        return fold(old, *args, **kwargs)

    monkeypatch.setattr(fd, "fold", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        solve(due, 0.9, "trace", "eigh")
    for (side, state, columns), old in zip(due, before, strict=True):
        names = [side.key(name) for name in fd.Covariance._fields]
        same = all(torch.equal(state[name], old[name]) for name in names)
        emptied = columns is None and not state[side.key("buffer")].any()
        assert (side.size != 6 or same) and (columns is not None or emptied != same)


def test_what_cannot_be_decomposed_stays_and_what_was_gathered_waits(monkeypatch):
    due, apart = many(), many()
    before = [{name: t.clone() for name, t in state.items()} for _, state, _ in due]
    fold = fd.fold

    def failing(old, *args, **kwargs):
        new = fold(old, *args, **kwargs)
        if old.vectors.shape[-2] == 6:  # the first member of each stack of that length
            new.values[0, 1] = torch.nan
        return new

    monkeypatch.setattr(fd, "fold", failing)
    failed = solve(due, 0.9, "trace", "eigh")
    monkeypatch.undo()
    solve(apart, 0.9, "trace", "eigh")
    lost = {(id(state), side) for side, state, _ in failed}
    assert 0 < len(lost) == len(failed) < sum(side.size == 6 for side, _, _ in due)
    for (side, state, _), old, (_, other, _) in zip(due, before, apart, strict=True):
        for name in state:
            if name.split("_", 1)[1] == side.key("").strip("_"):
                assert torch.equal(state[name], (old if (id(state), side) in lost else other)[name])
    # The next solve uses the waiting statistics, as if the failed attempt had not happened.
    assert solve(due, 0.9, "trace", "eigh") == []


def test_gathered_statistics_that_have_overflowed_are_dropped(buffered):
    plan = buffered
    state = filled(plan)
    before = {name: t.clone() for name, t in state.items()}
    plan.gather(state, torch.full(plan.dims, 1e200, dtype=F64), 0.9)
    failed = solve([(side, state, None) for side in plan.sides], 1.0, "trace", "eigh")
    assert {side for side, _, _ in failed} == set(plan.sides)
    assert all(torch.equal(state[name], before[name]) for name in state)
    for side in plan.sides:
        assert not state[side.key("buffer")].any() and state[side.key("mass")] == 0 and state[side.key("decay")] == 1


@pytest.mark.parametrize("size", [1e-200, 1e-30, 1.0, 1e30, 1e200])
@pytest.mark.parametrize("exponent", [-0.25, -1.0])
def test_turn_is_precondition_but_for_a_factor_and_of_moderate_numbers(plan, exponent, size):
    state, x = filled(plan), normal(*plan.dims, seed=9)
    expected = x.clone()
    plan.precondition(state, expected, exponent, 1e-6, "trace")
    got = (x * size).unsqueeze(0)
    power = kronecker.moderate(got)
    assert 0.5 <= got.abs().max() < 1
    stack = Stack(plan, [state])
    log = stack.turn(got, stack.roots(exponent, 1e-6, "trace"), sizes=True)
    assert 1e-60 < got.abs().max() < 1e60
    # The rounding of `x * size`, amplified by the condition of the roots, 1e6 along an axis.
    true = got.abs().max().log() + log + power.double() * math.log(2.0) - math.log(size)
    assert true.item() == pytest.approx(expected.abs().max().log().item(), abs=1e-8)
    assert torch.allclose(got[0] / got.norm(), expected / expected.norm(), rtol=0, atol=1e-8)


# -- stacks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_stack_is_its_tensors_one_by_one(plan, dtype):
    """Each tensor has covariances of its own, gathered and preconditioned; one of them has none yet."""
    states = [{name: t.to(dtype) for name, t in filled(plan, scale=10.0**n).items()} for n in range(3)]
    states.append(plan.allocate(CPU, dtype))
    others = [{name: t.clone() for name, t in state.items()} for state in states]
    x = torch.stack([normal(*plan.dims, seed=50 + n, dtype=dtype) for n in range(4)])
    before, stack = x.clone(), Stack(plan, states)
    tolerance = {"rtol": 0, "atol": 1e-12 if dtype == F64 else 1e-5}
    if plan.buffered:
        stack.gather(x, 0.9)
        assert torch.equal(x, before)
        for state, other, one in zip(states, others, x, strict=True):
            plan.gather(other, one, 0.9)
            for name, tensor in state.items():
                assert torch.allclose(tensor, other[name], rtol=tolerance["atol"], atol=tolerance["atol"])
    kronecker.moderate(x)
    alone = x.clone()
    stack.turn(x, stack.roots(-0.25, 1e-6, "trace"), sizes=False)
    for one, other, lone in zip(x, others, alone, strict=True):
        plan.precondition(other, lone, -0.25, 1e-6, "trace")
        assert torch.allclose(one / one.norm(), lone / lone.norm(), **tolerance)


def test_roots_of_many_stacks_are_those_of_each():
    """Stacks of different ranks, sizes and exponents, in one call."""
    stacks = [Stack(PLANS[name], [filled(PLANS[name], scale=2.0**n) for n in range(2)]) for name in PLANS]
    exponents = [-0.5 / len(stack.kronecker.dims) for stack in stacks]
    together = kronecker.roots(stacks, exponents, 1e-6, "trace")
    for stack, exponent, found in zip(stacks, exponents, together, strict=True):
        alone = stack.roots(exponent, 1e-6, "trace")
        assert list(found) == list(alone) == list(stack.kronecker.sides)
        for side, root in found.items():
            for one, other in zip(root, alone[side], strict=True):
                assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)
            for n, state in enumerate(stack.states):
                inside, outside = fd.inverse_root(side.get(state), exponent, 1e-6, "trace")
                assert torch.allclose(root.ratio[n], inside / outside - 1, rtol=1e-9, atol=1e-12)
                assert torch.allclose(root.log[n], outside.log(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-20, 1.0, 3e38])
def test_moderate_numbers_are_the_same_digits(size):
    x = torch.linspace(-1, 1, 12).view(2, 3, 2) * torch.tensor([size, 1.0]).view(2, 1, 1)
    got = x.clone()
    power = kronecker.moderate(got)
    assert torch.equal(got.double() * 2.0 ** power.double().view(2, 1, 1), x.double())
    if size >= 1e-37:
        assert ((got.abs().amax((1, 2)) >= 0.5) & (got.abs().amax((1, 2)) < 8)).all()


def test_solve_of_nothing():
    solve([], 0.9, "trace", "eigh")


def test_keys_of_sides_are_all_different():
    plan = PLANS["4d_blocks"]
    assert len({side.key("vectors") for side in plan.sides}) == len(plan.sides)
    assert Side(0, 1, 5, 2).key("tail") == "tail_0_1"

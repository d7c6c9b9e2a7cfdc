"""Recut pieces: exact state stays equal bit for bit, other state keeps its bounds, covariances keep order and trace."""

import math
from itertools import pairwise

import pytest
import torch

from sketch_plugins.checkpoints.recut import recut
from sketch_plugins.checkpoints.recut_geometry import Held
from sketch_plugins.linalg.cutting import cut
from sketch_plugins.linalg.kronecker import Kronecker
from sketch_plugins.linalg.solving import solve
from sketch_plugins.sharding.blocks import Matrix, Rows, matrix_shape
from sketch_plugins.sharding.pieces import Fragment, Piece, pieces
from sketch_plugins.stores import CountMin, CountSketch, Cover, Dense, Ema, Gradient, Int8, Log8, RowCountMin

CPU = torch.device("cpu")
SHAPES = [(1, 31), (31, 1), (31, 33), (1025, 3), (5, 1025), (12, 4, 5), (40,), ()]
STORES = {
    "fp32": ("first_moment", Dense(1)),
    "bf16": ("first_moment", Dense(1, bf16=True)),
    "int8": ("first_moment", Int8(block_size=8)),
    "log8": ("second_moment", Log8(block_size=8)),
    "count_sketch": ("first_moment", CountSketch(compression=0.2, depth=3)),
    "dense": ("second_moment", Dense(2)),
    "count_min": ("second_moment", CountMin(compression=0.2)),
    "count_min_sum": ("second_moment", CountMin(compression=0.2, bucket="sum")),
    "count_min_3": ("second_moment", CountMin(compression=0.2, depth=3, hash="affine")),
    "count_min_bf16": ("second_moment", CountMin(compression=0.2, bf16=True)),
    "count_min_scaled": ("second_moment", CountMin(compression=0.2, scaled=True)),
    "row_count_min": ("second_moment", RowCountMin(compression=0.2)),
    "cover": ("second_moment", None),
}


def flat(whole, world, align=2):
    """The pieces of each rank of a flat partition that holds the parameter alone."""
    n = math.prod(whole)
    size = -(-n // (align * world)) * align
    out = []
    for rank in range(world):
        lo, hi = min(rank * size, n), min((rank + 1) * size, n)
        out += pieces([Fragment(0, whole, lo, hi - lo, 0)])
    return out


def store_for(name, piece):
    moment, store = STORES[name]
    if store is None:
        store = Cover(dims=piece.shape) if len(piece.shape) > 1 else Dense(2)
    return moment, store


def held(piece, names=("int8", "count_min"), state=None):
    return Held(piece, dict(store_for(n, piece) for n in names), state={} if state is None else state)


def steps(h, gradients):
    """State that has averaged these gradients of the whole parameter."""
    rows, columns = h.rectangle
    h.state.update(step=torch.tensor(float(len(gradients))), place=h.piece.place)
    for name, store in h.stores.items():
        state = h.state[name] = store.allocate(h.matrix, CPU, torch.float32)
        for t, g in enumerate(gradients, 1):
            part = g.reshape(matrix_shape(g.shape))[rows.lo : rows.hi, columns.lo : columns.hi].contiguous()
            store.write(state, Gradient(Matrix(part), None, g.dtype, 64, h.matrix), Ema(0.9, 1 - 0.9, t))
    return h


def gradients(whole, n=3):
    generator = torch.Generator().manual_seed(len(whole))
    return [torch.randn(whole, generator=generator) + 0.1 for _ in range(n)]


def whole_of(held_, name):
    """The estimates of all pieces as one matrix."""
    out = torch.full(matrix_shape(held_[0].piece.whole), math.nan)
    for h in held_:
        rows, columns = h.rectangle
        at = Rows(rows.size, torch.arange(rows.size), 0, columns.size)
        read = h.stores[name].read(h.state[name], at, torch.float32)
        out[rows.lo : rows.hi, columns.lo : columns.hi] = read
    return out


def run(name, whole, old_world, new_world):
    old = [steps(held(p, [name]), gradients(whole)) for p in flat(whole, old_world)]
    new = [held(p, [name]) for p in flat(whole, new_world)]
    exact = recut(old, new)
    for h, same in zip(new, exact, strict=True):
        for moment, store in h.stores.items():
            if moment in same:
                rows, columns = h.rectangle
                before = whole_of(old, moment)[rows.lo : rows.hi, columns.lo : columns.hi]
                assert torch.equal(whole_of(new, moment)[rows.lo : rows.hi, columns.lo : columns.hi], before)
            else:
                assert not isinstance(store, Dense) and old_world != new_world
        assert h.state["step"] == 3 and torch.equal(h.state["place"], h.piece.place)
        for moment, store in h.stores.items():
            layout = store.layout(h.matrix, torch.float32)
            assert {k: (tuple(t.shape), t.dtype) for k, t in h.state[moment].items()} == layout
    return old, new


@pytest.mark.parametrize("whole", SHAPES)
@pytest.mark.parametrize("name", STORES)
def test_the_same_partition_is_the_identity_and_no_alias(name, whole):
    old, new = run(name, whole, 3, 3)
    for a, b in zip(old, new, strict=True):
        for moment in a.stores:
            for key, tensor in a.state[moment].items():
                assert torch.equal(tensor, b.state[moment][key])
                assert tensor.data_ptr() != b.state[moment][key].data_ptr()


@pytest.mark.parametrize("whole", SHAPES)
@pytest.mark.parametrize(("old_world", "new_world"), [(2, 1), (1, 4), (2, 3), (7, 2)])
@pytest.mark.parametrize("name", ["fp32", "bf16", "dense"])
def test_dense_moments_are_exact(name, old_world, new_world, whole):
    old, new = run(name, whole, old_world, new_world)
    moment = STORES[name][0]
    assert torch.equal(whole_of(new, moment), whole_of(old, moment))


@pytest.mark.parametrize("whole", SHAPES)
@pytest.mark.parametrize(("old_world", "new_world"), [(2, 1), (1, 4), (2, 3)])
def test_int8_blocks_that_stay_are_exact_and_others_within_half_a_step(old_world, new_world, whole):
    old, new = run("int8", whole, old_world, new_world)
    before, after = whole_of(old, "first_moment"), whole_of(new, "first_moment")
    kept = torch.zeros_like(before, dtype=torch.bool)

    def blocks(h):
        rows, columns = h.rectangle
        for row in range(rows.lo, rows.hi):
            for lo in range(columns.lo, columns.hi, 8):
                yield row, lo, min(lo + 8, columns.hi)

    common = {b for h in old for b in blocks(h)} & {b for h in new for b in blocks(h)}
    for row, lo, hi in common:
        kept[row, lo:hi] = True
    assert torch.equal(before[kept], after[kept])
    # The block's largest number, which belongs to the row, sets the step of its codes.
    bound = before.abs().amax(1, keepdim=True) / 254 * (1 + 1e-6)
    assert ((after - before).abs() <= bound).all()
    if old_world == 1 and len(whole) > 1 and whole[0] >= 8:
        assert kept.float().mean() > 0.5  # whole rows


def test_int8_codes_of_whole_rows_are_copied_not_encoded():
    """fl(127 s) / 127 is not always s, so encoding would change some scales. Those of whole rows stay."""
    whole = (6, 16)
    old = [steps(held(p, ["int8"]), gradients(whole)) for p in flat(whole, 1)]
    scales = old[0].state["first_moment"]["scales"]
    scales.copy_(torch.rand(scales.shape, generator=torch.Generator().manual_seed(1)) + 1.0)
    new = [held(p, ["int8"]) for p in flat(whole, 3)]
    recut(old, new)
    for key in ("codes", "scales"):
        assert torch.equal(torch.cat([h.state["first_moment"][key] for h in new]), old[0].state["first_moment"][key])


@pytest.mark.parametrize("whole", [(31, 33), (1025, 3), (12, 4, 5)])
@pytest.mark.parametrize(("old_world", "new_world"), [(2, 1), (1, 4), (2, 3)])
def test_count_min_means_are_means_of_the_old_estimates(old_world, new_world, whole):
    old, new = run("count_min", whole, old_world, new_world)
    before, after = whole_of(old, "second_moment"), whole_of(new, "second_moment")
    torch.testing.assert_close(after.sum(0), before.sum(0), rtol=1e-5, atol=0)
    for h in new:
        store = h.stores["second_moment"]
        rows, columns = h.rectangle
        mine, theirs = (x[rows.lo : rows.hi, columns.lo : columns.hi] for x in (after, before))
        buckets = store.hashes(rows.size)[0].bucket(torch.arange(rows.size))
        for b in range(store.buckets(rows.size)):
            expected = theirs[buckets == b].double().mean(0).float().expand(int((buckets == b).sum()), -1)
            torch.testing.assert_close(mine[buckets == b], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["count_min_sum", "count_sketch"])
def test_sums_do_not_grow_from_cut_to_cut(name):
    """Merged and split ten times; a sketch of its own estimates would grow by the load each time."""
    whole = (60, 7)
    moment = STORES[name][0]
    old = start = [steps(held(p, [name]), gradients(whole)) for p in flat(whole, 2)]
    for world in (3, 2) * 5:
        new = [held(p, [name]) for p in flat(whole, world)]
        recut(old, new)
        old = new
    assert whole_of(old, moment).norm() <= 1.5 * whole_of(start, moment).norm()
    if name == "count_min_sum":
        assert whole_of(old, moment).norm() >= 0.5 * whole_of(start, moment).norm()


@pytest.mark.parametrize("whole", [(31, 33), (12, 4, 5), (5, 1025)])
@pytest.mark.parametrize(("old_world", "new_world"), [(2, 1), (1, 4), (2, 3)])
def test_covers_stay_upper_bounds(old_world, new_world, whole):
    old, new = run("cover", whole, old_world, new_world)
    assert (whole_of(new, "second_moment") >= whole_of(old, "second_moment")).all()


def test_the_rows_scales_of_row_count_min_stay():
    old, new = run("row_count_min", (31, 33), 1, 3)
    before, after = whole_of(old, "second_moment"), whole_of(new, "second_moment")
    for h in new:
        rows, columns = h.rectangle
        part = before[rows.lo : rows.hi, columns.lo : columns.hi].mean(1)
        torch.testing.assert_close(h.state["second_moment"]["row"].squeeze(1), part, rtol=1e-5, atol=0)
        torch.testing.assert_close(after[rows.lo : rows.hi, columns.lo : columns.hi].mean(1), part, rtol=0.5, atol=0)


def test_shards_of_columns():
    """A DTensor cut along dimension 1 and then along dimension 0."""
    whole = (12, 10)
    old = [steps(held(Piece(0, whole, (12, 5), 0, c), ["fp32", "dense"]), gradients(whole)) for c in (0, 5)]
    new = [held(Piece(0, whole, (4, 10), r, 0), ["fp32", "dense"]) for r in (0, 4, 8)]
    recut(old, new)
    for name in ("first_moment", "second_moment"):
        assert torch.equal(whole_of(old, name), whole_of(new, name))


def test_a_rank_alone_is_enough_and_nothing_comes_of_nothing():
    whole = (31, 33)
    old = [steps(held(p), gradients(whole)) for p in flat(whole, 2)]
    one = [held(p) for p in flat(whole, 3)[:2]]
    every = [held(p) for p in flat(whole, 3)]
    recut(old, one)
    recut(old, every)
    for a, b in zip(one, every, strict=False):
        assert torch.equal(a.state["second_moment"]["table"], b.state["second_moment"]["table"])
    fresh = [held(p) for p in flat(whole, 3)]
    recut([held(p) for p in flat(whole, 2)], fresh)
    assert all(not h.state for h in fresh)


def test_the_last_rms_is_over_all_that_a_piece_is_made_of():
    old = [held(p, ("dense",)) for p in flat((6, 4), 2)]
    assert [h.piece.shape for h in old] == [(3, 4), (3, 4)]
    for h, rms in zip(old, (3.0, 4.0), strict=True):
        steps(h, [torch.ones(6, 4)])
        h.state["rms"] = {"last": torch.tensor([rms, 1.0])}
    (new,) = [held(p, ("dense",)) for p in flat((6, 4), 1)]
    (same,) = recut(old, [new])
    assert torch.equal(new.state["rms"]["last"], torch.tensor([12.5**0.5, 1.0])) and "rms" not in same
    again = [held(p, ("dense",)) for p in flat((6, 4), 2)]
    assert all("rms" in same for same in recut(old, again))
    assert all(torch.equal(a.state["rms"]["last"], b.state["rms"]["last"]) for a, b in zip(old, again, strict=True))


@pytest.mark.parametrize("whole", SHAPES)
@pytest.mark.parametrize(("old_world", "new_world"), [(2, 1), (1, 4), (2, 3), (7, 2), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16], ids=str)
def test_corrections_of_weights_go_where_their_weights_go(old_world, new_world, whole, dtype):
    info = torch.iinfo(dtype)
    rows, columns = matrix_shape(whole)
    codes = torch.randint(info.min, info.max + 1, (rows, columns), generator=torch.Generator().manual_seed(0)).to(dtype)

    def of(h):
        (lo, hi), (left, right) = h.rectangle
        return codes[lo:hi, left:right].reshape(h.matrix)

    old = [steps(held(p, ["fp32"]), gradients(whole)) for p in flat(whole, old_world)]
    for h in old:
        h.state["weight_correction"] = {"codes": of(h).clone(), "mark": torch.ones(1, dtype=torch.int64)}
    new = [held(p, ["fp32"]) for p in flat(whole, new_world)]
    for h, same in zip(new, recut(old, new), strict=True):
        assert "weight_correction" in same and torch.equal(h.state["weight_correction"]["codes"], of(h))
        # It is known which weights the fingerprint belongs to if nothing was cut.
        uncut = any(o.rectangle == h.rectangle and o.piece.shape == h.piece.shape for o in old)
        assert int(h.state["weight_correction"]["mark"]) == uncut


def test_what_does_not_fit_is_named():
    whole = (6, 4)
    old = [steps(held(p), gradients(whole)) for p in flat(whole, 2)]
    new = [held(p) for p in flat(whole, 1)]
    with pytest.raises(ValueError, match=r"has 24 elements, but the old pieces contain 12"):
        recut(old[:1], new)
    with pytest.raises(ValueError, match=r"contain 36 of them: they overlap"):
        recut([*old, old[0]], new)
    with pytest.raises(ValueError, match=r"shapes \(\(6, 4\), \(6, 5\)\)"):
        recut(old, [held(p) for p in flat((6, 5), 1)])
    with pytest.raises(ValueError, match="other pieces of the same parameter have state"):
        recut([old[0], held(old[1].piece)], new)
    with pytest.raises(ValueError, match="has no second_moment"):
        recut([steps(held(o.piece, ["int8"]), gradients(whole)) for o in old], new)
    with pytest.raises(ValueError, match="already has state"):
        recut(old, [old[0]])
    with pytest.raises(ValueError, match=r"was saved for position \[0, 0, 6, 4\]"):
        recut([old[0], Held(old[1].piece, old[1].stores, state={**old[1].state, "place": old[0].piece.place})], new)
    with pytest.raises(ValueError, match="contains step, place, first_moment; expected"):
        wrong = {k: v for k, v in old[1].state.items() if k != "second_moment"}
        recut([old[0], Held(old[1].piece, old[1].stores, state=wrong)], new)
    old[1].state["step"] += 1
    with pytest.raises(ValueError, match="different steps: 3, 4"):
        recut(old, new)
    assert not new[0].state


# -- covariances -----------------------------------------------------------------------------------------------------


def rows_of(whole, *cuts):
    bounds = [0, *cuts, whole[0]]
    return [Piece(0, whole, (b - a, *whole[1:]), a, 0) for a, b in pairwise(bounds)]


def preconditioned(piece, ranks=(3, 3), block=0, buffered=False, tail="trace", dims=None):
    dims = dims or piece.shape
    ranks = tuple(min(r, d) for r, d in zip(ranks, dims, strict=True))
    plan = Kronecker(tuple(dims), tuple(cut(d, block) for d in dims), ranks, buffered)
    return Held(piece, {}, plan, {}, tail)


def learn(h, updates, solved=True, tail="trace"):
    """Covariances of these updates of the whole parameter, decay 0.9; the last ones are only gathered if not solved."""
    h.state.update(step=torch.tensor(1.0), preconditioner=h.preconditioner.allocate(CPU, torch.float64))
    rows, _ = h.rectangle
    for t, x in enumerate(updates):
        part = x[rows.lo : rows.hi]
        if h.preconditioner.buffered:
            h.preconditioner.gather(h.state["preconditioner"], part, 0.9)
            if solved or t < len(updates) - 2:
                solve([(s, h.state["preconditioner"], None) for s in h.preconditioner.sides], 1.0, tail, "eigh")
        else:
            solve(
                [(s, h.state["preconditioner"], c) for s, c in h.preconditioner.columns(part).items()], 0.9, tail, "svd"
            )
    return h


def covariance(h, number=0):
    """``(V diag(values) V^T, tail, trace)`` of the number-th side."""
    c = h.preconditioner.sides[number].get(h.state["preconditioner"])
    return c.vectors * c.values @ c.vectors.mT, c.tail, c.trace


def updates(whole, n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2, whole[-1], dtype=torch.float64)
    return [torch.randn(whole, generator=generator, dtype=torch.float64) * scales for _ in range(n)]


def exact(parts):
    """The decayed sum of x x^T."""
    total = torch.zeros(len(parts[0]), len(parts[0]), dtype=torch.float64)
    for x in parts:
        total = 0.9 * total + x @ x.mT
    return total


def least(matrix):
    return torch.linalg.eigvalsh(matrix)[0]


@pytest.mark.parametrize("buffered", [False, True])
def test_the_same_partition_keeps_covariances_and_what_gathers(buffered):
    whole = (12, 5)
    old = [learn(preconditioned(p, buffered=buffered), updates(whole), solved=False) for p in rows_of(whole, 7)]
    new = [preconditioned(p, buffered=buffered) for p in rows_of(whole, 7)]
    recut(old, new, torch.float64)
    for a, b in zip(old, new, strict=True):
        assert a.state["preconditioner"].keys() == b.state["preconditioner"].keys()
        assert all(torch.equal(t, b.state["preconditioner"][k]) for k, t in a.state["preconditioner"].items())


@pytest.mark.parametrize("buffered", [False, True])
def test_merged_at_full_rank_the_columns_covariance_is_exact_and_the_rows_block_diagonal(buffered):
    whole = (12, 5)
    x = updates(whole)
    old = [learn(preconditioned(p, (12, 5), buffered=buffered), x, solved=False) for p in rows_of(whole, 7)]
    (new,) = made = [preconditioned(p, (12, 5), buffered=buffered) for p in rows_of(whole)]
    before = {k: t.clone() for k, t in old[0].state["preconditioner"].items()}
    recut(old, made, torch.float64)
    left, _, left_trace = covariance(new, 0)
    right, tail, right_trace = covariance(new, 1)
    torch.testing.assert_close(right, exact([u.mT for u in x]), rtol=1e-9, atol=1e-9)
    blocks = torch.block_diag(exact([u[:7] for u in x]), exact([u[7:] for u in x]))
    torch.testing.assert_close(left, blocks, rtol=1e-9, atol=1e-9)
    for trace in (left_trace, right_trace):
        torch.testing.assert_close(trace, blocks.trace())
    assert tail == 0
    # The old state is unchanged, and the new one has no gathered statistics.
    assert all(torch.equal(before[k], t) for k, t in old[0].state["preconditioner"].items())
    if buffered:
        state = new.state["preconditioner"]
        assert not state["buffer_0_0"].any() and state["mass_0_1"] == 0 and state["decay_0_1"] == 1


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("cuts", [((), (5,)), ((4, 9), ()), ((7,), (4, 9)), ((2,), (2, 7, 8))])
def test_traces_add_up_over_every_cut(cuts, buffered):
    whole = (12, 5)
    old = [learn(preconditioned(p, buffered=buffered), updates(whole)) for p in rows_of(whole, *cuts[0])]
    new = [preconditioned(p, buffered=buffered) for p in rows_of(whole, *cuts[1])]
    recut(old, new, torch.float64)
    for number in (0, 1):
        before, after = (sum(covariance(h, number)[2] for h in part) for part in (old, new))
        torch.testing.assert_close(after, before, rtol=1e-12, atol=0)
        for h in new:
            c = h.preconditioner.sides[number].get(h.state["preconditioner"])
            torch.testing.assert_close(c.vectors.mT @ c.vectors, torch.eye(c.vectors.shape[1]).double())
            assert (c.values >= 0).all() and (c.values.diff() <= 0).all()
            d, k = c.vectors.shape
            torch.testing.assert_close(c.values.sum() + c.tail * (d - k), c.trace)


def test_split_rows_have_the_diagonal_blocks_and_their_share_of_the_columns():
    whole = (12, 5)
    x = updates(whole)
    old = [learn(preconditioned(p, (12, 5)), x) for p in rows_of(whole)]
    new = [preconditioned(p, (12, 5)) for p in rows_of(whole, 4)]
    recut(old, new, torch.float64)
    left = exact(x)
    torch.testing.assert_close(covariance(new[0], 0)[0], left[:4, :4])
    torch.testing.assert_close(covariance(new[1], 0)[0], left[4:, 4:])
    right = exact([u.mT for u in x])
    torch.testing.assert_close(covariance(new[0], 1)[0], right * 4 / 12)
    torch.testing.assert_close(covariance(new[1], 1)[0], right * 8 / 12)
    # And merged again.
    again = [preconditioned(p, (12, 5)) for p in rows_of(whole)]
    recut(new, again, torch.float64)
    torch.testing.assert_close(covariance(again[0], 1)[0], right)


def test_the_papers_bound_carries_over_to_merged_pieces():
    """``0 <= L - V values V^T <= tail I`` of the merged columns, and of the rows' block diagonal."""
    whole = (12, 5)
    x = updates(whole, 6)
    old = [learn(preconditioned(p, (3, 2), tail="paper"), x, tail="paper") for p in rows_of(whole, 4, 9)]
    for cuts in ((), (4,)):
        made = [preconditioned(p, (3, 2), tail="paper") for p in rows_of(whole, *cuts)]
        recut(old, made, torch.float64)
        for h in made:
            (lo, hi), _ = h.rectangle
            right = exact([u[lo:hi].mT for u in x])
            bounds = [b for b in (0, 4, 9, 12) if lo <= b <= hi]
            left = torch.block_diag(*(exact([u[a:b] for u in x]) for a, b in pairwise(bounds)))
            for number, true in enumerate((left, right)):
                kept, tail, trace = covariance(h, number)
                assert least(true - kept) >= -1e-9 * trace
                assert least(kept + tail * torch.eye(len(true)) - true) >= -1e-9 * trace


def test_what_is_cut_off_is_the_least_of_it():
    """The k largest eigenvalues of the sum of the old sketches stay, which is its best approximation."""
    whole = (12, 5)
    old = [learn(preconditioned(p, (3, 2)), updates(whole)) for p in rows_of(whole, 7)]
    made = [preconditioned(p, (3, 2)) for p in rows_of(whole)]
    recut(old, made, torch.float64)
    total = torch.zeros(5, 5, dtype=torch.float64)
    for h in old:
        c = h.preconditioner.sides[1].get(h.state["preconditioner"])
        total += covariance(h, 1)[0] + c.tail * (torch.eye(5) - c.vectors @ c.vectors.mT)
    eigenvalues = torch.linalg.eigvalsh(total).flip(0)
    c = made[0].preconditioner.sides[1].get(made[0].state["preconditioner"])
    torch.testing.assert_close(c.values, eigenvalues[:2])
    torch.testing.assert_close(torch.linalg.matrix_norm(total - covariance(made[0], 1)[0], 2), eigenvalues[2])


def test_blocks_meet_blocks():
    """Blocks of at most 4, with other cuts of the rows and the same cuts of the columns; at full rank all is known."""
    whole = (12, 8)
    x = updates(whole)
    old = [learn(preconditioned(p, (4, 4), block=4), x) for p in rows_of(whole)]
    new = [preconditioned(p, (4, 4), block=4) for p in rows_of(whole, 6)]
    recut(old, new, torch.float64)
    for h in new:
        (lo, _), _ = h.rectangle
        for number, side in enumerate(h.preconditioner.sides):
            rows, columns = h.preconditioner.blocks[side.block]
            rows = slice(rows.start + lo, rows.stop + lo)
            expected = torch.zeros(side.size, side.size, dtype=torch.float64)
            for first in range(0, 12, 4):  # an old block's rows
                a, b = max(first, rows.start), min(first + 4, rows.stop)
                if a >= b:
                    continue
                if side.axis == 0:
                    into = slice(a - rows.start, b - rows.start)
                    expected[into, into] = exact([u[a:b, columns] for u in x])
                else:
                    expected += exact([u[first : first + 4, columns].mT for u in x]) * (b - a) / 4
            torch.testing.assert_close(covariance(h, number)[0], expected, rtol=1e-9, atol=1e-9)


def test_pieces_without_a_covariance_are_stood_for_by_the_others():
    """A row that was cut in two halves, which have no covariances; it is whole in the new piece."""
    whole = (5, 8)
    x = updates(whole)
    old = [learn(preconditioned(Piece(0, whole, (4, 8), 0, 0), (4, 8)), x)]
    for column in (0, 4):
        part = Held(Piece(0, whole, (1, 4), 4, column), {})
        part.state.update(step=torch.tensor(1.0))
        old.append(part)
    new = [preconditioned(p, (5, 8)) for p in rows_of(whole)]
    recut(old, new, torch.float64)
    left, right = exact([u[:4] for u in x]), exact([u[:4].mT for u in x])
    kept, _, trace = covariance(new[0], 1)
    torch.testing.assert_close(kept, right * 5 / 4)
    torch.testing.assert_close(trace, right.trace() * 5 / 4)
    kept, _, trace = covariance(new[0], 0)
    torch.testing.assert_close(kept, torch.block_diag(left, torch.zeros(1, 1)))
    torch.testing.assert_close(trace, left.trace() * 5 / 4)
    # If no piece has a covariance, a new one starts.
    fresh = [preconditioned(p, (2, 2)) for p in rows_of(whole)]
    recut([Held(p, {}, None, {"step": torch.tensor(1.0)}) for p in rows_of(whole, 2)], fresh)
    assert (covariance(fresh[0], 0)[0] == 0).all()


def test_a_vectors_covariance_follows_its_elements():
    """S-AdaGrad reads a piece as one vector: at full rank, the diagonal blocks of runs of elements stay."""
    whole = (3, 5)
    x = [u.reshape(-1, 1) for u in updates(whole)]

    def of(piece):
        h = preconditioned(piece, (15, 0), dims=(piece.numel, 1), tail="paper")
        return h

    old = []
    for piece in flat(whole, 2):
        h = of(piece)
        h.state.update(step=torch.tensor(1.0), preconditioner=h.preconditioner.allocate(CPU, torch.float64))
        start = piece.row * 5 + piece.column
        for u in x:
            solve(
                [(h.preconditioner.sides[0], h.state["preconditioner"], u[start : start + piece.numel])],
                0.9,
                "paper",
                "svd",
            )
        old.append(h)
    new = [of(p) for p in flat(whole, 1)]
    recut(old, new, torch.float64)
    bounds = [0, 5, 8, 10, 15]
    assert [h.piece.numel for h in old] == [b - a for a, b in pairwise(bounds)]
    expected = torch.block_diag(*(exact([u[a:b] for u in x]) for a, b in pairwise(bounds)))
    torch.testing.assert_close(covariance(new[0])[0], expected)


def test_other_ranks_and_float32():
    whole = (12, 5)
    x = [u.float() for u in updates(whole)]
    old = []
    for piece in rows_of(whole, 7):
        h = preconditioned(piece, (4, 4))
        h.state.update(step=torch.tensor(1.0), preconditioner=h.preconditioner.allocate(CPU, torch.float32))
        (lo, hi), _ = h.rectangle
        for u in x:
            solve(
                [(s, h.state["preconditioner"], c) for s, c in h.preconditioner.columns(u[lo:hi]).items()],
                0.9,
                "trace",
                "eigh",
            )
        old.append(h)
    new = [preconditioned(p, (2, 5)) for p in rows_of(whole)]
    recut(old, new)
    for name, tensor in new[0].state["preconditioner"].items():
        assert (tuple(tensor.shape), tensor.dtype) == new[0].preconditioner.layout(torch.float32)[name]
    torch.testing.assert_close(covariance(new[0], 1)[2], sum(covariance(h, 1)[2] for h in old))

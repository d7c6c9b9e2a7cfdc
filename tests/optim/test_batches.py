"""Experts: a parameter (E, R, D) is E matrices, and each of them has its own buckets."""

import copy
import importlib.util
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sketch_plugins import SM3, CSAdagrad, CSAdam, CSMomentum, CSRMSprop, Sketchy, convert_state, state_report
from sketch_plugins.memory.plan_optimizers import choices, sharded_cost
from sketch_plugins.memory.plan_trace import Subject
from sketch_plugins.memory.probe import SecondMomentProbe
from sketch_plugins.sharding.blocks import Matrix, Rows, Tile, is_batch, tiles
from sketch_plugins.stores import CountMin, Cover, Ema, Gradient

E, R, D = 3, 23, 20
SKETCHES = [
    (CSAdam, {"first_moment": "fp32"}),
    (CSAdam, {"first_moment": "int8", "compression": 0.3, "block_size": 8}),
    (CSAdam, {"first_moment": "none", "depth": 2, "hash": "affine"}),
    (CSAdam, {"first_moment": "none", "width": 5, "clean_every": 2}),
    (CSAdam, {"first_moment": "fp32", "second_moment": "row_count_min", "depth": 2}),
    (CSAdam, {"preset": "paper_cs_mv", "allow_dense_count_sketch": True}),
    (CSRMSprop, {"hash": "affine"}),
    (CSRMSprop, {"width": 100}),
    (CSAdagrad, {"weight_decay": 0.1}),
    (CSMomentum, {"first_moment": "count_sketch", "allow_dense_count_sketch": True, "depth": 3}),
]
INPUTS = st.integers(1, 5), st.integers(1, 40), st.integers(0, 45), st.floats(0.01, 1.0), st.integers(1, 3)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def train(cls, tensors, gradients, fused=False, **options):
    params = [torch.nn.Parameter(t.clone()) for t in tensors]
    optimizer = cls(params, fused=fused, **{"min_compress_size": 0, **options})
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return params, optimizer


@given(*INPUTS, st.sampled_from(["strided", "affine"]), st.integers(0, 3))
def test_no_bucket_holds_rows_of_two_matrices(number, rows, width, compression, depth, hash, seed):
    store = CountMin(compression=compression, width=width, depth=depth, hash=hash, seed=seed, matrices=number)
    alone = CountMin(compression=compression, width=width, depth=depth, hash=hash, seed=seed)
    index = torch.arange(number * rows)
    for h, single in zip(store.hashes(number * rows), alone.hashes(rows), strict=True):
        buckets = h.bucket(index)
        assert buckets.min() >= 0 and buckets.max() < store.buckets(number * rows) == number * alone.buckets(rows)
        for b in range(h.width):
            members = index[buckets == b]
            assert len(members) == h.load(torch.tensor(b)) >= 1
            assert len(set((members // rows).tolist())) == 1
        # Each matrix is hashed as if it were alone.
        own = torch.arange(rows)
        for m in range(number):
            assert torch.equal(h.bucket(own + m * rows), single.bucket(own) + m * single.width)
            assert torch.equal(h.sign(own + m * rows), single.sign(own))
        assert torch.equal(h.row(index).sort().values, index)
        assert torch.equal(h.bucket(h.row(index)), torch.tensor([h.bucket_of_place(i) for i in index.tolist()]))


@given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 9), st.integers(1, 9), st.integers(1, 99))
def test_tiles_with_a_period_stay_within_a_matrix(number, rows, columns, period, chunk):
    seen = torch.zeros(number * rows, columns)
    for at in tiles(number * rows, columns, chunk, period, matrices=number):
        at.get(seen).add_(1)
        assert at.start // rows == (at.start + at.cycles * at.rows - 1) // rows
        assert at.cycles == 1 or (at.start % rows % period == 0 and at.rows == period)
        assert at.start % rows % period + at.rows <= period
    assert (seen == 1).all()


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "last axis first"])
def test_a_batch_as_a_matrix_whatever_its_strides(layout):
    x = random(E, R, D)
    expected = x.reshape(E * R, D).clone()
    if layout == "transposed":
        x = x.mT.contiguous().mT
    elif layout == "last axis first":
        x = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    matrix = Matrix(x, 1)
    rows = torch.tensor([0, 22, 23, 50, 68])
    for at in (
        Tile(E * R, 20, 1, 30, 3, 17),
        Tile(E * R, 23, 2, 5, 0, D),
        Rows(E * R, rows, 0, D),
        Rows(69, rows, 5, 9),
    ):
        assert torch.equal(matrix.get(at), at.get(expected))
        new = random(*at.shape, seed=1)
        matrix.put(at, new)
        at.put(expected, new)
        assert torch.equal(x.reshape(E * R, D), expected)


@pytest.mark.parametrize("chunk_size", [0, 64])
@pytest.mark.parametrize(("cls", "options"), SKETCHES, ids=lambda v: v.__name__ if isinstance(v, type) else str(v))
def test_a_batch_trains_as_its_matrices_do_bit_for_bit(cls, options, chunk_size):
    options = {**options, "chunk_size": chunk_size}
    whole, steps = random(E, R, D), [random(E, R, D, seed=s) for s in (1, 2, 3)]
    (p,), one = train(cls, [whole], [[g] for g in steps], **options)
    matrices, several = train(cls, list(whole), [list(g) for g in steps], **options)
    assert torch.equal(p, torch.stack(list(matrices)))
    for name, tensor in one.state[p].items():
        if name != "step":
            apart = [several.state[q][name] for q in matrices]
            assert torch.equal(tensor, torch.cat(apart, 1 if name.endswith(".table") else 0)), name
    assert any(name.endswith(".table") and tensor.shape[1] % E == 0 for name, tensor in one.state[p].items())


COVARIANCES = [
    {},
    {"graft": "rmsprop", "rank": 4},
    {"graft": "adagrad", "momentum_placement": "after"},
    {"graft": "none"},
    {"graft": "none", "exponent": 1.0, "matrix_eps": 1e-3},
    {"input": "gradient", "momentum_of": "all"},
    {"input": "gradient", "graft": "rmsprop", "momentum_placement": "after", "chunk_size": 64},
    {"statistics": "sample", "update_freq": 1, "rank": 5},
    {"statistics": "sample", "input": "gradient", "tail": "paper", "update_freq": 2, "solver": "svd"},
    {"max_block_dim": 12, "rank": 0.25},
    {"max_aspect_ratio": 1.0, "rank": 3},
]


@pytest.mark.parametrize("fused", [False, None])
@pytest.mark.parametrize("options", COVARIANCES, ids=str)
def test_each_matrix_of_a_batch_has_covariances_of_its_own(options, fused):
    dtype, tolerance = (torch.float32, 2e-5) if fused is None else (torch.float64, 1e-10)
    options = {"update_freq": 3, "rank": 6, "batch_dims": 1, "first_moment": "fp32", **options}
    tensors = [random(E, R, D).to(dtype), random(E, R, D, seed=5).to(dtype)]
    steps = [[random(E, R, D, seed=10 * s + n).to(dtype) for n in range(2)] for s in range(7)]
    for step in steps:
        step[0][2] *= 100  # norms differ
        step[1][1] = 0  # an expert that gets no tokens
    together, one = train(Sketchy, tensors, steps, fused=fused, **options)
    single = [tensor for whole in tensors for tensor in whole]
    apart, several = train(
        Sketchy, single, [[g for whole in step for g in whole] for step in steps], fused=fused, **options
    )
    for number, p in enumerate(together):
        assert one.state[p]["preconditioner.values_0_1"].shape[0] == E
        own = apart[number * E : number * E + E]
        assert not torch.equal(p[0], tensors[number][0])
        torch.testing.assert_close(p.data, torch.stack([q.data for q in own]), rtol=tolerance, atol=tolerance)
        for name in ("values", "tail", "trace"):
            key = f"preconditioner.{name}_0_1"
            other = torch.stack([several.state[q][key] for q in own])
            torch.testing.assert_close(one.state[p][key], other, rtol=100 * tolerance, atol=tolerance)
    assert torch.equal(together[1][1].double(), tensors[1][1].double())


LAGGED = {"lagged_rms": True}
MEASURED = {"update_clip": 0.3, "scale_parameter": True, "reference_rms": 0.1}
# What measures, in every store. Without sketches int8 blocks run through a matrix, so those have a float32 momentum.
CLIPPED = [
    (CSAdam, {"preset": "lean"}),
    (CSAdam, {"preset": "lean", **LAGGED}),
    (CSAdam, {"preset": "lean", "depth": 2, "hash": "affine"}),
    (CSAdam, {"update_clip": 0.3}),
    (CSAdam, {"update_clip": 0.3, "block_size": 8, "compression": 0.3, **LAGGED}),
    (CSAdam, {"preset": "exact", **MEASURED}),
    (CSAdam, {"preset": "exact", **MEASURED, **LAGGED}),
    (CSAdam, {"min_compress_size": 1 << 20, **MEASURED, **LAGGED}),
    (CSRMSprop, {"preset": "lean", "compression": 0.3}),
    (CSAdagrad, {"preset": "lean", "weight_decay": 0.1, **LAGGED}),
    (CSMomentum, {"first_moment": "fp32", "nesterov": True, "update_clip": 0.3}),
    (SM3, {}),
    (SM3, LAGGED),
    (SM3, {"preset": "ema"}),
    (SM3, {"preset": "ema", "variant": "I", **LAGGED}),
    (SM3, {"preset": "exact", **LAGGED}),
    (Sketchy, {"precondition": "none", "momentum_of": "all"}),
    (Sketchy, {"precondition": "none", "graft": "sm3"}),
]
IDS = {"ids": lambda v: v.__name__ if isinstance(v, type) else str(v)}


def unlike(step, dtype):
    """Gradients of experts that are used in different sizes; the second one is first used in step 3."""
    g = random(E, R, D, seed=step)
    return (g * torch.tensor([3.0, float(step >= 3), 0.02]).view(E, 1, 1)).to(dtype)


@pytest.mark.filterwarnings("ignore:fused=True. a parameter of shape")
@pytest.mark.parametrize(("cls", "options"), CLIPPED, **IDS)
def test_each_matrix_is_clipped_and_scaled_by_itself(cls, options, fused):
    """A batch takes the steps that its matrices take as parameters of their own."""
    dtype, tolerance = (torch.float32, 2e-5) if fused else (torch.float64, 1e-10)
    whole = (random(E, R, D) * torch.tensor([1.0, 0.1, 5.0]).view(E, 1, 1)).to(dtype)
    steps = [unlike(step, dtype) for step in range(1, 5 if fused else 7)]
    options = {"lr": 0.01, "fused": fused, **options}
    (p,), one = train(cls, [whole], [[g] for g in steps], **options)
    matrices, several = train(cls, list(whole), [list(g) for g in steps], **options)
    apart = torch.stack([q.data for q in matrices])
    for moved, expected in zip(p.data - whole, apart - whole, strict=True):
        assert (moved - expected).abs().max() <= tolerance * expected.abs().max()
    if options.get("lagged_rms"):
        last = torch.stack([several.state[q]["rms.last"] for q in matrices])
        torch.testing.assert_close(one.state[p]["rms.last"], last, rtol=tolerance, atol=0.0)
    # Measured as a whole, the matrices would take other steps.
    (q,), _ = train(cls, [whole], [[g] for g in steps], **{**options, "batch_dims": 0})
    assert ((q - whole)[1] - (apart - whole)[1]).abs().max() > 0.1 * (apart - whole)[1].abs().max()


@pytest.mark.parametrize("options", [{}, {"input": "gradient"}, {"graft": "rmsprop"}, {"graft": "none"}], ids=str)
def test_a_matrix_of_a_stack_is_scaled_by_its_own_size(options):
    """Sketchy: matrices of any size, of which one gets no gradient at first, as parameters of their own."""
    options = {"update_freq": 3, "rank": 6, "first_moment": "fp32", "lr": 0.01, "fused": False, **options}
    scale = torch.tensor([1.0, 0.1, 5.0], dtype=torch.float64).view(E, 1, 1)
    tensors = [random(E, R, D, seed=n).double() * scale for n in (0, 5)]
    steps = [[random(E, R, D, seed=10 * s + n).double() * scale for n in range(2)] for s in range(6)]
    for step in steps[:3]:
        step[0][1] = 0
    together, _ = train(Sketchy, tensors, steps, **options)
    single = [matrix for whole in tensors for matrix in whole]
    apart, _ = train(Sketchy, single, [[g for whole in step for g in whole] for step in steps], **options)
    ours, expected = (torch.stack([p.data for p in found]).view(2, E, R, D) for found in (together, apart))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("cls", "options"),
    [(CSAdam, {"preset": "lean"}), (CSAdam, {"update_clip": 1.0}), (CSAdam, {"preset": "exact", "update_clip": 1.0}),
     (SM3, {}), (Sketchy, {"rank": 4})],
    **IDS,
)  # fmt: skip
def test_an_expert_that_is_first_used_late_takes_the_step_of_a_matrix_of_its_own(cls, options):
    """One of 16 experts gets its first gradient in step 51."""
    number = 16
    whole = 0.02 * random(number, 16, 16).double()
    options = {"lr": 1e-3, "weight_decay": 0.0, "fused": False, **options}
    p = torch.nn.Parameter(whole.clone())
    q = torch.nn.Parameter(whole[3].clone())
    mixed, single = (cls([x], min_compress_size=0, **options) for x in (p, q))
    for step in range(51):
        p.grad = random(number, 16, 16, seed=step + 1).double()
        if step < 50:
            p.grad[3] = 0
        q.grad = p.grad[3].clone()
        before = p.detach().clone(), q.detach().clone()
        mixed.step()
        single.step()
    first, alone = (p.detach() - before[0])[3].square().mean().sqrt(), (q.detach() - before[1]).square().mean().sqrt()
    assert 0 < first <= 1.5 * alone
    assert first <= 2e-3  # of a learning rate of 1e-3


@pytest.mark.parametrize("lagged", [False, True])
def test_the_touched_rows_of_each_matrix_are_measured_by_themselves(lagged):
    """An expert without touched rows takes no step, and keeps what it measured."""
    whole = (random(E, R, D) * torch.tensor([1.0, 0.1, 5.0]).view(E, 1, 1)).double()
    options = {"preset": "lean", "weight_decay": 0.0, "lagged_rms": lagged, "fused": False, "lr": 0.01}
    steps = []
    for s in range(1, 6):
        g = random(E, R, D, seed=s).double() * torch.tensor([3.0, 0.0 if s < 3 else 1.0, 0.02]).view(E, 1, 1)
        g[0, s % 3 :: 3] = 0
        if s == 4:
            g[2] = 0
        steps.append(g)
    (p,), one = train(CSAdam, [whole], [], **options)
    matrices, several = train(CSAdam, list(whole), [], **options)
    for s, g in enumerate(steps):
        for optimizer in (one, several):
            optimizer.param_groups[0]["row_sparse"] = s != 3  # the fourth step is dense
        p.grad = g.clone()
        one.step()
        for q, own in zip(matrices, g, strict=True):
            q.grad = own.clone()
        several.step()
        torch.testing.assert_close(p.data, torch.stack([q.data for q in matrices]), rtol=1e-10, atol=1e-12)
        if lagged:
            last = torch.stack([several.state[q]["rms.last"] for q in matrices])
            torch.testing.assert_close(one.state[p]["rms.last"], last, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("chunk_size", [0, 64])
@pytest.mark.parametrize(
    ("cls", "options"),
    [(CSAdam, {"preset": "lean"}), (CSAdam, {"second_moment": "row_count_min", **MEASURED, **LAGGED}),
     (SM3, {"first_moment": "fp32"}), (SM3, {"preset": "ema", "variant": "I"})],
    **IDS,
)  # fmt: skip
def test_a_sparse_tensor_touches_all_rows_of_its_experts(cls, options, chunk_size):
    whole = (random(E, R, D) * torch.tensor([1.0, 0.1, 5.0]).view(E, 1, 1)).double()
    g = random(E, R, D, seed=1).double() * torch.tensor([3.0, 1.0, 0.02]).view(E, 1, 1)
    options = {"weight_decay": 0.0, "lr": 0.01, "chunk_size": chunk_size, **options}
    index = torch.tensor([[0, 2]])
    touched = torch.sparse_coo_tensor(index, g[index[0]], g.shape, check_invariants=True)
    (p,), _ = train(cls, [whole], [[touched], [touched]], **options)
    assert torch.equal(p[1], whole[1])
    for matrix in (0, 2):
        rows = torch.sparse_coo_tensor(torch.arange(R).unsqueeze(0), g[matrix], (R, D), check_invariants=True)
        (q,), _ = train(cls, [whole[matrix]], [[rows], [rows]], **options)
        assert not torch.equal(q, whole[matrix])
        torch.testing.assert_close(p[matrix], q.data, rtol=1e-10, atol=1e-12)


def test_state_of_each_matrix_s_rms():
    """Two numbers for each matrix: bytes, a resumed run, and state dicts in which there are two for the whole."""
    whole, steps = random(E, R, D), [unlike(s, torch.float32) for s in range(1, 6)]
    for options in ({"preset": "lean"}, {"preset": "exact", **MEASURED}):
        options = {**options, **LAGGED}
        (p,), optimizer = train(CSAdam, [whole], [], **options)
        assert state_report(optimizer).by_store()["rms"] == 8 * E
        (p,), optimizer = train(CSAdam, [whole], [[g] for g in steps[:3]], **options)
        assert state_report(optimizer).by_store()["rms"] == 8 * E
        saved = copy.deepcopy(optimizer.state_dict())
        assert saved["state"][0]["rms.last"].shape == (E, 2)
        (q,), again = train(CSAdam, [p.detach()], [], **options)
        again.load_state_dict(saved)
        for g in steps[3:]:
            p.grad, q.grad = g.clone(), g.clone()
            optimizer.step()
            again.step()
        assert torch.equal(p, q) and torch.equal(optimizer.state[p]["rms.last"], again.state[q]["rms.last"])

        old = copy.deepcopy(saved)
        old["state"][0]["rms.last"] = torch.tensor([0.5, 0.25])
        again.load_state_dict(old)
        assert torch.equal(again.state[q]["rms.last"], torch.tensor([[0.5, 0.25]] * E))
        assert old["state"][0]["rms.last"].shape == (2,)
        old["state"][0]["rms.last"] = torch.zeros(E + 1, 2)
        with pytest.raises(ValueError, match=r"'last' of shape \(4, 2\).*expected \(3, 2\)"):
            again.load_state_dict(old)
    (p,), optimizer = train(CSAdam, [whole], [[steps[0]]], **options, batch_dims=0)
    assert optimizer.state[p]["rms.last"].shape == (2,)


def test_without_batches_a_parameter_is_measured_as_a_whole():
    """``batch_dims=0``: the steps are those of the matrix (E, R * D), bit for bit; so are a convolution's."""
    for shape, axes in (((E, R, D), {"batch_dims": 0}), ((20, 16, 3), {})):
        whole, steps = random(*shape), [random(*shape, seed=s) for s in (1, 2, 3)]
        for options in ({"preset": "lean"}, {"preset": "lean", **LAGGED}, {"preset": "exact", **MEASURED}):
            (p,), _ = train(CSAdam, [whole], [[g] for g in steps], **options, **axes)
            (q,), _ = train(CSAdam, [whole.flatten(1)], [[g.flatten(1)] for g in steps], **options)
            assert torch.equal(p.flatten(1), q)


def test_a_batch_that_cannot_be_decomposed_keeps_the_other_matrices(monkeypatch):
    """The covariance of one matrix overflows: it keeps its last preconditioner, and the others get new ones."""
    p = torch.nn.Parameter(random(E, R, D))
    optimizer = Sketchy([p], update_freq=1, rank=4, min_compress_size=0, statistics="accumulate")
    p.grad = random(E, R, D, seed=1)
    optimizer.step()
    before = {name: tensor.clone() for name, tensor in optimizer.state[p].items() if name.startswith("preconditioner")}
    optimizer.state[p]["preconditioner.buffer_0_1"][1] = float("inf")
    p.grad = random(E, R, D, seed=2)
    with pytest.warns(RuntimeWarning, match="the covariance of parameter 0.* could not be decomposed"):
        optimizer.step()
    for name in ("values", "vectors"):
        old, new = before[f"preconditioner.{name}_0_1"], optimizer.state[p][f"preconditioner.{name}_0_1"]
        assert torch.equal(old[1], new[1]) and not torch.equal(old[0], new[0]) and not torch.equal(old[2], new[2])
    assert bool((optimizer.state[p]["preconditioner.buffer_0_1"] == 0).all())


@pytest.mark.parametrize("most", [1, 3000, 1 << 24])
def test_solves_of_batches_are_bounded_and_the_same(most, monkeypatch):
    monkeypatch.setattr("sketch_plugins.linalg.solving.STACK", most)
    steps = [[random(E, R, D, seed=1), random(2, R, D, seed=2), random(R, D, seed=3)]] * 2
    params, _ = train(Sketchy, [random(E, R, D), random(2, R, D), random(R, D)], steps, batch_dims=1, rank=4)
    monkeypatch.undo()
    again, _ = train(Sketchy, [random(E, R, D), random(2, R, D), random(R, D)], steps, batch_dims=1, rank=4)
    for p, q in zip(params, again, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_row_sparse_gradients_of_a_batch():
    """Rows that are not touched stay; a gradient with whole experts touches all their rows."""
    whole, g = random(E, R, D), random(E, R, D, seed=1)
    g[0] = 0
    g[2, ::2] = 0
    options = {"row_sparse": True, "first_moment": "fp32", "depth": 2, "weight_decay": 0.0}
    (p,), _ = train(CSAdam, [whole], [[g], [g]], **options)
    matrices, _ = train(CSAdam, list(whole), [list(g)] * 2, **options)
    assert torch.equal(p, torch.stack(list(matrices)))
    assert torch.equal(p[0], whole[0]) and torch.equal(p[2, ::2], whole[2, ::2]) and (p[1] != whole[1]).all()

    index = torch.tensor([[2, 1]])
    sparse = torch.sparse_coo_tensor(index, g[index[0]] + 1, (E, R, D))
    dense = torch.zeros(E, R, D).index_copy_(0, index[0], g[index[0]] + 1)
    (a,), first = train(CSAdam, [whole], [[sparse], [sparse]], **options)
    (b,), second = train(CSAdam, [whole], [[dense], [dense]], **options)
    assert torch.equal(a, b) and torch.equal(a[0], whole[0])
    assert torch.equal(first.state[a]["second_moment.table"], second.state[b]["second_moment.table"])
    probe = SecondMomentProbe(first, rows=40)
    probe.update()
    assert 0 <= probe.relative_error() < 10


def experts(make, decays=False, d=16, h=32, number=8, steps=200):
    """Losses of experts that are used in the frequencies 1/2, 1/4, ..., 1/128.

    ``decays``: the learning rate falls linearly to 0.
    """
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.nn.Parameter(torch.randn(number, a, b, generator=generator) * 0.1) for a, b in ((d, h), (h, d)))
    target = torch.randn(number, d, d, generator=generator) / d**0.5
    often = torch.tensor([0.5 ** min(k + 1, number - 1) for k in range(number)])
    optimizer = make([up, down])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps if decays else 1.0)

    def loss(x, e, chosen):
        out = torch.zeros_like(x)
        for k in chosen:
            mine = (e == k).nonzero().squeeze(-1)
            out = out.index_copy(0, mine, torch.nn.functional.gelu(x[mine] @ up[k]) @ down[k] - x[mine] @ target[k])
        return out.square().mean()

    for _ in range(steps):
        x = torch.randn(256, d, generator=generator)
        e = torch.multinomial(often, 256, True, generator=generator)
        optimizer.zero_grad()
        loss(x, e, range(number)).backward()
        optimizer.step()
        schedule.step()
    x = torch.randn(512, d, generator=generator)
    with torch.no_grad():
        return [float(loss(x, torch.full((512,), k), [k])) for k in range(number)]


@pytest.fixture(scope="module")
def with_adamw():
    """Losses with AdamW: with a constant rate, and with one that decays."""
    return [experts(lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.0), decays) for decays in (False, True)]


ALL = [(CSAdam, {}), (CSAdam, {"preset": "lean"}), (SM3, {}), (SM3, {"preset": "ema"}), (Sketchy, {})]


@pytest.mark.parametrize(("cls", "options"), ALL, **IDS)
def test_the_rarest_expert_trains_as_with_adamw(cls, options, with_adamw):
    """At AdamW's rate and without another option, if the rate decays.

    At a constant rate steps that are relative to the weights have to have AdamW's size: ``reference_rms`` is the RMS of
    the weights, 0.1. Otherwise their noise would decide the loss.
    """
    for decays in (False, True):
        given = options if decays or (cls is CSAdam and not options) else {"reference_rms": 0.1, **options}
        ours = experts(lambda p, given=given: cls(p, lr=3e-3, weight_decay=0.0, fused=False, **given), decays)
        assert ours[-1] < 1.05 * with_adamw[decays][-1], (decays, ours, with_adamw)


def test_experts_that_share_buckets_would_be_noticed(with_adamw):
    mixed = experts(lambda p: CSAdam(p, lr=3e-3, weight_decay=0.0, fused=False, batch_dims=0))
    assert mixed[-1] > 1.1 * with_adamw[0][-1], (mixed, with_adamw)


def test_what_is_a_batch():
    batches = [(8, 28672, 4096), (8, 4096, 14336), (128, 2880, 5760), (512, 1024, 512), (1024, 512, 512), (3, 16, 16)]
    others = [
        (768, 48, 128), (1024, 64, 128), (512, 512, 3), (512, 512, 10), (1536, 768, 16), (512, 1, 10), (8192, 1, 4),
        (32, 3, 5, 5), (4096, 4096), (1, 1, 8192), (7,), (), (1024, 16, 64),
    ]  # fmt: skip
    assert all(map(is_batch, batches)) and not any(map(is_batch, others))
    optimizer = CSAdam([torch.nn.Parameter(torch.zeros(1))])
    (group,) = optimizer.param_groups
    for shape in batches + others:
        large = torch.tensor(shape).prod() >= group["min_compress_size"]
        assert optimizer.batch_axes(shape, group) == int(is_batch(shape) and bool(large))
        assert optimizer.batch_axes(shape, {**group, "batch_dims": 0}) == 0
        assert optimizer.batch_axes(shape, {**group, "batch_dims": 1}) == int(len(shape) > 2 and bool(large))
        # Without a sketch there are no buckets.
        assert optimizer.batch_axes(shape, {**group, "second_moment": "dense"}) == 0
    assert optimizer.batch_axes((8, 64, 64), {**group, "second_moment": "cover", "first_moment": "count_sketch"}) == 1
    with pytest.raises(ValueError, match=r"batch_dims=2 is not one of 'auto', 0, 1"):
        CSAdam([torch.nn.Parameter(torch.zeros(1))], batch_dims=2)


@pytest.mark.parametrize("fused", [False, pytest.param(True, id="numba")])
def test_a_convolution_is_what_it_was_bit_for_bit(fused):
    """The same numbers in a matrix (out, in * kernel) take the same steps."""
    if fused and importlib.util.find_spec("numba") is None:
        pytest.skip("needs Numba")
    x, g = random(40, 24, 5), random(40, 24, 5, seed=1)
    (conv,), a = train(CSAdam, [x], [[g], [g]], fused=fused)
    (matrix,), b = train(CSAdam, [x.flatten(1)], [[g.flatten(1)]] * 2, fused=fused)
    assert torch.equal(conv.flatten(1), matrix)
    assert a.state[conv]["second_moment.table"].shape == b.state[matrix]["second_moment.table"].shape == (1, 2, 120)


def test_bytes_of_a_layer_of_mixtral():
    shapes = [(8, 2 * 14336, 4096), (8, 4096, 14336)]
    params = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    optimizer = CSAdam(params)
    (group,) = optimizer.param_groups
    for p in params:
        planned = optimizer.planned_state(p, group)
        expected = {
            "first_moment": p.numel() * (1 + 4 / 128),
            "second_moment": 4 * 8 * -(-p.shape[1] // 20) * p.shape[2] + 4 * 8 * p.shape[1],
        }
        assert {name: size for name, (_, size) in planned.items()} == expected
    report = state_report(optimizer)
    assert report.planned and report.bytes_per_param < 1.3
    with torch.no_grad():
        assert state_report(CSAdam(params, batch_dims=0)).bytes_per_param > 1.5  # one bucket for 8 experts, and dearer


def test_plan_counts_the_pieces_of_experts():
    """Under ZeRO the pieces of every rank have buckets of their own; whole experts keep the same state as without."""
    shape = (4, 64, 64)
    (choice,) = choices("cs_adam", "fp32")
    subject = Subject(lambda: torch.nn.ParameterList([torch.nn.Parameter(torch.empty(shape))]))
    expert = 64 * 64 * (1 + 4 / 64) + 4 * 4 * 64  # int8 codes and scales, and 4 buckets of 64 numbers
    # The state of two experts, and 4 bytes an element for the partition.
    assert sharded_cost(choice, subject, True, 1, 2).state == 2 * (expert + 4 * 64 * 64)


def test_checkpoints():
    whole, g = random(E, R, D), random(E, R, D, seed=1)
    (p,), optimizer = train(CSAdam, [whole], [[g], [g]])
    (q,), again = train(CSAdam, [p.detach()], [])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, o in ((p, optimizer), (q, again)):
        one.grad = g.clone()
        o.step()
    assert torch.equal(p, q)

    # Before there was the option.
    (old,), writer = train(CSAdam, [whole], [[g]], batch_dims=0)
    saved = writer.state_dict()
    assert saved["state"][0]["second_moment.table"].shape == (1, 1, R * D)
    del saved["param_groups"][0]["batch_dims"]
    before = again.state_dict()["state"][0]["second_moment.table"].clone()
    with pytest.raises(
        ValueError, match=r"shape \(3, 23, 20\).*the 3 matrices share buckets, covers or covariances.*batch_dims=0"
    ):
        again.load_state_dict(saved)
    assert torch.equal(again.state_dict()["state"][0]["second_moment.table"], before)
    (q,), reader = train(CSAdam, [old.detach()], [], batch_dims=0)
    reader.load_state_dict(saved)
    for one, o in ((old, writer), (q, reader)):
        one.grad = g.clone()
        o.step()
    assert torch.equal(old, q)

    # Parameters that are no batch continue as before, and so do exact ones.
    for shape, options in (((40, 30), {}), ((E, R, D), {"preset": "exact"}), ((E, R, D), {"min_compress_size": 4096})):
        (x,), writer = train(CSAdam, [random(*shape)], [[random(*shape, seed=1)]], **options)
        saved = writer.state_dict()
        del saved["param_groups"][0]["batch_dims"]
        train(CSAdam, [x.detach()], [], **options)[1].load_state_dict(saved)

    with pytest.raises(ValueError, match=r"batch_dims='auto'.*batch_dims=0"):
        reader.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("variant", ["I", "II"])
def test_covers_of_an_earlier_version_which_all_matrices_shared(variant):
    options = {"variant": variant, "first_moment": "none"}
    (p,), writer = train(SM3, [random(E, R, D)], [[random(E, R, D, seed=1)]], **options)
    saved = copy.deepcopy(writer.state_dict())
    own = saved["state"][0]["second_moment.axis_1"]
    assert own.shape == (E, D)
    shared = saved["state"][0]["second_moment.axis_1"] = own.amax(0)
    (q,), reader = train(SM3, [p.detach()], [], **options)
    reader.load_state_dict(saved)
    assert torch.equal(reader.state[q]["second_moment.axis_1"], shared.expand(E, D))
    writer.state[p]["second_moment.axis_1"] = shared
    copied = pickle.loads(pickle.dumps(writer))
    (again,) = copied.param_groups[0]["params"]
    assert torch.equal(copied.state[again]["second_moment.axis_1"], shared.expand(E, D))
    assert torch.equal(reader.state[q]["second_moment.axis_0"], writer.state[p]["second_moment.axis_0"])
    q.grad = random(E, R, D, seed=2)
    reader.step()  # variant II computes the covers anew, so that each matrix has its own
    assert (reader.state[q]["second_moment.axis_1"] != shared).all()


def test_covers_of_rows_from_several_matrices():
    """Rows that are read or written together may belong to any matrices of the batch."""
    store = Cover(dims=(E * R, D), matrices=E)
    values = random(E * R, D).square()
    state = store.allocate((E * R, D), torch.device("cpu"), torch.float32)
    store.assign(state, values)
    assert torch.equal(state["axis_1"], values.view(E, R, D).amax(1))
    rows = torch.tensor([0, R - 1, R, 2 * R, 3 * R - 1])
    found = store.read(state, Rows(E * R, rows, 3, D - 2), torch.float32)
    columns = state["axis_1"][rows // R, 3 : D - 2]
    assert torch.equal(found, torch.minimum(state["axis_0"][rows, None], columns))
    grad = Gradient(Matrix(random(len(rows), D, seed=1)), rows, torch.float32, 40, (E * R, D), packed=True, matrices=E)
    store.write(state, grad, Ema(1.0, 1.0))
    expected = values.view(E, R, D).amax(1)
    new = values.amax(1)[rows, None] + grad.matrix.tensor.square()
    for row, matrix in zip(new, (rows // R).tolist(), strict=True):
        expected[matrix] = expected[matrix].maximum(row)
    torch.testing.assert_close(state["axis_1"], expected)


def test_converted_state():
    whole, g = random(E, R, D), random(E, R, D, seed=1)
    p = torch.nn.Parameter(whole.clone())
    adamw = torch.optim.AdamW([p])
    for _ in range(2):
        p.grad = g
        adamw.step()
    for options in ({"compression": 1.0, "first_moment": "fp32"}, {"compression": 0.2}):
        ours = CSAdam([p], min_compress_size=0, fused=False, **options)
        ours.load_state_dict(convert_state(adamw.state_dict(), ours))
        v = adamw.state[p]["exp_avg_sq"]
        if options["compression"] == 1.0:
            assert torch.equal(ours.state[p]["first_moment.dense"], adamw.state[p]["exp_avg"].flatten(0, 1))
            assert torch.equal(ours.state[p]["second_moment.table"][0], v.flatten(0, 1))
        else:
            width = 5  # a fifth of 23 rows
            means = torch.stack([v[m, b::width].mean(0) for m in range(E) for b in range(width)])
            torch.testing.assert_close(ours.state[p]["second_moment.table"][0], means)


@pytest.mark.parametrize(
    ("cls", "options"),
    [(CSAdam, {"preset": "lean", **LAGGED}), (CSAdam, {"preset": "exact", **LAGGED}),
     (SM3, {"preset": "ema", **LAGGED}), (Sketchy, {"first_moment": "fp32"}),
     (Sketchy, {"first_moment": "fp32", "precondition": "none", "momentum_of": "all"})],
    **IDS,
)  # fmt: skip
def test_converted_state_of_each_matrix_is_that_of_a_matrix_of_its_own(cls, options):
    """RMS of the last update, and momenta that are clipped and scaled."""
    scale = torch.tensor([3.0, 0.1, 10.0]).view(E, 1, 1)
    whole, found = random(E, R, D) * scale, []
    steps = [random(E, R, D, seed=s) * (scale if s > 1 else 1.0) for s in (1, 2)]
    for tensors in ([whole], list(whole)):
        params = [torch.nn.Parameter(t.clone()) for t in tensors]
        adamw = torch.optim.AdamW(params)
        for g in steps:
            for p, own in zip(params, [g] if len(params) == 1 else g, strict=True):
                p.grad = own.clone()
            adamw.step()
        ours = cls(params, min_compress_size=0, fused=False, **options)
        ours.load_state_dict(convert_state(adamw.state_dict(), ours))
        found.append([ours.state[p] for p in params])
    names = {"rms.last", "first_moment.dense"} & set(found[0][0])
    assert names
    for name in names:
        apart = torch.stack([state[name] for state in found[1]])
        torch.testing.assert_close(found[0][0][name].view(apart.shape), apart, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"budget": 3.0}, {"preset": "paper", "graft": "cs"}], ids=str)
def test_the_graft_of_sketchy(options):
    """Each expert has buckets of its own, as it has covariances of its own."""
    options = {"lr": 0.01, **options}
    whole, steps = random(E, R, D), [[random(E, R, D, seed=s)] for s in (1, 2, 3)]
    (p,), optimizer = train(Sketchy, [whole], steps, **options)
    assert optimizer.state[p]["second_moment.table"].shape == (1, E * 2, D)
    assert optimizer.state[p]["preconditioner.vectors_0_1"].shape[:2] == (E, D)
    (flat,), other = train(Sketchy, [whole], steps, batch_dims=0, **options)
    assert other.state[flat]["second_moment.table"].shape == (1, 1, R * D)
    assert torch.isfinite(p).all() and not torch.equal(p, whole)


def test_mixtral_of_transformers():
    """The three-dimensional parameters of the real class, and a step of them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    batches = {name: p for name, p in model.named_parameters() if p.ndim == 3}
    if not batches:
        pytest.skip(f"transformers {transformers.__version__} keeps each expert as a parameter of its own")
    assert {tuple(p.shape) for p in batches.values()} == {(4, 96, 32), (4, 32, 48)}
    optimizer = CSAdam(model.named_parameters(), lr=1e-2, fused=False)
    before = {name: p.detach().clone() for name, p in batches.items()}
    x = torch.randint(0, 64, (2, 16))
    losses = []
    for _ in range(3):
        loss = model(input_ids=x, labels=x).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    for name, p in batches.items():
        width = -(-p.shape[1] // 20)
        assert optimizer.state[p]["second_moment.table"].shape == (1, 4 * width, p.shape[2])
        assert not torch.equal(p, before[name])

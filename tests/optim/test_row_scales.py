"""`row_scales`: rows with larger gradients than their bucket's mean take shorter steps."""

import contextlib
import copy
import math

import pytest
import torch

from sketch_plugins import CSAdagrad, CSAdam, CSRMSprop, state_report
from sketch_plugins.optim import layout, stand_in
from sketch_plugins.optim.specialisations import Recorder, Stopped, specialisation, watching
from sketch_plugins.sharding.blocks import Matrix, Tile
from sketch_plugins.stores import CountMin, Ema, Gradient

from .conftest import parameters

pytestmark = pytest.mark.filterwarnings("ignore:fused=True. a parameter of shape")
SHAPES = [(46, 64), (90, 70), (30,), (3, 24, 72), (64, 200)]
OPTIONS = [
    {},
    {"preset": "lean"},
    {"preset": "lean", "lagged_rms": True},
    {"first_moment": "fp32", "update_clip": 0.5},
    {"width": 3},
    {"width": 1, "preset": "lean"},
    {"hash": "affine", "first_moment": "none"},
    {"table_dtype": "bf16", "first_moment": "fp32"},
]


@pytest.fixture(autouse=True)
def narrow(monkeypatch, request):
    """Narrower matrices have them, too, so that the interpreter is fast enough."""
    if "which_matrices" not in request.node.name:
        monkeypatch.setattr(layout, "SCALED", 64)


def gradients(shapes, step, dtype=torch.float32):
    """Rows have gradients of very different size."""
    out = []
    for n, shape in enumerate(shapes):
        g = torch.Generator().manual_seed(100 * step + n)
        own = torch.Generator().manual_seed(n)
        size = torch.exp(2 * torch.randn(shape[:-1] + (1,) * (len(shape) > 1), generator=own)) if len(shape) > 1 else 1
        out.append((torch.randn(shape, generator=g) * size).to(dtype))
    return out


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        for p, g in zip(params, gradients([tuple(p.shape) for p in params], step, params[0].dtype), strict=True):
            p.grad = g
        optimizer.step()


def naive(p, grads, width, lr, betas, eps):
    """The step as the documentation has it, row by row."""
    rows, columns = p.shape
    m, table = torch.zeros_like(p), torch.zeros(width, columns, dtype=p.dtype)
    means = torch.zeros(rows, dtype=p.dtype)
    members = [[i for i in range(rows) if i % width == b] for b in range(width)]
    for t, g in enumerate(grads, 1):
        old = means.clone()
        for b, of in enumerate(members):
            table[b] = betas[1] * table[b] + (1 - betas[1]) * (g[of] ** 2).mean(0)
        means = betas[1] * means + (1 - betas[1]) * (g**2).mean(1)
        m = betas[0] * m + (1 - betas[0]) * g
        for b, of in enumerate(members):
            for i in of:
                mean = old[of].mean()
                own = math.sqrt(mean / old[i]) if old[i] > mean else 1.0
                v = (table[b] / (1 - betas[1] ** t)).sqrt() + eps
                p[i] -= lr * own * m[i] / (1 - betas[0] ** t) / v
    return p, table, means


def test_is_the_formula():
    (p,) = parameters([(23, 64)])
    grads = [gradients([(23, 64)], step, torch.float64)[0] for step in range(6)]
    expected, table, means = naive(p.detach().clone(), grads, 4, 1e-2, (0.9, 0.99), 1e-8)
    optimizer = CSAdam(
        [p], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0, width=4, first_moment="fp32", min_compress_size=0
    )
    for g in grads:
        p.grad = g
        optimizer.step()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-12)
    state = optimizer.state[p]
    torch.testing.assert_close(state["second_moment.table"][0], table, rtol=1e-10, atol=0)
    torch.testing.assert_close(state["second_moment.row_means"].squeeze(1), means, rtol=1e-10, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_kernels_take_the_step_of_the_definition(options, fused):
    """Also in remembered steps. Codes of int8 differ where a number lies between two of them."""
    size = {} if "width" in options else {"compression": 0.1}
    options = {"lr": 1e-2, "min_compress_size": 0, **size, **options}
    ours, theirs = parameters(SHAPES, torch.float32), parameters(SHAPES, torch.float32)
    one, other = CSAdam(ours, fused=fused, **options), CSAdam(theirs, fused=False, **options)
    train(one, ours, 5)
    train(other, theirs, 5)
    int8 = one.param_groups[0]["first_moment"] == "int8"
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-3 if int8 else 1e-5)
        if "second_moment.row_means" in other.state[q]:
            names = ("second_moment.row_means", "second_moment.table")
            for name in names if options.get("table_dtype") != "bf16" else names[:1]:
                torch.testing.assert_close(one.state[p][name], other.state[q][name], rtol=1e-5, atol=0)


def test_a_row_with_large_gradients_takes_steps_of_adams_size(fused):
    """Twenty rows share one bucket; one of them has 100 times the gradients."""
    steps = {}
    for scales in (False, True):
        p = torch.nn.Parameter(torch.zeros(20, 64))
        optimizer = CSAdam(
            [p], lr=1.0, width=1, row_scales=scales, first_moment="none", min_compress_size=0, weight_decay=0.0,
            fused=fused,
        )  # fmt: skip
        for step in range(30):
            before = p.detach().clone()
            p.grad = torch.randn(20, 64, generator=torch.Generator().manual_seed(step))
            p.grad[7] *= 100
            optimizer.step()
        steps[scales] = (p.detach() - before).square().mean(1).sqrt()
    assert steps[False][7] == pytest.approx(math.sqrt(20), rel=0.3) and steps[True][7] == pytest.approx(1, rel=0.3)
    others = torch.arange(20) != 7
    torch.testing.assert_close(steps[False][others], steps[True][others], rtol=1e-5, atol=0)


@pytest.mark.parametrize("options", [{}, {"preset": "lean"}, {"preset": "lean", "lagged_rms": True}], ids=str)
def test_the_number_of_threads_does_not_matter(options):
    """A matrix that is most of the step is measured by all threads, and then they apply it."""
    pytest.importorskip("numba")
    results, threads = [], torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            params = parameters([(900, 130), (70, 64)], torch.float32)
            train(optimizer := CSAdam(params, lr=1e-2, fused=True, min_compress_size=0, **options), params, 3)
            results.append((params, [optimizer.state[p]["second_moment.row_means"] for p in params]))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, results[0][0], results[1][0])) and all(map(torch.equal, results[0][1], results[1][1]))


def test_which_matrices_have_them():
    shapes = [(100, 128), (100, 127), (8192, 128), (8192, 512), (100,), (4, 32, 128), (16, 128)]
    params = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
    optimizer = CSAdam(params, min_compress_size=0)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    have = ["second_moment.row_means" in optimizer.state[p] for p in params]
    assert have == [True, False, False, True, False, True, True]
    for options in ({"row_scales": False}, {"depth": 2}, {"bucket": "sum"}, {"compression": 1.0}, {"preset": "exact"}):
        optimizer = CSAdam([torch.nn.Parameter(torch.ones(100, 128))], min_compress_size=0, **options)
        optimizer.param_groups[0]["params"][0].grad = torch.ones(100, 128)
        optimizer.step()
        assert not any("row_means" in name for state in optimizer.state.values() for name in state), options
    assert "row_scales" in CSRMSprop([torch.nn.Parameter(torch.ones(2))]).param_groups[0]


def test_bytes():
    p = torch.nn.Parameter(torch.zeros(1000, 400))
    with_, without = (state_report(CSAdam([p], row_scales=scales)).bytes_per_param for scales in (True, False))
    assert with_ - without == pytest.approx(4 / 400)


def test_row_sparse_steps_neither_read_nor_write_them(fused):
    states = []
    for scales in (True, False):
        (p,) = parameters([(60, 64)], torch.float32)
        optimizer = CSAdam([p], lr=1e-2, row_scales=scales, row_sparse=True, min_compress_size=0, fused=fused)
        for step in range(4):
            p.grad = gradients([(60, 64)], step)[0]
            p.grad[torch.arange(60) % 3 != step % 3] = 0
            optimizer.step()
        states.append((p, optimizer.state[p]))
    (p, state), (q, _) = states
    assert torch.equal(p, q) and not state["second_moment.row_means"].any()


@pytest.mark.parametrize("matrices", [1, 3])
@pytest.mark.parametrize("hash", ["strided", "affine"])
def test_estimates_are_of_rank_one_within_a_bucket(hash, matrices):
    """Exactly, if the squares are; then `assign` of the estimates gives the same state."""
    store = CountMin(width=4, hash=hash, matrices=matrices, scaled=True, seed=3)
    shape, g = (matrices * 22, 6), torch.Generator().manual_seed(0)
    rows, columns = torch.rand(shape[0], 1, generator=g, dtype=torch.float64), torch.rand(1, 6, generator=g).double()
    grad = Gradient(Matrix((rows * columns).sqrt()), None, torch.float64, 50, shape, matrices=matrices)
    state = store.allocate(shape, torch.device("cpu"), torch.float64)
    store.write(state, grad, Ema(0.9, 0.1, 1))
    read = torch.cat(
        [store.read(state, Tile(shape[0], i, 1, 1, 0, 6), torch.float64).view(1, 6) for i in range(shape[0])]
    )
    torch.testing.assert_close(read, 0.1 * rows * columns, rtol=1e-12, atol=0)
    again = store.allocate(shape, torch.device("cpu"), torch.float64)
    store.assign(again, read)
    for name, value in state.items():
        torch.testing.assert_close(again[name], value, rtol=1e-12, atol=0)


def test_checkpoints_of_earlier_versions_go_on_without_them():
    p, q = parameters([(50, 64)], torch.float32), parameters([(50, 64)], torch.float32)
    writer, reader = CSAdam(p, row_scales=False, min_compress_size=0), CSAdam(q, min_compress_size=0)
    train(writer, p, 2)
    train(reader, q, 1)
    saved = copy.deepcopy(writer.state_dict())
    del saved["param_groups"][0]["row_scales"]
    reader.load_state_dict(saved)
    assert reader.param_groups[0]["row_scales"] is False
    with torch.no_grad():
        q[0].copy_(p[0])
    train(writer, p, 2, first=2)
    train(reader, q, 2, first=2)
    assert torch.equal(p[0], q[0])
    # The same script is started a second time.
    third = CSAdam(q, min_compress_size=0)
    third.load_state_dict(copy.deepcopy(reader.state_dict()))
    train(writer, p, 1, first=4)
    train(third, q, 1, first=4)
    assert torch.equal(p[0], q[0])


def test_estimates_where_means_tell_nothing():
    """Overflowed sums, and rows that have had no dense gradient: the estimate is the bucket's, and never NaN."""
    store = CountMin(width=1, scaled=True)
    state = store.allocate((4, 3), torch.device("cpu"), torch.float32)
    state["table"].fill_(2.0)
    at = Tile(4, 0, 4, 1, 0, 3)
    for means in ([math.inf, 1, 1, 1], [3e38, 3e38, 3e38, 1], [0, 0, 0, 0]):
        state["row_means"].copy_(torch.tensor(means).unsqueeze(1))
        assert (store.read(state, at, torch.float32) == 2).all() and (store.used(state, at, torch.float32) == 2).all()
    state["row_means"].copy_(torch.tensor([0.0, 1, 1, 6]).unsqueeze(1))
    assert store.read(state, at, torch.float32)[:, 0, 0].tolist() == [2, 1, 1, 6]
    assert store.used(state, at, torch.float32)[:, 0, 0].tolist() == [2, 2, 2, 6]


def test_other_optimizers_do_not_take_the_key():
    p = torch.nn.Parameter(torch.zeros(100, 128))
    with pytest.raises((ValueError, TypeError), match="row_scales"):
        CSAdagrad([{"params": [p], "row_scales": True}], bucket="mean")


@pytest.mark.parametrize("shape", [(8192, 128), (400, 256)], ids=["embedding", "matrix"])
def test_the_self_check_finds_a_smaller_tensor(shape, monkeypatch):
    """Whose step runs the same kernel: an embedding has no row scales, a matrix of as many columns would have them."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted where there is no GPU only")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = []

    class Noted(Recorder):
        def note(self, pending):
            found.extend(pending)
            super().note(pending)

    p = torch.nn.Parameter(torch.randn(shape))
    p.grad = torch.randn(shape)
    optimizer = CSAdam([p], fused=True)
    with contextlib.suppress(Stopped), watching(Noted(stop=True)):
        optimizer.step()
    _, text = specialisation(found[0].backend.name, found[0].work)
    kind = stand_in.like(optimizer, found[0], text)
    assert kind is not None and math.prod(kind[0]) < math.prod(shape)


def test_numbers_that_overflow_scale_nothing():
    (p,) = parameters([(40, 64)], torch.float32)
    optimizer = CSAdam([p], lr=1e-3, width=2, first_moment="none", min_compress_size=0, fused=False)
    for _ in range(3):
        p.grad = torch.full_like(p, 1e20)
        optimizer.step()
    assert p.isfinite().all()

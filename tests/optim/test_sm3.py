"""SM3 against a naive implementation with loops over elements, and its own properties; the rest is inherited."""

import copy
import itertools
import math
import pickle
from functools import partial

import pytest
import torch

from sketch_plugins import SM3, CSAdagrad, CSAdam, CSRMSprop, quadratic_warmup, state_report
from sketch_plugins.memory.probe import SecondMomentProbe
from sketch_plugins.sharding.state_names import nested

from .conftest import known, parameters, train

# The published form, which the references are written for.
Paper = partial(SM3, preset="paper")
SHAPES = [(), (1,), (5,), (4, 3), (1, 6), (3, 1), (3, 2, 4), (2, 3, 2, 2)]


class Naive:
    """The paper's pseudo-code on dictionaries of floats; moments of a tensor, one element at a time."""

    def __init__(self, shape, variant, beta1, beta2):
        self.shape, self.variant, self.beta1, self.beta2 = shape, variant, beta1, beta2
        self.every = list(itertools.product(*map(range, shape)))
        # The slices of a vector are its elements; a number is one slice.
        self.axes = range(len(shape)) if shape else [None]
        self.mu = {s: 0.0 for i in self.every for s in self.slices(i)}
        self.m = {i: 0.0 for i in self.every}

    def slices(self, i, rows=None):
        return [(k, None if k is None else i[k]) for k in (self.axes if rows is None else self.axes[:1])]

    def nu(self, g, rows=None):
        gain = 1.0 if self.beta2 == 1.0 else 1.0 - self.beta2
        touched = [i for i in self.every if rows is None or i[0] in rows]
        square = {i: float(g[i]) ** 2 for i in touched}
        members = {}
        for i in touched:
            for s in self.slices(i):
                members.setdefault(s, []).append(i)
        if self.variant == "II":
            nu = {i: self.beta2 * min(self.mu[s] for s in self.slices(i, rows)) + gain * square[i] for i in touched}
            new = {s: max(nu[i] for i in inside) for s, inside in members.items()}
        else:
            new = {s: self.beta2 * self.mu[s] + gain * max(square[i] for i in x) for s, x in members.items()}
        for s, value in new.items():
            self.mu[s] = value if rows is None or s[0] == 0 else max(self.mu[s], value)
        if self.variant == "I":
            nu = {i: min(self.mu[s] for s in self.slices(i, rows)) for i in touched}
        return nu

    def step(self, p, g, lr, decay, momentum, rows=None, clip=0.0):
        nu = self.nu(g, rows)
        u = {i: float(g[i]) / math.sqrt(v) if v > 0 else 0.0 for i, v in nu.items()}
        rms = math.sqrt(sum(x * x for x in u.values()) / len(u))
        for i in nu:
            x = u[i] / max(1.0, rms / clip) if clip else u[i]
            if momentum:
                x = self.m[i] = self.beta1 * self.m[i] + (1 - self.beta1) * x
            p[i] = (1 - lr * decay) * float(p[i]) - lr * x
        return rms


def some(shape, steps, seed=0):
    g = torch.Generator().manual_seed(seed)
    for t in range(steps):
        x = torch.randn(shape, dtype=torch.float64, generator=g) * (1 + t % 3)
        yield x * (torch.rand(shape, generator=g) < 0.8)


def start(shape, seed=9):
    return torch.nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))


def sparse(g, rows):
    return torch.sparse_coo_tensor(torch.tensor([rows]), g[rows], g.shape, check_invariants=True)


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("momentum", ["fp32", "none"])
@pytest.mark.parametrize("beta2", [1.0, 0.9])
@pytest.mark.parametrize("variant", ["II", "I"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dense_trajectory(shape, variant, beta2, momentum, chunk):
    p = start(shape)
    expected = p.detach().clone()
    optimizer = Paper(
        [p], 0.05, (0.8, beta2), weight_decay=0.1, variant=variant, first_moment=momentum, chunk_size=chunk
    )
    naive = Naive(shape, variant, 0.8, beta2)
    for g in some(shape, 6):
        p.grad = g
        optimizer.step()
        naive.step(expected, g, 0.05, 0.1, momentum != "none")
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("how", ["sparse", "row_sparse"])
@pytest.mark.parametrize("momentum", ["fp32", "none"])
@pytest.mark.parametrize("beta2", [1.0, 0.9])
@pytest.mark.parametrize("variant", ["II", "I"])
@pytest.mark.parametrize("shape", [(6, 3), (5, 2, 2)])
def test_dense_and_sparse_steps_in_turn(shape, variant, beta2, momentum, how):
    p = start(shape)
    expected = p.detach().clone()
    options = {"variant": variant, "first_moment": momentum, "chunk_size": 4}
    optimizer = Paper([p], 0.05, (0.8, beta2), weight_decay=0.1, row_sparse=how == "row_sparse", **options)
    naive = Naive(shape, variant, 0.8, beta2)
    for t, g in enumerate(some(shape, 8)):
        rows = None if t % 3 == 0 else [[0, 2, 4], [1, 2], [3]][t % 3]
        before = p.detach().clone()
        if rows is None:
            g = g + 0.01  # every row has a gradient, and is found to have one
            p.grad = g
        else:
            mask = torch.zeros(shape, dtype=torch.float64)
            mask[rows] = 1
            g = (g + 0.01) * mask
            p.grad = sparse(g, rows) if how == "sparse" else g
        # If rows are searched for, a step with all of them is also a row-sparse one.
        every = list(range(shape[0])) if rows is None and how == "row_sparse" else rows
        optimizer.step()
        naive.step(expected, g, 0.05, 0.1, momentum != "none", every)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-13)
        if rows is not None:
            others = [i for i in range(shape[0]) if i not in rows]
            assert torch.equal(p.detach()[others], before[others])


def test_repeated_indices_of_a_sparse_gradient_are_one_row():
    torch.manual_seed(0)
    values = torch.randn(4, 3, dtype=torch.float64)
    once, twice = start((6, 3)), start((6, 3))
    a, b = Paper([once]), Paper([twice])
    for _ in range(3):
        twice.grad = torch.sparse_coo_tensor(torch.tensor([[4, 1, 4, 1]]), values, (6, 3), check_invariants=True)
        once.grad = sparse(twice.grad.to_dense(), [1, 4])
        a.step()
        b.step()
    assert torch.equal(once, twice)


@pytest.mark.parametrize("variant", ["II", "I"])
def test_untouched_rows_keep_parameter_cover_and_momentum_bit_for_bit(variant):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(30, 20))
    optimizer = Paper([p], weight_decay=0.1, variant=variant)
    for t in range(6):
        before = p.detach().clone(), copy.deepcopy(optimizer.state.get(p, {}))
        rows = torch.randperm(30)[:7].sort().values
        p.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), torch.randn(7, 20), (30, 20), check_invariants=True)
        optimizer.step()
        rest = torch.ones(30, dtype=torch.bool)
        rest[rows] = False
        assert torch.equal(p[rest], before[0][rest]) and (p[rows] != before[0][rows]).any(1).all()
        if t:
            now, old = optimizer.state[p], before[1]
            assert torch.equal(now["second_moment.axis_0"][rest], old["second_moment.axis_0"][rest])
            for key in ("codes", "scales"):
                assert torch.equal(now[f"first_moment.{key}"][rest], old[f"first_moment.{key}"][rest])


@pytest.mark.parametrize("shape", [(), (7,), (6, 1), (1, 6)])
def test_where_covers_are_exact_it_is_adagrad(shape):
    """Vectors, numbers, and matrices of one row or one column: no two elements share every slice."""
    mine, theirs = start(shape), start(shape)
    a = Paper([mine], 0.1, first_moment="none")
    b = torch.optim.Adagrad([theirs], 0.1, eps=1e-30)
    for g in some(shape, 8):
        mine.grad, theirs.grad = g + 0.1, g + 0.1
        a.step()
        b.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 5), (3, 2, 4)])
def test_dense_sums_are_adagrad_with_momentum_on_its_update(shape):
    p = start(shape)
    expected, total, m = p.detach().clone(), torch.zeros(shape), torch.zeros(shape)
    optimizer = Paper([p], 0.1, first_moment="fp32", second_moment="dense")
    for g in some(shape, 6):
        g = g + 0.1
        total = total + g * g
        m = 0.9 * m + 0.1 * g / total.sqrt()
        expected -= 0.1 * m
        p.grad = g
        optimizer.step()
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)
    assert state_report(optimizer).by_store() == {"first_moment": 8 * p.numel(), "second_moment": 8 * p.numel()}


@pytest.mark.parametrize("eps", [1e-30, 0.0])
@pytest.mark.parametrize("options", [{}, {"variant": "I"}, {"betas": (0.9, 0.9)}, {"preset": "lean"}], ids=str)
def test_elements_that_never_had_a_gradient_stay_where_they_are(options, eps):
    p = torch.nn.Parameter(torch.randn(6, 5))
    before = p.detach().clone()
    optimizer = Paper([p], eps=eps, **options)
    for _ in range(3):
        p.grad = torch.zeros(6, 5)
        optimizer.step()
        assert torch.equal(p, before)
        assert not any(t.any() for t in nested(optimizer.state[p])["second_moment"].values())
    p.grad[2, 3] = 1.0
    optimizer.step()
    changed = (p != before).nonzero().tolist()
    assert changed == [[2, 3]]


def test_the_first_step_without_momentum_is_the_sign():
    p = torch.nn.Parameter(torch.zeros(4, 6))
    g = torch.randn(4, 6) * torch.logspace(-8, 8, 6)
    p.grad = g
    Paper([p], 0.5, preset="lean").step()
    torch.testing.assert_close(p.detach(), -0.5 * g.sign(), rtol=1e-6, atol=0)


def test_averages_decay():
    p = torch.nn.Parameter(torch.zeros(4, 3, 2, dtype=torch.float64))
    optimizer = Paper([p], betas=(0.9, 0.5), preset="lean")
    p.grad = torch.ones_like(p) * 8
    optimizer.step()
    for t in range(1, 20):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        for cover in nested(optimizer.state[p])["second_moment"].values():
            assert (cover == 32 * 0.5**t).all()


@pytest.mark.parametrize("shape", [(64, 33), (6, 4, 3, 3), (12, 5, 7)])
@pytest.mark.parametrize("options", [{}, {"variant": "I"}, {"first_moment": "bf16"}, {"preset": "lean"}], ids=str)
def test_the_chunk_size_does_not_change_a_bit(shape, options):
    results = []
    for chunk in (1, 70, 300, 10**6):
        p = parameters([shape], torch.float32)[0]
        # Blocks of 4: int8 tiles hold whole ones at every chunk size.
        optimizer = Paper([p], chunk_size=chunk, block_size=4, weight_decay=0.1, **options)
        train(optimizer, [p], 5)
        results.append((p, nested(optimizer.state[p])["second_moment"]))
    for p, covers in results[1:]:
        assert torch.equal(p, results[0][0])
        assert all(torch.equal(covers[k], results[0][1][k]) for k in covers)


def test_state_bytes():
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 4), (torch.float64, 8)):
        for shape in [(64, 3, 3, 3), (100, 7), (5, 4, 3), (1, 9)]:
            p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
            optimizer = Paper([p], preset="lean")
            assert state_report(optimizer).state_bytes == size * sum(shape)
            p.grad = torch.ones_like(p)
            optimizer.step()
            assert state_report(optimizer).by_store() == {"second_moment": size * sum(shape)}
    p = torch.nn.Parameter(torch.zeros(1024, 4096, device="meta"))
    report = state_report(Paper([p]))
    assert report.by_store() == {"first_moment": p.numel() + p.numel() // 128 * 4, "second_moment": 4 * (1024 + 4096)}
    small = Paper([torch.nn.Parameter(torch.zeros(8, 8))], preset="lean", min_compress_size=100)
    assert state_report(small).state_bytes == 4 * 64


@pytest.mark.parametrize("first_moment", ["none", "fp32", "int8", "bf16"])
def test_update_clip_comes_before_the_momentum(first_moment):
    shape = (9, 8)
    p = start(shape)
    expected = p.detach().clone()
    optimizer = Paper([p], 0.1, update_clip=0.3, first_moment=first_moment, chunk_size=16)
    naive, clipped = Naive(shape, "II", 0.9, 1.0), 0
    for g in some(shape, 8):
        p.grad = g
        optimizer.step()
        clipped += naive.step(expected, g, 0.1, 0.0, first_moment != "none", clip=0.3) > 0.3
        # m is at most about 0.3; its codes err by 1/254 of that, 10 steps long at beta1 = 0.9, at a rate of 0.1
        atol = 0.1 * 10 * 0.3 / 254 if first_moment in ("int8", "bf16") else 1e-12
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=atol)
    assert 0 < clipped


def test_scale_parameter():
    p, q = start((9, 8)), start((9, 8))
    a, b = Paper([p], 1.0, scale_parameter=True), Paper([q], 1.0)
    for g in some((9, 8), 4):
        b.param_groups[0]["lr"] = float(p.detach().square().mean().sqrt())
        q.grad = p.grad = g
        a.step()
        b.step()
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_resume_is_bit_for_bit_and_another_structure_is_refused():
    shapes = [(7, 9), (4, 3, 2, 2), (5,), ()]
    for dtype in (torch.float32, torch.bfloat16):
        params = parameters(shapes, dtype)
        optimizer = Paper(params, update_clip=0.5, first_moment_rounding="stochastic")
        train(optimizer, params, 3)
        saved = copy.deepcopy(optimizer.state_dict())
        copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = Paper(copies, lr=9.0)
        other.load_state_dict(saved)
        for o, ps in ((optimizer, params), (other, copies)):
            train(o, ps, 3, first=3)
        for p, q in zip(params, copies, strict=True):
            assert torch.equal(p, q)
            covers = [nested(o.state[x])["second_moment"] for o, x in ((optimizer, p), (other, q))]
            assert all(
                torch.equal(covers[0][k], covers[1][k]) and covers[1][k].dtype == torch.float32 for k in covers[0]
            )
        for option, old, now in (
            ("variant", "II", "I"), ("second_moment", "cover", "dense"), ("first_moment", "int8", "none"),
            ("min_compress_size", 0, 50),
        ):  # fmt: skip
            with pytest.raises(ValueError, match=f"{option}={old!r}.*{option}={now!r}"):
                Paper(parameters(shapes, dtype), **{option: now}).load_state_dict(saved)
    # (2, 3, 4) and (2, 4, 3) are the same matrix, but not the same covers.
    one, two = Paper(parameters([(2, 3, 4)])), Paper(parameters([(2, 4, 3)]))
    train(one, one.param_groups[0]["params"], 1)
    with pytest.raises(ValueError, match=r"'axis_1' of shape \(3,\).*expected \(4,\)"):
        two.load_state_dict(one.state_dict())


def test_options():
    p = torch.nn.Parameter(torch.ones(4, 4))
    assert Paper([p]).param_groups[0]["betas"] == (0.9, 1.0)
    for betas in [(1.0, 0.9), (0.9, 1.1), (-0.1, 1.0), (0.9, -0.1), (0.9,)]:
        with pytest.raises(ValueError, match=r"betas=.* not allowed.*the second in \[0, 1\]"):
            Paper([p], betas=betas)
    for cls in (CSAdam, CSAdagrad, CSRMSprop):  # 1 is SM3's alone: Adam would divide by 1 - 1
        with pytest.raises(ValueError, match=r"two numbers in \[0, 1\)"):
            cls([p], betas=(0.9, 1.0))
    for options in (
        {"variant": "III"},
        {"variant": 2},
        {"first_moment": "count_sketch"},
        {"second_moment": "count_min"},
    ):
        (key, value), = options.items()  # fmt: skip
        with pytest.raises(ValueError, match=f"{key}={value!r} is not one of"):
            Paper([p], **options)
    # Options of sketches are refused, both in a constructor and in a group, where other unknown keys are kept.
    sketch = {"width": 4, "depth": 2, "hash": "affine", "compression": 0.1, "bucket": "sum", "clean_every": 3}
    assert known("sm3", sketch) == {}
    for key, value in sketch.items():
        with pytest.raises(TypeError, match=key):
            Paper([p], **{key: value})
        if key in ("width", "depth"):  # other code uses these words, too
            assert Paper([{"params": [p], key: value}]).param_groups[0][key] == value
            continue
        with pytest.raises(ValueError, match=f"SM3 has no option '{key}'"):
            Paper([{"params": [p], key: value}])


# -- covers in the other optimizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 2, 2)])
@pytest.mark.parametrize("first_moment", ["fp32", "none"])
def test_adam_with_covers(shape, first_moment):
    p = start(shape)
    expected, m = p.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    common = {"second_moment": "cover", "min_compress_size": 0, "chunk_size": 7}
    optimizer = CSAdam([p], 0.05, (0.8, 0.9), 1e-6, 0.1, first_moment=first_moment, **common)
    naive = Naive(shape, "II", 0.0, 0.9)
    for t, g in enumerate(some(shape, 6), 1):
        m = 0.8 * m + 0.2 * g
        numerator = g if first_moment == "none" else m / (1 - 0.8**t)
        nu = torch.tensor([v for _, v in sorted(naive.nu(g).items())], dtype=torch.float64).view(shape)
        expected = (1 - 0.05 * 0.1) * expected - 0.05 * numerator / ((nu / (1 - 0.9**t)).sqrt() + 1e-6)
        p.grad = g
        optimizer.step()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-11, atol=1e-12)
    assert list(nested(optimizer.state[p])["second_moment"]) == [f"axis_{k}" for k in range(len(shape))]


def test_rmsprop_and_adagrad_with_covers():
    shape = (5, 3, 4)
    p, q = start(shape), start(shape)
    ours, theirs = p.detach().clone(), q.detach().clone()
    common = {"second_moment": "cover", "min_compress_size": 0}
    rmsprop = CSRMSprop([p], 0.05, (0.0, 0.9), 1e-6, 0.0, **common)
    adagrad = CSAdagrad([q], 0.05, initial_accumulator_value=0.3, **common)
    average, total = Naive(shape, "II", 0.0, 0.9), Naive(shape, "II", 0.0, 1.0)
    total.mu = {s: 0.3 for s in total.mu}
    for t, g in enumerate(some(shape, 5), 1):
        for optimizer, parameter, expected, naive in ((rmsprop, p, ours, average), (adagrad, q, theirs, total)):
            nu = torch.tensor([v for _, v in sorted(naive.nu(g).items())], dtype=torch.float64).view(shape)
            root = (nu / (1 - 0.9**t)).sqrt() + 1e-6 if naive is average else nu.sqrt() + 1e-10
            expected -= 0.05 * g / root
            parameter.grad = g
            optimizer.step()
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cls", [SM3, CSAdam])
def test_convolution_weights_in_channels_last(cls):
    torch.manual_seed(0)
    base, grads = torch.randn(6, 4, 3, 3), [torch.randn(6, 4, 3, 3) for _ in range(3)]
    options = {} if cls is SM3 else {"second_moment": "cover", "min_compress_size": 0}
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = torch.nn.Parameter(base.clone(memory_format=layout))
        optimizer = cls([p], chunk_size=20, **options)
        for g in grads:
            p.grad = g.clone(memory_format=layout)
            optimizer.step()
        assert p.is_contiguous(memory_format=layout)
        results.append((p.detach(), nested(optimizer.state[p])["second_moment"]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][k], results[1][1][k]) for k in results[0][1])
    assert [len(t) for t in results[0][1].values()] == [6, 4, 3, 3]


def test_a_signed_sketch_beside_a_cover():
    """Tiles then follow the hash: several cycles of its buckets at once."""
    results = []
    for chunk in (1, 20, 45, 10**6):
        p = parameters([(23, 3)], torch.float64)[0]
        optimizer = CSAdam(
            [p], second_moment="cover", first_moment="count_sketch", allow_dense_count_sketch=True, width=5,
            min_compress_size=0, chunk_size=chunk,
        )  # fmt: skip
        train(optimizer, [p], 4)
        results.append((p.detach(), nested(optimizer.state[p])["second_moment"]))
    for p, covers in results[1:]:
        torch.testing.assert_close(p, results[0][0], rtol=1e-12, atol=1e-12)  # the sketch adds in another order
        assert all(torch.equal(covers[k], results[0][1][k]) for k in covers)


@pytest.mark.parametrize("shape", [(50, 8), (50, 4, 2)])
def test_probe_measures_how_far_covers_are_from_the_exact_sum(shape):
    torch.manual_seed(0)
    errors = {}
    for flat in (True, False):
        p = torch.nn.Parameter(torch.zeros(shape))
        optimizer = Paper([p])
        probe = SecondMomentProbe(optimizer, rows=20)
        for _ in range(4):
            p.grad = torch.ones(shape) if flat else torch.randn(shape)
            probe.update()
            optimizer.step()
        errors[flat] = probe.relative_error()
    assert errors[True] < 1e-6 < 0.1 < errors[False]  # a constant gradient is covered exactly


# -- warm-up ---------------------------------------------------------------------------------------------------------


def rates(steps, *args, **kwargs):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Paper([{"params": [p]}, {"params": [torch.nn.Parameter(torch.ones(2))], "lr": 4.0}], lr=2.0)
    scheduler = quadratic_warmup(optimizer, *args, **kwargs)
    out = []
    for _ in range(steps):
        assert optimizer.param_groups[1]["lr"] == 2 * optimizer.param_groups[0]["lr"]
        out.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        scheduler.step()
    return out


def test_quadratic_warmup():
    assert rates(6, 4) == pytest.approx([1 / 16, 4 / 16, 9 / 16, 1, 1, 1])
    assert rates(3, 0) == [1, 1, 1] == rates(3, 1)
    # the last 20 % of 10 steps: 2/3, 1/3, and 0 thereafter
    assert rates(12, 2, total_steps=10, decay=0.2) == pytest.approx([0.25, *[1] * 7, 2 / 3, 1 / 3, 0, 0])
    assert rates(20, 0, total_steps=20) == pytest.approx([*[1] * 18, 2 / 3, 1 / 3])
    assert rates(5, 0, total_steps=4, decay=0) == [1] * 5


def test_quadratic_warmup_is_resumed_from_its_state_and_pickled():
    whole = rates(9, 5, total_steps=8, decay=0.5)
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Paper([p], lr=2.0)
    scheduler = quadratic_warmup(optimizer, 5, total_steps=8, decay=0.5)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    optimizer, scheduler = pickle.loads(pickle.dumps((optimizer, scheduler)))
    assert optimizer.param_groups[0]["lr"] / 2 == pytest.approx(whole[4])
    other = Paper([p], lr=2.0)
    resumed = quadratic_warmup(other, 1)  # another schedule: the saved one wins
    resumed.load_state_dict(scheduler.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for expected in whole[5:]:
        other.step()
        resumed.step()
        assert other.param_groups[0]["lr"] / 2 == pytest.approx(expected)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((-1,), ["warmup_steps=-1", ">= 0"]),
        ((2.5,), ["warmup_steps=2.5", "an integer"]),
        ((True,), ["warmup_steps=True"]),
        ((5, 4), ["warmup_steps=5", "total_steps=4"]),
        ((0, 0), ["total_steps=0", ">= 1"]),
        ((1, 10, 1.5), ["decay=1.5", "[0, 1]"]),
        ((1, 10, "much"), ["decay='much'"]),
        ((1, None, 0.1), ["decay=0.1", "total_steps"]),
    ],
    ids=str,
)
def test_bad_arguments_of_the_warmup_are_named(args, words):
    with pytest.raises(ValueError) as error:
        quadratic_warmup(Paper([torch.nn.Parameter(torch.ones(2))]), *args)
    assert all(word in str(error.value) for word in words), error.value


def test_it_learns_a_convolution():
    """A regression on a 4-d weight: SM3 reaches the same loss as Adagrad, at the same rate."""
    losses = {}
    for label, build in (
        ("adagrad", lambda p: torch.optim.Adagrad(p, lr=0.05)),
        ("sm3", lambda p: Paper(p, lr=0.05)),
        ("lean", lambda p: Paper(p, lr=0.05, preset="lean")),
    ):
        torch.manual_seed(0)
        model, target = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(3, 8, 3)
        optimizer = build(model.parameters())
        for _ in range(150):
            x = torch.randn(8, 3, 6, 6)
            loss = (model(x) - target(x).detach()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[label] = loss.item()
    assert losses["sm3"] < 2 * losses["adagrad"] + 1e-3 and losses["lean"] < 2 * losses["adagrad"] + 1e-3

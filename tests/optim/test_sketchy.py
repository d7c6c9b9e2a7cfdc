"""Sketchy against dense Shampoo; and its sketches, grafts and schedules."""

import copy
import io
import math
from itertools import pairwise

import pytest
import torch

from sketch_plugins import CSAdam, Sketchy, registry, state_report
from sketch_plugins.linalg import kronecker, solving
from sketch_plugins.optim.sketchy import optimizer as sketchy
from sketch_plugins.optim.sketchy.graft import GRAFTS, INPUTS
from sketch_plugins.optim.sketchy.momentum import PLACES
from sketch_plugins.sharding.state_names import nested

SHAPES = [(12, 9), (6, 4, 3), (7, 300), (5,), ()]
# Exact everywhere: the graft has a bucket for every row, the covariances every direction.
FULL = {"compression": 1.0, "min_compress_size": 0, "rank": 10_000, "merge_dims": 1, "first_moment": "fp32"}


def parameters(shapes=SHAPES, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, dtype=torch.float64, generator=g).to(dtype)) for s in shapes]


def gradients(params, step):
    """Correlated along both axes, of another size for each parameter."""
    g = torch.Generator().manual_seed(100 + step)
    out = []
    for i, p in enumerate(params):
        x = torch.randn(p.shape, dtype=torch.float64, generator=g) * 10.0 ** (i - 2)
        if p.ndim > 1:
            mix = torch.randn(p.shape[0], p.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(i))
            x = torch.tensordot(mix, x, 1) * torch.linspace(0.1, 3, p.shape[-1], dtype=torch.float64)
        out.append(x.to(p.dtype))
    return out


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        for p, g in zip(params, gradients(params, step), strict=True):
            p.grad = g
        optimizer.step()


class Dense:
    """Kronecker-factored Shampoo with dense covariances and a dense graft, one parameter, written from the formulas."""

    def __init__(
        self, p, graft="cs", lr=0.05, input="update", momentum="before", nesterov=True, statistics="accumulate",
        update_freq=1, beta=0.99, decay=0.0, clip=1.0, scale=True, ratio=16.0, eps=1e-6, start=1,
        embedding_rate=2.0,
    ):  # fmt: skip
        self.p, self.graft, self.lr, self.input, self.momentum, self.nesterov = p, graft, lr, input, momentum, nesterov
        self.statistics, self.update_freq, self.beta, self.decay = statistics, update_freq, beta, decay
        self.clip, self.scale, self.eps, self.start = clip, scale, eps, start
        self.t, self.v, self.m = 0, torch.zeros_like(p), torch.zeros_like(p)
        n = p.numel()
        self.axes = [] if p.ndim < 2 else [i for i, d in enumerate(p.shape) if d <= ratio * (n // d)]
        self.gathered = {i: torch.zeros(p.shape[i], p.shape[i], dtype=p.dtype) for i in self.axes}
        self.solved = {i: torch.zeros_like(c) for i, c in self.gathered.items()}
        self.has_momentum = p.ndim > 1 and len(self.axes) == p.ndim
        self.factor = embedding_rate if 0 < len(self.axes) < p.ndim else 1.0

    def update_of(self, g):
        if self.graft == "none":
            return g
        beta2 = 0.999
        if self.graft in ("cs", "rmsprop"):
            self.v = beta2 * self.v + (1 - beta2) * g * g
            u = g / ((self.v / (1 - beta2**self.t)).sqrt() + 1e-8)
        else:  # sums
            self.v = self.v + g * g
            u = g / (self.v.sqrt() + 1e-8)
        return u * self.size(u)

    def size(self, u):
        size = 1.0
        if self.clip:
            size /= max(1.0, u.pow(2).mean().sqrt().item() / self.clip)
        if self.scale:
            size *= max(1e-3, self.p.pow(2).mean().sqrt().item())
        return size

    def gather(self, x):
        for i in self.axes:
            unfolded = x.movedim(i, 0).flatten(1)
            self.gathered[i] = self.beta * self.gathered[i] + unfolded @ unfolded.T

    def precondition(self, x):
        for i in self.axes:
            if self.solved[i].any():
                values, vectors = torch.linalg.eigh(self.solved[i])
                values = values.clamp_min(0)
                floor = len(values) * torch.finfo(x.dtype).eps / 2 * values.max()
                root = (values.clamp_min(floor) + self.eps * values.max()) ** (-0.5 / x.ndim)
                x = torch.tensordot((vectors * root) @ vectors.T, x, ([1], [i])).movedim(0, i)
        return x

    def average(self, x, b=0.9):
        if not self.has_momentum:
            return x
        self.m = b * self.m + (1 - b) * x
        if self.nesterov:
            return (b * self.m + (1 - b) * x) / (1 - b ** (self.t + 1))
        return self.m / (1 - b**self.t)

    def due(self):
        return self.t % self.update_freq == 0 or (self.t < self.update_freq and bin(self.t).count("1") == 1)

    def step(self, g):
        self.t += 1
        u = self.update_of(g)
        x = u if self.input == "update" else g
        if self.statistics == "accumulate":
            self.gather(x)
        elif self.due():
            self.gather(x)
            self.solved = dict(self.gathered)
        if self.t < self.start or not self.axes:
            x = u
        if self.momentum == "before":
            x = self.average(x)
        size = x.norm() if self.input == "update" or self.t < self.start else u.norm()
        if self.t >= self.start and self.axes:
            x = self.precondition(x)
            if self.graft != "none":
                x = x * size / x.norm()
        if self.graft == "none":
            x = x * self.size(x)
        if self.momentum == "after":
            x = self.average(x)
        self.p = (1 - self.lr * self.decay) * self.p - self.factor * self.lr * x
        if self.statistics == "accumulate" and self.due():
            self.solved = {i: c.clone() for i, c in self.gathered.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"update_freq": 3},
        {"update_freq": 10, "nesterov": False},
        {"update_freq": 4, "solver": "svd"},
        {"update_freq": 2, "solver": "power"},
        {"momentum_placement": "after"},
        {"graft": "rmsprop", "update_clip": 0.0, "scale_parameter": False},
        {"graft": "adagrad", "update_clip": 0.3},
        {"graft": "none", "update_clip": 0.5},
        {"graft": "none", "update_clip": 0.0, "scale_parameter": False, "momentum_placement": "after"},
        {"input": "gradient", "nesterov": False},
        {"input": "gradient", "start_preconditioning_step": 4, "momentum_placement": "after"},
        {"start_preconditioning_step": 5},
        {"statistics": "sample", "update_freq": 3, "tail": "paper", "solver": "svd", "input": "gradient"},
        {"statistics": "sample", "update_freq": 1, "tail": "sqrt", "momentum_placement": "after", "weight_decay": 0.3},
        {"embedding_rate": 0.7, "weight_decay": 0.3},
    ],
    ids=str,
)
def test_a_rank_of_the_whole_axis_is_dense_shampoo(options):
    """Nothing escapes a sketch as wide as its axis, so all forms of the tail agree with the dense method (float64)."""
    params = parameters()
    names = {"update_clip": "clip", "scale_parameter": "scale", "weight_decay": "decay"}
    names |= {"start_preconditioning_step": "start", "momentum_placement": "momentum"}
    known = {names.get(k, k): v for k, v in options.items() if k not in ("solver", "tail")}
    known = {"update_freq": 10, **known}
    dense = [Dense(p.detach().clone(), **known) for p in params]
    optimizer = Sketchy(params, lr=0.05, **{"reference_rms": 1.0, **FULL, **options})
    for step in range(14):
        grads = gradients(params, step)
        for p, d, g in zip(params, dense, grads, strict=True):
            p.grad = g
            d.step(g)
        optimizer.step()
        for p, d in zip(params, dense, strict=True):
            # The inverse roots of eigenvalues near round-off lose some digits.
            torch.testing.assert_close(p.detach(), d.p, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("graft", GRAFTS)
@pytest.mark.parametrize("momentum", PLACES)
def test_every_graft_and_place_of_the_momentum_moves_downhill(graft, momentum):
    p = torch.nn.Parameter(torch.randn(20, 12, generator=torch.Generator().manual_seed(0)))
    start = p.detach().square().sum()
    lr = 0.02 if graft in ("cs", "rmsprop") else 0.2  # the steps of sums become shorter
    options = {"reference_rms": 1.0, "momentum_placement": momentum, "rank": 4, "update_freq": 3}
    optimizer = Sketchy([p], lr, graft=graft, **options)
    for _ in range(60):
        p.grad = 2 * p.detach()
        optimizer.step()
    assert p.detach().square().sum() < 0.5 * start


@pytest.mark.parametrize(
    "options", [{}, {"preset": "paper", "momentum_placement": "before"}, {"graft": "sm3"}], ids=str
)
def test_the_step_is_as_long_as_the_graft_s(options):
    """Preconditioning turns the update; its norm stays that of the same optimizer without it."""
    runs = []
    for start in (1, 10**6):
        params = parameters([(40, 24)])
        options = {"rank": 4, "update_freq": 3, "first_moment": "fp32", **options}
        optimizer = Sketchy(params, 1.8e-4, start_preconditioning_step=start, **options)
        if options.get("input") == "gradient" or options.get("preset") == "paper":
            for group in optimizer.param_groups:
                group["first_moment"] = "none"  # the size is then that of u, whatever is averaged
        lengths = []
        for step in range(7):
            before = params[0].detach().clone()
            train(optimizer, params, 1, first=step)
            lengths.append((params[0].detach() - before).norm())
            params[0].data.copy_(before)  # the same weights in both runs: RMS(p) is part of the step
        runs.append((lengths, params[0].grad, before))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-9, atol=0)


def test_without_a_preconditioner_it_is_the_lean_count_sketch_update():
    options = {"compression": 0.2, "min_compress_size": 0, "weight_decay": 0.1}
    a, b = (parameters(dtype=torch.float32) for _ in range(2))
    train(Sketchy(a, 9e-4, precondition="none", **options), a, 5)
    train(CSAdam(b, 9e-4, preset="lean", row_scales=False, **options), b, 5)
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_a_vocabulary_is_preconditioned_along_its_other_axis_alone():
    optimizer = Sketchy(parameters([(2000, 16), (16, 2000), (30, 20), (40_000, 4000)][:3], torch.float32))
    train(optimizer, optimizer.param_groups[0]["params"], 1)
    table, head, hidden = (nested(optimizer.state[p]) for p in optimizer.param_groups[0]["params"])
    assert set(table) == {"step", "second_moment", "preconditioner"}  # no momentum there
    assert {k.split("_", 1)[1] for k in table["preconditioner"]} == {"0_1"}
    assert {k.split("_", 1)[1] for k in head["preconditioner"]} == {"0_0"}
    assert {k.split("_", 1)[1] for k in hidden["preconditioner"]} == {"0_0", "0_1"} and "first_moment" in hidden
    preconditioner = optimizer.preconditioner_of(torch.empty(32_000, 4096, device="meta"), optimizer.param_groups[0])
    assert [s.axis for s in preconditioner.sides] == [1]  # longer than max_axis
    everything = Sketchy([torch.nn.Parameter(torch.zeros(2000, 16))], precondition="all")
    assert (
        len(everything.preconditioner_of(everything.param_groups[0]["params"][0], everything.param_groups[0]).sides)
        == 2
    )


def test_blocks_are_preconditioned_by_themselves():
    whole, parts = parameters([(12, 10)]), parameters([(12, 10)])
    pieces = [torch.nn.Parameter(t.clone()) for t in parts[0].detach().split(5, 1)]
    options = {**FULL, "graft": "none", "scale_parameter": False, "update_clip": 0.0, "update_freq": 2}
    a = Sketchy(whole, 1.8e-4, max_block_dim=5, **options)
    b = Sketchy(pieces, 1.8e-4, max_block_dim=5, **options)
    for step in range(6):
        g = gradients(whole, step)[0]
        whole[0].grad = g
        for piece, part in zip(pieces, g.split(5, 1), strict=True):
            piece.grad = part.clone()
        a.step()
        b.step()
    # Rows (12) are cut into three blocks of 4, columns into two of 5.
    assert len(a.preconditioner_of(whole[0], a.param_groups[0]).sides) == 12
    torch.testing.assert_close(whole[0].detach(), torch.cat([p.detach() for p in pieces], 1), rtol=1e-9, atol=1e-12)


def test_ranks():
    p = torch.nn.Parameter(torch.zeros(100, 40))

    def ranks(**options):
        optimizer = Sketchy([p], **options)
        return [s.rank for s in optimizer.preconditioner_of(p, optimizer.param_groups[0]).sides]

    assert ranks(rank=8) == [8, 8]
    assert ranks(rank=64) == [64, 40]
    assert ranks(rank=0.25) == [25, 10]
    assert ranks(rank=0.001) == [1, 1]
    for bad in (0, -1, 2.5, math.nan, "many"):
        with pytest.raises(ValueError, match=r"rank=.*an integer >= 1 or a fraction in \(0, 1\)"):
            Sketchy([p], rank=bad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", [6.0, 7.0, 20.0])
def test_a_budget_is_kept_and_used(budget, dtype):
    params = [torch.nn.Parameter(torch.randn(s, dtype=dtype)) for s in [(100, 40), (64, 64), (3, 200)]]
    options = {"compression": 0.05, "min_compress_size": 0, "momentum_of": "all"}
    optimizer = Sketchy(params, budget=budget, **options)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p, kept in zip(params, state_report(optimizer).parameters, strict=True):
        assert kept.state_bytes <= budget * p.numel()
        preconditioner = optimizer.preconditioner_of(p, optimizer.param_groups[0])
        if preconditioner is not None and any(
            0 < r < d for r, d in zip(preconditioner.ranks, preconditioner.dims, strict=True)
        ):
            size = dtype.itemsize
            more = (
                2
                * size
                * (
                    sum(d for d, r in zip(preconditioner.dims, preconditioner.ranks, strict=True) if 0 < r < d)
                    + len(preconditioner.dims)
                )
            )
            assert kept.state_bytes + more >= budget * p.numel()


def test_an_impossible_budget_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"budget=0\.5 bytes.*too small"):
        Sketchy([torch.nn.Parameter(torch.zeros(100, 40))], budget=0.5)
    mixed = [torch.nn.Parameter(torch.zeros(s)) for s in [(3000, 40), (200, 100)]]
    with pytest.raises(ValueError, match=r"budget=1 bytes.*first_moment='int8' and graft='cs'"):
        Sketchy(mixed, budget=1.0)  # int8 takes more by itself, though the table's covariance would fit
    Sketchy(mixed, budget=1.0, first_moment="none")
    Sketchy([torch.nn.Parameter(torch.zeros(40))], budget=0.5)  # nothing to precondition, nothing to refuse


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tail": "paper"}, "tail='paper' needs statistics='sample'"),
        ({"tail": "sqrt"}, "tail='sqrt' needs statistics='sample'"),
        ({"statistics_freq": 2, "statistics": "sample"}, "statistics_freq=2 needs statistics='accumulate'"),
        ({"statistics_freq": 3}, "statistics_freq=3 does not divide update_freq=10"),
        ({"shampoo_beta": 1.0}, r"shampoo_beta=1\.0 is not allowed.*in \(0, 1\)"),
        ({"solver": "qr"}, "solver='qr' is not one of 'svd', 'eigh', 'power'"),
        ({"graft": "adam"}, "graft='adam' is not one of"),
        ({"update_freq": 0}, "update_freq=0 is not allowed"),
        ({"exponent": -0.5}, r"exponent=-0\.5 is not allowed"),
        ({"first_moment": "count_sketch"}, "first_moment='count_sketch' is not one of"),
    ],
    ids=str,
)
def test_options_that_cannot_be_meant_are_errors(options, words):
    p = torch.nn.Parameter(torch.zeros(8, 8))
    with pytest.raises(ValueError, match=words):
        Sketchy([p], **options)
    optimizer = Sketchy([torch.nn.Parameter(torch.zeros(8, 8))])
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": [p], **options})
    assert len(optimizer.param_groups) == 1


def test_neither_compiled_nor_captured():
    for option in ("compile", "capturable"):
        with pytest.raises((TypeError, ValueError), match=option):
            Sketchy([torch.nn.Parameter(torch.zeros(8, 8))], **{option: True})
        with pytest.raises(ValueError, match=rf"no option '{option}'\.|does not support {option}=True"):
            Sketchy([{"params": [torch.nn.Parameter(torch.zeros(8, 8))], option: True}])


def snapshot(optimizer):
    return [
        t.clone()
        for p in optimizer.param_groups[0]["params"]
        for t in [p.detach(), *flat(optimizer.state[p])]
    ]  # fmt: skip


def flat(state):
    for value in state.values():
        yield from flat(value) if isinstance(value, dict) else [value]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_gradients_that_are_not_finite(value, preset):
    params = parameters(dtype=torch.float32)
    optimizer = Sketchy(params, preset=preset, update_freq=2)
    train(optimizer, params, 3)
    before = snapshot(optimizer)
    for p, g in zip(params, gradients(params, 3), strict=True):
        p.grad = g
    params[1].grad[2, 1, 1] = value
    with pytest.raises(
        ValueError, match=r"parameter 1 of group 0, of shape \(6, 4, 3\), has a gradient that is not fin"
    ):
        optimizer.step()
    assert all(map(torch.equal, snapshot(optimizer), before))
    optimizer.param_groups[0]["nonfinite"] = "skip"
    optimizer.step()
    assert all(map(torch.equal, snapshot(optimizer), before))
    params[1].grad[2, 1, 1] = 0.5
    optimizer.step()
    assert not torch.equal(snapshot(optimizer)[0], before[0])
    assert all(torch.isfinite(t).all() for t in snapshot(optimizer))


def test_low_rank_and_vanishing_gradients():
    """Rank 1 below the sketch's rank, zeros, then something new: nothing is amplified beyond the graft's norm."""
    params = parameters([(30, 20)], torch.float32)
    optimizer = Sketchy(params, 1.7e-4, rank=8, update_freq=1)
    u, v = torch.randn(30, 1), torch.randn(1, 20)
    for g in [*[u @ v] * 5, *[torch.zeros(30, 20)] * 3, torch.randn(30, 20) * 1e-12, torch.randn(30, 20)]:
        before = params[0].detach().clone()
        params[0].grad = g
        optimizer.step()
        assert all(torch.isfinite(t).all() for t in snapshot(optimizer))
        # RMS(u) is clipped at 1, and relative to the weights.
        assert (params[0] - before).norm() <= 0.0101 * before.norm()


@pytest.mark.parametrize("options", [{}, {"momentum_placement": "after"}, {"nesterov": False}], ids=str)
def test_without_a_graft_the_update_is_the_gradient(options):
    runs = []
    for input in INPUTS:
        params = parameters([(20, 12), (300, 6)])
        train(Sketchy(params, 1.8e-4, graft="none", input=input, rank=4, update_freq=3, **options), params, 7)
        runs.append(params)
    assert all(map(torch.equal, *runs))


def test_momentum_of_gradients_begins_with_the_preconditioner():
    """Before it, steps consist of the graft's updates, which have another size, so one average must not mix them."""
    p = torch.nn.Parameter(torch.randn(40, 24, generator=torch.Generator().manual_seed(0)))
    optimizer = Sketchy([p], 1.8e-4, input="gradient", start_preconditioning_step=6, rank=4, update_freq=2)
    steps = []
    for step in range(16):
        before = p.detach().clone()
        p.grad = 1e-4 * torch.randn(40, 24, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        steps.append((p.detach() - before).flatten())
    cosines = [torch.cosine_similarity(a, b, 0).item() for a, b in pairwise(steps[7:])]
    assert max(cosines) < 0.95


@pytest.mark.parametrize("scale", [1e-20, 1e-23, 1e-30])
@pytest.mark.parametrize(
    "options",
    [{"preset": "paper"}, {"input": "gradient"}, {"graft": "none"}, {"exponent": 1.0}, {"scale_parameter": False}],
    ids=str,
)
def test_vanishing_gradients_move_nothing_to_nowhere(scale, options):
    """Their squares underflow, and the next gradients have ordinary sizes."""
    params = parameters([(20, 12), (2, 2), (100, 3)], torch.float32)
    optimizer = Sketchy(params, 1.8e-4, update_freq=2, **options)
    for size in (scale, scale, 1.0, 1.0, scale):
        for p in params:
            p.grad = size * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()
        assert all(torch.isfinite(t).all() for t in snapshot(optimizer))


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_an_exponent_of_one_trains_at_any_scale(scale):
    params = parameters([(20, 12)], torch.float32)
    optimizer = Sketchy(params, 1.8e-4, input="gradient", exponent=1.0, rank=4)
    for step in range(4):
        before = params[0].detach().clone()
        params[0].grad = gradients(params, step)[0] * scale
        optimizer.step()
        assert 0 < (params[0] - before).norm() < before.norm()


@pytest.mark.parametrize("scale", [1e-12, 1e9, 1e15])
@pytest.mark.parametrize("options", [{}, {"statistics": "sample", "solver": "power", "rank": 70}], ids=str)
def test_gradients_of_any_size_have_the_same_directions(scale, options):
    runs = []
    for size in (1.0, scale):
        params = parameters([(200, 120)], torch.float32)
        optimizer = Sketchy(params, 1.8e-4, **{"input": "gradient", "rank": 8, "update_freq": 2, "eps": 0.0, **options})
        for step in range(5):
            params[0].grad = gradients(params, step)[0] * size
            optimizer.step()
        state = nested(optimizer.state[params[0]])["preconditioner"]
        runs.append((params[0].detach(), state["values_0_0"] / state["trace_0_0"]))
    torch.testing.assert_close(*runs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{"input": "gradient"}, {"graft": "none"}, {"preset": "paper"}], ids=str)
def test_gradients_whose_squares_are_infinite_are_errors_too(options):
    params = parameters([(20, 12)], torch.float32)
    optimizer = Sketchy(params, 1.8e-4, **options)
    train(optimizer, params, 2)
    before = snapshot(optimizer)
    params[0].grad.fill_(1e20)
    with pytest.raises(ValueError, match="not finite, or whose squares are not"):
        optimizer.step()
    assert all(map(torch.equal, snapshot(optimizer), before))


def test_options_changed_in_a_group_are_checked_before_a_step():
    params = parameters([(20, 12)], torch.float32)
    optimizer = Sketchy(params, 1.8e-4)
    train(optimizer, params, 2)
    before = snapshot(optimizer)
    optimizer.param_groups[0]["tail"] = "paper"
    with pytest.raises(ValueError, match="tail='paper' needs"):
        optimizer.step()
    assert all(map(torch.equal, snapshot(optimizer), before))


def test_row_sparse_is_about_vocabularies():
    params = parameters([(40, 24), (700, 8)], torch.float32)
    optimizer = Sketchy(params, 1.8e-4, row_sparse=True, rank=2)
    train(optimizer, params, 2)
    hidden, table = (nested(optimizer.state[p])["preconditioner"] for p in params)
    assert hidden["trace_0_0"] > 0 and table["trace_0_1"] == 0


def test_first_steps_of_zeros_change_nothing_but_the_counter():
    params = parameters(dtype=torch.float32)
    optimizer = Sketchy(params, 1.8e-3)
    before = [p.detach().clone() for p in params]
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(map(torch.equal, params, before))
    train(optimizer, params, 3)
    assert all(torch.isfinite(t).all() for t in snapshot(optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"solver": "power", "refresh_every": 2}, {"preset": "paper"}], ids=str)
@pytest.mark.parametrize("stop", [3, 7, 10])
def test_a_run_resumed_between_solves_is_the_uninterrupted_one(dtype, options, stop):
    shapes = [(40, 24), (500, 8), (6, 4, 3), (5,)]
    options = {"rank": 4, "update_freq": 5, **options}
    straight = parameters(shapes, dtype)
    train(Sketchy(straight, 9e-4, **options), straight, 14)
    params = parameters(shapes, dtype)
    first = Sketchy(params, 9e-4, **options)
    train(first, params, stop)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = Sketchy(params, 9e-4, **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert all(t.dtype != torch.bfloat16 for t in flat(nested(second.state[params[0]])["preconditioner"]))
    train(second, params, 14 - stop, first=stop)
    assert all(map(torch.equal, params, straight))


def test_state_of_another_rank_or_kind_is_refused():
    params = parameters(dtype=torch.float32)
    optimizer = Sketchy(params, rank=4)
    train(optimizer, params, 1)
    saved = optimizer.state_dict()
    for options in ({"rank": 5}, {"statistics": "sample"}, {"max_block_dim": 5}, {"graft": "sm3"}, {"budget": 20.0}):
        with pytest.raises(ValueError, match=f"written with {next(iter(options))}="):
            Sketchy(params, **{"rank": 4, **options}).load_state_dict(saved)
    broken = copy.deepcopy(saved)
    broken["state"][0]["preconditioner.vectors_0_0"][0, 0] = math.nan
    with pytest.raises(ValueError, match=r"saved preconditioner of parameter 0.*impossible values in 'vectors_0_0'"):
        Sketchy(params, rank=4).load_state_dict(broken)
    contradictory = copy.deepcopy(saved)
    contradictory["param_groups"][0]["tail"] = "paper"
    with pytest.raises(ValueError, match="tail='paper' needs"):
        Sketchy(params, rank=4).load_state_dict(contradictory)
    older = copy.deepcopy(saved)
    for key in Sketchy.FIXED:
        del older["param_groups"][0][key]
    Sketchy(params, rank=4).load_state_dict(older)
    damaged = optimizer.state_dict()
    damaged["state"][0] = {
        name: tensor for name, tensor in damaged["state"][0].items() if not name.startswith("preconditioner.")
    }
    with pytest.raises(ValueError, match=r"saved state of parameter 0.* expected .*preconditioner"):
        Sketchy(params, rank=4).load_state_dict(damaged)


def test_equal_shapes_are_solved_in_one_call(monkeypatch):
    calls = []
    fold = kronecker.fd.fold

    def counted(old, *args, **kwargs):
        calls.append(tuple(old.vectors.shape))
        return fold(old, *args, **kwargs)

    monkeypatch.setattr(kronecker.fd, "fold", counted)
    params = parameters([(24, 24)] * 3 + [(24, 48)] * 2 + [(900, 24)], torch.float32)
    train(Sketchy(params, rank=4, update_freq=5), params, 1)
    # 3 * 2 + 2 + 1 axes of 24, 2 of 48; the axis of 900 has none.
    assert sorted(calls) == [(2, 48, 4), (9, 24, 4)]
    calls.clear()
    monkeypatch.setattr(solving, "STACK", 24 * 8 * 4)
    train(Sketchy(params, rank=4, update_freq=5), params, 1)
    assert sorted(calls) == [(1, 24, 4), (2, 48, 4), (4, 24, 4), (4, 24, 4)]


SPARSE_ROWS = [(64, 16), (16, 64), (40, 3), (8, 3, 3, 3)]


@pytest.mark.parametrize("options", [{}, {"preset": "paper"}, {"solver": "power", "rank": 4}], ids=str)
def test_gradients_with_many_zero_rows_leave_everything_finite(options):
    """MKL's eigh fails for their covariances: with the defaults, in one of twenty runs of three steps."""
    for seed in range(12):
        params = parameters(SPARSE_ROWS, torch.float32, seed)
        optimizer = Sketchy(params, fused=False, **options)
        g = torch.Generator().manual_seed(seed)
        for _ in range(4):
            for p in params:
                rows = torch.rand(p.shape[0], *[1] * (p.ndim - 1), generator=g) < 0.2
                p.grad = torch.randn(p.shape, generator=g) * rows
            optimizer.step()
        assert all(torch.isfinite(t).all() for t in snapshot(optimizer))


def broken(original, silent):
    def decompose(matrix, *args, **kwargs):
        if not silent:
            raise torch.linalg.LinAlgError("did not converge")
        return [part + math.nan for part in original(matrix, *args, **kwargs)]

    return decompose


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("options", [{"update_freq": 1}, {"preset": "paper", "update_freq": 1, "rank": 4}], ids=str)
def test_the_last_preconditioner_stays_where_nothing_helps(options, silent, monkeypatch):
    """A step whose solves fail equals one without solves, and the next solve has all gathered statistics."""
    params, others = parameters([(20, 12)], torch.float32), parameters([(20, 12)], torch.float32)
    a, b = (Sketchy([("weight", p)], 1.8e-4, **options) for p in (params[0], others[0]))
    train(a, params, 3)
    train(b, others, 3)
    before = copy.deepcopy(nested(a.state[params[0]])["preconditioner"])
    monkeypatch.setattr(torch.linalg, "eigh", broken(torch.linalg.eigh, silent))
    monkeypatch.setattr(torch.linalg, "svd", broken(torch.linalg.svd, silent))
    with pytest.warns(
        RuntimeWarning, match=r"covariance of parameter 'weight' of shape \(20, 12\) could not be decomposed"
    ) as warned:
        train(a, params, 1, first=3)
    assert len(warned) == 1
    assert warned[0].filename == __file__  # the line that takes the step, not one of ours
    monkeypatch.undo()
    monkeypatch.setattr(sketchy, "solve", lambda *_: [])
    train(b, others, 1, first=3)
    monkeypatch.undo()
    assert torch.equal(params[0], others[0])
    after = nested(a.state[params[0]])["preconditioner"]
    kept = [name for name in before if name.startswith(("vectors", "values", "tail", "trace"))]
    assert all(torch.equal(after[name], before[name]) for name in kept)
    assert all(torch.isfinite(t).all() for t in snapshot(a))
    train(a, params, 2, first=4)
    train(b, others, 2, first=4)
    assert torch.equal(params[0], others[0])
    assert not torch.equal(a.state[params[0]]["preconditioner.values_0_0"], before["values_0_0"])


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-19, 1e-8, 1e8, 1e15])
@pytest.mark.parametrize(
    "options",
    [
        {"graft": "none"},
        {"graft": "none", "input": "gradient", "exponent": 1.0, "matrix_eps": 0.0},
        {"exponent": 1.0, "max_block_dim": 8, "matrix_eps": 1e-2},
        {"graft": "adagrad", "exponent": 1.0, "max_block_dim": 8, "input": "gradient", "merge_dims": 1},
        {"graft": "none", "exponent": 1.0, "statistics": "sample", "tail": "paper", "merge_dims": 1},
    ],
    ids=str,
)
def test_roots_of_any_size_make_steps_of_the_right_size(options, scale):
    """Before clipping, the roots' product may be 1e57, and cancels: the scale of the gradients does not matter."""

    def move(dtype, size):
        params = parameters([(20, 12), (4, 3, 5, 2), (30, 3)], dtype)
        optimizer = Sketchy(params, 1.8e-4, update_freq=2, eps=0.0, **options)
        before = [p.detach().clone() for p in params]
        for step in range(3):
            for p, g in zip(params, gradients(params, step), strict=True):
                p.grad = (g * size).to(dtype)
            optimizer.step()
            assert all(torch.isfinite(t).all() for t in snapshot(optimizer))
        return params, [p.detach() - q for p, q in zip(params, before, strict=True)]

    for dtype in (torch.float32, torch.float64):
        params, moves = move(dtype, scale)
        for moved, p in zip(moves, params, strict=True):
            # Three steps of lr * RMS(p) at most, during which RMS(p) grows by less than a tenth.
            assert moved.norm() <= 3 * 0.01 * 1.1 * p.norm()
        if dtype == torch.float64 and options.get("graft") != "none" and scale > 1e-37:  # the floor of eps=0
            # In float64 nothing underflows, and the graft does not depend on the size. (Well conditioned roots amplify
            # int8's rounding of the momentum by no more than their condition.)
            for a, b in zip(moves, move(dtype, 1.0)[1], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_solves_happen_when_they_are_due(monkeypatch):
    when = []
    params = parameters([(12, 9)], torch.float32)
    optimizer = Sketchy(params, update_freq=6, solver="power", refresh_every=2)
    monkeypatch.setattr(sketchy, "solve", lambda sides, decay, tail, solver: when.append((step, solver)) or [])
    for step in range(1, 25):
        train(optimizer, params, 1, first=step)
    assert when == [
        (1, "eigh"), (2, "eigh"), (4, "eigh"), (6, "power"), (12, "eigh"), (18, "power"), (24, "eigh")
    ]  # fmt: skip


def test_embeddings_and_output_layers_have_a_learning_rate_of_their_own():
    def moved(**options):
        params = parameters([(400, 20), (20, 400), (60, 20), (20,), (20, 16, 3, 3)])
        before = [p.detach().clone() for p in params]
        train(Sketchy(params, 1e-3, rank=4, weight_decay=0.1, **options), params, 1)
        kept = [(1 - 1e-4) * q for q in before]  # decay has no factor
        return [p.detach() - q for p, q in zip(params, kept, strict=True)]

    for half, one in zip(moved(embedding_rate=0.5), moved(embedding_rate=1.0), strict=True):
        factor = 0.5 if 400 in one.shape else 1.0
        torch.testing.assert_close(half, factor * one, rtol=1e-9, atol=1e-12)
    for default, two in zip(moved(), moved(embedding_rate=2.0), strict=True):
        assert torch.equal(default, two)


@pytest.mark.parametrize("columns", [8, 100])  # preconditioned on one side, and on both with a momentum
def test_row_sparse_gradients_take_the_graft_s_step(columns):
    p, q = (torch.nn.Parameter(torch.ones(300, columns)) for _ in range(2))
    a, b = (
        Sketchy([p], 1.8e-3, rank=2, compression=0.1),
        CSAdam([q], 1.8e-3 * (2 if columns == 8 else 1), preset="lean", weight_decay=0, compression=0.1),
    )  # with 8 columns the rows have no covariance, as those of an embedding
    for step in range(4):
        index = torch.tensor([[1, 5, 7 + step]])
        for x in (p, q):
            values = torch.randn(3, columns, generator=torch.Generator().manual_seed(step))
            x.grad = torch.sparse_coo_tensor(index, values, x.shape, check_invariants=True)
        a.step()
        b.step()
    assert torch.equal(p, q) and torch.equal(p[20:], torch.ones(280, columns))
    p.grad = torch.randn(300, columns)  # and dense ones may follow
    a.step()
    assert torch.isfinite(p).all()


def test_the_lm_head_and_every_hidden_matrix_of_a_model_share_a_budget_below_two_bytes():
    """Bytes a parameter on BERT-base's shapes, by default."""
    layer = [(768, 768)] * 4 + [(3072, 768), (768, 3072)] + [(768,)] * 9 + [(3072,)]
    shapes = [(30522, 768), (512, 768), (2, 768), (768,), (768,), *layer * 12, (768, 768), (768,)]
    with torch.device("meta"):
        report = state_report(Sketchy([torch.nn.Parameter(torch.empty(s)) for s in shapes]))
    assert report.params == 109_482_240
    assert report.bytes_per_param < 2.0


def test_its_options_are_known_to_the_whole_family():
    """In another optimizer's parameter group they are errors, and not ignored keys."""
    p = torch.nn.Parameter(torch.zeros(8, 8))
    common = {
        "rank",
        "budget",
        "tail",
        "statistics",
        "input",
        "exponent",
        "precondition",
        "nesterov",
    }  # frameworks' words, too
    for option in set(Sketchy.OPTIONS) - set(CSAdam.OPTIONS) - common:
        with pytest.raises(ValueError, match=f"no option '{option}'"):
            CSAdam([{"params": [p], option: 1}])


def test_registry_and_text():
    parsed = registry.parse_options("sketchy", {"rank": "64", "update_freq": "10", "graft": "sm3", "nesterov": "false"})
    assert parsed == {"rank": 64.0, "update_freq": 10, "graft": "sm3", "nesterov": False}
    assert registry.get("sketchy").cls is Sketchy

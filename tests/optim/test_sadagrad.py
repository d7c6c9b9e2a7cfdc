"""S-AdaGrad against dense full-matrix Adagrad and the paper's own algorithm; and unusual input."""

import copy
import io
import math

import pytest
import torch

from sketch_plugins import SAdagrad, state_report
from sketch_plugins.sharding.state_names import nested

from .conftest import parameters

SHAPES = [(9,), (6, 4), (3, 2, 2), (1,), ()]


def gradients(shapes, step, dtype=torch.float64):
    """A few directions are strong, so that a sketch has something to keep; each parameter has another scale."""
    g = torch.Generator().manual_seed(500 + step)
    out = []
    for i, shape in enumerate(shapes):
        n = math.prod(shape)
        mix = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        mix = mix * 0.8 ** torch.arange(n, dtype=torch.float64)
        x = mix @ torch.randn(n, dtype=torch.float64, generator=g) * 10.0 ** (i - 2)
        out.append(x.view(shape).to(dtype))
    return out


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        for p, g in zip(params, gradients([tuple(p.shape) for p in params], step, params[0].dtype), strict=True):
            p.grad = g
        optimizer.step()


def root(matrix, eps=0.0):
    """The inverse root of ``matrix + eps * I``; for a singular matrix, the root of the pseudo-inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values + eps
    seen = values > 1e-13 * values[-1]
    return (vectors * torch.where(seen, values.abs().clamp_min(1e-300).rsqrt(), 0.0)) @ vectors.mT


class Dense:
    """Full-matrix Adagrad of one vector: x <- x - lr * (sum of g g^T + eps)^(-1/2) g."""

    def __init__(self, p, lr, eps=0.0, decay=0.0):
        self.x, self.lr, self.eps, self.decay = p.detach().clone().flatten(), lr, eps, decay
        self.total = torch.zeros(len(self.x), len(self.x), dtype=p.dtype)

    def step(self, g):
        g = g.flatten()
        self.total = self.total + torch.outer(g, g)
        self.x = (1 - self.lr * self.decay) * self.x - self.lr * (root(self.total, self.eps) @ g)


class Paper:
    """Alg. 1 and 2 of arXiv 2302.03764 as printed, where the set K is the whole space.

    The sketch B has ell rows; the last one is 0. g replaces it, and the singular values are lowered until one is 0.
    """

    def __init__(self, p, lr, rank):
        self.x, self.lr = p.detach().clone().flatten(), lr
        self.b = torch.zeros(rank + 1, len(self.x), dtype=p.dtype)
        self.alpha = 0.0

    def step(self, g):
        g = g.flatten()
        assert not self.b[-1].any()
        self.b[-1] = g
        _, s, vt = torch.linalg.svd(self.b, full_matrices=True)
        squares = torch.zeros(len(self.b), dtype=s.dtype)  # more rows than columns: the other values are 0
        squares[: len(s)] = s.square()
        rho = squares[-1].item()
        rows = torch.zeros_like(self.b)
        rows[: len(s)] = vt[: len(s)]
        self.b = (squares - rho).clamp_min(0).sqrt().unsqueeze(-1) * rows
        self.alpha += rho
        whole = self.b.mT @ self.b + self.alpha * torch.eye(len(g), dtype=g.dtype)
        self.x = self.x - self.lr * (root(whole) @ g)


def compare(optimizer, params, others, steps, tolerance):
    for step in range(steps):
        grads = gradients([tuple(p.shape) for p in params], step)
        for p, other, g in zip(params, others, grads, strict=True):
            p.grad = g
            other.step(g)
        optimizer.step()
        for p, other in zip(params, others, strict=True):
            torch.testing.assert_close(p.detach().flatten(), other.x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("solver", ["eigh", "svd"])
@pytest.mark.parametrize("rank", [24, 1000])
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_rank_of_the_dimension_is_full_matrix_adagrad(solver, rank, decay):
    params = parameters(SHAPES)
    others = [Dense(p, 0.1, 1e-2, decay) for p in params]
    optimizer = SAdagrad(params, 0.1, 1e-2, decay, rank=rank, solver=solver)
    compare(optimizer, params, others, 40, 1e-10)


@pytest.mark.parametrize("solver", ["eigh", "svd"])
def test_without_epsilon_it_is_the_pseudo_inverse(solver):
    """From the first gradient on, of which 24 are needed before the largest sum is regular.

    1e-6, not 1e-8: the roots of eigenvalues 1e-9 of the largest amplify round-off by 3e4, those outside of the sketch,
    where the paper's pseudo-inverse is 0 and the floor is not, by up to 1e8.
    """
    params = parameters(SHAPES)
    compare(SAdagrad(params, 0.1, rank=24, solver=solver), params, [Dense(p, 0.1) for p in params], 40, 1e-6)


@pytest.mark.parametrize("solver", ["eigh", "svd"])
@pytest.mark.parametrize("rank", [1, 2, 5, 8, 9])
def test_the_algorithm_of_the_paper_step_by_step(solver, rank):
    params = parameters(SHAPES)
    others = [Paper(p, 0.1, rank) for p in params]
    optimizer = SAdagrad(params, 0.1, rank=rank, solver=solver)
    compare(optimizer, params, others, 40, 1e-6)  # see above
    for p, other in zip(params, others, strict=True):
        state = nested(optimizer.state[p])["preconditioner"]
        assert state["tail_0_0"].item() == pytest.approx(other.alpha, rel=1e-9, abs=1e-12)
        v = state["vectors_0_0"]
        torch.testing.assert_close((v * state["values_0_0"]) @ v.mT, other.b.mT @ other.b, rtol=1e-8, atol=1e-9)


def test_one_number_is_plain_adagrad():
    """``lr * g / sqrt(sum of g^2)``, whatever the rank."""
    params = [torch.nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2)]
    mine, theirs = SAdagrad(params[:1], 0.3, rank=4), torch.optim.Adagrad(params[1:], 0.3, eps=0.0)
    for step in range(10):
        for p in params:
            p.grad = torch.tensor([math.sin(step) + 0.2], dtype=torch.float64)
        mine.step()
        theirs.step()
    # 1e-16 of g is outside of the sketch by round-off, and the root of the floor there is 5e7 times that of the sum.
    torch.testing.assert_close(params[0], params[1], rtol=0, atol=1e-8)


def test_many_features_in_float32():
    """What the sketch resolves is not floored by the dimension: 1e5 units in the last place are 1 % of the largest."""
    p = torch.nn.Parameter(torch.zeros(200_000))
    optimizer = SAdagrad([p], 1.0, rank=3)
    for index, size in ((0, 100.0), (150_000, 1.0), (3, 0.5)):
        p.grad = torch.zeros_like(p).index_fill_(0, torch.tensor([index]), size)
        optimizer.step()
    expected = torch.zeros_like(p).index_fill_(0, torch.tensor([0, 3, 150_000]), -1.0)
    # Eigenvalues of a Gram matrix in float32, 4e4 times smaller than the largest: 1e-3 of each is round-off.
    torch.testing.assert_close(p.detach(), expected, rtol=1e-2, atol=1e-5)


def test_escaped_mass_bounds_what_the_sketch_misses():
    """Frequent Directions' guarantee: 0 <= sum of g g^T - sketch <= rho * I; the rest of the spectrum bounds rho."""
    (p,) = parameters([(12,)])
    optimizer = SAdagrad([p], 0.1, rank=3)
    total = torch.zeros(12, 12, dtype=torch.float64)
    for step in range(30):
        (p.grad,) = gradients([(12,)], step)
        total += torch.outer(p.grad, p.grad)
        optimizer.step()
        state = nested(optimizer.state[p])["preconditioner"]
        v, rho = state["vectors_0_0"], state["tail_0_0"].item()
        missed = torch.linalg.eigvalsh(total - (v * state["values_0_0"]) @ v.mT)
        values = torch.linalg.eigvalsh(total).flip(0)
        slack = 1e-12 * values[0].item()
        assert missed[0] >= -slack and missed[-1] <= rho + slack
        # ell = rank + 1 rows: rho <= min over j < ell of (sum of the eigenvalues after the j-th) / (ell - j).
        assert rho <= min(values[j:].sum().item() / (4 - j) for j in range(4)) + slack


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bytes_of_state(dtype):
    """k directions, k eigenvalues, the escaped mass and the trace; at most the dimension of each."""
    params = parameters([(1000,), (30, 5), (3,), (0,), ()], dtype)
    optimizer = SAdagrad(params, 0.1, rank=7)
    numbers = [7 * 1000 + 7 + 2, 7 * 150 + 7 + 2, 3 * 3 + 3 + 2, 0, 1 + 1 + 2]
    size = 8 if dtype == torch.float64 else 4
    assert [kept.state_bytes for kept in state_report(optimizer).parameters] == [size * n for n in numbers]
    train(optimizer, params, 1)
    for p, n in zip(params, numbers, strict=True):
        assert sum(t.nbytes for t in nested(optimizer.state[p]).get("preconditioner", {}).values()) == size * n
    assert [kept.state_bytes for kept in state_report(optimizer).parameters] == [size * n for n in numbers]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 4, 9])
def test_a_resumed_run_is_the_uninterrupted_one(dtype, stop):
    straight = parameters(SHAPES, dtype)
    train(SAdagrad(straight, 0.1, rank=3), straight, 12)
    params = parameters(SHAPES, dtype)
    first = SAdagrad(params, 0.1, rank=3)
    train(first, params, stop)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = SAdagrad(params, 0.1, rank=3)
    second.load_state_dict(torch.load(file, weights_only=True))
    kinds = {t.dtype for t in nested(second.state[params[0]])["preconditioner"].values()}
    assert kinds == {torch.float64 if dtype == torch.float64 else torch.float32}
    train(second, params, 12 - stop, first=stop)
    assert all(map(torch.equal, params, straight))


def test_state_of_another_rank_or_optimizer_is_refused():
    params = parameters([(9,)])
    optimizer = SAdagrad(params, rank=3)
    train(optimizer, params, 1)
    with pytest.raises(ValueError, match="written with rank=3, but group 0 of this SAdagrad has rank=4"):
        SAdagrad(params, rank=4).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="not written by SAdagrad, but by another optimizer"):
        SAdagrad(params, rank=3).load_state_dict(torch.optim.Adagrad(params).state_dict())


def test_bfloat16_parameters_are_rounded_once_a_step():
    """Arithmetic is float32: one step differs from that of float32 weights by the rounding of the result alone."""
    low = parameters(SHAPES, torch.bfloat16)
    optimizer = SAdagrad(low, 0.1, rank=3)
    for step in range(5):
        high = [torch.nn.Parameter(p.detach().float()) for p in low]
        other = SAdagrad(high, 0.1, rank=3)
        if step:
            # States are float32 on both sides: they may be handed over.
            saved = copy.deepcopy(optimizer.state_dict())
            other.load_state_dict(saved)
        grads = gradients([tuple(p.shape) for p in low], step, torch.bfloat16)
        for p, q, g in zip(low, high, grads, strict=True):
            p.grad, q.grad = g, g.float()
        optimizer.step()
        other.step()
        assert all(torch.equal(p, q.bfloat16()) for p, q in zip(low, high, strict=True))


def test_zero_gradients():
    params = parameters(SHAPES, torch.float32)
    before = [p.detach().clone() for p in params]
    optimizer = SAdagrad(params, 0.1, rank=3)
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(map(torch.equal, params, before))
    train(optimizer, params, 5)
    kept = [p.detach().clone() for p in params]
    sketches = copy.deepcopy([nested(optimizer.state[p])["preconditioner"] for p in params])
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(map(torch.equal, params, kept))
    for p, old in zip(params, sketches, strict=True):
        new = nested(optimizer.state[p])["preconditioner"]
        assert all(torch.isfinite(t).all() for t in new.values())
        # Nothing escapes with a zero, and no eigenvalue moves by more than the round-off of its decomposition.
        torch.testing.assert_close(new["tail_0_0"], old["tail_0_0"], rtol=0, atol=1e-5 * old["trace_0_0"].item())
        torch.testing.assert_close(new["values_0_0"], old["values_0_0"], rtol=0, atol=1e-5 * old["trace_0_0"].item())


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e17])
def test_steps_do_not_depend_on_the_scale_of_the_gradients(scale):
    """(c^2 G)^(-1/2) c g = G^(-1/2) g; float32 squares end at 1e-38, below which a gradient counts for nothing."""
    runs = []
    for factor in (1.0, scale):
        (p,) = parameters([(9,)], torch.float32)
        optimizer = SAdagrad([p], 0.1, rank=3)
        before = p.detach().clone()
        for step in range(8):
            (g,) = gradients([(9,)], step, torch.float32)
            p.grad = g / g.norm() * factor
            optimizer.step()
            assert torch.isfinite(p).all()
        runs.append(p.detach() - before)
    if scale > 1e-18:
        torch.testing.assert_close(runs[0], runs[1], rtol=1e-3, atol=1e-4)
    else:
        assert runs[1].abs().max() < 0.1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_that_are_not_finite(value, sparse):
    params = parameters([(9,), (6, 4)], torch.float32)
    names = ("bias", "weight")
    optimizer = SAdagrad(list(zip(names, params, strict=True)), 0.1, rank=3)
    train(optimizer, params, 3)
    before = copy.deepcopy([[p.detach() for p in params], optimizer.state_dict()["state"]])
    for p, g in zip(params, gradients([(9,), (6, 4)], 3, torch.float32), strict=True):
        p.grad = g
    params[1].grad[2, 1] = value
    if sparse:
        params[1].grad = params[1].grad.to_sparse(1)
    with pytest.raises(
        ValueError, match=r"parameter 'weight' of shape \(6, 4\) has a gradient that is not fin"
    ) as error:
        optimizer.step()
    assert "nonfinite" not in str(error.value)  # an option of Sketchy's, not of this
    after = [[p.detach() for p in params], optimizer.state_dict()["state"]]
    assert all(map(torch.equal, flat(after), flat(before)))


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in (value.values() if isinstance(value, dict) else value) for t in flat(part)]


def test_sparse_gradients_are_the_same_step_as_dense_ones():
    """Rows without a gradient move, too, because the root of the sum mixes all numbers of a parameter."""
    sparse, dense = parameters([(6, 4)]), parameters([(6, 4)])
    a, b = (SAdagrad(p, 0.1, weight_decay=0.1, rank=3, maximize=True) for p in (sparse, dense))
    for step in range(8):
        rows = torch.tensor([[step % 6, 2, 2]])
        values = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        sparse[0].grad = torch.sparse_coo_tensor(rows, values, (6, 4), check_invariants=True)
        dense[0].grad = sparse[0].grad.to_dense()
        before = sparse[0].detach().clone()
        a.step()
        b.step()
        assert torch.equal(sparse[0], dense[0])
        if step > 3:
            assert (sparse[0] != before).all()


def test_maximize_and_weight_decay():
    runs = []
    for sign in (1, -1):
        params = parameters(SHAPES)
        optimizer = SAdagrad(params, 0.1, weight_decay=0.2, rank=3, maximize=sign < 0)
        for step in range(6):
            for p, g in zip(params, gradients(SHAPES, step), strict=True):
                p.grad = sign * g
            optimizer.step()
        runs.append(params)
    assert all(map(torch.equal, *runs))
    decayed, plain = parameters([(9,)]), parameters([(9,)])
    train(SAdagrad(decayed, 0.1, weight_decay=0.2), decayed, 1)
    train(SAdagrad(plain, 0.1), plain, 1)
    (start,) = parameters([(9,)])
    torch.testing.assert_close(decayed[0] - plain[0], -0.1 * 0.2 * start, rtol=1e-12, atol=1e-14)


def test_a_parameter_is_one_vector_whatever_its_shape_layout_and_tiles():
    (vector,) = parameters([(24,)])
    shaped = torch.nn.Parameter(vector.detach().view(6, 4).clone())
    turned = torch.nn.Parameter(vector.detach().view(6, 4).mT.contiguous().mT)
    assert not turned.is_contiguous()
    optimizers = [
        SAdagrad([vector], 0.1, rank=3),
        SAdagrad([shaped], 0.1, rank=3, chunk_size=5),
        SAdagrad([turned], torch.tensor(0.1, dtype=torch.float64), rank=3),
    ]
    for step in range(8):
        (g,) = gradients([(24,)], step)
        vector.grad, shaped.grad, turned.grad = g, g.view(6, 4), g.view(6, 4)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(vector.view(6, 4), shaped) and torch.equal(shaped, turned)


def test_options_of_a_group():
    params = parameters([(9,), (9,), (9,)])
    (alone,) = parameters([(9,)], seed=0)
    params[1].data.copy_(alone.data)
    together = SAdagrad([{"params": params[:1]}, {"params": params[1:2], "rank": 2, "lr": 0.3, "eps": 0.1}], 0.1)
    by_itself = SAdagrad([alone], 0.3, 0.1, rank=2)
    for step in range(5):
        for p, g in zip(params, gradients([(9,)] * 3, step), strict=True):
            p.grad = g
        alone.grad = params[1].grad
        together.step()
        by_itself.step()
    assert torch.equal(params[1], alone)
    assert together.state[params[0]]["preconditioner.vectors_0_0"].shape == (9, 9)  # rank 10 by default


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank=0 is not allowed.*an integer >= 1"),
        ({"rank": 2.5}, r"rank=2\.5 is not"),
        ({"lr": -1.0}, r"lr=-1\.0 is not allowed"),
        ({"eps": -1e-8}, "eps=-1e-08 is not allowed"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1 is not allowed"),
        ({"solver": "power"}, "solver='power' is not one of 'eigh', 'svd'"),
        ({"preset": "paper"}, "preset='paper' is not one of 'default'"),
    ],
    ids=str,
)
def test_options_that_are_not_allowed(options, words):
    p = torch.nn.Parameter(torch.zeros(8))
    with pytest.raises(ValueError, match=words):
        SAdagrad([p], **options)
    optimizer = SAdagrad([torch.nn.Parameter(torch.zeros(8))])
    with pytest.raises(ValueError, match=words):
        optimizer.add_param_group({"params": [p], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("option", ["betas", "momentum", "compile", "tail", "nonfinite"])
def test_options_it_does_not_have(option):
    with pytest.raises(TypeError, match=option):
        SAdagrad([torch.nn.Parameter(torch.zeros(8))], **{option: True})


def test_arguments_of_torch_s_optimizers():
    neutral = {"foreach": False, "fused": None, "amsgrad": False, "capturable": False, "differentiable": False}
    ends = []
    for given in ({}, neutral):
        p, q = (torch.nn.Parameter(torch.ones(8)) for _ in range(2))
        optimizer = SAdagrad([p], **given)
        optimizer.add_param_group({"params": [q], **given})
        for _ in range(3):
            p.grad = q.grad = torch.arange(8.0)
            optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        ends.append(p.detach())
        assert torch.equal(p, q)
    assert torch.equal(*ends)
    for name in neutral:
        for build in (
            lambda name=name: SAdagrad([p], **{name: True}),
            lambda name=name: SAdagrad([{"params": [p], name: True}]),
        ):
            with pytest.raises(ValueError, match=f"SAdagrad does not support {name}=True"):
                build()
        optimizer = SAdagrad([p])
        optimizer.param_groups[0][name] = True
        p.grad = torch.ones(8)
        with pytest.raises(ValueError, match=f"SAdagrad does not support {name}=True"):
            optimizer.step()


def test_complex_parameters_are_refused():
    with pytest.raises(ValueError, match="is complex"):
        SAdagrad([torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))])

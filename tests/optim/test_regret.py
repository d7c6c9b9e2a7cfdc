"""S-AdaGrad in the setting that it is made for: online logistic regression. benchmarks/regret.py is the long run."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import rates
import regret

SAMPLES, BATCH = 4000, 8
AT = [125, 250, 500]


@pytest.fixture(scope="module")
def averages():
    """Contender -> average regrets after the rounds of ``AT``, at its best learning rate of factors of 2."""
    data = regret.stream(SAMPLES, seed=0, batch=BATCH)
    least = regret.best_fixed(data, AT)
    out = {}
    for name, contender in regret.CONTENDERS.items():
        found = rates.sweep(lambda lr, of=contender: regret.play(of, lr, data), regret.final, contender.centre)
        total = found[rates.best_rate(found, regret.final)][0].double().cumsum(0)
        out[name] = [(total[rounds - 1].item() - best) / rounds for rounds, best in zip(AT, least, strict=True)]
    return out


def test_the_stream_is_like_a9a():
    data = regret.stream(20_000)
    assert data.x.shape == (20_000, 123) and (data.x.sum(1) == 14).all() and set(data.x.unique().tolist()) == {0.0, 1.0}
    assert 0.22 < data.y.mean() < 0.26
    # Correlated: of 123 - 13 dimensions 10 carry most of the second moment.
    values = torch.linalg.eigvalsh(data.x.mT @ data.x)
    assert values[-10:].sum() > 0.6 * values.sum()


def test_the_best_fixed_weights_are():
    """The gradient at L-BFGS's end is 0, and weights of 0 are worse."""
    data = regret.stream(2000, batch=4)
    (least,) = regret.best_fixed(data, [500])
    model = torch.nn.Linear(123, 1, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    x, y = data.x.double(), data.y.double()
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    assert 500 * loss(model(x).squeeze(1), y).item() > least + 50
    # Newton's method from 0, an independent solver, ends at the same loss: the optimum is flat, its value is not.
    w = torch.zeros(123, dtype=torch.float64)
    for _ in range(12):
        s = torch.sigmoid(x @ w)
        hessian = (x.mT * (s * (1 - s))) @ x + 1e-9 * torch.eye(123, dtype=torch.float64)
        w = w - torch.linalg.solve(hessian, x.mT @ (s - y))
    assert 500 * loss(x @ w, y).item() == pytest.approx(least, rel=1e-5)


def test_average_regret_falls_as_fast_as_the_root_of_the_rounds(averages):
    """The theory promises a slope of -1/2; samples of one distribution allow more (measured: -0.6 to -0.8)."""
    for name, average in averages.items():
        assert all(x > 0 for x in average), name
        assert regret.slope(AT, average) < -0.5, name


def test_a_sketch_of_rank_10_of_123_is_near_the_full_matrix(averages):
    """After 500 rounds; four streams: 0.99 to 1.04 times the diagonal's regret, 1.00 to 1.08 times the full matrix's.

    One-hot features are the diagonal's own basis: S-AdaGrad is not reliably below it, and after 8,140 rounds, when
    small eigenvalues matter, above it (1.27 and 1.38 times, benchmarks/results/regret_a9a_like.csv). What holds at both
    lengths is that it is below gradient descent.
    """
    mine = averages["S-AdaGrad, rank 10"][-1]
    assert mine < 1.15 * averages["full-matrix Adagrad"][-1]
    assert mine < 1.15 * averages["diagonal Adagrad"][-1]
    assert mine < averages["gradient descent"][-1]


def test_the_basis_does_not_matter():
    """With rotated features the problem is the same for S-AdaGrad (float64, up to round-off), not for the diagonal."""
    data = regret.stream(800, batch=8)
    data = data._replace(x=data.x.double(), y=data.y.double())
    d = data.x.shape[1]
    basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    losses = {}
    for name in ("S-AdaGrad, rank 10", "diagonal Adagrad"):
        losses[name] = []
        for x in (data.x, data.x @ basis):
            w = torch.nn.Parameter(torch.zeros(d, dtype=torch.float64))
            optimizer = regret.CONTENDERS[name].build([w], 0.4)
            for t in range(data.rounds):
                part = slice(8 * t, 8 * t + 8)
                loss = torch.nn.functional.binary_cross_entropy_with_logits(x[part] @ w, data.y[part])
                (w.grad,) = torch.autograd.grad(loss, w)
                optimizer.step()
                losses[name].append(loss.item())
    mine, diagonal = losses["S-AdaGrad, rank 10"], losses["diagonal Adagrad"]
    half = len(mine) // 2
    assert mine[half:] == pytest.approx(mine[:half], rel=1e-5)
    assert diagonal[half:] != pytest.approx(diagonal[:half], rel=1e-2)

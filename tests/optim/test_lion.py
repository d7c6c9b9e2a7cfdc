"""Lion beside its definition: the signs of an average, every number moves by the rate."""

import pytest
import torch

from sketch_plugins import CSLion, registry, state_report

SHAPES = [(70, 80), (30,), (4, 48, 40)]


def parameters(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def gradients(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in SHAPES]


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        for p, g in zip(params, gradients(step, params[0].dtype), strict=True):
            p.grad = g
        optimizer.step()


def published(params, steps, lr, betas, decay, maximize=False):
    """Algorithm 2 of arXiv 2302.06675, in float64."""
    params = [p.detach().double().clone() for p in params]
    averages = [torch.zeros_like(p) for p in params]
    for step in range(steps):
        for p, m, g in zip(params, averages, gradients(step), strict=True):
            g = -g if maximize else g
            c = betas[0] * m + (1 - betas[0]) * g
            p.sub_(lr * (c.sign() + decay * p))
            m.copy_(betas[1] * m + (1 - betas[1]) * g)
    return params


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.98), (0.5, 0.5), (0.1, 0.999)])
def test_it_is_lion(betas, maximize):
    params = parameters()
    expected = published(params, 6, 0.01, betas, 0.1, maximize)
    train(CSLion(params, 0.01, betas, weight_decay=0.1, preset="exact", maximize=maximize), params, 6)
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("moment", ["fp32", "bf16", "int8"])
def test_a_compressed_momentum_changes_few_signs(moment, fused):
    if fused:
        pytest.importorskip("numba")
    params = parameters(torch.float32)
    expected = published(params, 8, 0.01, (0.9, 0.99), 0.1)
    train(CSLion(params, 0.01, weight_decay=0.1, first_moment=moment, min_compress_size=0, fused=fused), params, 8)
    other = sum(((p.detach() - q).abs() > 1e-3).sum().item() for p, q in zip(params, expected, strict=True))
    total = sum(p.numel() for p in params)
    # A number whose average is next to 0 may have another sign in one of the steps.
    assert other <= {"fp32": 1e-3, "bf16": 0.01, "int8": 0.03}[moment] * total


@pytest.mark.parametrize("fused", [False, True])
def test_only_signs_count(fused):
    """Gradients of any size give the same steps, and there is no step without any gradient so far."""
    if fused:
        pytest.importorskip("numba")
    moved = []
    for scale in (1.0, 2.0**20, 2.0**-20):
        params = parameters(torch.float32)
        start = [p.detach().clone() for p in params]
        optimizer = CSLion(params, 0.25, fused=fused)
        for step in range(3):
            for p, g in zip(params, gradients(step, torch.float32), strict=True):
                p.grad = g * scale
                p.grad[..., :3] = 0
            optimizer.step()
        moved.append([p.detach().clone() for p in params])
        for p, before in zip(params, start, strict=True):
            assert torch.equal(p[..., :3], before[..., :3])
            torch.testing.assert_close(((p - before) * 4).round(), (p - before) * 4, rtol=0, atol=1e-5)
    assert all(torch.equal(a, b) for other in moved[1:] for a, b in zip(moved[0], other, strict=True))


@pytest.mark.parametrize("fused", [False, True])
def test_nan_stays_nan(fused):
    if fused:
        pytest.importorskip("numba")
    params = parameters(torch.float32)
    for p in params:
        p.grad = torch.ones_like(p)
    params[0].grad[3, 5] = float("nan")
    CSLion(params, fused=fused, first_moment="fp32").step()
    assert params[0].isnan().sum() == 1 and params[0][3, 5].isnan()


def test_touched_rows_alone_move():
    p = torch.nn.Parameter(torch.randn(200, 30))
    before = p.detach().clone()
    p.grad = torch.sparse_coo_tensor([[3, 7]], torch.ones(2, 30), (200, 30), check_invariants=True)
    CSLion([p], 0.5, weight_decay=0.1).step()
    rest = [i for i in range(200) if i not in (3, 7)]
    assert torch.equal(p[rest], before[rest])
    torch.testing.assert_close(p[[3, 7]].detach(), before[[3, 7]] * 0.95 - 0.5)


def test_it_is_registered_and_its_state_is_small():
    assert registry.get("cs_lion").cls is CSLion
    with pytest.raises(ValueError, match="Did you mean 'cs_lion'"):
        registry.get("lion")
    p = torch.nn.Parameter(torch.randn(1000, 768))
    assert state_report(CSLion([p])).bytes_per_param == pytest.approx(1 + 4 / 128)
    assert registry.parse_options("cs_lion", {"betas": "0.95:0.98"}) == {"betas": (0.95, 0.98)}


@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.99, 0.9), (0.9, 1.0), (0.9,)])
def test_betas_that_have_no_meaning(betas):
    with pytest.raises(ValueError, match="0 < b1 <= b2 < 1"):
        CSLion(parameters(), betas=betas)


@pytest.mark.parametrize("then", [(0.95, 0.95), (0.5, 0.9)])
def test_betas_that_change_after_a_step_was_remembered(then, monkeypatch):
    """Equal betas do not look ahead, and a kernel is compiled for one of the two cases."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are interpreted where there is no GPU only")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for first, second in (((0.9, 0.99), then), (then, (0.9, 0.99))):
        ends = []
        for fused in (True, False):
            params = parameters(torch.float32)
            optimizer = CSLion(params, 0.01, first, preset="exact", fused=fused)
            train(optimizer, params, 3)
            optimizer.param_groups[0]["betas"] = second
            train(optimizer, params, 2, first=3)
            ends.append([p.detach() for p in params])
        for a, b in zip(*ends, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

"""``lagged_rms``: update_clip and scale_parameter use the measurements of the previous step. Kernels: tests/kernels."""

import copy
import importlib.util

import pytest
import torch

from sketch_plugins import (
    SM3,
    CSAdagrad,
    CSAdam,
    CSMomentum,
    CSRMSprop,
    Sketchy,
    full_precision_state_dict,
    load_full_precision_state_dict,
    registry,
    state_report,
)
from sketch_plugins.optim import gradients as looked_at

R, D, WIDTH = 23, 6, 5
CLIP, LR, DECAY, B1, B2, EPS = 0.3, 0.5, 0.1, 0.8, 0.9, 1e-6
HAS_NUMBA = importlib.util.find_spec("numba") is not None


def start(scale=0.01):
    return scale * torch.randn(R, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(n, sparse=()):
    """Growing and shrinking, so that clipping by the step before differs from clipping by this one; None: all rows."""
    generator = torch.Generator().manual_seed(3)
    for t in range(n):
        g = torch.randn(R, D, dtype=torch.float64, generator=generator) * (1.0, 8.0, 0.2, 30.0)[t % 4]
        rows = torch.randperm(R, generator=generator)[:9].sort().values if t in sparse else None
        yield g, rows


def give(p, g, rows):
    p.grad = g.clone() if rows is None else torch.sparse_coo_tensor(rows.unsqueeze(0), g[rows], g.shape)


def rms(x):
    return float(x.square().mean().sqrt())


class Devices:
    """Both RMS, kept from step to step; touched rows are measured in the same step."""

    last = None

    def of(self, update, parameter, rows):
        """(Clipping's divisor, the step's scale)."""
        now = rms(update), rms(parameter)
        used = now if self.last is None or rows is not None else self.last
        self.last = now
        return max(1.0, used[0] / CLIP), max(1e-3, used[1])


def adam(p, steps, first_moment):
    """CSAdam with a strided count-min sketch, row by row."""
    v = torch.zeros(WIDTH, D, dtype=torch.float64)
    m = torch.zeros(R, D, dtype=torch.float64)
    devices = Devices()
    for t, (g, rows) in enumerate(steps, 1):
        touched = list(range(R)) if rows is None else rows.tolist()
        for b in range(WIDTH):
            members = [i for i in touched if i % WIDTH == b]
            if members:
                mean = torch.stack([g[i] ** 2 for i in members]).mean(0)
                for _ in range(1 if rows is None else len(members)):
                    v[b] = B2 * v[b] + (1 - B2) * mean
        root = (1 - B2**t) ** 0.5
        update = torch.zeros(len(touched), D, dtype=torch.float64)
        for k, i in enumerate(touched):
            numerator = g[i]
            if first_moment == "fp32":
                m[i] = B1 * m[i] + (1 - B1) * g[i]
                numerator = m[i] / (1 - B1**t)
            root_v = v[i % WIDTH].sqrt()
            update[k] = numerator / (root_v / root + EPS if rows is None else (root_v + EPS) / root)
        divisor, scale = devices.of(update, p[touched], rows)
        p[touched] = (1 - LR * DECAY) * p[touched] - LR * scale * update / divisor
    return p, devices.last


@pytest.mark.parametrize("sparse", [(), (2, 3, 6), (0, 4)], ids=str)
@pytest.mark.parametrize("first_moment", ["none", "fp32"])
def test_adam_is_the_formula(first_moment, sparse):
    p = torch.nn.Parameter(start())
    optimizer = CSAdam(
        [p], LR, (B1, B2), EPS, DECAY, first_moment=first_moment, width=WIDTH, min_compress_size=0, chunk_size=9,
        update_clip=CLIP, scale_parameter=True, lagged_rms=True,
    )  # fmt: skip
    for g, rows in gradients(8, sparse):
        give(p, g, rows)
        optimizer.step()
    expected, last = adam(start(), gradients(8, sparse), first_moment)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(optimizer.state[p]["rms.last"], torch.tensor(last, dtype=torch.float64))


def test_sm3_clips_before_the_momentum():
    p, expected = torch.nn.Parameter(start()), start()
    optimizer = SM3(
        [p], LR, (B1, B2), EPS, preset="exact", update_clip=CLIP, reference_rms=1.0, lagged_rms=True, chunk_size=9
    )
    v = m = torch.zeros(R, D, dtype=torch.float64)
    devices = Devices()
    for g, rows in gradients(8):
        give(p, g, rows)
        optimizer.step()
        v = B2 * v + (1 - B2) * g * g
        u = g / (v + EPS).sqrt()
        divisor, scale = devices.of(u, expected, None)
        m = B1 * m + (1 - B1) * u / divisor
        expected = expected - LR * scale * m
        torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-13)


def test_momentum_and_coupled_weight_decay():
    p, expected = torch.nn.Parameter(start()), start()
    options = {"update_clip": CLIP, "scale_parameter": True, "lagged_rms": True, "chunk_size": 9}
    optimizer = CSMomentum([p], LR, weight_decay=DECAY, momentum=B1, nesterov=True, preset="exact", **options)
    m = torch.zeros(R, D, dtype=torch.float64)
    devices = Devices()
    for g, rows in gradients(8):
        give(p, g, rows)
        optimizer.step()
        x = g + DECAY * expected
        m = B1 * m + x
        u = x + B1 * m
        divisor, scale = devices.of(u, expected, None)
        expected = expected - LR * scale * u / divisor
        torch.testing.assert_close(p.detach(), expected, rtol=1e-10, atol=1e-13)


BACKENDS = [False, pytest.param(True, marks=pytest.mark.skipif(not HAS_NUMBA, reason="Numba is not installed"))]
OPTIMIZERS = [
    (CSAdam, {"preset": "lean"}),
    (CSAdam, {"update_clip": 0.3}),
    (CSRMSprop, {"preset": "lean"}),
    (CSAdagrad, {"preset": "lean", "reference_rms": 1.0}),
    (CSMomentum, {"update_clip": 0.3}),
    (SM3, {"preset": "ema"}),
    (SM3, {"update_clip": 0.3}),
]
SHAPES = [(300, 130), (40, 33), (9,), (6, 4, 3, 3), ()]


def build(cls, options, fused, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]
    return params, cls(params, **{"fused": fused, "min_compress_size": 0, "lagged_rms": True, **options})


def train(params, optimizer, steps, scale=1.0):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = scale * torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


@pytest.mark.filterwarnings("ignore:fused=True. a parameter of shape")
@pytest.mark.parametrize("fused", BACKENDS)
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS, ids=str)
def test_the_first_step_is_that_without_and_the_second_is_not(cls, options, fused):
    ours, others = build(cls, options, fused), build(cls, {**options, "lagged_rms": False}, fused)
    for run in (ours, others):
        train(*run, [0])
    assert all(map(torch.equal, ours[0], others[0]))
    for run in (ours, others):
        train(*run, [1], 5.0)
    assert not torch.equal(ours[0][0], others[0][0])


@pytest.mark.filterwarnings("ignore:fused=True. a parameter of shape")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", BACKENDS)
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS, ids=str)
def test_a_run_resumes_bit_for_bit(cls, options, fused, dtype):
    whole = build(cls, options, fused, dtype)
    train(*whole, range(5))
    for at in (1, 3):
        params, optimizer = build(cls, options, fused, dtype)
        train(params, optimizer, range(at))
        copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
        fresh = cls(copies, **{"fused": fused, "min_compress_size": 0, "lagged_rms": True, **options})
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert all(fresh.state[p]["rms.last"].dtype == torch.float32 for p in copies)
        train(copies, fresh, range(at, 5))
        assert all(map(torch.equal, whole[0], copies))
        for p, q in zip(whole[0], copies, strict=True):
            assert torch.equal(whole[1].state[p]["rms.last"], fresh.state[q]["rms.last"])


def test_bytes():
    """Two float32 for each parameter, planned or there; two float64 of a float64 parameter."""
    params, optimizer = build(CSAdam, {"preset": "lean"}, False)
    for _ in range(2):
        report = state_report(optimizer)
        assert report.by_store()["rms"] == 8 * len(SHAPES)
        buckets = [(300, 130), (40, 33), (6, 36)]
        sketched = sum(4 * -(-r // 20) * d for r, d in buckets)  # ceil(0.05 * r) buckets
        sketched += 4 * 300  # a number for each row of the wide matrix (row_scales)
        steps = 0 if report.planned else 4 * len(SHAPES)
        assert report.state_bytes - report.by_store().get("step", 0) == sketched + 4 * (9 + 1) + 8 * len(SHAPES)
        assert report.by_store().get("step", 0) in (0, steps)
        train(params, optimizer, [0])
    assert all(optimizer.state[p]["rms.last"].shape == (2,) for p in params)
    params, optimizer = build(CSAdam, {"preset": "lean"}, False, torch.float64)
    assert state_report(optimizer).by_store()["rms"] == 16 * len(SHAPES)
    assert "rms" not in state_report(build(CSAdam, {"lagged_rms": False}, False)[1]).by_store()


@pytest.mark.parametrize("fused", BACKENDS)
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_zeros_do_no_harm(fused, eps):
    """Gradients and parameters of zeros, in the first step or later, cause no 0 / 0, and nothing is lost."""
    params, optimizer = build(CSAdam, {"preset": "lean", "eps": eps}, fused)
    for p in params[1:]:
        p.data.zero_()
    train(params, optimizer, [0], 0.0)
    assert all(float(optimizer.state[p]["rms.last"][0]) == 0 for p in params)
    for step, scale in enumerate((1.0, 0.0, 0.0, 1.0), 1):
        train(params, optimizer, [step], scale)
        assert all(p.isfinite().all() and optimizer.state[p]["rms.last"].isfinite().all() for p in params)
    assert all((p != 0).any() for p in params)


@pytest.mark.filterwarnings("ignore:fused=True. a parameter of shape")
@pytest.mark.parametrize("fused", BACKENDS)
@pytest.mark.parametrize(("cls", "options"), OPTIMIZERS, ids=str)
def test_a_learning_rate_of_0_measures_like_any_other(cls, options, fused):
    """A warm-up starts there, and the measurements do not contain the learning rate."""
    runs = [build(cls, {**options, "lr": lr, "weight_decay": 0.0}, fused) for lr in (0.0, 1e-3)]
    for run in runs:
        train(*run, range(3))
    for p, q in zip(*(run[0] for run in runs), strict=True):
        a, b = runs[0][1].state[p]["rms.last"], runs[1][1].state[q]["rms.last"]
        torch.testing.assert_close(a[0], b[0], rtol=1e-6, atol=0)
        assert a[0] > 0 and a[1] > 0
    assert all(map(torch.equal, runs[0][0], build(cls, options, fused)[0]))


def test_a_first_step_without_rows_leaves_the_parameter_s_size():
    p, q = (torch.nn.Parameter(start(3.0)) for _ in range(2))
    options = {"min_compress_size": 0, "weight_decay": 0.0, "first_moment": "none", "width": WIDTH}
    optimizer = CSAdam([p], LR, scale_parameter=True, update_clip=CLIP, lagged_rms=True, row_sparse=True, **options)
    plain = CSAdam([q], LR * rms(start(3.0)), row_sparse=True, **options)
    for g in (torch.zeros(R, D, dtype=torch.float64), next(iter(gradients(1)))[0]):
        for parameter, one in ((p, optimizer), (q, plain)):
            parameter.grad = g.clone()
            one.step()
            one.param_groups[0]["row_sparse"] = False
    torch.testing.assert_close(p, q)
    assert not torch.equal(p, start(3.0))


def test_what_is_switched_on_later_finds_its_measure():
    """Both are measured, whether they are used or not."""
    p, expected = torch.nn.Parameter(start()), start()
    optimizer = CSAdam([p], LR, (B1, B2), EPS, 0.0, preset="exact", lagged_rms=True)
    twin = copy.deepcopy(optimizer)
    ((g, _), (h, _)) = gradients(2)
    for one in (optimizer, twin):
        (parameter,) = one.param_groups[0]["params"]
        parameter.grad = g
        one.step()
    last, before = optimizer.state[p]["rms.last"].clone(), p.detach().clone()
    torch.testing.assert_close(last, torch.tensor([rms(before - start()) / LR, rms(start())], dtype=torch.float64))
    optimizer.param_groups[0].update(update_clip=CLIP, scale_parameter=True)
    for one in (optimizer, twin):
        (parameter,) = one.param_groups[0]["params"]
        parameter.grad = h
        one.step()
    update = twin.param_groups[0]["params"][0].detach() - before
    expected = before + update * max(1e-3, float(last[1])) / max(1.0, float(last[0]) / CLIP)
    torch.testing.assert_close(p.detach(), expected)


def test_errors():
    p = torch.nn.Parameter(torch.randn(64, 70))
    with pytest.raises(ValueError, match="lagged_rms='yes' is not allowed: lagged_rms must be True or False"):
        CSAdam([p], lagged_rms="yes")
    with pytest.raises(TypeError, match="lagged_rms"):
        Sketchy([p], lagged_rms=True)
    with pytest.raises(ValueError, match="Sketchy has no option 'lagged_rms'"):
        Sketchy([{"params": [p], "lagged_rms": True}])
    assert registry.parse_options("cs_adam", {"lagged_rms": "true"}) == {"lagged_rms": True}
    params, optimizer = build(CSAdam, {"preset": "lean"}, False)
    train(params, optimizer, [0])
    other = build(CSAdam, {"preset": "lean", "lagged_rms": False}, False)[1]
    with pytest.raises(ValueError, match="lagged_rms=True, but group 0 of this CSAdam has lagged_rms=False"):
        other.load_state_dict(optimizer.state_dict())
    broken = copy.deepcopy(optimizer.state_dict())
    broken["state"][0]["rms.last"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"the saved rms of .* has 'last' of shape \(3,\).*expected \(2,\)"):
        optimizer.load_state_dict(broken)
    del broken["state"][0]["rms.last"]
    with pytest.raises(ValueError, match="expected rms, second_moment, step"):
        optimizer.load_state_dict(broken)
    optimizer.param_groups[0]["lagged_rms"] = False
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="lagged_rms of group 0 was True and is now False"):
        train(params, optimizer, [1])
    assert all(map(torch.equal, params, before))


def test_a_first_step_is_not_captured(monkeypatch):
    """A graph would repeat it for ever; the kernels of the later steps are in tests/kernels."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    p = torch.nn.Parameter(torch.randn(24, 48))
    optimizer = CSAdam([p], fused=True, capturable=True, preset="lean", lagged_rms=True)
    p.grad = torch.randn_like(p)
    before = p.detach().clone()
    monkeypatch.setattr(looked_at, "is_capturing", lambda device: True)
    with pytest.raises(ValueError, match=r"first step with lagged_rms=True .*Take one step, .*before the capture"):
        optimizer.step()
    assert torch.equal(p, before) and not optimizer.state
    monkeypatch.setattr(looked_at, "is_capturing", lambda device: False)
    optimizer.step()
    monkeypatch.setattr(looked_at, "is_capturing", lambda device: True)
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


@pytest.mark.parametrize("way", ["started", "copied", "loaded"])
def test_state_that_no_step_has_changed_has_no_rms(way, monkeypatch):
    """`load_full_precision_state_dict` makes state without a step: the first one measures, also under capturable."""
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    generator = torch.Generator().manual_seed(0)
    weights = {"weight": 0.01 * torch.randn(24, 48, generator=generator)}
    grads = [(3.0 * torch.randn(24, 48, generator=generator)).bfloat16() for _ in range(2)]
    out = []
    for capturable in (True, False):
        model = torch.nn.Linear(48, 24, bias=False).bfloat16()
        options = {"update_clip": 0.1, "scale_parameter": True, "lagged_rms": True, "weight_bits": 32}
        optimizer = CSAdam(model.parameters(), lr=0.1, fused=True, capturable=capturable, preset="lean", **options)
        load_full_precision_state_dict(model, optimizer, weights)
        if way == "copied":
            model, optimizer = copy.deepcopy((model, optimizer))
        elif way == "loaded":
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if capturable:
            model.weight.grad = grads[0]
            with monkeypatch.context() as patch, pytest.raises(ValueError, match="has taken no step yet"):
                patch.setattr(looked_at, "is_capturing", lambda device: True)
                optimizer.step()
        for grad in grads:
            model.weight.grad = grad
            optimizer.step()
        assert not optimizer._unmeasured
        out.append(full_precision_state_dict(model, optimizer)["weight"])
    moved = float((out[1] - weights["weight"]).abs().max())
    assert float((out[0] - out[1]).abs().max()) < 1e-4 * moved

"""MemSGD: limits, invariants, and saved state."""

import io
import math

import pytest
import torch

from sketch_plugins import MemSGD


def problem(shapes=((40, 5), (31,), ()), dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=g, dtype=torch.float64).to(dtype)) for s in shapes]


def feed(params, step):
    g = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("lr", (0.1, torch.tensor(0.1)))
@pytest.mark.parametrize("compressor", ("topk", "randk"))
def test_all_entries_are_sgd_bit_for_bit(dtype, lr, compressor):
    ours, theirs = problem(dtype=dtype), problem(dtype=dtype)
    mem = MemSGD(ours, lr=lr, density=1.0, weight_decay=0.01, compressor=compressor)
    sgd = torch.optim.SGD(theirs, lr=0.1 if not isinstance(lr, torch.Tensor) else lr, weight_decay=0.01)
    for step in range(50):
        for params in (ours, theirs):
            feed(params, step)
        mem.step()
        sgd.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all("error" not in state for state in mem.state.values())


@pytest.mark.parametrize("compressor", ("topk", "randk"))
@pytest.mark.parametrize("options", ({"k": 1}, {"density": 0.1}, {"density": 0.3, "shift": 20.0}))
def test_less_its_memory_it_is_sgd(compressor, options):
    """x_t - m_t is plain SGD's iterate on the same gradients, in float64 to 1e-12."""
    ours, theirs = problem(), problem()
    mem = MemSGD(ours, lr=0.1, compressor=compressor, **options)
    for step in range(200):
        feed(ours, step)
        mem.step()
        rate = 0.1 if "shift" not in options else 0.1 * 20 / (20 + step)
        for p, q in zip(ours, theirs, strict=True):
            q.data -= rate * p.grad
    for p, q in zip(ours, theirs, strict=True):
        m = mem.state[p].get("error", torch.zeros(p.numel(), dtype=p.dtype)).view(p.shape)
        assert (p - m - q).abs().max() < 1e-12


def test_one_step_by_hand():
    p = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    optimizer = MemSGD([p], lr=0.5, k=1)
    for grad, expected, memory in (
        ([1.0, -4.0, 2.0, 0.0], [1.0, 4.0, 3.0, 4.0], [0.5, 0.0, 1.0, 0.0]),
        ([0.0, 1.0, 2.0, 0.0], [1.0, 4.0, 1.0, 4.0], [0.5, 0.5, 0.0, 0.0]),
        ([0.0, 0.0, 0.0, 0.0], None, None),
    ):
        p.grad = torch.tensor(grad)
        optimizer.step()
        if expected:
            assert p.tolist() == expected and optimizer.state[p]["error"].tolist() == memory
    assert sorted(p.tolist()) in ([0.5, 1.0, 4.0, 4.0], [1.0, 1.0, 3.5, 4.0])


def test_average():
    """The weights (a + t)^2 over the iterates at which gradients were taken."""
    params = problem()
    optimizer = MemSGD(params, lr=0.1, k=3, shift=7.0, averaging=True)
    total, weights = [0.0 for _ in params], 0.0
    for step in range(30):
        weight = (7.0 + step) ** 2
        total = [t + weight * p.detach() for t, p in zip(total, params, strict=True)]
        weights += weight
        feed(params, step)
        optimizer.step()
    for t, average in zip(total, optimizer.averaged_parameters(), strict=True):
        assert torch.allclose(t / weights, average, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="averaging=False"):
        MemSGD(params).averaged_parameters()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_low_precision_loses_nothing(dtype):
    """The part of an update that rounding removes stays in the memory: x - m follows SGD in float32."""
    ours = problem(((300,),), dtype=dtype)
    exact = ours[0].detach().double()
    optimizer = MemSGD(ours, lr=1e-3, density=0.2)
    for step in range(100):
        feed(ours, step)
        optimizer.step()
        exact -= 1e-3 * ours[0].grad.double()
    found = ours[0].double() - optimizer.state[ours[0]]["error"].double()
    assert (found - exact).abs().max() < 1e-5  # 100 additions in float32


def test_sparse_gradients_and_layouts():
    table = torch.nn.Parameter(torch.ones(6, 2))
    table.grad = torch.sparse_coo_tensor([[1, 4, 1]], torch.tensor([[1.0, 1.0], [3.0, 4.0], [1.0, 1.0]]), (6, 2))
    optimizer = MemSGD([table], lr=1.0, k=2)
    optimizer.step()
    expected = torch.ones(6, 2)
    expected[4] = torch.tensor([-2.0, -3.0])
    assert torch.equal(table, expected)
    conv = torch.nn.Parameter(torch.ones(2, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    conv.grad = torch.arange(24.0).view(2, 3, 2, 2)
    MemSGD([conv], lr=1.0, k=1).step()
    assert conv.flatten().tolist() == [1.0] * 23 + [-22.0] and conv.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_state_dict_continues_bit_for_bit(dtype):
    a, b = problem(dtype=dtype), problem(dtype=dtype)
    options = {"lr": 0.1, "density": 0.1, "compressor": "randk", "averaging": True, "shift": 10.0}
    first, second = MemSGD(a, **options), MemSGD(b, **{**options, "lr": 9.0})
    for step in range(5):
        feed(a, step)
        first.step()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(a, b, strict=True):
        q.data.copy_(p.data)
        kinds = {torch.float64 if dtype == torch.float64 else torch.float32}
        assert {t.dtype for t in second.state[q].values()} == kinds
    for step in range(5, 10):
        for params, optimizer in ((a, first), (b, second)):
            feed(params, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_state_that_is_not_loaded():
    ours = problem()
    optimizer = MemSGD(ours, lr=0.1, density=0.1)
    feed(ours, 0)
    optimizer.step()
    good = optimizer.state_dict()
    before = {p: state["error"].clone() for p, state in optimizer.state.items() if "error" in state}

    def kept(**changes):
        return {**good, "state": {**good["state"], 0: {**good["state"][0], **changes}}}

    group = {k: v for k, v in good["param_groups"][0].items() if k != "params"}
    others = [{"lr": 0.1, "params": good["param_groups"][0]["params"]}]  # of another optimizer
    for bad, said in (
        ({}, "has no 'state'"),
        ({"state": {}}, "has no 'param_groups'"),
        ({**good, "param_groups": [group]}, "group 0 of the state dict of MemSGD has no 'params'"),
        ({**good, "state": {**good["state"], 0: {"error": good["state"][0]["error"]}}}, "parameter 0 lacks 'step'"),
        (kept(error=torch.zeros(3)), r"parameter 0 has 'error' \(a tensor of shape \(3,\)\).* 200 entries"),
        (kept(average=[0.0]), r"'average' \(list\)"),
        ({**kept(exp_avg=torch.zeros(200)), "param_groups": others}, "contains 'exp_avg'"),
        *(({**good, "state": {**good["state"], 0: entry}}, "parameter 0 is") for entry in (None, "x", [1])),
    ):
        with pytest.raises(ValueError, match=said):
            optimizer.load_state_dict(bad)
    for p, error in before.items():
        assert torch.equal(optimizer.state[p]["error"], error) and float(optimizer.state[p]["step"]) == 1.0


def test_memory_is_what_makes_it_converge():
    """A quadratic in one of two dimensions; its gradients are larger in the other. Top-1 without memory never moves."""
    for memory, reached in ((True, True), (False, False)):
        p = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        optimizer = MemSGD([p], lr=0.05, k=1, memory=memory)
        for step in range(400):
            sign = 1.0 if step % 2 else -1.0
            p.grad = torch.tensor([2.0 * float(p[0].detach()), sign * 5.0]) + torch.tensor([0.0, 0.0])
            optimizer.step()
        assert (abs(float(p[0].detach())) < 0.2) == reached


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 0}, "k=0"),
        ({"density": 0.0}, r"density=0\.0"),
        ({"density": 1.5}, r"density=1\.5"),
        ({"compressor": "best"}, "compressor='best'"),
        ({"shift": 0.0}, "shift"),
        ({"lr": -1.0}, "lr"),
        ({"averaging": "yes"}, "averaging='yes'"),
    ],
)
def test_errors(options, said):
    with pytest.raises(ValueError, match=said):
        MemSGD(problem(), **options)
    if "k" in options:
        with pytest.raises(ValueError, match=said):
            MemSGD([{"params": problem(), **options}])


def test_refused_parameters():
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="complex"):
        MemSGD([p]).step()
    table = torch.nn.Parameter(torch.ones(6, 2))
    table.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (6, 2))
    with pytest.raises(ValueError, match="sparse"):
        MemSGD([table], weight_decay=0.1).step()


def test_closure_and_steps_of_nothing():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = MemSGD([p, torch.nn.Parameter(torch.ones(0))], lr=0.0, k=1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 4.0
    for q in optimizer.param_groups[0]["params"]:
        q.grad = torch.zeros_like(q)
    optimizer.step()
    assert p.tolist() == [1.0] * 4 and math.isfinite(float(optimizer.state[p]["error"].sum()))


@pytest.mark.parametrize(
    ("key", "value"), [("density", 2.0), ("density", math.nan), ("k", 0), ("compressor", "foo"), ("weight_decay", -1.0)]
)
def test_an_option_changed_in_a_group_is_checked_before_the_step(key, value):
    p = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = MemSGD([p], density=0.5)
    optimizer.param_groups[0][key] = value
    p.grad = torch.ones(6, 4)
    with pytest.raises(ValueError, match=f"{key}="):
        optimizer.step()
    assert bool((p == 1).all()) and not optimizer.state


def test_a_saved_group_that_lacks_an_option_takes_the_optimizer_s():
    p = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = MemSGD([p], density=0.5)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["compressor"]
    optimizer.load_state_dict(saved)
    p.grad = torch.ones(6, 4)
    optimizer.step()
    assert optimizer.param_groups[0]["compressor"] == "topk" and not bool((p == 1).all())


def test_state_of_other_code_is_saved_and_loaded():
    ours = problem()
    optimizer = MemSGD(ours, lr=0.1, density=0.1)
    feed(ours, 0)
    optimizer.step()
    for p in ours:
        optimizer.state[p].update(sum=torch.ones(3), exp_avg=torch.ones(p.shape))
    twin = MemSGD(problem(), lr=0.1, density=0.1)
    twin.load_state_dict(optimizer.state_dict())
    for state in twin.state.values():
        assert torch.equal(state["sum"], torch.ones(3)) and "exp_avg" in state and state["step"] == 1


class Labelled(torch.Tensor):
    """A subclass with memory of its own."""


def test_gradients_of_a_subclass_leave_plain_state():
    ours, twins = problem(), problem()
    optimizers = [MemSGD(params, lr=0.1, density=0.1, averaging=True) for params in (ours, twins)]
    for step in range(3):
        feed(ours, step)
        feed(twins, step)
        for p in twins:
            p.grad = p.grad.as_subclass(Labelled)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, twins, strict=True))
    assert {type(tensor) for state in optimizers[1].state.values() for tensor in state.values()} == {torch.Tensor}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": 3}, "the present step of parameter 1 of group 0, .* is 3; expected a tensor"),
        ({"step": None}, "is None"),
        ({"step": torch.tensor(math.inf)}, "inf"),
        ({"error": torch.zeros(7)}, r"has 'error' \(a tensor of shape \(7,\)\)"),
        ({"error": torch.zeros(200, dtype=torch.float64)}, "has 'error' of torch.float64; expected torch.float32"),
        ({"error": torch.zeros(200, device="meta")}, "on the meta device"),
        ({"error": torch.zeros(1).expand(200)}, "'error' whose elements share memory"),
        ({"average": torch.zeros(200)}, r"'average' \(a tensor of shape \(200,\)\)"),
    ],
)
def test_changed_state_is_refused_before_anything_moves(change, said):
    params = [torch.nn.Parameter(torch.ones(20, 10)) for _ in range(2)]
    optimizer = MemSGD(params, lr=0.1, density=0.1, averaging=True)
    feed(params, 0)
    optimizer.step()
    feed(params, 1)
    optimizer.state[params[1]].update(change)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=said):
        optimizer.step()
    assert all(torch.equal(p, was) for p, was in zip(params, before, strict=True))
    assert optimizer.state[params[0]]["step"] == 1


def test_state_is_written_in_place():
    ours = problem()
    optimizer = MemSGD(ours, lr=0.1, density=0.1, averaging=True)
    feed(ours, 0)
    optimizer.step()
    before = [tensor for state in optimizer.state.values() for tensor in state.values()]
    feed(ours, 1)
    optimizer.step()
    after = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert list(map(id, before)) == list(map(id, after))


def test_arguments_of_torch_s_optimizers():
    neutral = {
        "foreach": False, "fused": None, "amsgrad": False, "capturable": False, "differentiable": False,
        "maximize": False,
    }  # fmt: skip
    MemSGD(problem(), **neutral).add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], **neutral})
    for name in neutral:
        with pytest.raises(ValueError, match=f"MemSGD does not support {name}=True"):
            MemSGD(problem(), **{name: True})
        with pytest.raises(ValueError, match=f"MemSGD does not support {name}=True"):
            MemSGD([{"params": problem(), name: True}])
        params = problem()
        optimizer = MemSGD(params)
        feed(params, 0)
        optimizer.param_groups[0][name] = True
        with pytest.raises(ValueError, match=f"MemSGD does not support {name}=True"):
            optimizer.step()

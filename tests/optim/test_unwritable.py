"""Parameters that a step cannot write are refused by name before anything changes, whatever takes the step."""

import importlib.util

import pytest
import torch

from sketch_plugins import MemSGD, SAdagrad, registry
from sketch_plugins.sharding.tensors import overlaps

FUSED = [False, True] if importlib.util.find_spec("numba") else [False]
KINDS = [(name, fused) for name in registry.names() for fused in FUSED] + [("sadagrad", None), ("mem_sgd", None)]
WITHOUT_KERNELS = {"sadagrad": SAdagrad, "mem_sgd": MemSGD}


def build(name, params, fused):
    if name in WITHOUT_KERNELS:
        return WITHOUT_KERNELS[name](params)
    return registry.get(name).cls(params, fused=fused)


def give(params):
    for p in params:
        p.grad = torch.ones(p.shape)


def expanded():
    return torch.nn.Parameter(torch.randn(1, 64).expand(64, 64))


def strided():
    return torch.nn.Parameter(torch.randn(127).as_strided((64, 64), (1, 1)))


def inference():
    with torch.inference_mode():
        return torch.nn.Parameter(torch.randn(64, 64), requires_grad=False)


def inference_copy(tensor):
    with torch.inference_mode():
        return tensor.clone()


@pytest.mark.parametrize(("name", "fused"), KINDS)
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (expanded, r"strides \(0, 1\)"),
        (strided, r"strides \(1, 1\)"),
        (inference, "inference tensor"),
    ],
)
def test_refused_by_name_before_the_first_write(name, fused, make, words):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(64, 64)), make()]
    optimizer = build(name, params, fused)
    give(params)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=rf"parameter 1 of group 0, of shape \(64, 64\).* {words}"):
        optimizer.step()
    assert all(torch.equal(p, was) for p, was in zip(params, before, strict=True)) and not optimizer.state


@pytest.mark.parametrize(("name", "fused"), KINDS)
def test_inference_tensors_step_within_inference_mode_only(name, fused):
    torch.manual_seed(0)
    plain = torch.nn.Parameter(torch.randn(64, 64))
    with torch.inference_mode():
        made = torch.nn.Parameter(plain.clone(), requires_grad=False)
    optimizers = [build(name, [p], fused) for p in (plain, made)]
    for _ in range(4):  # more than it takes to remember a step
        give([plain, made])
        optimizers[0].step()
        with torch.inference_mode():
            optimizers[1].step()
    assert torch.equal(plain, made)
    before = made.detach().clone()
    give([made])
    with pytest.raises(ValueError, match="inference tensor"):
        optimizers[1].step()
    assert torch.equal(made, before) and all(state["step"] == 4 for state in optimizers[1].state.values())
    with torch.inference_mode():
        optimizers[1].step()
    assert not torch.equal(made, before)


STATES = {
    "several elements share memory": lambda t: t.flatten()[0].expand(t.shape),
    "made in torch.inference_mode": inference_copy,
    "on meta, while the parameter is on cpu": lambda t: t.to("meta"),
    "with layout torch.sparse_coo": lambda t: t.to_sparse(),
}


@pytest.mark.parametrize("said", STATES)
@pytest.mark.parametrize(("name", "fused"), [kind for kind in KINDS if kind[0] != "mem_sgd"])
@pytest.mark.parametrize("steps", [1, 4])
def test_state_that_cannot_be_written_is_refused_by_name(name, fused, said, steps):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(64, 80)) for _ in range(2)]
    optimizer = build(name, params, fused)
    for _ in range(steps):
        give(params)
        optimizer.step()
    state = optimizer.state[params[1]]
    for key in [key for key, tensor in state.items() if key != "step" and tensor.ndim and tensor.numel() > 1]:
        kept, state[key] = state[key], STATES[said](state[key])
        before = [p.detach().clone() for p in params]
        with pytest.raises(ValueError, match=f"of parameter 1 of group 0.* has a tensor .*{said}"):
            optimizer.step()
        assert all(torch.equal(p, was) for p, was in zip(params, before, strict=True))
        assert [own["step"] for own in optimizer.state.values()] == [steps, steps]
        state[key] = kept
    optimizer.step()


@pytest.mark.parametrize(("name", "fused"), KINDS)
def test_a_rate_without_a_number_is_refused(name, fused):
    p = torch.nn.Parameter(torch.ones(64, 80))
    optimizer = build(name, [p], fused)
    for _ in range(4):
        give([p])
        optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
    with pytest.raises(ValueError, match=r"lr of param_groups\[0\] is a tensor on the meta device"):
        optimizer.step()
    assert torch.equal(p, before)


def test_overlap():
    base = torch.zeros(4096)
    for size, stride, shared in (
        ((4, 6), (6, 1), False),
        ((6, 4), (1, 6), False),
        ((4, 6), (12, 2), False),
        ((2, 3), (3, 2), False),  # interleaved, but no place twice
        ((1, 6), (0, 1), False),
        ((4, 6), (0, 1), True),
        ((4, 6), (5, 1), True),
        ((3, 4), (3, 2), True),
        ((2, 3, 4), (12, 4, 1), False),
        ((2, 3, 4), (11, 4, 1), True),
    ):
        tensor = base.as_strided(size, stride)
        offsets = {
            sum(i * s for i, s in zip(at, stride, strict=True))
            for at in torch.cartesian_prod(*(torch.arange(n) for n in size)).tolist()
        }
        assert shared == (len(offsets) < tensor.numel()) == overlaps(tensor), (size, stride)

"""State in shared memory (Hogwild): every process steps the same moments and counts the same steps."""

import importlib.util

import pytest
import torch

from sketch_plugins import CSAdam, MemSGD, Sketchy

FUSED = [False, True] if importlib.util.find_spec("numba") else [False]
KINDS = [
    *((CSAdam, {"fused": fused}) for fused in FUSED),
    *((Sketchy, {"fused": fused, "rank": 4}) for fused in FUSED),
    (MemSGD, {"density": 0.1, "averaging": True}),
]


def train(params, optimizer, steps):
    for _ in range(steps):
        for p in params:
            p.grad = torch.full_like(p, 0.1)
        optimizer.step()


def tensors(optimizer):
    return [tensor for state in optimizer.state.values() for tensor in state.values()]


@pytest.mark.parametrize(("cls", "options"), KINDS)
@pytest.mark.parametrize("before", [0, 1, 4])  # after 4 steps the counters lie in one allocation
def test_tensors_in_shared_memory_stay_where_they_are(cls, options, before):
    """What another process has mapped is then what each step reads and writes."""
    params, alone = ([torch.nn.Parameter(torch.ones(12, 20)) for _ in range(5)] for _ in range(2))
    optimizer, other = (cls(own, lr=0.01, **options) for own in (params, alone))
    train(params, optimizer, before + 1)
    shared = [*params, *tensors(optimizer)]
    for tensor in shared:
        tensor.share_memory_()
    places = [tensor.data_ptr() for tensor in shared]
    mapped = [tensor.detach().view(tensor.shape) for tensor in shared]  # as another process maps them
    train(params, optimizer, 4)
    counters = {state["step"].data_ptr() for state in optimizer.state.values()}
    for tensor in mapped:
        if tensor.data_ptr() in counters:  # five steps of another process
            tensor += 5
    train(params, optimizer, 4)
    assert [tensor.data_ptr() for tensor in [*params, *tensors(optimizer)]] == places
    assert all(tensor.is_shared() for tensor in shared)
    assert [float(state["step"]) for state in optimizer.state.values()] == [before + 14.0] * 5
    assert all(torch.equal(tensor, view) for tensor, view in zip(shared, mapped, strict=True))
    train(alone, other, before + 5)
    for state in other.state.values():
        state["step"] += 5
    train(alone, other, 4)
    assert all(torch.equal(p, q) for p, q in zip(params, alone, strict=True))

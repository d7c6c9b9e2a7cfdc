"""Learning rates: tensors of one element in any shape, values that are not finite, and rounded zeros."""

import copy
import importlib.util

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from sketch_plugins import SM3, CSAdam, MemSGD, SAdagrad, registry
from sketch_plugins.optim.options import RATE_ROUNDING

from .conftest import parameters, train

SHAPES = [(20, 30), (9,), (5, 4, 3, 3)]
CLASSES = [*(registry.get(name).cls for name in registry.names()), SAdagrad, MemSGD]
each = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def ways(cls):
    """Paths of a step: eager, fused, touched rows. MemSGD's has no memory, because it would be applied."""
    if cls is MemSGD:
        return [{"density": 1.0}]
    if cls is SAdagrad:
        return [{}]
    fused = [{"fused": True}] if importlib.util.find_spec("numba") and cls in (CSAdam, SM3) else []
    return [{"fused": False}, *fused, *([{"fused": False, "row_sparse": True}] if cls is CSAdam else [])]


def build(cls, lr, **options):
    params = parameters(SHAPES, torch.float32)
    return cls(params, lr=lr, weight_decay=0.1, **options), params


@each
@pytest.mark.parametrize("shape", [(1,), (1, 1, 1)], ids=str)
def test_a_tensor_of_one_element_is_a_rate_in_every_path(cls, shape):
    """As in torch, whatever its number of dimensions: the same bits as a 0-d tensor's."""
    for options in ways(cls):
        one, params = build(cls, torch.full(shape, 0.01), **options)
        two, others = build(cls, torch.tensor(0.01), **options)
        train(one, params, 3)
        train(two, others, 3)
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True)), options
        assert tuple(one.param_groups[0]["lr"].shape) == shape  # the user's tensor stays what it is
        one.param_groups[0]["lr"].zero_()
        before = [p.detach().clone() for p in params]
        train(one, params, 1, first=3)
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True)), options


@each
@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0, -1e-9])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_what_is_no_rate_is_refused_at_construction_in_a_group_at_a_step_and_in_a_checkpoint(cls, value, kind):
    with pytest.raises(ValueError, match=r"lr=.* is not allowed: lr must be a finite number >= 0"):
        build(cls, kind(value))
    with pytest.raises(ValueError, match="is not allowed: lr must be"):
        cls([{"params": parameters(SHAPES, torch.float32), "lr": kind(value)}])
    optimizer, params = build(cls, kind(0.01))
    train(optimizer, params, 1)
    before, saved = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = kind(value)
    with pytest.raises(ValueError, match="is not allowed: lr must be"):
        optimizer.load_state_dict(saved)
    if kind is float:
        optimizer.param_groups[0]["lr"] = value
    else:
        optimizer.param_groups[0]["lr"].fill_(value)  # in place: it is the same tensor
    with pytest.raises(ValueError, match="is not allowed: lr must be"):
        train(optimizer, params, 1, first=1)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert all(optimizer.state[p]["step"] == 1 for p in params)


@pytest.mark.parametrize("value", [torch.tensor([0.1, 0.2]), torch.tensor(1 + 0j), torch.tensor(True)], ids=str)
@each
def test_tensors_that_are_no_number_are_refused(cls, value):
    with pytest.raises(ValueError, match="lr"):
        build(cls, value)


@each
def test_what_rounding_leaves_of_zero_is_zero(cls):
    """In a step, as a float and as a tensor, with weight decay; and in a checkpoint, which keeps the value."""
    for options in ways(cls):
        for lr in (-3e-20, -RATE_ROUNDING, torch.tensor(-3e-20), torch.full((1, 1), -3e-20, dtype=torch.float64)):
            optimizer, params = build(cls, 0.01, **options)
            train(optimizer, params, 1)
            optimizer.param_groups[0]["lr"] = lr
            before = [p.detach().clone() for p in params]
            train(optimizer, params, 1, first=1)
            assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True)), (options, lr)
            other, _ = build(cls, lr, **options)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            assert other.param_groups[0]["lr"] == lr


@each
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize(
    "schedule", [lambda o: LinearLR(o, end_factor=0.0, total_iters=10), lambda o: CosineAnnealingLR(o, 10)]
)
def test_schedules_end_at_zero(cls, tensor, schedule):
    options = {"density": 1.0} if cls is MemSGD else {}
    optimizer, params = build(cls, torch.tensor(1e-3) if tensor else 1e-3, **options)
    scheduler = schedule(optimizer)
    for step in range(12):
        before = [p.detach().clone() for p in params]
        still = float(optimizer.param_groups[0]["lr"]) <= 0
        train(optimizer, params, 1, first=step)
        if still:
            assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
        scheduler.step()
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        if step == 9:  # the tenth: both are at 0, to a rounding
            assert abs(float(optimizer.param_groups[0]["lr"])) < 1e-15

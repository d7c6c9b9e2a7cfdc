"""Arguments of torch's optimizers that change nothing, lazy modules, fake tensors: what users of AdamW pass on."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sketch_plugins import CSAdagrad, CSAdam, CSMomentum, CSRMSprop, MemSGD, SAdagrad, Sketchy, registry, state_report

from .conftest import parameters, train

SHAPES = [(30, 40), (9,)]
NOTHING = {"amsgrad": False, "foreach": None, "differentiable": False, "capturable": False, "fused": None}


def weights(optimizer):
    params = optimizer.param_groups[0]["params"]
    train(optimizer, params, 2)
    return [p.detach().clone() for p in params]


def test_arguments_that_change_nothing_are_taken_and_kept_nowhere(name):
    cls = registry.get(name).cls
    plain = cls(parameters(SHAPES, torch.float32))
    other = cls(parameters(SHAPES, torch.float32), **NOTHING)
    assert set(plain.param_groups[0]) == set(other.param_groups[0])
    assert all(torch.equal(p, q) for p, q in zip(weights(plain), weights(other), strict=True))
    cls(parameters(SHAPES, torch.float32), foreach=False, fused=False)
    cls([{"params": parameters(SHAPES, torch.float32), **NOTHING}])
    text = {"amsgrad": "false", "foreach": "None", "differentiable": "False", "lr": "0.1"}
    assert registry.parse_options(name, text) == {"lr": 0.1}


@pytest.mark.parametrize(
    ("key", "value"), [("amsgrad", True), ("foreach", True), ("differentiable", True), ("foreach", "yes")]
)
def test_others_are_refused_wherever_they_come_from(name, key, value):
    cls, params = registry.get(name).cls, parameters(SHAPES, torch.float32)
    said = rf"does not support {key}={value!r}, because .*change(s)? nothing"
    with pytest.raises(ValueError, match=f"{cls.__name__} {said}"):
        cls(params, **{key: value})
    with pytest.raises(ValueError, match=f"{cls.__name__} {said}"):
        cls([{"params": params, key: value}])
    with pytest.raises(ValueError, match=f"{name} does not support {key}="):
        registry.parse_options(name, {key: str(value)})
    optimizer = cls(params)
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match=said):
        train(optimizer, params, 1)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("cls", "torchs"),
    [
        (CSAdam, torch.optim.AdamW), (CSAdagrad, torch.optim.Adagrad), (CSMomentum, torch.optim.SGD),
        (CSRMSprop, torch.optim.RMSprop),
    ],
)  # fmt: skip
def test_the_groups_and_defaults_of_the_counterpart_can_be_handed_on(cls, torchs):
    """Unchanged, with all defaults; RMSprop's alpha has the meaning of our betas."""
    theirs = torchs(parameters(SHAPES, torch.float32), lr=0.1)
    options = {key: value for key, value in theirs.defaults.items() if key != "alpha"}
    ours = cls(parameters(SHAPES, torch.float32), **options)
    weights(ours)
    groups = cls([{key: value for key, value in group.items() if key != "alpha"} for group in theirs.param_groups])
    weights(groups)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (CSMomentum, {"dampening": 0.1}), (CSRMSprop, {"momentum": 0.9}), (CSRMSprop, {"centered": True}),
        (CSAdam, {"decoupled_weight_decay": False}), (Sketchy, {"capturable": True}),
    ],
    ids=str,
)  # fmt: skip
def test_the_counterpart_s_own_are_refused_where_they_change_something(cls, options):
    ((key, value),) = options.items()
    with pytest.raises(ValueError, match=f"{cls.__name__} does not support {key}={value!r}, because"):
        cls(parameters(SHAPES, torch.float32), **options)


def test_they_are_documented(name):
    cls = registry.get(name).cls
    assert cls.NO_EFFECT
    for key in cls.NO_EFFECT:
        assert f"        {key}:" in cls.__doc__, key


# -- lazy modules ----------------------------------------------------------------------------------------------------


def lazy_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.LazyLinear(40), torch.nn.Linear(40, 5))


@pytest.mark.parametrize("cls", [*(registry.get(n).cls for n in registry.names()), SAdagrad, MemSGD])
def test_lazy_modules_are_looked_at_in_the_first_step(cls):
    model = lazy_model()
    optimizer = cls(model.parameters(), lr=0.01)
    for other in (optimizer, copy.deepcopy(cls(torch.nn.Linear(3, 3).parameters(), lr=0.01))):
        other.state_dict()
    x = torch.randn(4, 30)
    steps = []
    torch.manual_seed(1)  # of the weights that the first batch makes
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        steps.append([p.detach().clone() for p in model.parameters()])
    again = lazy_model()
    torch.manual_seed(1)
    again(x)
    reference = cls(again.parameters(), lr=0.01)
    for made in steps:
        reference.zero_grad()
        again(x).square().mean().backward()
        reference.step()
        assert all(torch.equal(p, q) for p, q in zip(again.parameters(), made, strict=True))
    fresh = cls(again.parameters(), lr=0.01)
    fresh.load_state_dict(optimizer.state_dict())


def test_what_needs_a_shape_says_that_a_batch_is_to_be_run_first():
    optimizer = CSAdam(lazy_model().parameters())
    with pytest.raises(ValueError, match=r"parameter 0 of group 0, of shape not known yet.* run a batch first"):
        state_report(optimizer)
    model = lazy_model()
    other = CSAdam(model.parameters())
    model(torch.randn(4, 30)).sum().backward()
    other.step()
    with pytest.raises(ValueError, match="run a batch before you load it"):
        optimizer.load_state_dict(other.state_dict())


# -- fake tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [*(registry.get(n).cls for n in registry.names()), SAdagrad])
def test_a_step_of_fake_tensors_names_what_does_without_numbers(cls):
    with FakeTensorMode():
        model = torch.nn.Linear(30, 40)
        optimizer = cls(model.parameters(), lr=1e-3)
        model(torch.randn(4, 30)).sum().backward()
        with pytest.raises(ValueError, match=r"fake tensor.*sketch_plugins\.plan"):
            optimizer.step()
    assert not optimizer.state

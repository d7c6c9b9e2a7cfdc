"""``optimizer.state[p]`` has one level, as torch's own optimizers have it; states with levels are still loaded."""

import copy
import pickle

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from sketch_plugins import CSAdam, Sketchy, registry, state_report
from sketch_plugins.optim.fused import describe
from sketch_plugins.sharding.parts import Part, Parts
from sketch_plugins.sharding.state_names import flattened, is_ours, kind_of, nested

SHAPES = [(70, 80), (30,), (4, 48, 40)]


def trained(name="cs_adam", steps=2, seed=0, **options):
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = registry.get(name).cls(params, min_compress_size=256, **options)
    train(optimizer, params, steps)
    return optimizer, params


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()


def with_levels(state_dict):
    """As versions before this one wrote it."""
    return {**state_dict, "state": {key: nested(state) for key, state in state_dict["state"].items()}}


@pytest.mark.parametrize("name", registry.names())
def test_one_level_holds_every_tensor(name):
    optimizer, params = trained(name, **({"lagged_rms": True} if "lagged_rms" in registry.get(name).options else {}))
    for p in params:
        assert all(isinstance(value, torch.Tensor) for value in optimizer.state[p].values())
        assert all(isinstance(key, str) and is_ours(key) for key in optimizer.state[p])
    walked = sum(t.nbytes for state in optimizer.state.values() for name, t in state.items() if name != "step")
    assert walked == state_report(optimizer).state_bytes > 0
    saved = optimizer.state_dict()["state"]
    assert all(isinstance(value, torch.Tensor) for state in saved.values() for value in state.values())


@pytest.mark.parametrize("name", registry.names())
def test_a_state_with_levels_loads_and_goes_on_bit_for_bit(name):
    optimizer, params = trained(name)
    saved = copy.deepcopy(with_levels(optimizer.state_dict()))
    assert any(isinstance(value, dict) for state in saved["state"].values() for value in state.values())
    before = copy.deepcopy(saved)
    other, others = trained(name, steps=0, seed=1)
    other.load_state_dict(saved)
    assert saved["state"].keys() == before["state"].keys() and all(
        saved["state"][key].keys() == state.keys() for key, state in before["state"].items()
    )
    for p, q in zip(params, others, strict=True):
        q.data.copy_(p.data)
        assert list(optimizer.state[p]) == list(other.state[q])
    train(optimizer, params, 3, first=2)
    train(other, others, 3, first=2)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(t, other.state[q][name]) for name, t in optimizer.state[p].items())


def test_a_pickle_with_levels_is_read():
    optimizer, params = trained()
    old = copy.deepcopy(optimizer)
    twins = old.param_groups[0]["params"]
    for p in twins:
        old.state[p] = nested(old.state[p])
        old.state[p]["of a wrapper"] = {"kept": 1}
    again = pickle.loads(pickle.dumps(old))
    for p, q in zip(params, again.param_groups[0]["params"], strict=True):
        assert again.state[q].pop("of a wrapper") == {"kept": 1}
        assert list(again.state[q]) == list(optimizer.state[p])
    train(optimizer, params, 1, first=2)
    train(again, again.param_groups[0]["params"], 1, first=2)
    assert all(map(torch.equal, params, again.param_groups[0]["params"]))


@pytest.mark.parametrize("cls", [CSAdam, Sketchy])
def test_torch_flattens_the_state_dict_of_a_model(cls):
    """torch's own flattening does not allow nested states."""
    model = torch.nn.Sequential(torch.nn.Linear(40, 48), torch.nn.Linear(48, 20))
    optimizer = cls(model.parameters(), min_compress_size=256)
    model(torch.randn(8, 40)).square().sum().backward()
    optimizer.step()
    found = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    assert "state.0.weight.second_moment.table" in found or "state.0.weight.preconditioner.vectors_0_0" in found


def test_names_are_taken_apart_and_put_together():
    key = "3[0,0:64x32]"
    state = {"step": 1, "first_moment": {"codes": 2, "scales": 3}, "place": 4}
    names = {"step": 1, "first_moment.codes": 2, "first_moment.scales": 3, "place": 4}
    assert flattened(state) == names and nested(names) == state
    pieces = {f"{key}.{name}": value for name, value in names.items()}
    assert flattened(state, key) == flattened({key: state}) == pieces and nested(pieces) == {key: state}
    assert nested(state) == state and nested({key: state}) == {key: state} == nested({key: names})
    assert [kind_of(name) for name in pieces] == ["step", "first_moment", "first_moment", "place"]
    others = {"slow.weights": 1, "buffer": {"first_moment": 2}, 7: 8}
    assert flattened(others) == nested(others) == others and not any(map(is_ours, others))
    assert not is_ours("first_momentum") and not is_ours(3) and is_ours("first_moment.codes")
    # Other code's keys with one of our words before a dot.
    mixed = {"step": 1, "step.lagged": 2, "place.kept": 3, "rms": 4, "rms.last": 5}
    assert nested(mixed) == mixed and not is_ours("step.lagged")


def test_a_sorted_state_dict_is_loaded_in_the_store_s_order():
    """Kernels use a store's tensors by their position."""
    pytest.importorskip("numba")
    ends = []
    for order in (list, sorted):
        optimizer, params = trained(second_moment="row_count_min")
        saved = optimizer.state_dict()
        saved["state"] = {key: {name: state[name] for name in order(state)} for key, state in saved["state"].items()}
        optimizer.load_state_dict(saved)
        work = []
        for p in params:
            stores, group = optimizer._stores(p, optimizer.param_groups[0]), optimizer.param_groups[0]
            p.grad = torch.ones_like(p)
            (part,) = optimizer._parts.of(0, p)
            gradient = optimizer._gradient(part, p.grad, group)
            found = describe(
                p.data, group, gradient, optimizer._rule(group, 3, False), stores, optimizer._state_of(part)
            )
            work.append([list(pair[1]) for pair in (found.first, found.second)])
        ends.append(work)
    assert ends[0] == ends[1] and ["table", "row"] in ends[0][0]


def test_a_partition_s_state_is_not_mistaken_for_another_one_s():
    """The names of its pieces are cached, but another state may have the same number of entries."""
    parts, data = Parts(), torch.zeros(4)
    one, other = (Part(data, data, 0, (4,), key=key) for key in ("0[0,0:4]", "1[0,0:4]"))
    assert parts.state_of(one, flattened({"step": 1}, one.key)) == {"step": 1}
    assert parts.state_of(other, flattened({"step": 2}, other.key)) == {"step": 2}
    assert parts.state_of(other, {"of others": 1}) == {}
    assert parts.state_of(one, flattened({"step": 3}, one.key)) == {"step": 3}

import copy
import io

import pytest
import torch

from sketch_plugins import CSAdam, registry

from .conftest import parameters, train

SHAPES = [(70, 80), (9,), (6, 4, 3, 3), ()]


def trained(name, dtype=torch.float32, steps=2, **options):
    params = parameters(SHAPES, dtype)
    optimizer = registry.get(name).cls(params, **{"min_compress_size": 0, **options})
    train(optimizer, params, steps)
    return optimizer, params


def tensors(value, path=""):
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, v in value.items():
            yield from tensors(v, f"{path}.{key}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip_keeps_every_dtype_and_bit(name, dtype):
    """torch casts state to the parameter's dtype: bf16 tables, bf16 int8 codes, and a silent change of the run."""
    optimizer, params = (
        trained(name, dtype, first_moment="int8") if name in ("cs_adam", "cs_momentum") else trained(name, dtype)
    )
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = registry.get(name).cls(copies, min_compress_size=0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(params, copies, strict=True):
        mine, theirs = dict(tensors(optimizer.state[p])), dict(tensors(other.state[q]))
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert mine[key].dtype == theirs[key].dtype and torch.equal(mine[key], theirs[key]), key
    train(optimizer, params, 3, first=2)
    train(other, copies, 3, first=2)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def test_state_is_plain(name):
    """Tensors, numbers and nested dicts with string keys: what weights_only and distributed checkpoints accept."""
    optimizer, _ = trained(name)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)

    def check(value):
        assert isinstance(value, (torch.Tensor, int, float, dict))
        if isinstance(value, dict):
            assert all(isinstance(k, str) for k in value)
            for v in value.values():
                check(v)

    for state in loaded["state"].values():
        check(state)


def test_a_loaded_state_is_not_tied_to_the_one_it_came_from(name):
    optimizer, params = trained(name)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = registry.get(name).cls(copies, min_compress_size=0)
    other.load_state_dict(optimizer.state_dict())
    before = {k: v.clone() for k, v in tensors(other.state[copies[0]])}
    train(optimizer, params, 1)
    assert all(torch.equal(v, before[k]) for k, v in tensors(other.state[copies[0]]))


@pytest.mark.parametrize(
    ("option", "saved", "present"),
    [
        ("compression", 0.05, 0.1), ("depth", 1, 2), ("seed", 0, 1), ("width", 0, 9), ("hash", "strided", "affine"),
        ("min_compress_size", 0, 100),
    ],
)  # fmt: skip
def test_another_structure_is_refused_with_both_values_and_nothing_changes(name, option, saved, present):
    if option not in registry.get(name).options:
        pytest.skip(f"{name} has no option {option}; test_sm3.py and test_lion.py have those of their state")
    optimizer, params = trained(name)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = registry.get(name).cls(copies, **{"min_compress_size": 0, "lr": 0.5, option: present})
    train(other, copies, 1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError) as error:
        other.load_state_dict(optimizer.state_dict())
    assert f"{option}={saved!r}" in str(error.value) and f"{option}={present!r}" in str(error.value)
    after = other.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        for (path, a), (_, b) in zip(tensors(state), tensors(after["state"][key]), strict=True):
            assert torch.equal(a, b), path


def test_another_store_another_optimizer_and_other_shapes_are_refused():
    optimizer, _params = trained("cs_adam")
    for options, words in (({"first_moment": "fp32"}, "first_moment='int8'"), ({"block_size": 64}, "block_size=128")):
        other = CSAdam(parameters(SHAPES, torch.float32), min_compress_size=0, **options)
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(optimizer.state_dict())
    fresh = CSAdam(parameters(SHAPES, torch.float32), min_compress_size=0)
    adamw = torch.optim.AdamW(parameters(SHAPES, torch.float32))
    with pytest.raises(ValueError, match="not written by CSAdam"):
        fresh.load_state_dict(adamw.state_dict())
    with pytest.raises(ValueError, match="parameters"):
        fresh.load_state_dict(CSAdam(parameters([(3, 3)], torch.float32), min_compress_size=0).state_dict())
    shapes = CSAdam(parameters([(80, 70), *SHAPES[1:]], torch.float32), min_compress_size=0)
    with pytest.raises(ValueError, match=r"shape \(70, 80\), torch.int8; expected \(80, 70\)"):
        shapes.load_state_dict(optimizer.state_dict())
    assert not shapes.state and not fresh.state
    broken = copy.deepcopy(optimizer.state_dict())
    del broken["state"][0]["second_moment.table"]
    with pytest.raises(ValueError, match="second_moment"):
        fresh.load_state_dict(broken)


def test_hyperparameters_come_from_the_state_dict_as_in_torch(name):
    optimizer, params = trained(name)
    optimizer.param_groups[0]["lr"] = 0.25
    other = registry.get(name).cls([torch.nn.Parameter(p.detach().clone()) for p in params], min_compress_size=0)
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.25


def test_loading_one_s_own_state_changes_nothing(name):
    """accelerate does this when it wraps an optimizer."""
    optimizer, params = trained(name)
    before = {k: v.clone() for k, v in tensors(optimizer.state[params[0]])}
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in tensors(optimizer.state[params[0]]))
    fresh = registry.get(name).cls(parameters(SHAPES, torch.float32))
    fresh.load_state_dict(fresh.state_dict())
    assert not fresh.state


def test_named_parameters_and_their_labels():
    model = torch.nn.Linear(80, 70)
    optimizer = CSAdam(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    other = CSAdam(torch.nn.Linear(80, 70).named_parameters())
    other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("writer", "reader"), [("cs_adam", "cs_rmsprop"), ("cs_adagrad", "cs_rmsprop"), ("cs_momentum", "cs_adam")]
)
def test_another_kind_of_the_family_is_refused(writer, reader):
    optimizer, _ = trained(writer)
    other = registry.get(reader).cls(parameters(SHAPES, torch.float32), min_compress_size=0)
    with pytest.raises(ValueError, match=f"not written by {type(other).__name__}, but by {type(optimizer).__name__}"):
        other.load_state_dict(optimizer.state_dict())


def test_a_checkpoint_older_than_an_option_loads(name):
    optimizer, params = trained(name)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["chunk_size"], saved["param_groups"][0]["compile"]
    groups = copy.deepcopy(saved["param_groups"])
    other = registry.get(name).cls([torch.nn.Parameter(p.detach().clone()) for p in params], min_compress_size=0)
    other.load_state_dict(saved)
    assert other.param_groups[0]["chunk_size"] == 0 and saved["param_groups"] == groups


def _damage(path, value):
    def apply(saved):
        *parents, last = path
        for key in parents:
            saved = saved[key]
        if value is KeyError:
            del saved[last]
        else:
            saved[last] = value(saved[last]) if callable(value) else value

    return apply


TABLE = ["state", 0, "second_moment.table"]
DAMAGES = {
    "no step": _damage(["state", 0, "step"], KeyError),
    "step None": _damage(["state", 0, "step"], None),
    "step text": _damage(["state", 0, "step"], "2"),
    "step negative": _damage(["state", 0, "step"], torch.tensor(-1.0)),
    "step nan": _damage(["state", 0, "step"], torch.tensor(float("nan"))),
    "no state": _damage(["state", 0], None),
    "bf16 table": _damage(TABLE, lambda t: t.bfloat16()),
    "no tensor": _damage(TABLE, 3),
    "another shape": _damage(TABLE, lambda t: t[:, :-1]),
    "no table": _damage(TABLE, KeyError),
    "too much": lambda saved: saved["state"][0].update({"preconditioner.values_0_0": torch.zeros(1)}),
    "lr": _damage(["param_groups", 0, "lr"], -1.0),
    "betas": _damage(["param_groups", 0, "betas"], None),
    "chunk_size": _damage(["param_groups", 0, "chunk_size"], -5),
    "params": _damage(["param_groups", 0, "params"], KeyError),
    "param_groups": _damage(["param_groups"], KeyError),
    "state": _damage(["state"], KeyError),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_state_is_refused_whole(damage):
    optimizer, params = trained("cs_adam")
    saved = copy.deepcopy(optimizer.state_dict())
    DAMAGES[damage](saved)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key in before["state"]:
        for (path, a), (_, b) in zip(tensors(before["state"][key]), tensors(after["state"][key]), strict=True):
            assert torch.equal(a, b), path
    train(optimizer, params, 1, first=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with kernels takes it")
def test_a_captured_run_is_not_resumed_where_nothing_can_be_captured():
    p = torch.nn.Parameter(torch.randn(8, 8))
    optimizer = registry.get("cs_adam").cls([p])
    train(optimizer, [p], 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["capturable"] = True
    with pytest.raises(ValueError, match="capturable=True needs the Triton kernels, which parameter 0 of group 0"):
        optimizer.load_state_dict(saved)
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(ValueError, match="capturable=True needs the Triton kernels"):
        optimizer.step()
    optimizer.param_groups[0]["capturable"] = False
    train(optimizer, [p], 1)
    assert int(optimizer.state[p]["step"]) == 2

"""Tensors in a state dict: all are checked before anything changes, and loaded ones can be stepped."""

import copy
import importlib.util

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sketch_plugins import CSAdam, MemSGD, SAdagrad, Sketchy, registry

from .conftest import parameters, train

SHAPES = [(30, 40), (9,)]
FUSED = [True, False] if importlib.util.find_spec("numba") else [False]
CLASSES = [*(registry.get(name).cls for name in registry.names()), SAdagrad, MemSGD]


def build(cls, steps=1, **options):
    params = parameters(SHAPES, torch.float32)
    optimizer = cls(params, **options)
    train(optimizer, params, steps)
    return optimizer, params


def tensors(state):
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            yield tuple(name.split(".")), value


def put(saved, path, value):
    saved[".".join(path)] = value


class Wrapped(torch.Tensor):
    """A wrapper subclass: it sees operations itself, and has no memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} of a wrapper")


def freed(tensor):
    out = tensor.clone()
    out.untyped_storage().resize_(0)
    return out


def fake(tensor):
    with FakeTensorMode() as mode:
        return mode.from_tensor(tensor)


ODD = {
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "wrapper": Wrapped,
    "fake": fake,
    "freed": freed,
    "complex": lambda t: t.to(torch.complex64),
}


def unchanged(optimizer, params, before, weights):
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        for (path, a), (_, b) in zip(tensors(state), tensors(after["state"][key]), strict=True):
            assert torch.equal(a, b), path
    assert all(torch.equal(p, q) for p, q in zip(params, weights, strict=True))


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_odd_tensors_are_refused_whole(cls, odd):
    """They are in the last parameter's state, and all others are good: nothing may have changed by then."""
    optimizer, params = build(cls)
    before, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    other, _ = build(cls, steps=2)
    last = other.state_dict()["state"][1]
    paths = [path for path, tensor in tensors(last) if tensor.numel()]
    assert paths
    for path in paths:
        saved = copy.deepcopy(other.state_dict())
        saved["param_groups"][0]["lr"] = 0.5
        tensor = dict(tensors(last))[path]
        put(saved["state"][1], path, ODD[odd](tensor))
        with pytest.raises(ValueError, match="parameter 1"):
            optimizer.load_state_dict(saved)
        unchanged(optimizer, params, before, weights)
    train(optimizer, params, 1, first=1)


def test_a_quantized_tensor_is_refused():
    optimizer, _ = build(CSAdam, min_compress_size=0)
    saved = copy.deepcopy(optimizer.state_dict())
    codes = torch.quantize_per_tensor(torch.zeros(30, 40), 0.1, 0, torch.qint8)
    saved["state"][0]["first_moment.codes"] = codes
    with pytest.raises(ValueError, match=r"'codes' .*qint8"):
        optimizer.load_state_dict(saved)


def test_state_of_a_parameter_on_the_meta_device_is_there(name):
    params = [torch.nn.Parameter(torch.empty(64, 70, device="meta"))]
    optimizer = registry.get(name).cls(params)
    real, _ = build(registry.get(name).cls)
    with_shape = registry.get(name).cls([torch.nn.Parameter(torch.randn(64, 70))])
    train(with_shape, with_shape.param_groups[0]["params"], 1)
    optimizer.load_state_dict(with_shape.state_dict())
    again = registry.get(name).cls([torch.nn.Parameter(torch.empty(64, 70, device="meta"))])
    again.load_state_dict(optimizer.state_dict())
    assert all(t.device.type == "meta" for path, t in tensors(again.state_dict()["state"][0]) if path != ("step",))
    assert real.state_dict()["state"]


def test_what_cannot_be_copied_changes_nothing(monkeypatch):
    """No memory for the copy of the last tensor."""
    optimizer, params = build(CSAdam)
    before, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    saved = copy.deepcopy(build(CSAdam, steps=3)[0].state_dict())
    victim, to = saved["state"][1]["second_moment.dense"], torch.Tensor.to

    def failing(self, *args, **kwargs):
        if self.data_ptr() == victim.data_ptr() and kwargs.get("copy"):
            raise torch.OutOfMemoryError("no memory left")
        return to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", failing)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.load_state_dict(saved)
    monkeypatch.undo()
    unchanged(optimizer, params, before, weights)


# -- numbers that cannot be ------------------------------------------------------------------------------------------

BAD = {"NaN": float("nan"), "infinite": float("inf"), "negative": -1.0}


def impossible(cls, path, kind):
    """Values that no step writes. Infinite squares, of gradients above 1.8e19, do occur, and are harmless."""
    if path[0] == "second_moment":
        return kind != "infinite" or path[-1] == "row"
    if path[-1] == "last":
        return kind != "infinite"
    return kind != "negative" or path[-1] == "scales"


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        *((cls, {}) for cls in CLASSES),
        (CSAdam, {"second_moment": "row_count_min", "min_compress_size": 0, "lagged_rms": True}),
        (CSAdam, {"second_moment": "cover", "first_moment": "bf16", "min_compress_size": 0}),
        (CSAdam, {"table_dtype": "bf16", "first_moment": "fp32", "min_compress_size": 0}),
        (Sketchy, {"precondition": "all", "min_compress_size": 0}),
    ],
    ids=str,
)
def test_numbers_that_no_step_leaves_behind_are_refused(cls, options, kind):
    optimizer, params = build(cls, **options)
    before, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    seen = 0
    for number in (0, 1):
        for path, tensor in tensors(before["state"][number]):
            if path == ("step",) or not tensor.is_floating_point() or not tensor.numel():
                continue
            saved = copy.deepcopy(before)
            bad = tensor.clone()
            bad.view(-1)[-1] = BAD[kind]
            put(saved["state"][number], path, bad)
            if impossible(cls, path, kind):
                seen += 1
                word = {"NaN": "NaN", "infinite": "infinite", "negative": "-1"}[kind]
                with pytest.raises(
                    ValueError, match=f"parameter {number}.* {word}.*(allowed are|must be finite)"
                ) as error:
                    optimizer.load_state_dict(saved)
                assert repr(path[-1]) in str(error.value) and "had probably diverged" in str(error.value)
                unchanged(optimizer, params, before, weights)
            else:
                build(cls, **options)[0].load_state_dict(saved)
    # The state of MemSGD and S-AdaGrad need not be positive; Adagrad and RMSprop only keep squares.
    assert seen or kind == "negative" or (kind == "infinite" and cls.__name__ in ("CSAdagrad", "CSRMSprop"))


def test_squares_that_overflow_are_saved_and_loaded():
    """A run with a gradient of 1e22 continues, but this element does not move any more."""
    optimizer, params = build(CSAdam, preset="exact")
    params[0].grad = torch.zeros(30, 40)
    params[0].grad[3, 4] = 1e22
    params[1].grad = None
    optimizer.step()
    assert torch.isinf(optimizer.state[params[0]]["second_moment.dense"]).sum() == 1
    assert all(torch.isfinite(p).all() for p in params)
    other, _ = build(CSAdam, preset="exact")
    other.load_state_dict(optimizer.state_dict())


# -- the number of steps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64, torch.bfloat16, torch.float16])
def test_a_step_of_any_dtype_counts_on(dtype, fused):
    """bfloat16 counts to 256 and no further, and kernels read a float32."""
    optimizer, params = build(CSAdam, steps=0, fused=fused)
    train(optimizer, params, 1)
    for p in params:
        optimizer.state[p]["step"].fill_(256.0)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].to(dtype).reshape(1)
    optimizer.load_state_dict(saved)
    train(optimizer, params, 2, first=256)
    for p in params:
        step = optimizer.state[p]["step"]
        assert step.dtype == torch.float32 and step.shape == () and step.item() == 258


@pytest.mark.parametrize(
    "step",
    [
        torch.tensor(2**24 + 1), torch.tensor(1.5), torch.tensor(float("inf")), torch.tensor([1.0, 2.0]),
        torch.tensor(True), torch.tensor(-1), torch.tensor(1 + 1j), torch.tensor(1.0, device="meta"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("cls", [CSAdam, MemSGD])
def test_a_step_that_float32_does_not_hold_is_refused(cls, step):
    optimizer, params = build(cls)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["step"] = step
    with pytest.raises(ValueError, match=r"the saved step of parameter 1.* whole number >= 0 that float32"):
        optimizer.load_state_dict(saved)
    assert optimizer.state[params[1]]["step"] == 1


@pytest.mark.parametrize("fused", FUSED)
def test_a_present_step_of_another_dtype_is_named_before_anything_moves(fused):
    optimizer, params = build(CSAdam, fused=fused)
    train(optimizer, params, 2, first=1)
    before = params[0].detach().clone()
    optimizer.state[params[1]]["step"] = torch.tensor(3)
    with pytest.raises(ValueError, match=r"the present step of parameter 1 .*float32"):
        train(optimizer, params, 1, first=3)
    assert torch.equal(params[0], before)


# -- inference mode --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_loaded_in_inference_mode(cls):
    """Tensors that are made there cannot be changed outside of it: a step could not be taken any more."""
    optimizer, params = build(cls, steps=2, lr=torch.tensor(0.01))
    other, other_params = build(cls, lr=torch.tensor(0.01))
    for p, q in zip(other_params, params, strict=True):
        p.data.copy_(q)
    with torch.inference_mode():
        saved = copy.deepcopy(optimizer.state_dict())  # inference tensors themselves
        saved["state"][0] = {key: value for key, value in saved["state"][0].items()}
        saved["state"][0]["slow"] = torch.ones(3)
        other.load_state_dict(saved)
    for one, own in ((optimizer, params), (other, other_params)):
        one.param_groups[0]["lr"].fill_(0.02)
        train(one, own, 2, first=2)
    other.state[other_params[0]]["slow"].add_(1)
    assert all(torch.equal(p, q) for p, q in zip(params, other_params, strict=True))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_wrong_containers_are_named_and_change_nothing(cls):
    params = [torch.nn.Parameter(torch.ones(30, 40)), torch.nn.Parameter(torch.ones(9))]
    optimizer = cls(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    good = optimizer.state_dict()
    (group,) = good["param_groups"]
    before = copy.deepcopy(good)
    for bad, said in (
        (None, "is a NoneType; expected a mapping"),
        ([good], "is a list; expected a mapping"),
        ({"state": {}}, "has no 'param_groups'; it has state"),
        ({**good, "state": None}, "'state' of .* is a NoneType"),
        ({**good, "state": [1]}, "'state' of .* is a list"),
        ({**good, "param_groups": group}, "'param_groups' of .* is a dict"),
        ({**good, "param_groups": None}, "'param_groups' of .* is a NoneType"),
        ({**good, "param_groups": [None]}, "group 0 of .* is a NoneType"),
        ({**good, "param_groups": [{**group, "params": None}]}, "params=None"),
        ({**good, "param_groups": [{**group, "params": [[0], [1]]}]}, r"has the key \[0\]"),
        *(({**good, "state": {**good["state"], 1: entry}}, "state of parameter 1") for entry in (None, "x", [1])),
    ):
        with pytest.raises(ValueError, match=said):
            optimizer.load_state_dict(bad)
    assert str(optimizer.state_dict()) == str(before)

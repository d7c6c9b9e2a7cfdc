"""Other code's keys in an optimizer's state: not changed, saved, loaded, and never taken for ours."""

import copy
import importlib.util
import io

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sketch_plugins import CSAdam, MemSGD, Sketchy, convert_state, registry, state_report
from sketch_plugins.checkpoints.reading import contents
from sketch_plugins.memory.probe import SecondMomentProbe
from sketch_plugins.optim import resolved

from .conftest import parameters, train

SHAPES = [(30, 40), (9,)]
FUSED = [True, False] if importlib.util.find_spec("numba") else [False]


def build(cls, **options):
    params = parameters(SHAPES, torch.float32)
    return cls(params, **options), params


def wrap(optimizer, params):
    """Entries like those of Lookahead, quantisation-aware wrappers and others."""
    for p in params:
        optimizer.state[p].update(
            slow=p.detach().clone().double(), counts={"seen": 3, "at": torch.ones(2)}, note="mine", list=[torch.ones(1)]
        )
    optimizer.state["global"] = {"tokens_seen": 7}


def check(optimizer, params, slow):
    for p, q in zip(params, slow, strict=True):
        state = optimizer.state[p]
        assert state["slow"].dtype == torch.float64 and torch.equal(state["slow"], q)
        assert state["counts"]["seen"] == 3 and torch.equal(state["counts"]["at"], torch.ones(2))
        assert state["note"] == "mine" and torch.equal(state["list"][0], torch.ones(1))
    assert optimizer.state["global"] == {"tokens_seen": 7}


@pytest.mark.parametrize("when", [0, 1, 3])
@pytest.mark.parametrize("fused", FUSED)
def test_they_change_no_step_and_go_with_the_state(name, when, fused):
    """``when``: steps before they appear; 0: our state does not exist yet, 3: kernels know the parameters."""
    cls = registry.get(name).cls
    plain, plain_params = build(cls, fused=fused)
    train(plain, plain_params, 5)
    optimizer, params = build(cls, fused=fused)
    train(optimizer, params, when)
    wrap(optimizer, params)
    slow = [p.detach().double() for p in params]
    train(optimizer, params, 4 - when, first=when)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, again_params = build(cls, fused=fused)
    for p, q in zip(again_params, params, strict=True):
        p.data.copy_(q)
    again.load_state_dict(torch.load(file, weights_only=True))
    check(again, again_params, slow)
    again.state[again_params[0]]["slow"].zero_()  # tensors are copies
    check(optimizer, params, slow)
    for one, own in ((optimizer, params), (again, again_params)):
        train(one, own, 1, first=4)
        assert all(torch.equal(p, q) for p, q in zip(own, plain_params, strict=True))


@pytest.mark.skipif(not importlib.util.find_spec("numba"), reason="kernels of a CPU are Numba's")
def test_kernels_remember_a_parameter_beside_them(monkeypatch):
    params = [torch.nn.Parameter(torch.randn(300, 200))]
    optimizer = CSAdam(params)
    train(optimizer, params, 1)
    wrap(optimizer, params)
    train(optimizer, params, 1)
    described = []
    monkeypatch.setattr(resolved, "choose", lambda *arguments: described.append(arguments))
    train(optimizer, params, 1)
    assert not described and optimizer.state[params[0]]["step"] == 3


def test_state_of_others_alone_is_no_state(name):
    optimizer, params = build(registry.get(name).cls)
    wrap(optimizer, params)
    report = state_report(optimizer)
    assert report.planned and report.state_bytes == state_report(build(registry.get(name).cls)[0]).state_bytes
    optimizer.param_groups[0]["seed"] = 3  # no state of ours that it would describe anew
    other, other_params = build(registry.get(name).cls, seed=3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    check(other, other_params, [p.detach().double() for p in params])
    train(other, other_params, 1)
    assert other.state[other_params[0]]["step"] == 1


def test_what_is_ours_is_still_demanded_beside_them():
    optimizer, params = build(CSAdam, min_compress_size=0)
    train(optimizer, params, 1)
    wrap(optimizer, params)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["second_moment.table"]
    with pytest.raises(ValueError, match=r"contains .*expected first_moment, second_moment, step"):
        optimizer.load_state_dict(saved)
    del optimizer.state[params[0]]["step"]
    with pytest.raises(ValueError, match="the present state"):
        train(optimizer, params, 1)


def test_reports_count_ours_only(name, tmp_path):
    optimizer, params = build(registry.get(name).cls)
    train(optimizer, params, 1)
    before = state_report(optimizer).to_dict()
    torch.save(optimizer.state_dict(), tmp_path / "before.pt")
    wrap(optimizer, params)
    assert state_report(optimizer).to_dict() == before
    torch.save(optimizer.state_dict(), tmp_path / "after.pt")
    old, new = (contents(tmp_path / file)[0] for file in ("before.pt", "after.pt"))
    assert old.to_dict() == new.to_dict() and new.optimizer == type(optimizer).__name__
    assert "sketch_plugins" not in new.groups[0]


def test_a_probe_looks_past_them():
    optimizer, params = build(CSAdam, min_compress_size=0)
    probe = SecondMomentProbe(optimizer)
    wrap(optimizer, params)
    params[0].grad = torch.ones_like(params[0])
    probe.update()
    optimizer.step()


def test_they_are_converted_along():
    params = parameters(SHAPES, torch.float32)
    adamw = torch.optim.AdamW([{"params": params, "optimizer": "adamw"}], lr=1e-3)
    train(adamw, params, 2)
    plain = copy.deepcopy(adamw.state_dict())
    wrap(adamw, params)
    optimizer, own = build(CSAdam)
    optimizer.register_state_dict_post_hook(lambda o, sd: {"nested": sd})
    optimizer.load_state_dict(convert_state(adamw.state_dict(), optimizer))
    check(optimizer, own, [p.detach().double() for p in params])
    other, other_params = build(CSAdam)
    other.load_state_dict(convert_state(plain, other))
    for p, q in zip(own, other_params, strict=True):
        assert torch.equal(optimizer.state[p]["step"], other.state[q]["step"])
    assert optimizer.param_groups[0]["optimizer"] == "adamw"
    nadam = torch.optim.NAdam(params)
    train(nadam, params, 1)
    with pytest.raises(ValueError, match="mu_product"):  # an optimizer's own key says that it is not Adam
        convert_state(nadam.state_dict(), optimizer)


def test_mem_sgd_leaves_them_alone():
    optimizer, params = build(MemSGD)
    wrap(optimizer, params)
    train(optimizer, params, 2)
    other, other_params = build(MemSGD)
    other.load_state_dict(optimizer.state_dict())
    assert other.state["global"] == {"tokens_seen": 7}
    for p, q in zip(params, other_params, strict=True):
        assert torch.equal(optimizer.state[p]["slow"].float(), other.state[q]["slow"].float())
        assert torch.equal(optimizer.state[p]["error"], other.state[q]["error"])
        assert (
            other.state[q]["step"] == 2 and other.state[q]["error"].data_ptr() != optimizer.state[p]["error"].data_ptr()
        )


@pytest.mark.parametrize("cls", [CSAdam, Sketchy])
def test_hooks_may_return_another_layout(cls):
    optimizer, params = build(cls)
    train(optimizer, params, 1)
    plain = optimizer.state_dict()
    optimizer.register_state_dict_post_hook(lambda o, sd: {"version": 1, "optimizer": sd})
    saved = optimizer.state_dict()
    assert list(saved) == ["version", "optimizer"] and saved["optimizer"].keys() == plain.keys()
    other, other_params = build(cls)
    other.register_load_state_dict_pre_hook(lambda o, sd: sd["optimizer"])
    other.load_state_dict(saved)
    assert torch.equal(other.state[other_params[0]]["step"], torch.tensor(1.0))


@pytest.fixture
def mesh():
    """A mesh of one process: placements, local shards and wrapped state are the same as with many."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("placement", [Shard(0), Replicate()])
def test_dtensors_keep_them_as_they_are(mesh, placement):
    def sharded():
        plain = parameters(SHAPES, torch.float32)
        params = [torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [placement])) for p in plain]
        optimizer = CSAdam(params, min_compress_size=0)
        optimizer.register_state_dict_post_hook(lambda o, sd: {"nested": sd})
        optimizer.register_load_state_dict_pre_hook(lambda o, sd: sd.get("nested", sd))
        return optimizer, params

    def step(optimizer, params, number):
        for p in params:
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
            p.grad = distribute_tensor(g, mesh, [placement])
        optimizer.step()

    optimizer, params = sharded()
    step(optimizer, params, 0)
    for p in params:
        optimizer.state[p].update(slow=p.detach().clone(), note="mine")
    step(optimizer, params, 1)
    saved = optimizer.state_dict()
    inner = saved["nested"]["state"][0]
    assert type(inner["slow"]).__name__ == "DTensor" and tuple(inner["slow"].shape) == SHAPES[0]
    if placement == Shard(0):
        assert len(inner["second_moment.table"]) == 1  # wrapped, as shards are
    other, other_params = sharded()
    other.load_state_dict(saved)
    for p, q in zip(params, other_params, strict=True):
        q.data.copy_(p.data)
        mine, theirs = optimizer.state[p], other.state[q]
        assert theirs["note"] == "mine" and torch.equal(mine["slow"].to_local(), theirs["slow"].to_local())
        assert type(theirs["slow"]).__name__ == "DTensor" and set(mine) == set(theirs)
    step(optimizer, params, 2)
    step(other, other_params, 2)
    assert all(torch.equal(p.to_local(), q.to_local()) for p, q in zip(params, other_params, strict=True))

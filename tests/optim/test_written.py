"""Which optimizer wrote a state, and with which options: the groups carry this mark."""

import copy
import io
import json
import pickle

import pytest
import torch

from sketch_plugins import SM3, CSAdam, CSMomentum, Sketchy, registry
from sketch_plugins.optim.written import MARK, written_by, written_with

from .conftest import parameters, train

SHAPES = [(40, 33), (9,)]
#: Another value of every structural option; those that would also change the state's shapes among them.
OTHER = {
    "batch_dims": 1, "compression": 0.5, "width": 7, "depth": 3, "hash": "affine", "table_dtype": "bf16", "seed": 7,
    "min_compress_size": 9, "lagged_rms": True, "first_moment": "fp32", "block_size": 16, "second_moment": "dense",
    "bucket": "sum", "variant": "I", "rank": 3, "budget": 2.0, "statistics": "sample", "graft": "sm3",
    "momentum_of": "all", "merge_dims": 3, "max_block_dim": 16, "max_axis": 50, "max_aspect_ratio": 1.5,
    "precondition": "none", "weight_bits": 24, "row_scales": False,
}  # fmt: skip
FIRST = {"bucket": {"CSAdagrad": "mean"}}


def made(cls, steps=1, **options):
    params = parameters(SHAPES, torch.float32)
    optimizer = cls(params, min_compress_size=0, **options)
    train(optimizer, params, steps)
    return optimizer


def again(optimizer):
    params = optimizer.param_groups[0]["params"]
    before = [p.detach().clone() for p in params]
    steps = [optimizer.state[p]["step"].item() for p in params]
    try:
        train(optimizer, params, 1, first=5)
    except ValueError:
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
        assert [optimizer.state[p]["step"].item() for p in params] == steps
        raise


def loaded(optimizer):
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer


def saved_and_loaded(optimizer):
    """Save and load through a file, like a checkpoint."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    return optimizer


WAYS = {
    "as it is": lambda o: o,
    "loaded": loaded,
    "from a file": saved_and_loaded,
    "deepcopy": copy.deepcopy,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
}


def structural(name):
    return [option for option in registry.get(name).cls.OPTIONS.values() if option.structural]


def other_value(cls, option):
    return FIRST.get(option.name, {}).get(cls.__name__, OTHER[option.name])


@pytest.mark.parametrize("way", WAYS)
def test_every_structural_option_changed_after_a_copy_is_refused_and_nothing_moves(name, way):
    cls = registry.get(name).cls
    assert structural(name)
    for option in structural(name):
        optimizer = WAYS[way](made(cls))
        group, value = optimizer.param_groups[0], other_value(cls, option)
        was = group[option.name]
        assert was != value, option.name
        group[option.name] = value
        with pytest.raises(ValueError, match=f"{option.name} of group 0 was "):
            again(optimizer)
        group[option.name] = was
        again(optimizer)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "as it is"])
def test_a_change_before_the_copy_is_no_less_refused(name, way):
    cls = registry.get(name).cls
    for option in structural(name):
        optimizer = made(cls)
        optimizer.param_groups[0][option.name] = other_value(cls, option)
        with pytest.raises(ValueError, match=option.name):
            again(WAYS[way](optimizer))


def test_a_state_dict_with_a_changed_option_is_refused_by_those_who_have_that_option():
    optimizer = made(CSAdam)
    optimizer.param_groups[0]["seed"] = 7
    fresh = CSAdam(parameters(SHAPES, torch.float32), min_compress_size=0, seed=7)
    with pytest.raises(ValueError, match=r"has seed=7, but its state was written with seed=0"):
        fresh.load_state_dict(optimizer.state_dict())
    assert not fresh.state


def test_an_option_that_is_deleted_is_missed():
    optimizer = made(CSMomentum, depth=2)
    del optimizer.param_groups[0]["depth"]
    with pytest.raises(ValueError, match="depth of group 0 was 2 and is now missing"):
        again(optimizer)


@pytest.mark.parametrize(
    ("cls", "option", "value"), [(CSAdam, "seed", 3), (SM3, "variant", "I"), (Sketchy, "rank", 4)], ids=str
)
@pytest.mark.parametrize("way", WAYS)
def test_without_state_options_may_be_changed(cls, option, value, way):
    params = parameters(SHAPES, torch.float32)
    optimizer = WAYS[way](cls(params, min_compress_size=0))
    optimizer.param_groups[0][option] = value
    own = optimizer.param_groups[0]["params"]
    train(optimizer, own, 2)
    whole = cls(parameters(SHAPES, torch.float32), min_compress_size=0, **{option: value})
    train(whole, whole.param_groups[0]["params"], 2)
    assert all(torch.equal(p, q) for p, q in zip(own, whole.param_groups[0]["params"], strict=True))
    assert written_with(optimizer.param_groups[0])[option] == value


def test_options_that_are_not_structural_may_be_changed(name):
    optimizer = loaded(made(registry.get(name).cls))
    optimizer.param_groups[0].update(lr=0.5, chunk_size=64, weight_decay=0.1)
    again(optimizer)


def test_the_mark_is_renewed_in_groups_made_of_groups():
    """``CSMomentum([{**group, "params": ...} for group in other.param_groups])``."""
    old = made(CSAdam, seed=3)
    group = {**old.param_groups[0], "params": parameters(SHAPES, torch.float32)}
    new = CSAdam([group], min_compress_size=0, depth=2)
    new.param_groups[0]["seed"] = 5
    train(new, new.param_groups[0]["params"], 1)
    assert written_with(new.param_groups[0])["seed"] == 5
    assert written_by(old.param_groups[0]) == "CSAdam" and written_with(old.param_groups[0])["seed"] == 3


# -- checkpoints that are older than the mark ------------------------------------------------------------------------


def older(state_dict):
    out = copy.deepcopy(state_dict)
    for group in out["param_groups"]:
        group["optimizer"] = json.loads(group.pop(MARK))["optimizer"]
    return out


def test_an_older_checkpoint_loads_and_is_marked(name):
    cls = registry.get(name).cls
    optimizer = made(cls, steps=2)
    params = parameters(SHAPES, torch.float32)
    for p, q in zip(params, optimizer.param_groups[0]["params"], strict=True):
        p.data.copy_(q)
    other = cls(params, min_compress_size=0)
    saved = older(optimizer.state_dict())
    other.load_state_dict(saved)
    assert "optimizer" not in other.param_groups[0] and "optimizer" in saved["param_groups"][0]
    train(optimizer, optimizer.param_groups[0]["params"], 1, first=2)
    train(other, params, 1, first=2)
    assert all(torch.equal(p, q) for p, q in zip(params, optimizer.param_groups[0]["params"], strict=True))
    other.param_groups[0]["seed"] = 7
    with pytest.raises(ValueError, match="seed of group 0 was 0 and is now 7"):
        again(other)


def test_an_older_checkpoint_of_another_optimizer_is_refused():
    with pytest.raises(ValueError, match="not written by CSMomentum, but by CSAdam"):
        made(CSMomentum).load_state_dict(older(made(CSAdam).state_dict()))


def test_an_older_pickle_is_marked():
    optimizer = made(CSAdam)
    for group in optimizer.param_groups:
        group["optimizer"] = json.loads(group.pop(MARK))["optimizer"]
    other = pickle.loads(pickle.dumps(optimizer))
    assert written_by(other.param_groups[0]) == "CSAdam" and "optimizer" not in other.param_groups[0]
    again(other)


@pytest.mark.parametrize("mark", ["CSAdam", "[]", '{"optimizer": 3, "options": {}}', None, 3, "{}"])
def test_a_damaged_mark_is_named(mark):
    optimizer = made(CSAdam)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][MARK] = mark
    with pytest.raises(ValueError, match=r"has sketch_plugins=.*Use another name for your own key"):
        optimizer.load_state_dict(saved)
    again(optimizer)


# -- keys of users in groups -----------------------------------------------------------------------------------------


def test_a_key_optimizer_is_the_user_s(name):
    cls = registry.get(name).cls

    def build():
        group = {"params": parameters(SHAPES, torch.float32), "optimizer": "adamw", "layer": 3}
        return cls([group], min_compress_size=0)

    one, two = build(), build()
    train(one, one.param_groups[0]["params"], 1)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert two.param_groups[0]["optimizer"] == "adamw" and two.param_groups[0]["layer"] == 3
    train(two, two.param_groups[0]["params"], 1)


@pytest.mark.parametrize(("key", "value"), [("depth", 0), ("depth", "encoder.3"), ("width", 0.9), ("hash", "0xab")])
def test_an_option_s_name_with_a_value_that_cannot_be_one_says_whose_name_it_is(key, value):
    group = {"params": parameters(SHAPES, torch.float32), key: value}
    with pytest.raises(ValueError) as error:
        CSAdam([group])
    said = str(error.value)
    assert f"{key}={value!r}" in said and f"{key!r} is an option of CSAdam" in said and "give it another name" in said
    optimizer = made(CSAdam)
    optimizer.param_groups[0][key] = value
    with pytest.raises(ValueError, match="give it another name"):
        again(optimizer)
    if key in ("depth", "width"):  # SM3 does not use these words of other code
        assert SM3([group]).param_groups[0][key] == value
        return
    with pytest.raises(ValueError, match=f"SM3 has no option '{key}'.*give it another name"):
        SM3([group])


def test_state_of_adamw_is_refused_with_the_way_to_convert_it(name):
    params = parameters(SHAPES, torch.float32)
    adamw = torch.optim.AdamW([{"params": params, "optimizer": "adamw"}])
    train(adamw, params, 1)
    optimizer = registry.get(name).cls(parameters(SHAPES, torch.float32))
    with pytest.raises(
        ValueError, match=r"by another optimizer .*sketch_plugins\.convert_state\(state_dict, optimizer"
    ):
        optimizer.load_state_dict(adamw.state_dict())


@pytest.mark.parametrize("alone", [False, True], ids=["step", "step_parameter"])
def test_an_option_that_is_taken_out_of_a_group_is_named_before_anything_changes(name, alone):
    cls = registry.get(name).cls
    always = [option for option in cls.OPTIONS if option in cls(parameters(SHAPES, torch.float32)).defaults]
    assert len(always) >= len(cls.OPTIONS) - 1  # cs_momentum has betas where they are given
    for option in always:
        params = parameters(SHAPES, torch.float32)
        optimizer = cls([{"params": params[:1]}, {"params": params[1:]}])
        for p in params:
            p.grad = torch.ones_like(p)
        before = [p.detach().clone() for p in params]
        value = optimizer.param_groups[1].pop(option)
        with pytest.raises(
            ValueError, match=rf"key {option} is missing in param_groups.*Restore it.*\[{option!r}\]"
        ) as caught:
            optimizer.step_parameter(1, 0) if alone else optimizer.step()
        assert repr(value) in str(caught.value)
        assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True)) and not optimizer.state
        optimizer.param_groups[1][option] = value
        optimizer.step()


@pytest.mark.parametrize(
    ("given", "meant"),
    [("cs_adm", "cs_adam"), ("CSAdam", "cs_adam"), ("cs-adagrad", "cs_adagrad"), ("scetchy", "sketchy")],
)
def test_a_name_that_is_nearly_one(given, meant):
    with pytest.raises(
        ValueError, match=f"unknown optimizer {given!r}. Did you mean {meant!r}. The optimizers are cs_adam"
    ):
        registry.get(given)
    with pytest.raises(ValueError, match=r"unknown optimizer 'lbfgs'\. The optimizers are"):
        registry.get("lbfgs")

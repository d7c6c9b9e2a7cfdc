"""`optim_target_modules`: which parameters are compressed or exact, and the weight-decay groups."""

import pytest
import torch

from sketch_plugins import registry, state_report
from sketch_transformers.targets import select_parameters


def options_of(name):
    sketch = ",compression=0.25" if "compression" in registry.get(name).options else ""
    rank = ",rank=1" if "rank" in registry.get(name).options else ""
    return f"min_compress_size=256{sketch}{rank}"


def names_of(model, params):
    chosen = {id(p) for p in params}
    return {name for name, p in model.named_parameters() if id(p) in chosen}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (r".*\.mlp\.c_fc", "mlp.c_fc."),
        (["c_fc"], "mlp.c_fc."),
        ([r".*mlp\.c_f."], "mlp.c_fc."),
        (r".*\.mlp", "mlp."),  # a module includes everything inside it
        (r"transformer\.h\.0", "h.0."),
        ("transformer.wte", "wte."),
        (["ln_1", "ln_2"], "ln_"),
    ],
    ids=str,
)
def test_selection(target, expected, model):
    selected = names_of(model, select_parameters(model, target))
    dropped = {"transformer.ln_f.weight", "transformer.ln_f.bias"} if expected == "ln_" else set()
    assert selected == {name for name, _ in model.named_parameters() if expected in name} - dropped


@pytest.mark.parametrize("target", ["all-linear", "all_linear"])
def test_all_linear_includes_the_linear_layer_of_gpt2_and_tied_weights(target, model):
    selected = names_of(model, select_parameters(model, target))
    layers = {name for name, _ in model.named_parameters() if "c_" in name}
    assert selected == layers | {"transformer.wte.weight"}  # the weight of lm_head, which is a Linear


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere", "'nowhere' does not match a module.*transformer.wte"),
        (["c_fc", "nowhere"], "'nowhere'.*does not match a module"),
        ([], "selects nothing"),
        ("(", "not a regular expression"),
        (3, "expected a regular expression"),
        ([3], "expected a regular expression"),
    ],
    ids=str,
)
def test_mistakes(target, message, model):
    with pytest.raises(ValueError, match=message):
        select_parameters(model, target)


def test_only_frozen_parameters_match(model):
    model.transformer.wte.requires_grad_(False)
    with pytest.raises(ValueError, match="does not match a module with trainable parameters"):
        select_parameters(model, "transformer.wte")


def test_nothing_matched_stops_training(make_trainer):
    with pytest.raises(ValueError, match="'nowhere' does not match a module"):
        make_trainer(optim_target_modules="nowhere").train()


@pytest.mark.parametrize("name", registry.names())
def test_groups_are_trainers_own_each_split_in_two(name, make_trainer):
    trainer = make_trainer(name, optim_target_modules=["mlp"], optim_args=options_of(name))
    plain = make_trainer(name, trainer.model).create_optimizer()
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is registry.get(name).cls
    assert [(group["preset"], group["weight_decay"]) for group in optimizer.param_groups] == [
        ("default", 0.1),
        ("exact", 0.1),
        ("default", 0.0),
        ("exact", 0.0),
    ]
    for pair, whole in zip((optimizer.param_groups[:2], optimizer.param_groups[2:]), plain.param_groups, strict=True):
        selected, rest = (names_of(trainer.model, group["params"]) for group in pair)
        assert all("mlp" in key for key in selected) and not any("mlp" in key for key in rest)
        assert selected | rest == names_of(trainer.model, whole["params"])


@pytest.mark.parametrize("name", registry.names())
def test_the_rest_is_exact(name, make_trainer):
    trainer = make_trainer(name, optim_target_modules=["mlp"], optim_args=options_of(name))
    trainer.train()
    report = state_report(trainer.optimizer)
    exact = {1, 3}
    dense = report.state_bytes - sum(report.by_group()[number] for number in (0, 2))
    params = sum(p.params for p in report.parameters if p.group in exact)
    moments = {len(p.stores) for p in report.parameters if p.group in exact}
    assert moments in ({1}, {2})
    assert dense == 4 * moments.pop() * params  # each moment whole, in fp32
    weights = [p for p in report.parameters if p.group == 0]
    assert all(p.state_bytes < 0.6 * 4 * len(p.stores) * p.params for p in weights)


def test_exact_rest_moves_as_under_adamw(make_trainer, new_model):
    # One step from the same weights: parameters that are not selected must equal torch's AdamW to fp32 rounding. The
    # epsilon keeps Adam from amplifying rounding noise, which is the whole gradient of attention's key bias.
    ours = make_trainer(model=new_model(dropout=0.0), optim_target_modules=["mlp"], max_steps=1, adam_epsilon=1e-5)
    theirs = make_trainer("adamw_torch", new_model(dropout=0.0), optim_args=None, max_steps=1, adam_epsilon=1e-5)
    ours.train()
    theirs.train()
    for (key, p), q in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        if "mlp" not in key:
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)

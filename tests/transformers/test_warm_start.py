"""Checkpoints of Trainer that AdamW wrote: ``warm_start`` in ``optim_args``, and the error without it."""

import copy
import logging
import shutil

import pytest
import torch
from transformers import Trainer

from sketch_plugins import CSAdam, cli, convert_state

from .test_training import SMALL, assert_equal, inner, losses

# Settings of both halves of a run. Attention's key bias has no gradient except rounding noise: with an epsilon of 1e-8
# Adam would amplify it to whole steps, which differ between kernels.
RUN = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear", "warmup_steps": 2}
RUN |= {"adam_epsilon": 1e-5}


@pytest.fixture
def begun(make_trainer, new_model, tmp_path):
    """`begun(**options)`: a run with AdamW of 6 steps, and its checkpoint after 3."""

    def make(**options):
        trainer = make_trainer("adamw_torch", new_model(dropout=0.0), optim_args=None, **{**RUN, **options})
        trainer.train()
        return trainer, tmp_path / "out" / "checkpoint-3"

    return make


def resume(make_trainer, new_model, checkpoint, optim_args, name="cs_adam", **options):
    options = {**RUN, "save_strategy": "no", **options}
    trainer = make_trainer(name, new_model(seed=7, dropout=0.0), optim_args=optim_args, **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


def test_exact_stores_go_on_as_adamw_does(begun, make_trainer, new_model, caplog):
    whole, checkpoint = begun()
    caplog.set_level(logging.INFO, "sketch_transformers.warm_start")
    resumed = resume(make_trainer, new_model, checkpoint, "preset=exact,fused=false,warm_start=true")
    assert any("warm start" in record.getMessage() for record in caplog.records)
    # torch's AdamW is the oracle: three steps whose operations are in another order.
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    rates = [
        {log["step"]: log["learning_rate"] for log in t.state.log_history if "loss" in log} for t in (whole, resumed)
    ]
    assert rates[0] == rates[1] and len(set(rates[0].values())) > 3  # the schedule goes on, and it does move
    assert resumed.state.global_step == 6 and list(losses(resumed)) == [1, 2, 3, 4, 5, 6]
    assert {float(state["step"]) for state in inner(resumed).state.values()} == {6.0}


@pytest.mark.parametrize(
    ("name", "optim_args", "options"),
    [
        ("cs_adam", SMALL, {}),
        ("cs_adam", f"{SMALL},preset=lean,betas=0.8:0.95", {}),
        ("cs_adam_layerwise", SMALL, {"max_grad_norm": 0.0}),
        ("sm3", SMALL, {}),
        ("sketchy", SMALL, {}),
    ],
    ids=["cs_adam", "lean", "layerwise", "sm3", "sketchy"],
)
def test_what_is_loaded_is_what_convert_state_makes(
    name, optim_args, options, begun, make_trainer, new_model, tmp_path
):
    _, checkpoint = begun(max_steps=3)
    if name == "sm3":
        options = {**options, "adam_epsilon": 1e-8}  # of Adam, which it does not read
    warm = resume(make_trainer, new_model, checkpoint, f"{optim_args},warm_start=true", name, **options)

    # The same by hand: a checkpoint in which the converted state replaces AdamW's.
    class ByHand(Trainer):
        def create_scheduler(self, *args, **kwargs):
            optimizer, saved = inner(self), torch.load(checkpoint / "optimizer.pt", weights_only=True)
            converted = convert_state(saved, optimizer, keep=["betas"] if "betas" in optim_args else [])
            torch.save(converted, tmp_path / "converted" / "optimizer.pt")
            return super().create_scheduler(*args, **kwargs)

    shutil.copytree(checkpoint, tmp_path / "converted")
    second = {**RUN, "save_strategy": "no", **options}
    other = make_trainer(name, new_model(seed=7, dropout=0.0), cls=ByHand, optim_args=optim_args, **second)
    other.train(resume_from_checkpoint=str(tmp_path / "converted"))
    assert losses(warm) == losses(other)
    assert_equal(inner(warm).state_dict(), inner(other).state_dict())
    for p, q in zip(warm.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
    if "betas" in optim_args:
        assert all(group["betas"] == (0.8, 0.95) for group in inner(warm).param_groups)


def test_the_command_makes_a_checkpoint_that_goes_on_like_a_warm_start(begun, make_trainer, new_model, tmp_path):
    whole, checkpoint = begun()
    options = f"{SMALL},compression=0.2"
    warm = resume(make_trainer, new_model, checkpoint, f"{options},warm_start=true")
    assert cli.main(["convert", str(checkpoint), "--optim", "cs_adam", "--optim-args", options]) == 0
    other = resume(make_trainer, new_model, tmp_path / "out" / "checkpoint-3-cs_adam", options)
    assert losses(warm) == losses(other) != losses(whole)
    assert_equal(inner(warm).state_dict(), inner(other).state_dict())
    for p, q in zip(warm.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_without_a_warm_start_it_is_an_error_that_says_how(begun, make_trainer, new_model):
    _, checkpoint = begun(max_steps=3)
    message = (
        r'one of torch.s optimizers, not of CSAdam.*optim_args="warm_start=true".*sketch-plugins convert CHECKPOINT'
    )
    with pytest.raises(ValueError, match=message):
        resume(make_trainer, new_model, checkpoint, SMALL)
    with pytest.raises(ValueError, match="warm_start=true"):
        resume(make_trainer, new_model, checkpoint, f"{SMALL},warm_start=false")
    # An optimizer that was not requested by its name.
    cls = (CSAdam, {"lr": 3e-3, "min_compress_size": 256})
    with pytest.raises(ValueError, match=r"sketch_plugins.convert_state\(state_dict, optimizer\)"):
        resume(make_trainer, new_model, checkpoint, None, "adamw_torch", optimizer_cls_and_kwargs=cls)


def test_a_trainer_that_makes_its_own_optimizer(begun, make_trainer, new_model):
    _, checkpoint = begun(max_steps=3)

    class Own(Trainer):
        def create_optimizer(self, model=None):
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            decayed = [p for p in self.model.parameters() if p.ndim > 1]
            others = [p for p in self.model.parameters() if p.ndim <= 1]
            groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
            self.optimizer = cls(groups, **kwargs)
            return self.optimizer

    warm = resume(make_trainer, new_model, checkpoint, f"{SMALL},warm_start=true", cls=Own)
    reference = resume(make_trainer, new_model, checkpoint, f"{SMALL},warm_start=true")
    assert losses(warm) == losses(reference)
    with pytest.raises(ValueError, match="warm_start=true"):
        resume(make_trainer, new_model, checkpoint, SMALL, cls=Own)


def test_a_run_of_ours_resumes_with_warm_start_as_without(make_trainer, new_model, tmp_path):
    saving = {**RUN, "optim_args": f"{SMALL},warm_start=true"}
    whole = make_trainer(model=new_model(dropout=0.0), **saving)
    whole.train()
    for optim_args in (SMALL, f"{SMALL},warm_start=true"):
        resumed = resume(make_trainer, new_model, tmp_path / "out" / "checkpoint-3", optim_args)
        assert_equal(inner(whole).state_dict(), inner(resumed).state_dict())


def test_where_it_is_not_possible(make_args):
    for value in ("perhaps", "1"):
        with pytest.raises(ValueError, match=f"warm_start='{value}' is not allowed.*True or False"):
            make_args(optim_args=f"warm_start={value}")
    with pytest.raises(ValueError, match=r"warm_start=true is not possible here: FSDP"):
        make_args(optim_args="warm_start=true", fsdp=True, fsdp_config={"version": 2})
    with pytest.raises(ValueError, match=r"warm_start=true is not possible here: with optim_target_modules"):
        make_args(optim_args="warm_start=true", optim_target_modules=".*mlp.*")
    assert make_args(optim_args="warm_start=false", fsdp=True, fsdp_config={"version": 2}).fsdp
    assert make_args(optim_args={"warm_start": True, "compression": 0.1}).optim_args


def test_groups_that_are_added_later_are_split_by_target_modules(make_trainer, model):
    trainer = make_trainer(model=model, optim_target_modules=".*mlp.*")
    optimizer = trainer.create_optimizer()
    before = len(optimizer.param_groups)
    fresh = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer.add_param_group({"params": [fresh], "weight_decay": 0.0})
    added = optimizer.param_groups[before:]
    assert [group["preset"] for group in added] == ["exact"] and added[0]["params"] == [fresh]
    with pytest.raises(TypeError, match="must be a dict"):
        optimizer.add_param_group([fresh])
    copied = copy.deepcopy(optimizer)
    copied.add_param_group({"params": [torch.nn.Parameter(torch.zeros(64, 64))]})
    assert copied.param_groups[-1]["preset"] == "exact" and len(optimizer.param_groups) == before + 1


def test_a_slip_of_the_pen_is_understood(make_args):
    with pytest.raises(ValueError, match=r"has no option 'warm_strat'\. Did you mean 'warm_start'"):
        make_args(optim_args="warm_strat=true")

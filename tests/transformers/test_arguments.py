"""Names and options in TrainingArguments, parsers, files and pickles."""

import copy
import dataclasses
import json
import pickle
import re

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from sketch_plugins import registry
from sketch_transformers.arguments import parse_optim_args


@pytest.mark.parametrize("name", registry.names())
def test_name_is_a_member(name):
    member = OptimizerNames(name)
    assert member == name and isinstance(member, OptimizerNames)
    assert member is OptimizerNames[name.upper()] is getattr(OptimizerNames, name.upper())
    assert member in list(OptimizerNames) and name in OptimizerNames._value2member_map_
    assert repr(member) == f"<OptimizerNames.{name.upper()}: '{name}'>"
    assert copy.copy(member) is copy.deepcopy(member) is pickle.loads(pickle.dumps(member)) is member
    assert {member: 1}[name] == 1


def test_registering_again_changes_nothing():
    import sketch_transformers

    before = list(OptimizerNames), Trainer.log, TrainingArguments.__post_init__
    sketch_transformers.register()
    assert (list(OptimizerNames), Trainer.log, TrainingArguments.__post_init__) == before


@pytest.mark.parametrize("name", registry.names())
def test_round_trips(name, make_args, tmp_path):
    args = make_args(name, optim_args="min_compress_size=99", optim_target_modules=["mlp"])
    parser = HfArgumentParser(TrainingArguments)
    as_dict = args.to_dict()
    assert as_dict["optim"] == name and type(as_dict["optim"]) is str
    as_json = tmp_path / "args.json"
    as_json.write_text(args.to_json_string())
    assert json.loads(as_json.read_text())["optim"] == name
    torch.save(args, tmp_path / "training_args.bin")
    for other in (
        parser.parse_dict(as_dict)[0],
        parser.parse_json_file(str(as_json))[0],
        pickle.loads(pickle.dumps(args)),
        copy.deepcopy(args),
        dataclasses.replace(args, seed=3),
        torch.load(tmp_path / "training_args.bin", weights_only=False),
    ):
        assert other.optim is OptimizerNames(name)
        assert (other.optim_args, other.optim_target_modules) == ("min_compress_size=99", ["mlp"])
    # 'cs_adam', OptimizerNames.CS_ADAM or cs_adam, as transformers and Python write it.
    assert re.search(rf"\boptim=[^,]*{name}\b", repr(args), re.IGNORECASE)
    assert args.to_sanitized_dict()["optim"] == name


def test_set_optimizer(make_trainer, make_args):
    args = make_args("sgd", optim_args=None).set_optimizer("cs_adam", learning_rate=0.5, beta1=0.8, args="seed=4")
    trainer = make_trainer()
    trainer.args = args
    group = trainer.create_optimizer().param_groups[0]
    assert (group["lr"], group["betas"][0], group["seed"]) == (0.5, 0.8, 4)


@pytest.mark.parametrize("cls", [TrainingArguments, Seq2SeqTrainingArguments])
def test_command_line(cls, tmp_path):
    line = ["--output_dir", str(tmp_path), "--optim", "cs_adam", "--optim_args", "compression=0.05,first_moment=int8"]
    (args,) = HfArgumentParser(cls).parse_args_into_dataclasses([*line, "--optim_target_modules", "mlp"])
    assert (args.optim, args.optim_args) == ("cs_adam", "compression=0.05,first_moment=int8")
    assert args.optim_target_modules in ("mlp", ["mlp"])


def test_an_unknown_name_is_refused_with_ours_in_the_list(make_args):
    with pytest.raises(ValueError) as error:
        make_args("cs_adamm")
    assert all(name in str(error.value) for name in registry.names())


MISTAKES = {
    "compresion=0.1": ["no option 'compresion'", "Did you mean 'compression'", "first_moment"],
    "compression": ["'compression' is not of the form key=value", "first_moment"],
    "compression=": ["'compression=' is not of the form key=value"],
    "=0.1": ["'=0.1' is not of the form key=value"],
    "compression=0.1,": ["'' is not of the form key=value"],
    "compression=0.1,compression=0.2": ["given twice", "'0.1'", "'0.2'"],
    "compression=low": ["compression='low'", "a number in (0, 1]"],
    "compression=1.5": ["compression='1.5'", "a number in (0, 1]"],
    "depth=1.5": ["depth='1.5'", "an integer >= 1"],
    "depth=0": ["depth='0'", "an integer >= 1"],
    "maximize=maybe": ["maximize='maybe'", "True or False"],
    "first_moment=int4": ["'int4'", "'int8'", "'fp32'", "'none'"],
    "preset=fat": ["'fat'", "'lean'"],
    "width=4,compression=0.1": ["width=4", "compression=0.1", "use one of them"],
    "lr=0.1": ["'lr'", "TrainingArguments.learning_rate"],
    "weight_decay=0.1": ["'weight_decay'", "TrainingArguments.weight_decay"],
    "betas=0.9": ["betas", "two numbers in [0, 1)"],
    "momentum=0.9": ["no option 'momentum'", "betas"],
}


@pytest.mark.parametrize("optim_args", MISTAKES)
def test_a_mistake_in_optim_args_says_what_is_allowed(optim_args, make_args, make_trainer):
    def check(error):
        assert all(part in str(error.value) for part in MISTAKES[optim_args]), error.value
        assert optim_args in str(error.value) and "cs_adam" in str(error.value)

    with pytest.raises(ValueError) as error:  # at once, where the arguments are made
        make_args(optim_args=optim_args)
    check(error)
    trainer = make_trainer()
    trainer.args.optim_args = optim_args  # and before the first step, where they were assigned later
    with pytest.raises(ValueError) as error:
        trainer.train()
    check(error)


@pytest.mark.parametrize("name", registry.names())
def test_every_option_can_be_written_as_text(name):
    for option in registry.get(name).options.values():
        if option.name in ("lr", "weight_decay"):
            continue
        for value in option.choices or ({float: 0.5, int: 3, bool: True, tuple: (0.5, 0.75)}[option.type],):
            text = ":".join(map(str, value)) if isinstance(value, tuple) else str(value)
            assert parse_optim_args(name, f" {option.name} = {text} ") == {option.name: value}


def test_a_mapping_from_a_configuration_file(make_args):
    args = make_args(optim_args={"compression": 0.25, "row_sparse": "auto"})
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    assert cls is registry.get("cs_adam").cls
    assert (kwargs["compression"], kwargs["row_sparse"]) == (0.25, "auto")
    with pytest.raises(ValueError, match="expected text of the form 'key=value,key=value', not list"):
        make_args(optim_args=["compression=0.1"])


def test_impossible_adam_arguments_are_reported_at_once(make_args):
    with pytest.raises(ValueError, match=r"betas=\(1\.5, 0\.999\)"):
        make_args(adam_beta1=1.5)


def test_optim_args_of_other_optimizers_are_not_looked_at(make_args):
    assert make_args("adamw_torch", optim_args="compression").optim_args == "compression"

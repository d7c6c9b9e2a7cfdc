"""The line of the first step and the names of parameters, in Trainer."""

import logging

import pytest
import torch
from transformers import Trainer
from transformers.utils import logging as transformers_logging

from sketch_plugins import CSAdam, cli, state_report
from sketch_transformers import ReclaimBatchSize, SketchCallback
from sketch_transformers.introduction import logger as theirs

from .conftest import Tokens

NAME = "sketch_plugins.optim.introduction"


@pytest.fixture
def shown():
    """The messages that reach transformers' handlers, and its default verbosity."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.WARNING)
    transformers_logging.add_handler(handler)
    theirs.setLevel(logging.NOTSET)
    yield lambda: [record.getMessage() for record in records if record.name == theirs.name]
    transformers_logging.remove_handler(handler)
    transformers_logging.set_verbosity(before)
    theirs.setLevel(logging.NOTSET)


def test_once_at_the_default_verbosity(make_trainer, shown):
    trainer = make_trainer(warmup_steps=2)
    trainer.train()
    (said,) = shown()
    report = state_report(trainer.optimizer)
    assert said.startswith(f"CSAdam: {report.bytes_per_param:.3g} bytes of state a parameter")
    assert said.endswith("learning rate 0 (0.003 before its schedule)")


@pytest.mark.parametrize(("level", "lines"), [("info", 1), ("warning", 0), ("error", 0)])
def test_a_log_level_decides(level, lines, make_trainer, shown):
    make_trainer(log_level=level, max_steps=2).train()
    assert len(shown()) == lines


def test_a_quiet_program_stays_quiet(make_trainer, shown):
    transformers_logging.set_verbosity_error()
    trainer = make_trainer(max_steps=2)
    transformers_logging.set_verbosity_error()  # Trainer's constructor sets it again
    trainer.train()
    assert shown() == []


def test_where_our_logger_listens_it_is_said_there_alone(make_trainer, shown, caplog):
    caplog.set_level(logging.INFO, NAME)
    make_trainer(max_steps=2).train()
    assert shown() == [] and len([r for r in caplog.records if r.name == NAME]) == 1


def test_the_table_of_the_callback_stands_for_it(make_trainer, shown, caplog):
    make_trainer(max_steps=2, callbacks=[SketchCallback]).train()
    assert len(shown()) == 1  # at this verbosity the table is not shown
    caplog.set_level(logging.INFO, "sketch_transformers.callback")
    make_trainer(max_steps=2, callbacks=[SketchCallback]).train()
    assert len(shown()) == 1
    (table,) = [r.getMessage() for r in caplog.records if r.name == "sketch_transformers.callback"]
    assert "transformer.wte.weight" in table and "0.5" not in table.split()


@pytest.mark.parametrize("optim", ["cs_adam_layerwise", "adamw_torch"])
def test_other_ways_to_step(optim, make_trainer, shown):
    args = {"max_grad_norm": 0.0} if optim != "adamw_torch" else {"optim_args": None}
    make_trainer(optim, max_steps=3, **args).train()
    assert len(shown()) == (optim != "adamw_torch")


class Meter:
    """A meter for which everything fits."""

    def start(self):
        pass

    def read(self):
        return 1


@pytest.mark.parametrize("own", [False, True], ids=["made by Trainer", "given to Trainer"])
def test_trials_of_a_batch_size_say_nothing(own, make_args, model, shown):
    callback = ReclaimBatchSize(budget=10**6, meter=Meter(), max_val=16, init_val=8)
    optimizers = (CSAdam(model.parameters()) if own else None, None)
    trainer = Trainer(
        model, make_args(max_steps=2), train_dataset=Tokens(), callbacks=[callback], optimizers=optimizers
    )
    trainer.train()
    assert len(callback.trials) > 1 and len(shown()) == 1


def test_names_are_the_models(make_trainer, tmp_path, capsys):
    """In reports, messages and the checkpoint, although Trainer's two groups have no names."""
    trainer = make_trainer(save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    names = {name for name, _ in trainer.model.named_parameters()}
    assert {p.name for p in state_report(trainer.optimizer).parameters} == names
    inner = trainer.optimizer.optimizer
    assert isinstance(inner, CSAdam) and "transformer.wte.weight" in inner._label(inner.param_groups[0], 0)
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path / "out" / "checkpoint-2"), "--rows", "0"]) == 0
    said = capsys.readouterr().out
    assert "transformer.h.1.mlp.c_fc.weight" in said and "0.5" not in said.split()
    (first,) = [text for text in said.splitlines() if text.startswith("group 0: ")]
    assert "lr=" in first and "weight_decay=0.1" in first and "min_compress_size=256" in first
    assert "compression" not in first and "other options at their defaults" in first and "wte" not in first


def test_groups_may_be_added_later_and_runs_resume(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=2, max_steps=2)
    trainer.create_optimizer()
    extra = torch.nn.Parameter(torch.zeros(4))
    trainer.optimizer.add_param_group({"params": [extra]})  # without names, like callbacks that unfreeze parameters
    assert state_report(trainer.optimizer).parameters[-1].name == "2.0"
    one = make_trainer(save_strategy="steps", save_steps=2, max_steps=4)
    one.train()
    two = make_trainer(max_steps=4)
    two.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)

"""The logs of SketchCallback, the reporters that get them, and checkpoints."""

import json
import logging

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import EarlyStoppingCallback

from sketch_plugins import state_report
from sketch_transformers import SketchCallback

MEMORY = ("optimizer/state_bytes", "optimizer/state_bytes_per_param", "optimizer/saved_vs_adamw_bytes")
ERROR = "optimizer/second_moment_relative_error"


def training_logs(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("callback", [SketchCallback, SketchCallback(sampled=True)], ids=["class", "sampled"])
def test_figures_reach_tensorboard(callback, make_trainer, tmp_path):
    trainer = make_trainer(
        report_to="tensorboard", callbacks=[callback], max_steps=4, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    report = state_report(trainer.optimizer)
    expected = dict(zip(MEMORY, (report.state_bytes, report.bytes_per_param, report.saved_bytes), strict=True))

    (file,) = tmp_path.rglob("events.out.*")
    events = EventAccumulator(str(file))
    events.Reload()
    for key, value in expected.items():
        scalars = events.Scalars(f"train/{key}")
        assert [event.step for event in scalars] == [1, 2, 3, 4, 4]  # the last one with the summary of the run
        assert all(event.value == pytest.approx(value, rel=1e-6) for event in scalars)  # fp32 in the event file
        assert [log[key] for log in training_logs(trainer)] == [value] * 4
    assert ("train/" + ERROR in events.Tags()["scalars"]) == (callback is not SketchCallback)
    assert not any("optimizer" in key for log in trainer.state.log_history if "eval_loss" in log for key in log)


def test_the_figures_are_bytes(make_trainer):
    trainer = make_trainer("adamw_torch", optim_args=None, callbacks=[SketchCallback()], max_steps=1)
    trainer.train()
    params = sum(p.numel() for p in trainer.model.parameters())
    assert [training_logs(trainer)[0][key] for key in MEMORY] == [8 * params, 8.0, 0]

    trainer = make_trainer(callbacks=[SketchCallback()], max_steps=1)
    trainer.train()
    log = training_logs(trainer)[0]
    tensors = [t for s in trainer.optimizer.state.values() for t in _tensors(s)]
    assert log[MEMORY[0]] == sum(t.numel() * t.element_size() for t in tensors)
    assert log[MEMORY[0]] + log[MEMORY[2]] == 8 * params


def _tensors(state):
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor) and key != "step":
            yield value


def test_the_error_is_that_of_the_sketch(make_trainer):
    def errors(optim_args):
        trainer = make_trainer(callbacks=[SketchCallback(sampled=True)], optim_args=optim_args)
        trainer.train()
        return [log[ERROR] for log in training_logs(trainer)]

    assert all(0.01 < error < 10 for error in errors("min_compress_size=256,compression=0.05"))
    # With a bucket for every row the method is exact, except for fp32 rounding.
    assert all(error < 1e-5 for error in errors("min_compress_size=256,compression=1.0"))


def test_the_error_of_covers(make_trainer):
    trainer = make_trainer("sm3", callbacks=[SketchCallback(sampled=True)])
    trainer.train()
    assert all(0.01 < log[ERROR] < 100 for log in training_logs(trainer))
    report = state_report(trainer.optimizer)
    assert all(log[MEMORY[0]] == report.state_bytes for log in training_logs(trainer))
    matrices = [p for p in report.parameters if len(p.shape) > 1]
    assert matrices and all(p.stores["second_moment"] == 4 * sum(p.shape) for p in matrices)


def test_without_a_second_moment_there_is_no_error(make_trainer):
    trainer = make_trainer("cs_momentum", callbacks=[SketchCallback(sampled=True)], max_steps=2)
    trainer.train()
    assert not any(ERROR in log for log in training_logs(trainer))


def test_sampling_another_optimizer_is_refused(make_trainer):
    with pytest.raises(TypeError, match="AdamW"):
        make_trainer("adamw_torch", optim_args=None, callbacks=[SketchCallback(sampled=True)]).train()


def test_memory_is_reported_once(make_trainer, caplog):
    with caplog.at_level(logging.INFO, logger="sketch_transformers.callback"):
        make_trainer(callbacks=[SketchCallback()], max_steps=3).train()
    (record,) = [record for record in caplog.records if record.name == "sketch_transformers.callback"]
    assert record.levelno == logging.INFO
    assert "after step 1" in record.getMessage() and "first moment" in record.getMessage()


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_samples_continue_on_resume(restore, accumulation, make_trainer, new_model, tmp_path):
    saving = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "restore_callback_states_from_checkpoint": restore,
        "gradient_accumulation_steps": accumulation,
    }
    whole = make_trainer(callbacks=[SketchCallback(sampled=True, rows=3)], **saving)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["SketchCallback"]
    others = {"full_precision": False, "check_numerics": False}
    assert saved["args"] == {"sampled": True, "rows": 3, "params": 4, "seed": 0, **others}

    resumed = make_trainer(model=new_model(seed=7), callbacks=[SketchCallback(sampled=True, rows=3)], **saving)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert [log[ERROR] for log in training_logs(whole)] == [log[ERROR] for log in training_logs(resumed)]


@pytest.mark.parametrize("before", [[], [EarlyStoppingCallback]], ids=["none", "another"])
def test_added_when_a_run_is_resumed(before, make_trainer, tmp_path):
    # Trainer's own saving fails with a KeyError for a stateful callback that the checkpoint does not know.
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    saving["load_best_model_at_end"] = bool(before)
    first = make_trainer(max_steps=2, callbacks=[cls() for cls in before], **saving)
    first.train()
    second = make_trainer(max_steps=4, callbacks=[SketchCallback(sampled=True)], **saving)
    second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["SketchCallback"]["attributes"]["samples"]["exact"]
    assert ERROR in training_logs(second)[-1]

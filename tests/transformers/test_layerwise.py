"""``<name>_layerwise`` in Trainer: the same run as with the plain name, but with steps in backward."""

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser, TrainerCallback, TrainingArguments

from sketch_plugins import registry
from sketch_plugins.memory.in_backward import in_backward
from sketch_transformers import SketchCallback

SMALL = "min_compress_size=256"
SCRIPT = Path(__file__).with_name("distributed_worker.py")


class Watch(TrainerCallback):
    """Records the number of gradients before the optimizer's step, and the learning rates at that time."""

    def __init__(self):
        self.gradients, self.taken, self.rates, self.cycles, self._backwards = [], [], [], [], 0

    def on_substep_end(self, args, state, control, **kwargs):
        self._backwards += 1

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.gradients.append(sum(p.grad is not None for p in model.parameters()))
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.cycles.append(self._backwards + 1)
        self._backwards = 0
        back = in_backward(optimizer)
        if back is not None:
            self.taken.append(back.taken)


def history(trainer, *keys):
    return [[log[key] for key in keys] for log in trainer.state.log_history if "loss" in log]


def assert_same(one, other):
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert history(one, "step", "loss", "learning_rate") == history(other, "step", "loss", "learning_rate")


@pytest.mark.parametrize("name", registry.names())
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_run_is_that_of_the_plain_name(name, accumulation, make_trainer, new_model):
    # 64 rows, batches of 8 (accumulation 1) or 6: eleven batches, so the epoch's last cycle is one of three.
    size = {1: 8, 4: 6}[accumulation]
    settings = {
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": size,
        "max_steps": 5,
        "max_grad_norm": 0.0,
        "warmup_steps": 2,
        **({"learning_rate": 2e-3} if name == "sketchy" else {}),
    }
    plain_watch, watch = Watch(), Watch()
    plain = make_trainer(name, callbacks=[plain_watch], **settings)
    plain.train()
    layerwise = make_trainer(f"{name}_layerwise", callbacks=[watch], **settings)
    layerwise.train()
    assert type(layerwise.optimizer.optimizer) is registry.get(name).cls
    assert_same(plain, layerwise)
    count = len(list(plain.model.parameters()))
    assert plain_watch.gradients == [count] * 5 and watch.gradients == [0] * 5 and watch.taken == [count] * 5
    assert watch.rates == plain_watch.rates and len(set(watch.rates)) > 2
    assert watch.cycles == ([1] * 5 if accumulation == 1 else [4, 4, 3, 4, 4])
    assert "grad_norm" in plain.state.log_history[0] and "grad_norm" not in layerwise.state.log_history[0]
    moved = [not torch.equal(p, q) for p, q in zip(layerwise.model.parameters(), new_model().parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("name", registry.names())
def test_resume_is_bit_for_bit_in_both_directions(name, make_trainer, new_model, tmp_path):
    saving = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 4,
        "max_grad_norm": 0.0,
        "gradient_accumulation_steps": 2,
        "optim_args": f"{SMALL},stochastic_rounding=true",
    }
    made = {}
    for optim in (name, f"{name}_layerwise"):
        whole = make_trainer(optim, new_model(dtype=torch.bfloat16), output_dir=str(tmp_path / optim), **saving)
        whole.train()
        made[optim] = whole
    for writer, reader in (made, reversed(made)):
        saved = torch.load(tmp_path / writer / "checkpoint-2" / "optimizer.pt", weights_only=True)
        assert len(saved["state"]) == len(list(whole.model.parameters()))
        resumed = make_trainer(reader, new_model(seed=7, dtype=torch.bfloat16), **saving)
        resumed.train(resume_from_checkpoint=str(tmp_path / writer / "checkpoint-2"))
        assert (in_backward(resumed.optimizer) is not None) == reader.endswith("_layerwise")
        for optim in made:
            for p, q in zip(made[optim].model.parameters(), resumed.model.parameters(), strict=True):
                assert torch.equal(p, q)
            assert history(resumed, "step", "loss")[-1] == history(made[optim], "step", "loss")[-1]


def test_target_modules_split_the_groups(make_trainer):
    settings = {"optim_target_modules": [r".*mlp.*"], "max_grad_norm": 0.0, "max_steps": 3}
    plain = make_trainer("cs_adam", **settings)
    plain.train()
    watch = Watch()
    layerwise = make_trainer("cs_adam_layerwise", callbacks=[watch], **settings)
    layerwise.train()
    assert_same(plain, layerwise)
    assert watch.gradients == [0, 0, 0]
    presets = [group["preset"] for group in layerwise.optimizer.param_groups]
    assert sorted(set(presets)) == ["default", "exact"]


def test_gradient_checkpointing_of_both_kinds(make_trainer):
    runs = []
    for optim in ("cs_adam", "cs_adam_layerwise"):
        for reentrant in (False, True):
            settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
            runs.append(make_trainer(optim, max_grad_norm=0.0, max_steps=3, **settings))
            runs[-1].train()
    assert_same(runs[0], runs[2])
    assert_same(runs[1], runs[3])


def test_clipping_is_warned_about_once(make_trainer, caplog):
    for norm in (1.0, 0.0):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "sketch_transformers"):
            make_trainer("sm3_layerwise", max_grad_norm=norm, max_steps=1).train()
        said = [record.getMessage() for record in caplog.records if record.name.startswith("sketch_transformers")]
        assert len(said) == (1 if norm else 0)
        assert not norm or all(word in said[0] for word in ("max_grad_norm=1.0", "sm3_layerwise", "max_grad_norm=0"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fp16": True}, "does not support fp16: GradScaler"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}, "train_batch_size": "auto"}}, "DeepSpeed"),
        ({"optim_args": "comm=block_topk"}, "'comm' in optim_args"),
        ({"optim_args": "no_such_thing=1"}, "no_such_thing"),
        ({"optim_args": "nonsense"}, "not of the form key=value"),
    ],
    ids=["fp16", "deepspeed", "comm", "unknown", "malformed"],
)
def test_what_cannot_be_done_is_refused(settings, said, make_args):
    if "deepspeed" in settings:
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    with pytest.raises(ValueError, match=f"(?s)cs_adam_layerwise.*{said}"):
        make_args("cs_adam_layerwise", **settings)


def test_fp16_from_the_environment_is_refused(make_args, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="fp16"):
        make_args("cs_adam_layerwise")


def test_sketchy_cannot_skip(make_trainer):
    trainer = make_trainer("sketchy_layerwise", optim_args=f"{SMALL},nonfinite=skip")
    with pytest.raises(ValueError, match="nonfinite='skip'"):
        trainer.create_optimizer()


def test_samples_of_gradients_are_refused(make_trainer):
    make_trainer("cs_adam_layerwise", callbacks=[SketchCallback()], max_steps=1).train()
    with pytest.raises(ValueError, match=r"sampled=True.*_layerwise"):
        make_trainer("cs_adam_layerwise", callbacks=[SketchCallback(sampled=True)], max_steps=1).train()


def test_training_anew_after_a_failure_begins_a_new_cycle(make_trainer):
    trainer = make_trainer("cs_adam_layerwise", max_grad_norm=0.0, max_steps=2)
    first = trainer.model.transformer.wte.weight

    def fail(grad):
        raise MemoryError("as if there were no more")

    handle = first.register_hook(fail)
    with pytest.raises(MemoryError, match="as if"):
        trainer.train()
    assert in_backward(trainer.optimizer).taken > 0  # those nearer to the loss
    handle.remove()
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_names_are_choices_of_the_command_line(tmp_path):
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--optim", "cs_momentum_layerwise", "--use_cpu"]
    )
    assert args.optim == "cs_momentum_layerwise" and args.optim.value == "cs_momentum_layerwise"


def test_two_processes(launch_ranks, tmp_path):
    """FSDP2 computes the weights of the plain name; DistributedDataParallel is refused."""
    launch_ranks(SCRIPT, "layerwise", tmp_path, tmp_path / "result")
    first, second = (json.loads((tmp_path / f"result.{rank}").read_text()) for rank in (0, 1))
    for rank in (first, second):
        assert rank["fsdp2 layerwise"] == rank["fsdp2"] == rank["fsdp2 layerwise resumed"]
        assert "does not support DistributedDataParallel" in rank["ddp layerwise"]["refused"]
    assert first["fsdp2"]["weights"] == second["fsdp2"]["weights"]

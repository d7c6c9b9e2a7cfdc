"""`ReclaimBatchSize` in Trainer: it finds the right size, and the search changes nothing else."""

import collections
import copy
import functools
import gc
import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, default_data_collator
from transformers.training_args import OptimizerNames

from sketch_plugins import registry
from sketch_plugins.memory.meter import AllocatorMeter
from sketch_transformers import ReclaimBatchSize, SketchCallback, reclaim_batch_size
from sketch_transformers.snapshot import generators

from .conftest import Tokens, tiny_model

SCRIPT = Path(__file__).with_name("reclaim_worker.py")


@pytest.fixture(autouse=True)
def few_objects(request):
    """Freeze older objects, because a garbage collection takes longer than a trial of the tiny model."""
    if "allocator" not in request.node.name:  # it asks the collector for all objects
        gc.freeze()
    yield
    gc.unfreeze()


class Samples:
    """An exact meter: 1000 bytes for each sample of the largest batch since `start`, 500 for each batch of a step."""

    def __init__(self):
        self.start()

    def start(self):
        self.peak = 0

    def saw(self, trainer, inputs):
        size = len(inputs["input_ids"])
        self.peak = max(self.peak, 1000 * size + 500 * trainer.args.gradient_accumulation_steps)

    def read(self):
        return self.peak


class Metered(Trainer):
    """Reports each batch to a meter, draws from every kind of generator, and may really run out of memory."""

    meter = None
    most = None
    error = None

    def training_step(self, model, inputs, *args, **kwargs):
        if self.meter is not None:
            self.meter.saw(self, inputs)
        size = len(inputs["input_ids"])
        if self.most is not None and size > self.most:
            torch.empty(2**60, dtype=torch.uint8)  # torch's own error
        if self.error is not None and size > self.error:
            raise ValueError("of the model's own")
        self.sizes = [*getattr(self, "sizes", []), size]
        return super().training_step(model, inputs, *args, **kwargs)


class Drawing:
    """A collator with generators of its own, which masks tokens: with another state the loss differs."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)
        self.held = {"numpy": [np.random.default_rng(4)], "old": np.random.RandomState(5), "python": random.Random(6)}

    def __call__(self, rows):
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        drawn = [int(torch.randint(64, (), generator=self.generator)), int(self.held["numpy"][0].integers(64))]
        drawn += [int(self.held["old"].randint(64)), self.held["python"].randrange(64), random.randrange(64)]
        drawn += [int(np.random.randint(64)), int(torch.randint(64, ()))]
        batch["input_ids"] = batch["input_ids"].clone()
        batch["input_ids"][:, : len(drawn)] = torch.tensor(drawn)
        return batch


class Counting(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(state.global_step)

    def on_log(self, args, state, control, **kwargs):
        self.seen.append("log")


def numbered_model():
    """A model with a buffer that training changes, and an attribute that is no tensor."""
    model = tiny_model()
    model.register_buffer("seen", torch.zeros(()))
    model.calls = 0

    def count(module, args, kwargs):
        if module.training:
            module.seen += 1
            module.calls += 1

    model.register_forward_pre_hook(count, with_kwargs=True)
    return model


@pytest.fixture
def metered(make_args):
    def make(optim="cs_adam", callbacks=None, data=None, cls=Metered, model=None, collator=None, **kwargs):
        np.random.seed(8)
        options = {name: kwargs.pop(name) for name in ("optimizers", "model_init") if name in kwargs}
        model = (model or numbered_model()) if "model_init" not in options else None
        args = make_args(optim, **{"per_device_train_batch_size": 4, "warmup_steps": 2, **kwargs})
        collator = collator or Drawing()
        data = Tokens() if data is None else data
        return cls(model, args, train_dataset=data, data_collator=collator, callbacks=callbacks, **options)

    return make


def reclaiming(trainer, budget, **options):
    """A callback whose meter sees the trainer's batches."""
    trainer.meter = Samples()
    callback = ReclaimBatchSize(budget=budget, meter=trainer.meter, **options)
    trainer.add_callback(callback)
    return callback


def same(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    return a == b


def differences(a, b):
    return [key for key in a if not same(a[key], b[key])]


def everything(trainer):
    """Everything that the rest of a training run depends on."""
    log = [
        {k: v for k, v in entry.items() if "runtime" not in k and "second" not in k}
        for entry in trainer.state.log_history
    ]
    optimizer, collator = trainer.optimizer, trainer.data_collator
    own = {}
    if isinstance(collator, Drawing):
        own = {"torch": collator.generator.get_state(), "python": collator.held["python"].getstate()}
        own |= {"old": collator.held["old"].get_state(), "numpy": collator.held["numpy"][0].bit_generator.state}
    return {
        "weights": {name: p.detach().clone() for name, p in trainer.model.state_dict().items()},
        "calls": trainer.model.calls,
        "optimizer": None if optimizer is None else copy.deepcopy(optimizer.state_dict()),
        "schedule": None if trainer.lr_scheduler is None else copy.deepcopy(trainer.lr_scheduler.state_dict()),
        "log": log,
        "steps": (trainer.state.global_step, trainer.state.max_steps, trainer.state.epoch, trainer.state.total_flos),
        "random": [random.getstate(), np.random.get_state(), torch.get_rng_state()],
        "own": own,
        "control": vars(trainer.control),
    }


#: All of ours, one whose steps are taken in backward, and one of torch's.
OPTIMIZERS = [*registry.names(), *[n.value for n in OptimizerNames if n.value == "cs_adam_layerwise"], "adamw_torch"]


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_the_run_is_that_of_the_size_from_the_start(optim, metered):
    """Dropout, order of the data, schedule, all kinds of generators; 2 epochs of 6 and 4 samples left over."""
    own = {"optim_args": None} if optim == "adamw_torch" else {}
    own |= {"max_grad_norm": 0.0} if optim == "cs_adam_layerwise" else {}
    trainer = metered(optim, max_steps=-1, num_train_epochs=2, **own)
    callback = reclaiming(trainer, 11_500, max_trials=3 if optim != "cs_adam" else 25)
    trainer.train()
    end = everything(trainer)
    size = callback.batch_size
    assert size == (11 if optim == "cs_adam" else 8) == trainer.args.per_device_train_batch_size
    updates = -(-64 // size)
    assert trainer.sizes[-updates:] == [size] * (updates - 1) + [64 - size * (updates - 1)]

    reference = metered(optim, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=size, **own)
    reference.train()
    assert trainer.state.max_steps == 2 * updates
    assert differences(everything(reference), end) == []
    assert callback.state_bytes > 0 and callback.adamw_bytes == 8 * sum(p.numel() for p in trainer.model.parameters())


def test_the_search_at_once(metered):
    trainer, counting = metered(callbacks=[Counting]), Counting()
    trainer.add_callback(counting)
    trainer.meter = Samples()
    args = dict(vars(trainer.args))
    before, attributes = everything(trainer), dict(vars(trainer))
    hooks = {name: len(value) for name, value in vars(trainer.model).items() if name.endswith("_hooks")}
    callback = reclaim_batch_size(trainer, 9_500, meter=trainer.meter, mode="power")
    assert callback.batch_size == 8 and [t.batch_size for t in callback.trials] == [4, 8, 16]
    assert same(everything(trainer), before) and counting.seen == []
    changed = {name for name, value in vars(trainer.args).items() if value != args[name]}
    assert changed == {"per_device_train_batch_size"}
    changed = {name for name, value in vars(trainer).items() if value is not attributes.get(name)}
    assert changed == {"_train_batch_size"}
    assert hooks == {name: len(value) for name, value in vars(trainer.model).items() if name.endswith("_hooks")}
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in trainer.model.parameters())
    trainer.train()
    assert trainer.state.global_step == 6 and [step for step in counting.seen if step != "log"] == [1, 2, 3, 4, 5, 6]
    assert len(callback.trials) == 3  # no other search
    with pytest.raises(ValueError, match="has a ReclaimBatchSize"):
        reclaim_batch_size(trainer, 9_500)


def test_accumulation_is_lowered(metered):
    """24 samples an update; every trial has the accumulation that training would have."""
    trainer = metered(gradient_accumulation_steps=6, max_steps=4, data=Tokens(96))
    callback = reclaiming(trainer, 9_600, keep_effective=True)
    trainer.train()
    assert (callback.batch_size, callback.gradient_accumulation_steps) == (8, 3)
    assert (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps) == (8, 3)
    tried = {t.batch_size: (t.gradient_accumulation_steps, t.fits, t.peak) for t in callback.trials}
    assert tried == {4: (6, True, 7000), 8: (3, True, 9500), 12: (2, False, 13000), 24: (1, False, 24500)}
    assert trainer.sizes[-12:] == [8] * 12
    end = everything(trainer)

    reference = metered(gradient_accumulation_steps=3, per_device_train_batch_size=8, max_steps=4, data=Tokens(96))
    reference.train()
    assert differences(everything(reference), end) == []


def test_accumulation_stays_or_rises(metered):
    trainer = metered(gradient_accumulation_steps=2, max_steps=2)
    callback = reclaiming(trainer, 6_500)
    trainer.train()
    assert (callback.batch_size, callback.gradient_accumulation_steps) == (5, 2)
    trainer = metered(gradient_accumulation_steps=1, max_steps=2)
    callback = reclaiming(trainer, 3_000, keep_effective=True)  # 4 take 4500
    trainer.train()
    assert (callback.batch_size, callback.gradient_accumulation_steps) == (2, 2)
    trainer = metered(gradient_accumulation_steps=6, max_steps=2)
    callback = reclaiming(trainer, 10**9, keep_effective=True, mode="power")
    trainer.train()  # 12 and 24 divide 24, of which 8 is the largest that is 4 times a power of two
    assert (callback.batch_size, callback.gradient_accumulation_steps) == (8, 3)


def test_out_of_memory_ends_a_trial(metered, caplog):
    trainer = metered()
    trainer.most = 11
    callback = reclaiming(trainer, 10**9)
    with caplog.at_level(logging.INFO, logger="sketch_transformers.reclaim"):
        trainer.train()
    assert callback.batch_size == 11
    assert {t.batch_size for t in callback.trials if t.peak is None} == {16, 12}
    said = caplog.messages
    assert "a batch of 16 does not fit (out of memory)" in said and "a batch of 11 fits (11.5 KB)" in said
    (table,) = [line for line in said if line.startswith("largest batch")]
    assert "per_device_train_batch_size=11" in table and f"AdamW's {callback.adamw_bytes / 1000:.1f} KB" in table
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if "│" in line]
    assert [row[0] for row in rows] == ["4", "8", "10", "11", "12", "16"]
    assert rows[-1] == ["16", "1", "no", "out of memory"] and rows[3] == ["11", "1", "yes", "11.5 KB"]


def test_the_allocator_of_a_cpu(metered):
    """The following training stays within the budget, and with one sample more it would not."""
    meter = AllocatorMeter()
    meter.start()
    meter.read()
    # Tests before this one may have left tensors in the process.
    budget = 2_000_000 + meter.live
    trainer = metered(cls=Trainer, max_steps=3)
    callback = ReclaimBatchSize(budget=budget, meter=AllocatorMeter(), init_val=8)
    trainer.add_callback(callback)
    trainer.train()
    size = callback.batch_size
    assert 8 < size < 16
    peaks = {}
    for one in (size, size + 1):
        del trainer
        trainer = metered(cls=Trainer, max_steps=3, per_device_train_batch_size=one)
        meter.start()
        trainer.train()
        peaks[one] = meter.read()
    assert peaks[size] <= budget < peaks[size + 1]
    tried = {t.batch_size: t.peak for t in callback.trials}
    assert tried[size] == pytest.approx(peaks[size], rel=0.01)
    assert tried[size + 1] == pytest.approx(peaks[size + 1], rel=0.01)


@pytest.mark.parametrize("why", ["error", "budget"])
def test_a_search_that_fails_leaves_nothing(why, metered):
    trainer = metered(gradient_accumulation_steps=2)
    trainer.error = 8
    budget, message = {"error": (10**9, "of the model's own"), "budget": (10, r"budget=10 \(10 B\) is too small")}[why]
    callback = reclaiming(trainer, budget)
    before = everything(trainer)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert same(everything(trainer), before)
    assert (trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps) == (4, 2)
    assert trainer.args.max_steps == 6 and callback.batch_size is None


def test_resumed_without_a_search(metered, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 4, "data": Tokens(128)}
    saving["collator"] = default_data_collator  # a checkpoint does not have the generators of ours
    whole = metered(callbacks=[SketchCallback], **saving)
    reclaiming(whole, 9_900, keep_effective=True)
    whole.train()
    end = everything(whole)
    checkpoint = tmp_path / "out" / "checkpoint-3"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["ReclaimBatchSize"]
    assert saved["attributes"] == {"batch_size": 8, "gradient_accumulation_steps": 2}
    assert ReclaimBatchSize(**saved["args"]).budget == 9_900

    for restoring in (False, True):
        resumed = metered(
            model=None, callbacks=[SketchCallback], restore_callback_states_from_checkpoint=restoring, **saving
        )
        resumed.model.load_state_dict(
            {name: torch.zeros_like(value) for name, value in resumed.model.state_dict().items()}
        )
        callback = reclaiming(resumed, 1)  # with this budget nothing would fit
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert callback.trials == [] and resumed.args.per_device_train_batch_size == 8
        assert resumed.args.gradient_accumulation_steps == 2 and resumed.state.global_step == 6
        found = everything(resumed)
        assert differences(found, end) == ["calls", "log"]
        assert same(found["log"][:-1], end["log"][:-1])  # the last one has the mean loss since the beginning


def test_resumed_from_a_run_without_it(metered, tmp_path, caplog):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    metered(**{**saving, "max_steps": 2}).train()
    trainer = metered(**saving)
    callback = reclaiming(trainer, 1)
    trainer.train(resume_from_checkpoint=True)
    assert "was saved without ReclaimBatchSize, so training resumes with per_device_train_batch_size=4" in caplog.text
    assert callback.batch_size is None and set(trainer.sizes) == {4}
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["ReclaimBatchSize"]["attributes"]["batch_size"] is None


def test_an_optimizer_and_a_schedule_of_ones_own(metered):
    def build(**options):
        model = numbered_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return metered(model=model, optimizers=(optimizer, schedule), optim_args=None, optim="adamw_torch", **options)

    trainer = build()
    callback = reclaiming(trainer, 9_500)
    trainer.train()
    end = everything(trainer)
    reference = build(per_device_train_batch_size=9)
    reference.train()
    assert callback.batch_size == 9
    assert differences(everything(reference), end) == []

    # Existing state continues where it was.
    before = copy.deepcopy(trainer.optimizer.state_dict()), copy.deepcopy(trainer.lr_scheduler.state_dict())
    callback.batch_size, trainer.args.per_device_train_batch_size = None, 4
    callback.search(trainer)
    assert callback.batch_size == 9
    assert same((trainer.optimizer.state_dict(), trainer.lr_scheduler.state_dict()), before)


def test_weights_that_train_makes(metered):
    trainer = metered(model_init=numbered_model)
    callback = reclaiming(trainer, 9_500)
    trainer.train()
    end = everything(trainer)
    reference = metered(model_init=numbered_model, per_device_train_batch_size=9)
    reference.train()
    assert callback.batch_size == 9
    assert differences(everything(reference), end) == []


@pytest.mark.parametrize("extra", [{"bf16": True}, {"neftune_noise_alpha": 5.0}, {"gradient_checkpointing": True}])
def test_what_trainer_does_to_a_model(extra, metered):
    trainer = metered(max_steps=3, **extra)
    callback = reclaiming(trainer, 9_500)
    trainer.train()
    end = everything(trainer)
    reference = metered(max_steps=3, per_device_train_batch_size=9, **extra)
    reference.train()
    assert callback.batch_size == 9
    assert differences(everything(reference), end) == []


def test_what_models_keep(metered):
    """torch refuses to copy into an expanded buffer, whose elements share memory; a queue, a set."""
    trainer = metered(max_steps=2)
    trainer.model.register_buffer("mask", torch.arange(4.0).expand(3, 4), persistent=False)
    trainer.model.last, trainer.model.lengths = collections.deque([0], maxlen=3), {0}

    def count(module, args, kwargs):
        module.mask[0] += 1
        module.last.append(len(module.last))
        module.lengths.add(len(kwargs["input_ids"]))

    trainer.model.register_forward_pre_hook(count, with_kwargs=True)
    callback = reclaiming(trainer, 9_500)
    trainer.train()
    assert callback.batch_size == 9 and trainer.model.mask.stride() == (0, 1)
    assert torch.equal(trainer.model.mask, torch.arange(4.0).expand(3, 4) + 2)
    assert list(trainer.model.last) == [0, 1, 2] and trainer.model.lengths == {0, 9}


def test_limits(metered):
    trainer = metered(data=Tokens(10), max_steps=2)
    assert reclaim_batch_size(trainer, "1TiB").batch_size == 10  # no more than the data
    trainer = metered(max_steps=2)
    trainer.meter = Samples()
    found = reclaim_batch_size(trainer, 10**9, init_val=2, max_val=6, meter=trainer.meter)
    assert found.batch_size == 6 and [t.batch_size for t in found.trials] == [2, 4, 6]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(Tokens())


class Own(Metered):
    def get_train_dataloader(self):
        return self.accelerator.prepare(torch.utils.data.DataLoader(self.train_dataset, batch_size=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auto_find_batch_size": True}, "does not support auto_find_batch_size=True, which also searches"),
        ({"data": Stream()}, "does not support a data set without length, because a trial"),
        ({"cls": Own}, "made batches of 4, but per_device_train_batch_size is 2"),
        ({"optim_args": "min_compress_size=256,comm=topk"}, "does not support enable_memsgd"),
    ],
)
def test_what_cannot_be_done(options, message, metered):
    trainer = metered(**options)
    reclaiming(trainer, 10_000, init_val=2)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_no_budget_on_a_cpu(metered):
    with pytest.raises(ValueError, match="budget=None means all memory of a CUDA device, but the device is cpu"):
        reclaim_batch_size(metered())
    trainer = metered()
    reclaiming(trainer, 10_000)
    with pytest.raises(ValueError, match="hyperparameter_search"):
        trainer.train(trial={"learning_rate": 1e-3})
    reclaiming(trainer, 10_000)
    with pytest.raises(ValueError, match="more than one ReclaimBatchSize"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "slow"}, "mode='slow' is not one of 'binsearch', 'power'"),
        (
            {"steps_per_trial": 1},
            "steps_per_trial=1 is not allowed: the optimizer's state is allocated by the first step",
        ),
        ({"init_val": 2.5}, "init_val=2.5 is not allowed"),
        ({"max_trials": 0}, "max_trials=0 is not allowed"),
        ({"budget": "much"}, "budget='much' is not allowed"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ReclaimBatchSize(**{"budget": 1000, **options})


def test_generators_are_found():
    made = [torch.Generator(), random.Random(), np.random.default_rng(), np.random.RandomState()]

    def closure(rows, generator=made[0]):
        return made[1]

    class Holder:
        def __init__(self):
            self.own = functools.partial(closure, [made[2]])
            self.back = self

        def method(self):
            return made[3]

    found = list(generators([Holder().method, list(range(20_000))]))
    assert {id(one) for one in found} == {id(one) for one in made}


# -- two processes ---------------------------------------------------------------------------------------------------


def test_ranks_agree(launch_ranks, tmp_path):
    launch_ranks(SCRIPT, tmp_path, tmp_path / "result")
    first, second = (json.loads((tmp_path / f"result.{rank}").read_text()) for rank in (0, 1))
    # Rank 1 has room for 6 samples, rank 0 for 9; then rank 0 runs out of memory beyond 5; then one of them fails.
    assert first["budget"]["batch_size"] == second["budget"]["batch_size"] == 6
    assert first["memory"]["batch_size"] == second["memory"]["batch_size"] == 5
    assert first["budget"]["weights"] == second["budget"]["weights"] == first["budget"]["reference"]
    assert first["memory"]["weights"] == second["memory"]["weights"] == first["memory"]["reference"]
    assert "of rank 1's own" in second["failed"] and "another rank failed" in first["failed"]
    assert "does not support FSDP, because a rank that runs out of memory" in first["fsdp"]
    assert "does not support DeepSpeed, because its parameter partitions" in first["deepspeed"]

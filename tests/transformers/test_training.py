"""The optimizers in Trainer: hyperparameters, groups, resuming."""

import warnings

import pytest
import torch
from transformers import Trainer

from sketch_plugins import CSAdam, registry, state_report
from sketch_transformers.arguments import optimizer_cls_and_kwargs

SMALL = "min_compress_size=256"


def losses(trainer):
    return {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}


def inner(trainer):
    return trainer.optimizer.optimizer  # inside accelerate's wrapper


@pytest.mark.parametrize("name", registry.names())
def test_every_name_trains(name, make_trainer, new_model):
    trainer = make_trainer(name, max_steps=8)
    before = {key: value.clone() for key, value in new_model().state_dict().items()}
    trainer.train()
    assert type(inner(trainer)) is registry.get(name).cls
    moved = [key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])]
    assert len(moved) == len(before)
    assert losses(trainer)[8] < losses(trainer)[1]


@pytest.mark.parametrize(
    ("name", "options", "far"),
    [
        ("cs_adam", "preset=lean", None), ("sketchy", None, None), ("sm3", None, None),
        ("sm3", "preset=paper", "second moments are sums"), ("sketchy", "reference_rms=1", "relative to the weights"),
    ],
)  # fmt: skip
def test_trainer_s_default_rate_is_a_usual_one_or_warned_of(name, options, far, make_trainer):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(name, optim_args=options, learning_rate=5e-5, max_steps=3).train()
    said = [str(w.message) for w in caught if "lr=" in str(w.message)]
    assert len(said) == (far is not None)
    if far:
        assert said[0].startswith("parameter group 0: lr=5e-05") and far in said[0]


@pytest.mark.parametrize("name", registry.names())
def test_arguments_arrive(name, make_trainer):
    adam = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    options = f"{SMALL},seed=5"
    if name in ("sm3", "cs_lion"):  # do not read Adam's settings, and say so
        adam, options = {}, f"{options},betas=0.8:0.95,eps=1e-6"
    trainer = make_trainer(name, optim_args=options, learning_rate=0.125, **adam)
    decayed, others = trainer.create_optimizer().param_groups
    for group in (decayed, others):
        assert (group["lr"], group["eps"]) == (0.125, 1e-6)
        if "momentum" in group:  # adam_beta1 is the momentum of an optimizer that has one
            assert group["momentum"] == 0.8 and "betas" not in group
        else:
            assert group["betas"] == (0.8, 0.95)
        assert (group["min_compress_size"], group["seed"]) == (256, 5)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim == 2 for p in decayed["params"]) and all(p.ndim == 1 for p in others["params"])


def test_sm3_keeps_its_own_defaults_and_refuses_those_of_adam(make_trainer, make_args):
    group = make_trainer("sm3").create_optimizer().param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-30)
    for field, value, instead in (
        ("adam_beta1", 0.8, "betas=0.8:0.999"),
        ("adam_beta2", 0.95, "betas=0.9:0.95"),
        ("adam_epsilon", 1e-6, "eps=1e-06"),
    ):
        with pytest.raises(ValueError, match=rf"{field}={value}.*'sm3'.*optim_args='{instead}'"):
            make_args("sm3", **{field: value})
        # The advised setting works, also beside the other one: optim_args takes precedence, as for every other name.
        group = make_trainer("sm3", optim_args=instead, **{field: value}).create_optimizer().param_groups[0]
        key, _, text = instead.partition("=")
        assert group[key] == (tuple(map(float, text.split(":"))) if key == "betas" else float(text))
    with pytest.raises(ValueError, match="adam_epsilon"):  # of the two, only what was given elsewhere
        make_args("sm3", optim_args="betas=0.9:0.95", adam_epsilon=1e-6)


def test_optim_args_beat_adam_arguments(make_trainer):
    trainer = make_trainer(optim_args="betas=0.5:0.75,eps=0.25", adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    group = trainer.create_optimizer().param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.5, 0.75), 0.25)


def test_a_momentum_in_optim_args_stands_for_the_first_beta(make_trainer):
    group = make_trainer("cs_momentum", optim_args="momentum=0.5,nesterov=true").create_optimizer().param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.5, True)
    assert make_trainer("cs_momentum", adam_beta1=0.7).create_optimizer().param_groups[0]["momentum"] == 0.7


def test_a_preset_is_an_option(make_trainer):
    group = make_trainer(optim_args="preset=lean").create_optimizer().param_groups[0]
    assert (group["preset"], group["first_moment"]) == ("lean", "none")


def test_uncompressed_equals_adamw(make_trainer, new_model):
    # The oracle is torch's own AdamW in the same loop, so only fp32 rounding differs. Attention's key bias has no
    # gradient but rounding noise, hence the epsilon: with 1e-8 Adam would blow that noise up to whole steps.
    ours = make_trainer(model=new_model(dropout=0.0), optim_args="preset=exact", adam_epsilon=1e-5)
    reference = make_trainer("adamw_torch", new_model(dropout=0.0), optim_args=None, adam_epsilon=1e-5)
    ours.train()
    reference.train()
    for p, q in zip(ours.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [(name, {}) for name in registry.names()]
    + [
        ("cs_adam", {"gradient_accumulation_steps": 2}),
        ("cs_adam", {"optim_args": f"{SMALL},first_moment_rounding=stochastic,depth=2,clean_every=2"}),
        ("cs_adam", {"optim_args": f"{SMALL},preset=lean"}),
        ("cs_adam", {"optim_target_modules": [r".*mlp.*"]}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value) or "plain",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_resume_is_bit_for_bit(name, kwargs, dtype, make_trainer, new_model, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **kwargs}
    whole = make_trainer(name, model=new_model(dtype=dtype), **saving)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"

    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert len(saved["state"]) == len(list(whole.model.parameters()))

    resumed = make_trainer(name, model=new_model(seed=7, dtype=dtype), **saving)  # other weights: they must be loaded
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert {step: losses(whole)[step] for step in (3, 4)} == {step: losses(resumed)[step] for step in (3, 4)}
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert p.dtype == dtype and torch.equal(p, q)
    assert_equal(inner(whole).state_dict(), inner(resumed).state_dict())


def assert_equal(one, other):
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


def test_state_of_another_compression_is_refused(make_trainer, new_model, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(optim_args=f"{SMALL},compression=0.25", **saving).train()
    other = make_trainer(optim_args=f"{SMALL},compression=0.5", **{**saving, "max_steps": 4})
    with pytest.raises(ValueError, match=r"0\.25.*0\.5|0\.5.*0\.25"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_public_way_without_registration(make_trainer):
    options = {"lr": 3e-3, "compression": 0.25, "min_compress_size": 256}
    public = make_trainer("adamw_torch", optim_args=None, optimizer_cls_and_kwargs=(CSAdam, dict(options)))
    public.train()
    named = make_trainer("cs_adam", optim_args=f"{SMALL},compression=0.25")
    named.train()
    assert type(inner(public)) is CSAdam
    assert [group["weight_decay"] for group in inner(public).param_groups] == [0.1, 0.0]
    assert losses(public) == losses(named)


def test_public_way_with_own_groups(make_trainer, model):
    embeddings = list(model.transformer.wte.parameters())
    others = [p for p in model.parameters() if all(p is not e for e in embeddings)]
    groups = [{"params": embeddings, "compression": 0.1}, {"params": others, "preset": "exact"}]
    kwargs = {"params": groups, "lr": 3e-3, "min_compress_size": 256}
    trainer = make_trainer("adamw_torch", model, optim_args=None, optimizer_cls_and_kwargs=(CSAdam, kwargs))
    trainer.train()
    by_group = state_report(inner(trainer)).by_group()
    assert by_group[0] < 2 * sum(p.numel() for p in embeddings)
    assert by_group[1] == 8 * sum(p.numel() for p in others)


def test_a_trainer_that_makes_its_own_groups(make_trainer):
    # The usual recipe for learning rates per layer: the class and its arguments, with other groups.
    class PerLayer(Trainer):
        def create_optimizer(self, model=None):
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            head, *rest = self.model.parameters()
            self.optimizer = cls([{"params": [head], "lr": 0.5}, {"params": rest}], **kwargs)
            return self.optimizer

    optimizer = make_trainer(cls=PerLayer, optim_target_modules=".*mlp.*").create_optimizer()
    assert type(optimizer) is CSAdam
    assert [(group["lr"], group["preset"]) for group in optimizer.param_groups] == [
        (0.5, "exact"),
        (3e-3, "default"),
        (3e-3, "exact"),
    ]


def test_other_optimizers_are_left_alone(make_trainer):
    assert type(make_trainer("adamw_torch", optim_args=None).create_optimizer()) is torch.optim.AdamW
    assert type(make_trainer("sgd", optim_args=None).create_optimizer()) is torch.optim.SGD


def test_stays_itself_under_deepspeed_offload(make_args):
    # accelerate would replace it by DeepSpeedCPUAdam. DeepSpeed is not needed: only its configuration is read.
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    args = make_args()
    args.hf_deepspeed_config = HfDeepSpeedConfig(offload)
    optimizer_cls_and_kwargs(args)
    assert args.hf_deepspeed_config.config["zero_force_ds_cpu_optimizer"] is False
    args.hf_deepspeed_config = HfDeepSpeedConfig({**offload, "zero_force_ds_cpu_optimizer": True})
    with pytest.raises(ValueError, match="DeepSpeedCPUAdam"):
        optimizer_cls_and_kwargs(args)
    args.hf_deepspeed_config = HfDeepSpeedConfig({"zero_optimization": {}, "optimizer": {"type": "AdamW"}})
    with pytest.raises(ValueError, match="'AdamW': remove that block"):
        optimizer_cls_and_kwargs(args)


def test_fsdp1_is_refused(make_args, monkeypatch):
    # test_distributed.py trains with FSDP2.
    with pytest.raises(ValueError, match=r"FSDP1.*fsdp_config=.*\"version\": 2"):
        make_args(fsdp=True, fsdp_config={"version": 1})
    assert make_args(fsdp=True, fsdp_config={"version": 2}).fsdp
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # what `accelerate launch --use_fsdp` sets
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="FSDP1"):
        make_args()
    monkeypatch.setenv("FSDP_VERSION", "2")
    make_args()

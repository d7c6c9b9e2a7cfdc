"""Checkpoints continue bit for bit; those of torch's own optimizers are refused, or converted with ``warm_start``."""

import pytest
import torch
from torch.optim import AdamW

from sketch_plugins import CSAdam, convert_state, registry

from .conftest import SMALL, equal, ours, same_state, small, strategy


def adamw(module):
    optimizer = AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def saving(namespace, folder):
    import importlib

    checkpoint = importlib.import_module(f"{namespace}.callbacks").ModelCheckpoint
    return {"enable_checkpointing": True, "callbacks": [checkpoint(folder, save_last=True, save_top_k=0)]}


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_last_continues_bit_for_bit(name, precision, fit, tmp_path):
    def make(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def run(epochs, folder, **options):
        own = strategy("SketchStrategy", optimizer=name, optimizer_kwargs=small(name))
        quiet = {"precision": precision, **saving("lightning.pytorch", tmp_path / folder)}
        return fit(make, own, max_epochs=epochs, max_steps=-1, **quiet, **options)

    whole, reference = run(3, "whole")
    run(1, "parts")
    resumed, made = run(3, "parts", seed=7, ckpt_path="last")  # other weights: they must be loaded
    assert made.global_step == 9 and len(resumed.rates) == 6 and resumed.rates == whole.rates[3:]
    assert equal(resumed, whole)
    assert same_state(made.optimizers[0].state_dict(), reference.optimizers[0].state_dict())


def test_pytorch_lightning_continues(fit, tmp_path):
    def run(epochs, folder, **options):
        return fit(
            adamw,
            "cs_adam",
            "pytorch_lightning",
            max_epochs=epochs,
            max_steps=-1,
            **saving("pytorch_lightning", tmp_path / folder),
            **options,
        )

    whole, _ = run(3, "whole")
    run(1, "parts")
    assert equal(run(3, "parts", seed=7, ckpt_path="last")[0], whole)


def test_a_checkpoint_reads_as_weights_only(fit, tmp_path):
    _, made = fit(adamw, "cs_adam")
    made.save_checkpoint(tmp_path / "a.ckpt")
    (saved,) = torch.load(tmp_path / "a.ckpt", weights_only=True)["optimizer_states"]
    assert saved["param_groups"][0]["sketch_plugins"]


def test_adamws_checkpoint_is_refused(fit, tmp_path):
    _, made = fit(adamw, max_epochs=1, max_steps=-1)
    made.save_checkpoint(tmp_path / "adamw.ckpt")
    with pytest.raises(ValueError, match=r"state of one of torch's optimizers, not of CSAdam.*warm_start=True"):
        fit(adamw, "cs_adam", ckpt_path=tmp_path / "adamw.ckpt")


def test_warm_start_converts(name, fit, tmp_path, log):
    module, made = fit(adamw, max_epochs=1, max_steps=-1)
    made.save_checkpoint(tmp_path / "adamw.ckpt")
    own = strategy("SketchStrategy", optimizer=name, optimizer_kwargs=small(name), warm_start=True)
    warm, trainer = fit(adamw, own, max_epochs=1, max_steps=-1, seed=7, ckpt_path=tmp_path / "adamw.ckpt")
    assert equal(warm, module)
    expected = registry.get(name).cls(list(warm.parameters()), **small(name))
    expected.load_state_dict(convert_state(made.optimizers[0].state_dict(), expected))
    assert same_state(trainer.optimizers[0].state_dict()["state"], expected.state_dict()["state"])
    assert any("warm start" in line for line in log())
    longer = strategy("SketchStrategy", optimizer=name, optimizer_kwargs=small(name), warm_start=True)
    warm, trainer = fit(adamw, longer, max_epochs=2, max_steps=-1, ckpt_path=tmp_path / "adamw.ckpt")
    assert len(warm.rates) == 3 and trainer.optimizers[0].state_dict()["state"][0]["step"] == 6


def test_a_dense_warm_start_continues_adamw(fit, tmp_path):
    whole, _ = fit(adamw, max_epochs=3, max_steps=-1)
    _, made = fit(adamw, max_epochs=1, max_steps=-1)
    made.save_checkpoint(tmp_path / "adamw.ckpt")
    exact = strategy("SketchStrategy", optimizer_kwargs={"preset": "exact"}, warm_start=True)
    warm, _ = fit(adamw, exact, max_epochs=3, max_steps=-1, ckpt_path=tmp_path / "adamw.ckpt")
    assert warm.rates == whole.rates[3:]
    for p, q in zip(warm.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # float32 rounding of another order of operations


@pytest.mark.parametrize("kind", ["one cycle", "cyclic", "chained"])
@pytest.mark.parametrize("name", ["cs_momentum", "sm3"])
def test_a_warm_start_with_cycled_momentum(name, kind, fit, tmp_path):
    """The saved scheduler says where AdamW keeps its momentum; the new optimizer may keep it elsewhere."""
    schedules = torch.optim.lr_scheduler
    kinds = {
        "one cycle": lambda o: schedules.OneCycleLR(o, 0.05, total_steps=40),
        "cyclic": lambda o: schedules.CyclicLR(o, 1e-3, 1e-1, step_size_up=3, cycle_momentum=True),
    }
    kinds["chained"] = lambda o: schedules.ChainedScheduler([kinds["one cycle"](o)])

    def make(module):
        optimizer = AdamW(module.parameters(), lr=1e-2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": kinds[kind](optimizer), "interval": "step"}}

    whole, reference = fit(make, max_epochs=2, max_steps=-1)
    _, made = fit(make, max_epochs=1, max_steps=-1)
    made.save_checkpoint(tmp_path / "adamw.ckpt")
    own = strategy("SketchStrategy", optimizer=name, optimizer_kwargs=small(name), warm_start=True)
    warm, trainer = fit(make, own, max_epochs=2, max_steps=-1, ckpt_path=tmp_path / "adamw.ckpt")
    assert warm.rates == whole.rates[3:]
    group = trainer.optimizers[0].param_groups[0]
    momentum = group["betas"][0] if name == "sm3" else group["momentum"]
    assert momentum == reference.optimizers[0].param_groups[0]["betas"][0]


def test_a_warm_start_leaves_own_checkpoints_alone(fit, tmp_path):
    whole, _ = fit(adamw, "cs_adam", max_epochs=3, max_steps=-1)
    _, made = fit(adamw, "cs_adam", max_epochs=1, max_steps=-1)
    made.save_checkpoint(tmp_path / "own.ckpt")
    resumed, _ = fit(
        adamw, strategy("SketchStrategy", warm_start=True), max_epochs=3, max_steps=-1, ckpt_path=tmp_path / "own.ckpt"
    )
    assert equal(resumed, whole)


def test_the_modules_own_optimizer_is_resumed(fit, tmp_path):
    make = lambda m: ours("cs_adam", lr=1e-2)(m.parameters())  # noqa: E731
    whole, _ = fit(make, max_epochs=3, max_steps=-1)
    _, made = fit(make, max_epochs=1, max_steps=-1)
    made.save_checkpoint(tmp_path / "own.ckpt")
    resumed, _ = fit(
        adamw, strategy("SketchStrategy", optimizer_kwargs={**SMALL, "weight_decay": 0.0}), max_epochs=1, max_steps=-1
    )
    assert type(_.optimizers[0]) is CSAdam
    resumed, _ = fit(make, "cs_adam", max_epochs=3, max_steps=-1, ckpt_path=tmp_path / "own.ckpt")
    assert equal(resumed, whole)

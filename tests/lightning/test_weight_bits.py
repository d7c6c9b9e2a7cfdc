"""``weight_bits`` in Lightning: bf16-true, resumed runs, the float32 weights in checkpoints."""

import importlib

import pytest
import torch

from sketch_plugins import CSAdam, full_precision_state_dict

from .conftest import SMALL, strategy
from .test_callbacks import adamw, callback


def checkpointing(namespace, folder):
    return importlib.import_module(f"{namespace}.callbacks").ModelCheckpoint(dirpath=folder, save_last=True)


def test_a_resumed_run_is_the_uninterrupted_one(namespace, fit, tmp_path):
    def run(epochs, folder, bits=24, **options):
        made = strategy(
            "SketchStrategy", namespace, optimizer="cs_adam", optimizer_kwargs={**SMALL, "weight_bits": bits}
        )
        callbacks = [
            checkpointing(namespace, tmp_path / folder),
            callback("OptimizerStateMonitor", namespace, full_precision=True),
        ]
        quiet = {"enable_checkpointing": True, "max_steps": -1, "precision": "bf16-true"}
        return fit(adamw, made, namespace, max_epochs=epochs, callbacks=callbacks, **quiet, **options)

    whole, trainer = run(2, "whole")
    run(1, "parts")
    resumed, other = run(2, "parts", seed=7, ckpt_path="last")
    wanted = full_precision_state_dict(whole, trainer.optimizers[0])
    got = full_precision_state_dict(resumed, other.optimizers[0])
    assert all(torch.equal(wanted[key], got[key]) for key in wanted)
    assert any(not torch.equal(wanted[key], p.float()) for key, p in whole.state_dict().items())
    checkpoint = torch.load(tmp_path / "parts" / "last.ckpt", weights_only=False)
    # The fingerprints are those of a state dict, although the weights were read before it was written.
    marks = [one["weight_correction.mark"] for one in checkpoint["optimizer_states"][0]["state"].values()]
    assert marks and all(map(bool, marks))
    saved = checkpoint["full_precision_state_dict"]
    assert saved.keys() == wanted.keys() and all(torch.equal(saved[key], wanted[key]) for key in wanted)
    with pytest.raises(ValueError, match="weight_bits=24 or 32"):
        run(1, "without", bits=None)


def test_several_optimizers(namespace, fit, tmp_path):
    """The float32 weights are those of all of them."""

    def make(module):
        made = [CSAdam(part.parameters(), weight_bits=24, **SMALL) for part in (module.net[:2], module.net[2:])]
        return made, [torch.optim.lr_scheduler.StepLR(one, 1) for one in made]

    callbacks = [checkpointing(namespace, tmp_path), callback("OptimizerStateMonitor", namespace, full_precision=True)]
    options = {"enable_checkpointing": True, "precision": "bf16-true", "callbacks": callbacks}
    module, trainer = fit(make, namespace=namespace, manual=True, **options)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["full_precision_state_dict"]
    wanted = full_precision_state_dict(module, trainer.optimizers)
    assert saved.keys() == wanted.keys() and all(torch.equal(saved[key], wanted[key]) for key in wanted)
    for name, p in module.named_parameters():
        assert "bias" in name or not torch.equal(saved[name], p.float())

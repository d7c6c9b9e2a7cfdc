"""A checkpoint of Lightning that AdamW wrote and ``sketch-plugins convert`` converted."""

import pytest
import torch
from torch.optim import SGD, AdamW
from torch.optim import lr_scheduler as schedules

from sketch_plugins import cli

from .conftest import SMALL, equal, same_state, strategy


@pytest.mark.parametrize("make", ["adamw", "sgd"])
def test_it_goes_on_like_a_warm_start(make, fit, tmp_path, capsys):
    name, theirs = {
        "adamw": ("cs_adam", lambda m: AdamW(m.parameters(), lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)),
        "sgd": ("cs_momentum", lambda m: SGD(m.parameters(), lr=1e-2, momentum=0.7)),
    }[make]

    def optimizers(module):
        optimizer = theirs(module)
        return {"optimizer": optimizer, "lr_scheduler": schedules.ExponentialLR(optimizer, 0.5)}

    options = {**SMALL, **({"compression": 0.25} if name == "cs_adam" else {})}
    _, made = fit(optimizers, max_steps=-1, max_epochs=2)
    made.save_checkpoint(tmp_path / "run.ckpt")
    text = ",".join(f"{key}={value}" for key, value in options.items())
    assert cli.main(["convert", str(tmp_path / "run.ckpt"), "--optim", name, "--optim-args", text]) == 0
    assert "group 0" in capsys.readouterr().out

    def goes_on(path, **more):
        chosen = strategy("SketchStrategy", optimizer=name, optimizer_kwargs=options, **more)
        return fit(optimizers, chosen, max_steps=-1, max_epochs=4, seed=1, ckpt_path=path)

    one, warm = goes_on(tmp_path / "run.ckpt", warm_start=True)
    other, converted = goes_on(tmp_path / f"run-{name}.ckpt")
    assert equal(one, other) and one.rates == other.rates
    whole, _ = fit(optimizers, max_steps=-1, max_epochs=4)
    assert one.rates == whole.rates[6:]  # the schedule continued where it was
    assert same_state(warm.optimizers[0].state_dict(), converted.optimizers[0].state_dict())
    taken = 12 if make == "adamw" else 7  # SGD does not count its steps, and its state counts as one
    assert {float(state["step"]) for state in converted.optimizers[0].state.values()} == {taken}
    assert isinstance(torch.load(tmp_path / f"run-{name}.ckpt", weights_only=False)["global_step"], int)

"""LightningCLI and Fabric: names and options from a command line; setup, save and load."""

import lightning
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from torch.optim import AdamW

import sketch_lightning
from sketch_plugins import CSAdam, Sketchy, registry

from .conftest import SMALL, data, equal, network, ours, same_state

pytest.importorskip("jsonargparse", reason="LightningCLI needs the package `jsonargparse`")


class Net(lightning.LightningModule):
    def __init__(self, width: int = 40):
        super().__init__()
        self.net = network()

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def train_dataloader(self):
        return torch.utils.data.DataLoader(data(), batch_size=8)


class WithAdamW(Net):
    def configure_optimizers(self):
        return AdamW(self.parameters(), lr=1e-2)


def cli(tmp_path, *options, model=Net, run=True):
    quiet = {
        "accelerator": "cpu", "devices": 1, "max_steps": 4, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(tmp_path),
    }  # fmt: skip
    return LightningCLI(
        model, args=["fit", *options] if run else list(options), run=run, trainer_defaults=quiet,
        seed_everything_default=0, save_config_callback=None,
    )  # fmt: skip


def test_an_optimizer_by_its_path(tmp_path):
    options = ["--optimizer", "sketch_plugins.CSAdam", "--optimizer.compression", "0.1", "--optimizer.lr", "0.02"]
    made = cli(tmp_path, *options, "--optimizer.min_compress_size=256", "--lr_scheduler", "CosineAnnealingLR",
               "--lr_scheduler.T_max", "10")  # fmt: skip
    (optimizer,) = made.trainer.optimizers
    assert type(optimizer) is CSAdam
    group = optimizer.param_groups[0]
    assert (group["compression"], group["initial_lr"], group["min_compress_size"]) == (0.1, 0.02, 256)


@pytest.mark.parametrize("name", registry.names())
def test_every_optimizer_by_its_path(name, tmp_path):
    cls = registry.get(name).cls
    made = cli(tmp_path, "--optimizer", f"sketch_plugins.{cls.__name__}", "--optimizer.seed", "3")
    assert type(made.trainer.optimizers[0]) is cls and made.trainer.optimizers[0].param_groups[0]["seed"] == 3


def test_a_misspelt_option_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli(tmp_path, "--optimizer", "sketch_plugins.CSAdam", "--optimizer.compresion", "0.1")
    assert "compresion" in capsys.readouterr().err


def test_a_strategy_by_name(tmp_path):
    made = cli(tmp_path, "--trainer.strategy", "cs_adam", model=WithAdamW)
    assert type(made.trainer.optimizers[0]) is CSAdam
    made = cli(tmp_path, "--trainer.strategy", "ddp_cs_adam", model=WithAdamW, run=False)
    assert type(made.trainer.strategy) is sketch_lightning.SketchDDPStrategy


def test_a_strategy_and_callbacks_in_a_file(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "trainer:\n"
        "  strategy:\n"
        "    class_path: sketch_lightning.SketchStrategy\n"
        "    init_args:\n"
        "      optimizer: sketchy\n"
        "      optimizer_kwargs: {rank: 4}\n"
        "  callbacks:\n"
        "    - class_path: sketch_lightning.OptimizerStateMonitor\n"
        "      init_args: {sampled: true}\n"
    )
    made = cli(tmp_path, "--config", str(tmp_path / "config.yaml"), model=WithAdamW)
    (optimizer,) = made.trainer.optimizers
    assert type(optimizer) is Sketchy and optimizer.param_groups[0]["rank"] == 4
    assert isinstance(made.trainer.callbacks[0], sketch_lightning.OptimizerStateMonitor)
    assert made.trainer.callbacks[0].sampled


# -- Fabric ----------------------------------------------------------------------------------------------------------


def fabric_steps(fabric, model, optimizer, first, last):
    for step in range(first, last):
        x, y = data(8, seed=step).tensors
        optimizer.zero_grad()
        fabric.backward(torch.nn.functional.mse_loss(model(x), y))
        optimizer.step()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_fabric_saves_and_loads(name, precision, tmp_path):
    def start(seed=0):
        fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
        model = network(seed)
        return fabric, *fabric.setup(model, ours(name, lr=1e-2)(model.parameters()))

    fabric, whole, optimizer = start()
    fabric_steps(fabric, whole, optimizer, 0, 3)
    fabric.save(tmp_path / "a.ckpt", {"model": whole, "optimizer": optimizer})
    fabric_steps(fabric, whole, optimizer, 3, 6)

    fabric, resumed, again = start(seed=7)
    fabric.load(tmp_path / "a.ckpt", {"model": resumed, "optimizer": again})
    fabric_steps(fabric, resumed, again, 3, 6)
    assert equal(whole, resumed) and same_state(optimizer.state_dict(), again.state_dict())
    if precision == "32-true":
        plain = network()
        alone = ours(name, lr=1e-2)(plain.parameters())
        for step in range(6):
            x, y = data(8, seed=step).tensors
            alone.zero_grad()
            torch.nn.functional.mse_loss(plain(x), y).backward()
            alone.step()
        assert equal(whole, plain)


def test_fabric_goes_on_from_adamw(tmp_path):
    from sketch_plugins import convert_state

    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = network()
    model, optimizer = fabric.setup(model, AdamW(model.parameters(), lr=1e-2))
    fabric_steps(fabric, model, optimizer, 0, 3)
    fabric.save(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer})
    saved = fabric.load(tmp_path / "a.ckpt")
    other = CSAdam(model.parameters(), lr=1e-2, **SMALL)
    other.load_state_dict(convert_state(saved["optimizer"], other))
    assert float(other.state_dict()["state"][0]["step"]) == 3

"""LightningCLI with a sketched optimizer, given by a strategy's name or by the optimizer's path.

    python examples/lightning_cli.py fit --config examples/lightning_cli.yaml
    python examples/lightning_cli.py fit --config examples/lightning_cli.yaml --trainer.strategy sm3
    python examples/lightning_cli.py fit --optimizer sketch_plugins.CSAdam --optimizer.compression 0.05

The model predicts each byte of this file from the eight bytes before it.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore", message=".*does not have many workers.*")
warnings.filterwarnings("ignore", message=".*LeafSpec.*")

import lightning  # noqa: E402
from lightning.pytorch.cli import LightningCLI  # noqa: E402

import sketch_lightning  # noqa: E402, F401  adds the strategies' names


class Bytes(lightning.LightningDataModule):
    """Windows of bytes and the byte that follows."""

    def __init__(self, file: str = __file__, window: int = 8, batch_size: int = 32) -> None:
        super().__init__()
        self.file, self.window, self.batch_size = Path(file), window, batch_size

    def train_dataloader(self) -> DataLoader:
        """Lightning's hook."""
        text = torch.tensor(list(self.file.read_bytes()))
        windows = text.unfold(0, self.window + 1, 1)
        return DataLoader(TensorDataset(windows[:, :-1], windows[:, -1]), self.batch_size, shuffle=True)


class Predictor(lightning.LightningModule):
    """A small network, written for AdamW."""

    def __init__(self, width: int = 64, window: int = 8, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = torch.nn.Sequential(
            torch.nn.Embedding(256, width),
            torch.nn.Flatten(),
            torch.nn.Linear(window * width, 4 * width),
            torch.nn.ReLU(),
            torch.nn.Linear(4 * width, 256),
        )

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Lightning's hook."""
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer, which --optimizer or a strategy of sketch_lightning replaces."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


if __name__ == "__main__":
    LightningCLI(Predictor, Bytes, seed_everything_default=0, save_config_callback=None)

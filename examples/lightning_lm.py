"""Train a small GPT-2 with AdamW, and again with one of Lightning's strategy flags, and compare them.

    python examples/lightning_lm.py                                  # needs `sketch-plugins[demo,lightning]`
    python examples/lightning_lm.py --strategy sketchy               # at AdamW's learning rate, too
    python examples/lightning_lm.py --strategy ddp_cs_adam --devices 2

The module builds AdamW in both runs, and the flag is the only difference. Text and model are those of `demo_lm.py`: the
source code of Python's own standard library. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import _common as common
import demo_lm
import torch
from torch.utils.data import DataLoader

warnings.filterwarnings("ignore", message=".*does not have many workers.*")
warnings.filterwarnings("ignore", message=".*LeafSpec.*")

import lightning  # noqa: E402
from lightning.pytorch.callbacks import Callback  # noqa: E402

import sketch_lightning  # noqa: E402
from sketch_plugins import registry, state_report  # noqa: E402


class LanguageModel(lightning.LightningModule):
    """A language model written for AdamW; it does not know about sketches."""

    def __init__(self, args: argparse.Namespace, folder: Path, lr: float) -> None:
        super().__init__()
        torch.manual_seed(args.seed)
        self.experiment = common.Experiment(*_parts(args, folder))
        self.model, self.args, self.lr = self.experiment.model, args, lr
        self.batch_size = args.batch_size

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Lightning's hook."""
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Lightning's hook."""
        loss = self.model(**batch).loss
        self.log("eval_loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]), sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with a warm-up and a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.args.weight_decay)
        steps, warm = self.args.steps, max(1, self.args.steps // 10)
        schedule = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, total_iters=warm),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm)),
            ],
            [warm],
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader:
        """Lightning's hook."""
        return DataLoader(self.experiment.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Lightning's hook."""
        return DataLoader(self.experiment.eval, self.batch_size)


def _parts(args: argparse.Namespace, folder: Path) -> tuple[Any, Any, Any]:
    built = demo_lm.build(args, folder)
    return built.model, built.train, built.eval


class Curves(Callback):
    """Both loss curves."""

    def __init__(self) -> None:
        self.train: list[tuple[int, float]] = []
        self.eval: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """Lightning's hook."""
        self.train.append((trainer.global_step, float(outputs["loss"])))

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        """Lightning's hook."""
        if not trainer.sanity_checking:
            self.eval.append((trainer.global_step, float(trainer.callback_metrics["eval_loss"])))


def run(args: argparse.Namespace, folder: Path, label: str, strategy: Any, lr: float) -> dict[str, Any]:
    """Train once."""
    module, curves = LanguageModel(args, folder, lr), Curves()
    torch.manual_seed(args.seed)
    trainer = lightning.Trainer(
        accelerator="cpu" if args.cpu else "auto",
        devices=args.devices,
        strategy=strategy,
        max_steps=args.steps,
        val_check_interval=max(1, args.steps // 5),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[curves, sketch_lightning.OptimizerStateMonitor(prog_bar=True)],
        default_root_dir=args.out,
    )
    trainer.fit(module)
    report = state_report(trainer.optimizers[0])
    return {
        "label": label,
        "optimizer": report.optimizer,
        "learning_rate": lr,
        "parameters": report.params,
        "eval_loss": curves.eval[-1][1] if curves.eval else None,
        "state_bytes": report.state_bytes,
        "bytes_per_param": report.bytes_per_param,
        "train_curve": curves.train,
        "eval_curve": curves.eval,
        "world_size": trainer.world_size,
    }


def print_table(results: list[dict[str, Any]]) -> None:
    """Print losses and memory side by side."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{results[0]['parameters']:,} parameters")
    for heading in ("strategy", "optimizer", "learning rate", "eval loss", "state", "B/param"):
        table.add_column(heading)
    for r in results:
        loss = "-" if r["eval_loss"] is None else f"{r['eval_loss']:.4f}"
        state = f"{r['state_bytes'] / common.MIB:.2f} MiB"
        table.add_row(r["label"], r["optimizer"], f"{r['learning_rate']:g}", loss, state, f"{r['bytes_per_param']:.3f}")
    Console(width=120).print(table)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Plot loss curves on the left, memory on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 1), layout="constrained")
    for number, r in enumerate(results):
        color = f"C{number}"
        left.plot(*zip(*r["train_curve"], strict=True), color=color, alpha=0.4, linewidth=1)
        if r["eval_curve"]:
            left.plot(*zip(*r["eval_curve"], strict=True), color=color, marker="o", label=r["label"])
        right.bar(r["label"], r["state_bytes"] / common.MIB, color=color)
    left.set(xlabel="step", ylabel="loss", title="Loss: evaluation (dots) and training (thin)")
    left.legend(frameon=False)
    right.set(title="Optimizer state, MiB")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    common.add_options(parser, out="lightning_out")
    parser.add_argument(
        "--strategy", default="cs_adam", metavar="NAME", help="flag of the second run (default: %(default)s)"
    )
    parser.add_argument("--devices", type=common.positive_int, default=1, metavar="N", help="default: %(default)s")
    parser.set_defaults(**demo_lm.DEFAULTS)
    args = common.parse(parser, demo_lm.QUICK, argv)
    if not any(args.strategy == name or args.strategy.endswith(f"_{name}") for name in registry.names()):
        known = ", ".join(registry.names())
        parser.error(f"--strategy {args.strategy}: no strategy of sketch_lightning for one of {known}")
    folder = args.out / "work"
    # Lightning starts this script again in each further process.
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"text: {demo_lm.prepare(args, folder)['source']}", flush=True)
    several = args.devices > 1
    results = [
        run(args, folder, "AdamW", "ddp" if several else "auto", demo_lm.DEFAULTS["lr"]),
        run(args, folder, args.strategy, args.strategy, args.lr),
    ]
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        (args.out / "results.json").write_text(json.dumps({"runs": results}, indent=1) + "\n")
        plot(results, args.out / "comparison.png")
        print_table(results)
        print(f"plot: {args.out / 'comparison.png'}   figures: {args.out / 'results.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

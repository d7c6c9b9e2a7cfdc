"""Run by `test_distributed` in two processes: DeepSpeed's ZeRO on CPUs through the strategy."""

import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

import torch  # noqa: E402
from ddp_worker import SMALL, Module, lightning  # noqa: E402

from sketch_lightning.lightning_pytorch import SketchDeepSpeedStrategy  # noqa: E402
from sketch_plugins import CSAdam  # noqa: E402

FOLDER = Path(sys.argv[1])


def train(module, strategy, epochs=2, **options):
    torch.manual_seed(11)
    made = lightning.Trainer(
        devices=2, accelerator="cpu", strategy=strategy, max_epochs=epochs, enable_progress_bar=False, logger=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=FOLDER,
    )  # fmt: skip
    made.fit(module, **options)
    return made


if __name__ == "__main__":
    for stage in (1, 2, 3):
        made = train(one := Module(), SketchDeepSpeedStrategy(optimizer_kwargs=SMALL, stage=stage))
        inner = made.optimizers[0].optimizer
        assert type(inner) is CSAdam, type(inner)
        print(stage, one.rates, flush=True)

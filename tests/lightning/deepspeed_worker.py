"""Run by `test_distributed` in two processes: DeepSpeed's ZeRO on CPUs through the strategy."""

import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

import deepspeed  # noqa: E402
import torch  # noqa: E402
from ddp_worker import SMALL, Module, lightning, own  # noqa: E402

from sketch_lightning.lightning_pytorch import SketchDeepSpeedStrategy  # noqa: E402
from sketch_plugins import CSAdam  # noqa: E402
from sketch_plugins.sharding.pieces import is_key  # noqa: E402
from sketch_plugins.sharding.state_names import PLACE, kind_of  # noqa: E402

FOLDER = Path(sys.argv[1])
# Otherwise DeepSpeed would compile a C++ extension for all-reduces of inference.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def train(module, stage, epochs=2, **options):
    torch.manual_seed(11)
    made = lightning.Trainer(
        devices=2,
        accelerator="cpu",
        strategy=SketchDeepSpeedStrategy(optimizer_kwargs=SMALL, stage=stage),
        max_epochs=epochs,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        default_root_dir=FOLDER,
    )
    made.fit(module, **options)
    return made


def flat(trainer):
    """This rank's partition of the weights in float32, without padding."""
    inner = trainer.optimizers[0].optimizer
    assert type(inner) is CSAdam
    return [part.data.clone() for p in inner.state for part in inner._parts.of(0, p)], inner


if __name__ == "__main__":
    for stage in (1, 2, 3):
        weights, inner = flat(train(one := Module(), stage))
        assert len(weights)
        if stage != 2:  # the optimizer that replaces AdamW is the one that a user would build
            reference, _ = flat(train(other := Module(own), stage))
            assert all(map(torch.equal, weights, reference)) and one.rates == other.rates
        # Pieces of matrices, not one long vector.
        assert all(any(kind_of(name) == PLACE for name in state) for state in inner.state.values())
        assert all(is_key(name.partition(".")[0]) for state in inner.state.values() for name in state)
        if stage == 2:
            first = train(Module(), stage, epochs=1)
            path = FOLDER / f"stage{stage}.ckpt"
            first.save_checkpoint(path)
            resumed, _ = flat(train(again := Module(seed=7), stage, ckpt_path=path))
            assert all(map(torch.equal, resumed, weights)) and len(again.rates) == 6
        print(f"stage {stage} ok", flush=True)

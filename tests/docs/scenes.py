"""What commands of pages find in their folder: training scripts as their authors write them, and checkpoints.

Every file is made on the spot. Models are tiny, but large enough for the default options to compress them.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Scene(NamedTuple):
    """Files of a folder (name -> text), and commands that run in it first."""

    files: Mapping[str, str] = MappingProxyType({})
    before: tuple[str, ...] = ()
    #: Packages without which the commands cannot run.
    needs: tuple[str, ...] = ()


#: Trainer, with its own options on the command line.
TRAINER = """
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments


def main():
    parser = HfArgumentParser(TrainingArguments)
    parser.set_defaults(output_dir="out", max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    (args,) = parser.parse_args_into_dataclasses()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=16, n_embd=64, n_layer=1, n_head=2))
    rows = torch.arange(16 * 64).reshape(64, 16) % 512
    trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    optimizer = trainer.optimizer.optimizer
    options = {name: optimizer.param_groups[0].get(name) for name in ("compression", "lr")}
    sys.stdout.write(f"TRAINED {type(optimizer).__name__} {options} to step {trainer.state.global_step}\\n")
    sys.stdout.flush()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
"""

#: A loop that builds torch's AdamW.
LOOP = """
import torch

model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _ in range(2):
    model(torch.randn(4, 64)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print("TRAINED", type(optimizer).__name__)
"""

#: The same with accelerate, like transformers' `*_no_trainer.py`.
ACCELERATE = """
import sys

import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
for _ in range(2):
    accelerator.backward(model(torch.randn(4, 64)).square().mean())
    optimizer.step()
    optimizer.zero_grad()
sys.stdout.write(f"TRAINED {type(optimizer.optimizer).__name__} with {accelerator.num_processes}\\n")
sys.stdout.flush()
accelerator.end_training()
"""

#: LightningCLI. A module without `configure_optimizers` takes the optimizer of the command line.
LIGHTNING = """
import lightning
import torch
from lightning.pytorch.cli import LightningCLI


class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))

    def training_step(self, batch, index):
        return self.net(batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(16, 64), batch_size=4)

    def on_train_end(self):
        (optimizer,) = self.trainer.optimizers
        print("TRAINED", type(optimizer).__name__, optimizer.param_groups[0].get("compression"), flush=True)
"""
ADAMW = """
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)
"""
FIT = """

if __name__ == "__main__":
    quiet = {"accelerator": "cpu", "max_steps": 2, "logger": False, "enable_checkpointing": False,
             "enable_progress_bar": False, "enable_model_summary": False}
    LightningCLI(Net, trainer_defaults=quiet, save_config_callback=None)
"""

#: A file of torch.save; the optimizer and the file's name are written into it.
SAVE = """
import torch

from sketch_plugins import CSAdam

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))
optimizer = OPTIMIZER(model.parameters(), lr=1e-3)
model(torch.randn(4, 64)).square().mean().backward()
optimizer.step()
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "FILE")
"""

#: Lightning's checkpoint of a run with AdamW.
SAVE_LIGHTNING = """
from lightning.pytorch import Trainer

from train import Net

trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                  enable_model_summary=False)
trainer.fit(Net())
trainer.save_checkpoint("adamw.ckpt")
"""

#: A sharded checkpoint of FSDP2, by one process.
SAVE_SHARDS = """
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sketch_plugins import CSAdam

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))
fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
optimizer = CSAdam(model.named_parameters(), lr=1e-3)
model(torch.randn(4, 64)).square().mean().backward()
optimizer.step()
state = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}
dcp.save(state, checkpoint_id="CHECKPOINT")
dist.destroy_process_group()
"""


def saved(optimizer, file="CHECKPOINT"):
    """A file of torch.save with the state of ``optimizer``."""
    return Scene({"save.py": SAVE.replace("OPTIMIZER", optimizer).replace("FILE", file)}, ("python save.py",))


EMPTY = Scene()
DRAWING = Scene(needs=("matplotlib",))
ACCELERATE_EXAMPLE = Scene(needs=("accelerate", "transformers", "tokenizers"))
FOLDERS = Scene(before=("mkdir -p ~/.local/share/bash-completion/completions ~/.zfunc",))
TRANSFORMERS = Scene({"train.py": TRAINER}, needs=("transformers",))
PACKAGE = Scene({"package/__init__.py": "", "package/train.py": TRAINER}, needs=("transformers",))
PLAIN = Scene({"train.py": LOOP, "program.py": LOOP})
NO_TRAINER = Scene({"script.py": ACCELERATE}, needs=("accelerate",))
CLI = ("lightning", "jsonargparse")
LIGHTNING_CLI = Scene({"train.py": LIGHTNING + ADAMW + FIT}, needs=CLI)
LIGHTNING_NAMES = Scene({"train.py": "import sketch_lightning\n" + LIGHTNING + ADAMW + FIT}, needs=CLI)
LIGHTNING_CLASS = Scene({"train.py": LIGHTNING + FIT}, needs=CLI)
ADAMW_CKPT = Scene({"train.py": LIGHTNING + ADAMW, "save.py": SAVE_LIGHTNING}, ("python save.py",), CLI)
SHARDS = Scene({"save.py": SAVE_SHARDS}, ("python save.py",))
#: A run of AdamW that stopped; its directory gets the name that the pages have.
STOPPED = Scene(
    TRANSFORMERS.files,
    (
        "python train.py --optim adamw_torch --max_steps 1 --save_strategy steps --save_steps 1",
        "mv out/checkpoint-1 out/checkpoint-500",
    ),
    TRANSFORMERS.needs,
)
CONVERTED = STOPPED._replace(before=(*STOPPED.before, "sketch-plugins convert out/checkpoint-500 --optim cs_adam"))

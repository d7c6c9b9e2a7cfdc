"""`sketch-plugins run` as a module under DeepSpeed's launcher and under torchrun, with a script that is not changed."""

import importlib.metadata
import os
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from sketch_plugins import import_hooks

# As its author wrote it, but for the two lines that save minutes; nothing of this project in it.
TRAIN = """
import argparse

import deepspeed
import torch

# Or DeepSpeed would compile a C++ extension for all-reduces of inference.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int)
    steps = parser.parse_args().steps
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(64, 32), torch.nn.Linear(32, 16))
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "cs_adam", "params": {"lr": 1e-2, "compression": 0.25, "min_compress_size": 64}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    for step in range(steps):
        engine.backward(engine(torch.arange(step, step + 6).view(2, 3)).square().mean())
        engine.step()
    name = type(engine.basic_optimizer).__name__
    with open(f"result{torch.distributed.get_rank()}", "w") as file:
        print(__name__, torch.distributed.get_world_size(), name, file=file)


if __name__ == "__main__":
    main()
"""


# A block of ours under Trainer. What is imported first is an argument.
TRAINER = """
import importlib
import sys

for name in sys.argv[1:]:
    importlib.import_module(name)

import deepspeed
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2))
params = {"lr": "auto", "weight_decay": "auto", "compression": 0.2, "min_compress_size": 256}
config = {
    "train_micro_batch_size_per_gpu": "auto",
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "cs_adam", "params": params},
}
args = TrainingArguments("out", max_steps=2, use_cpu=True, report_to="none", save_strategy="no", deepspeed=config,
                         learning_rate=3e-3)
rows = torch.arange(16 * 32).reshape(32, 16) % 64
trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
trainer.train()
optimizer = trainer.model_wrapped.basic_optimizer
state = sum(t.nbytes for s in optimizer.state.values() for t in torch.utils._pytree.tree_leaves(s)
            if isinstance(t, torch.Tensor))
with open(f"result{torch.distributed.get_rank()}", "w") as file:
    print(torch.distributed.get_world_size(), type(optimizer).__name__, optimizer.param_groups[0]["compression"], state,
          file=file)
"""


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launchers():
    scripts = Path(sysconfig.get_path("scripts"))
    port = ["--master_port", free_port()]
    return {
        # Without the local rank: it would be put in front of what comes after the module, which reads `run` there.
        "deepspeed": [str(scripts / "deepspeed"), "--num_gpus", "2", *port, "--no_local_rank", "--module"],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *port, "-m"],
    }


def test_the_installed_distribution_names_the_trigger():
    entries = {entry.name: entry.value for entry in importlib.metadata.entry_points(group=import_hooks.GROUP)}
    assert entries["deepspeed.runtime.engine"] == "sketch_deepspeed:register"


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_an_unmodified_script_finds_our_names_in_its_configuration(launcher, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    command = [*launchers()[launcher], "sketch_plugins", "run", "train.py", "--steps", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for rank in (0, 1):
        assert (tmp_path / f"result{rank}").read_text().split() == ["__main__", "2", "CSAdam"]


def test_a_script_that_gives_deepspeed_an_adamw(tmp_path):
    """Under `run --optim`, with the launcher inside: ZeRO wraps ours, and is left alone itself."""
    block = TRAIN[TRAIN.index('        "optimizer": {') : TRAIN.index("    }\n    engine")]
    script = TRAIN.replace(block, "").replace(
        "config=config)", "config=config, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2))"
    )
    (tmp_path / "train.py").write_text(script)
    command = [sys.executable, "-m", "sketch_plugins", "run", "--optim", "cs_adam", "torchrun", "--standalone"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*command, "--nproc_per_node", "2", "train.py", "--steps", "2"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stderr.count("replaced AdamW by CSAdam(lr=0.01)") == 1
    for rank in (0, 1):
        assert (tmp_path / f"result{rank}").read_text().split() == ["__main__", "2", "CSAdam"]


@pytest.mark.parametrize(
    "command",
    [
        ("sketch_plugins", "run", "train.py"),
        ("sketch_plugins", "run", "train.py", "deepspeed"),
        ("train", "sketch_transformers"),
    ],
    ids=["run", "run, DeepSpeed first", "the integration of transformers alone"],
)
def test_a_block_of_ours_under_trainer(command, tmp_path):
    """Whatever was imported first: DeepSpeed's engine is imported by Trainer, long after the configuration is read."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    (tmp_path / "train.py").write_text(TRAINER)
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(tmp_path)])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path}
    done = subprocess.run(
        [*launchers()["torchrun"], *command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    adamw = 8 * sum(p.numel() for p in _gpt2().parameters()) / 2
    for rank in (0, 1):
        world, kind, compression, state = (tmp_path / f"result{rank}").read_text().split()
        assert (world, kind, compression) == ("2", "CSAdam", "0.2")
        assert 0 < int(state) < 0.7 * adamw


def _gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2))

"""A rank of Trainer's runs on two processes: ``distributed_worker.py RUN FOLDER RESULT``; see `RUNS`.

It writes the losses of its steps, a digest of all weights and one of its optimizer's state to ``RESULT.RANK``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

import sketch_transformers  # noqa: F401
from sketch_plugins.memory.in_backward import in_backward

#: run -> what is done, one after the other: (kind, whether it resumes).
RUNS = {
    "whole": [
        ("ddp", False),
        ("adamw", False),
        ("adamw resumed", True),
        ("fsdp2", False),
        ("fsdp2 resumed", True),
    ],
    "killed": [("ddp", False)],
    "goes on": [("ddp", True)],
    "layerwise": [
        ("ddp layerwise", False),
        ("fsdp2", False),
        ("fsdp2 layerwise", False),
        ("fsdp2 layerwise resumed", True),
    ],
}
STEPS = 6


class Watch(TrainerCallback):
    """Records how many parameters have taken their step in backward, and how many have not."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        back, params = in_backward(kwargs["optimizer"]), list(kwargs["model"].parameters())
        self.seen.append((0 if back is None else back.taken, sum(p.grad is not None for p in params)))


class Stop(TrainerCallback):
    """Rank 1 stops for ever in the middle of an epoch."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5 and args.process_index == 1:
            (FOLDER / "paused").touch()
            time.sleep(600)


def train(kind: str, resumes: bool, killed: bool) -> dict[str, Any]:
    out = FOLDER / kind.removesuffix(" resumed")
    layerwise = "layerwise" in kind
    fsdp: dict[str, Any] = {}
    if kind.startswith("fsdp2"):
        # accelerate uses FSDP only with several GPUs. FSDP2 itself runs on a CPU, so accelerate is told to use it
        # before it decides, by a state that Trainer accepts unchanged.
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
        fsdp = {
            "accelerator_config": {"use_configured_state": True},
            "fsdp": "full_shard",
            "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"},
        }
    # An AdamW run that continues with our optimizer: with exact stores it computes the same as AdamW.
    optim_args = {"adamw": None, "adamw resumed": "preset=exact,fused=false,warm_start=true"}
    settings = dict(
        output_dir=str(out),
        optim="adamw_torch" if kind == "adamw" else "cs_adam_layerwise" if layerwise else "cs_adam",
        optim_args=optim_args.get(kind, "min_compress_size=256"),
        learning_rate=3e-3,
        weight_decay=0.1,
        # Attention's key bias has no gradient except rounding noise, which Adam would amplify to whole steps.
        adam_epsilon=1e-5 if kind.startswith("adamw") else 1e-8,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="no" if resumes else "steps",
        save_steps=3,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        **({"max_grad_norm": 0.0} if run == "layerwise" else {}),
        **fsdp,
    )
    try:
        args = TrainingArguments(**settings)
    except ValueError as error:
        return {"refused": str(error)}
    set_seed(7 if resumes else dist.get_rank() if dist.is_initialized() else 0)  # other weights: they must be loaded
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2))
    steps = torch.randint(1, 5, (64, 1), generator=torch.Generator().manual_seed(0))
    rows = (torch.arange(16) * steps) % 64
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model, args, train_dataset=data, callbacks=[watch := Watch(), *([Stop()] if killed else [])])
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-3") if resumes else None)
    ours = trainer.optimizer.optimizer
    assert type(ours).__name__ == ("AdamW" if kind == "adamw" else "CSAdam"), ours
    count = sum(len(group["params"]) for group in ours.param_groups)
    assert set(watch.seen) == {(count, 0) if layerwise else (0, count)}, watch.seen
    sharded = [hasattr(p, "to_local") for g in ours.param_groups for p in g["params"]]
    assert all(sharded) if kind.startswith("fsdp2") else not any(sharded)
    return {
        "losses": {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log},
        "weights": digest([p.full_tensor() if hasattr(p, "full_tensor") else p for p in trainer.model.parameters()]),
        "state": digest(ours.state_dict()["state"]),
    }


def digest(value: Any) -> str:
    whole = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                whole.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list):
            for one in value:
                add(one)
        else:
            local = value.to_local() if hasattr(value, "to_local") else value
            whole.update(f"{local.dtype}{tuple(local.shape)}".encode())
            whole.update(local.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    add(value)
    return whole.hexdigest()


if __name__ == "__main__":
    FOLDER = Path(sys.argv[2])
    run = sys.argv[1]
    result = {kind: train(kind, resumes, run == "killed") for kind, resumes in RUNS[run]}
    Path(f"{sys.argv[3]}.{os.environ['RANK']}").write_text(json.dumps(result))
    dist.destroy_process_group()

"""A rank of `ReclaimBatchSize` under DistributedDataParallel: ``reclaim_worker.py FOLDER RESULT``."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from distributed_worker import digest
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from sketch_transformers import ReclaimBatchSize


class Meter:
    """Bytes a sample, which differ between ranks, so that each rank has room for another number."""

    def __init__(self, bytes_a_sample: int) -> None:
        self.bytes_a_sample, self.peak = bytes_a_sample, 0

    def start(self) -> None:
        self.peak = 0

    def read(self) -> int:
        return self.peak


class Metered(Trainer):
    meter: Any = None
    most: int | None = None
    wrong: int | None = None

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        size = len(inputs["input_ids"])
        if self.meter is not None:
            self.meter.peak = max(self.meter.peak, size * self.meter.bytes_a_sample)
        if self.most is not None and size > self.most:
            torch.empty(2**60, dtype=torch.uint8)
        if self.wrong is not None and size > self.wrong:
            raise ValueError("of rank 1's own")
        return super().training_step(model, inputs, *args, **kwargs)


def build(size: int, **options: Any) -> Metered:
    args = TrainingArguments(
        sys.argv[1],
        optim="cs_adam",
        optim_args="min_compress_size=256",
        learning_rate=3e-3,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=2,
        max_steps=3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
        **options,
    )
    set_seed(RANK)  # other weights on each rank; all ranks then use those of rank 0
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    rows = (torch.arange(16) * torch.randint(1, 5, (64, 1), generator=torch.Generator().manual_seed(0))) % 64
    return Metered(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])


def train(trainer: Metered) -> str:
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    return digest(dict(trainer.model.state_dict()))


def reclaim(bytes_a_sample: int = 1, **limits: Any) -> dict[str, Any]:
    trainer = build(3)
    trainer.meter = Meter(bytes_a_sample)
    for name, value in limits.items():
        setattr(trainer, name, value)
    callback = ReclaimBatchSize(budget=990, max_val=8, meter=trainer.meter)
    trainer.add_callback(callback)
    weights = train(trainer)
    return {"batch_size": callback.batch_size, "weights": weights, "reference": train(build(callback.batch_size))}


def failure(trainer: Metered) -> str:
    trainer.add_callback(ReclaimBatchSize(budget=990, meter=Meter(1)))
    try:
        trainer.train()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


if __name__ == "__main__":
    RANK = int(os.environ["RANK"])
    gc.freeze()  # otherwise garbage collections take longer than the trials
    result: dict[str, Any] = {"budget": reclaim((110, 150)[RANK]), "memory": reclaim(most=(5, None)[RANK])}
    trainer = build(3)
    trainer.wrong = (None, 4)[RANK]
    result["failed"] = failure(trainer)
    # accelerate uses FSDP only with several GPUs: see distributed_worker.py.
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    fsdp = {"accelerator_config": {"use_configured_state": True}, "fsdp": "full_shard", "fsdp_config": {"version": 2}}
    result["fsdp"] = failure(build(3, **fsdp))
    for name in [name for name in os.environ if "FSDP" in name]:
        del os.environ[name]
    AcceleratorState._reset_state(reset_partial_state=True)
    block = {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": "auto"}
    result["deepspeed"] = failure(build(3, deepspeed=block))
    Path(f"{sys.argv[2]}.{RANK}").write_text(json.dumps(result))
    dist.destroy_process_group()

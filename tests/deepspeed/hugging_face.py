"""Run by test_hugging_face.py in two processes: Trainer and plain accelerate with DeepSpeed configurations."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, GradientState
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import sketch_deepspeed  # noqa: F401
import sketch_transformers
from sketch_plugins import CSAdam

SMALL = "min_compress_size=256,compression=0.2"
AUTO = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
CPU = {"device": "cpu", "pin_memory": False}


def config(stage: int, block: Any = None, **zero: Any) -> dict[str, Any]:
    out: dict[str, Any] = {**AUTO, "zero_optimization": {"stage": stage, **zero}}
    return out if block is None else {**out, "optimizer": block}


def new_model() -> GPT2LMHeadModel:
    set_seed(0)
    size = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def rows() -> list[dict[str, torch.Tensor]]:
    steps = torch.randint(1, 5, (64, 1), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in (torch.arange(16) * steps) % 64]


def arguments(folder: str, ds: dict[str, Any], **kwargs: Any) -> TrainingArguments:
    fixed: dict[str, Any] = {
        "output_dir": folder,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "deepspeed": ds,
        "seed": 1,
    }
    return TrainingArguments(**{**fixed, **kwargs})


def digest(model: Any) -> list[float]:
    parameters = list(model.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return [p.detach().double().mul(torch.arange(1, p.numel() + 1).view(p.shape)).sum().item() for p in parameters]


def run(folder: str, ds: dict[str, Any], resume: str | None = None, own: Any = None, **kwargs: Any) -> dict[str, Any]:
    args = arguments(folder, ds, **kwargs)
    callback = sketch_transformers.SketchCallback()
    trainer = Trainer(new_model(), args, train_dataset=rows(), callbacks=[callback], optimizer_cls_and_kwargs=own)
    trainer.train(resume_from_checkpoint=resume)
    engine = trainer.model_wrapped
    optimizer = engine.basic_optimizer
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "class": type(optimizer).__name__,
        "groups": [
            {k: g[k] for k in ("lr", "betas", "eps", "weight_decay", "compression") if k in g}
            for g in optimizer.param_groups
        ],
        "losses": [entry["loss"] for entry in logs],
        "state_bytes": logs[-1].get("optimizer/state_bytes"),
        "digest": digest(engine.module),
        "norms": [entry["grad_norm"] for entry in logs],
    }


def said(action: Any) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def plain_accelerate(optimizer: Any) -> dict[str, Any]:
    AcceleratorState._reset_state(True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as `accelerate launch` sets it
    GradientState._reset_state()
    ds = {**config(2, offload_optimizer=CPU), "gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    ds |= {"train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True}
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ds))
    model = new_model()
    optimizer = optimizer(model.parameters())
    engine, wrapped = accelerator.prepare(model, optimizer)
    batch = torch.stack([row["input_ids"] for row in rows()[:4]])
    losses = []
    for _ in range(4):
        loss = engine(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        wrapped.step()
        wrapped.zero_grad()
        losses.append(loss.item())
    return {"class": type(engine.basic_optimizer).__name__, "losses": losses}


def main(out: str, folder: str) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Or DeepSpeed would compile a C++ extension for all-reduces of inference.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    results: dict[str, Any] = {}
    auto = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    small = {"min_compress_size": 256, "compression": 0.2}
    block = {"type": "cs_adam", "params": {**auto, **small}}
    ours = {"optim": "cs_adam", "optim_args": SMALL}
    try:
        saved = {"save_strategy": "steps", "save_steps": 3}
        results["no block"] = run(f"{folder}/a", config(2), **ours, **saved)
        results["resumed"] = run(f"{folder}/b", config(2), resume=f"{folder}/a/checkpoint-3", **ours)
        results["stage 3"] = run(f"{folder}/c", config(3), **ours)
        results["block"] = run(f"{folder}/d", config(3, block), optim="cs_adam", adam_beta2=0.99)
        results["block only"] = run(f"{folder}/e", config(2, block))
        offload = config(2, offload_optimizer=CPU)
        results["offload"] = run(f"{folder}/f", offload, **ours)
        results["offload, class"] = run(f"{folder}/g", offload, own=(CSAdam, {"lr": 3e-3, **small}))
        whole = {"max_grad_norm": 0.0}
        results["unclipped"] = run(f"{folder}/i", config(2), **ours, **whole)
        results["unclipped, offload"] = run(f"{folder}/j", offload, **ours, **whole)
        results["unclipped, offload, class"] = run(f"{folder}/k", offload, own=(CSAdam, {"lr": 3e-3, **small}), **whole)
        results["unclipped, stage 3"] = run(f"{folder}/l", config(3), **ours, **whole)
        results["unclipped, stage 3, offload"] = run(f"{folder}/m", config(3, offload_optimizer=CPU), **ours, **whole)
        results["offload, block"] = run(f"{folder}/h", config(2, block, offload_optimizer=CPU))
        results["accelerate"] = plain_accelerate(lambda ps: CSAdam(ps, lr=3e-3, **small))
        sm3 = {"type": "sm3", "params": {"lr": "auto", "betas": "auto"}}
        results["said"] = {
            "sm3 auto": said(lambda: arguments(folder, config(2, sm3))),
            "args beside block, optim left alone": said(
                lambda: arguments(folder, config(2, block), optim_args="compresion=banana")
            ),
            "targets beside block": said(
                lambda: arguments(folder, config(2, block), optim_target_modules=["nothing_like_this"])
            ),
            "args beside block": said(lambda: arguments(folder, config(2, block), **ours)),
            "another block": said(lambda: arguments(folder, config(2, {"type": "Adam"}), **ours)),
            "force": said(lambda: arguments(folder, {**offload, "zero_force_ds_cpu_optimizer": True}, **ours)),
        }
        del sys.modules["sketch_deepspeed"]
        results["said"]["not registered"] = said(lambda: arguments(folder, config(2, block)))
    except Exception:
        results["error"] = traceback.format_exc()
    with open(f"{out}.{os.environ['RANK']}", "w") as file:
        json.dump(results, file)
    dist.barrier() if "error" not in results else None
    os._exit(0)  # a rank that has failed must not wait for the other one


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Run by test_features.py in two processes, then in one: what a DeepSpeed configuration may ask of an optimizer."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
import traceback
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

import sketch_deepspeed  # noqa: F401
from sketch_plugins import CSAdam, registry, state_report
from sketch_plugins.optim import step_cache

CPU = {"device": "cpu", "pin_memory": False}
EXACT = {"lr": 1e-2, "weight_decay": 0.1, "preset": "exact", "betas": [0.8, 0.99]}


def zero(stage: int, **options: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **options}}


def new_model() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Embedding(64, 24), torch.nn.Linear(24, 48), torch.nn.Tanh(), torch.nn.Linear(48, 7)]
    return torch.nn.Sequential(*layers)


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randint(0, 64, (4, 5), generator=torch.Generator().manual_seed(10 * step + rank))


def engine_of(config: dict[str, Any], block: Any = None, optimizer: Any = None) -> Any:
    model = new_model()
    config = {"train_micro_batch_size_per_gpu": 4, "gradient_clipping": 0.0, "steps_per_print": 10**9, **config}
    if block is not None:
        config["optimizer"] = block
    if optimizer is not None and not callable(optimizer):
        optimizer = optimizer[0](model.parameters(), **optimizer[1])
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), optimizer=optimizer, config=config)[0]


def train(engine: Any, steps: range) -> None:
    for step in steps:
        engine.backward(engine(batch(step, dist.get_rank())).square().mean())
        engine.step()


def weights(engine: Any) -> list[torch.Tensor]:
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        return [p.detach().clone() for p in parameters]


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def trained(config: dict[str, Any], steps: int = 3, **kwargs: Any) -> tuple[list[torch.Tensor], Any]:
    if "optimizer" not in kwargs:
        kwargs.setdefault("block", {"type": "cs_adam", "params": EXACT})
    engine = engine_of(config, **kwargs)
    train(engine, range(steps))
    found = weights(engine)
    engine.destroy()
    return found, engine


def accumulated_and_clipped(limit: float) -> list[torch.Tensor]:
    """Plain torch: two micro-batches of each rank for a step, the gradient's norm limited."""
    model = new_model()
    optimizer = CSAdam(model.parameters(), **EXACT)
    for step in range(2):
        for micro in (2 * step, 2 * step + 1):
            for rank in (0, 1):
                (model(batch(micro, rank)).square().mean() / 4).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def said(config: dict[str, Any], params: Any = None, name: str = "cs_adam", **kwargs: Any) -> str:
    try:
        engine_of(config, {"type": name, "params": params or {"lr": 1e-3}} if not kwargs else None, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def remembered(stage: int) -> dict[str, Any]:
    """Six steps of an optimizer that remembers them, and of one that remembers nothing: kinds, difference."""
    found, kinds = [], []
    step_cache.GROUP = 1  # a rank has few of this model's parameters
    for forgets in (False, True):
        block = {"type": "cs_adam", "params": {"lr": 1e-2, "min_compress_size": 0, "fused": True}}
        engine = engine_of(zero(stage), block)
        for step in range(6):
            if forgets:
                engine.basic_optimizer._step_cache = None
            train(engine, range(step, step + 1))
        if not forgets:
            kinds = [type(group).__name__ for group in engine.basic_optimizer._step_cache._groups.values()]
        found.append(weights(engine))
        engine.destroy()
    return {"kinds": kinds, "differs": difference(*found)}


def two_processes(folder: str) -> dict[str, Any]:
    out: dict[str, Any] = {
        "classes": {},
        "differs": {},
        "remembered": {},
        "names": {"model": [n for n, _ in new_model().named_parameters()]},
    }
    reference, engine = trained(zero(2))
    out["betas"] = engine.basic_optimizer.param_groups[0]["betas"]
    for name in registry.names():
        for key, config in {"1": zero(1), "3": zero(3)}.items():
            engine = engine_of(config, {"type": name, "params": {"lr": 1e-3}})
            out["classes"][f"{name} {key}"] = type(engine.basic_optimizer).__name__
            if name == "cs_adam":
                train(engine, range(1))
                out["names"][key] = [one.name for one in state_report(engine.basic_optimizer).parameters]
            engine.destroy()
    engine = engine_of(zero(1), {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}})
    out["classes"]["AdamW"] = type(engine.basic_optimizer).__name__
    engine.destroy()

    ours = (CSAdam, EXACT)
    runs: dict[str, Any] = {
        "3": {"config": zero(3)},
        "sub-groups": {"config": zero(3, sub_group_size=200)},
        "offload 2": {"config": zero(2, offload_optimizer=CPU)},
        "offload 3": {"config": zero(3, offload_optimizer=CPU)},
        "client": {"config": zero(2), "optimizer": ours},
        "client offload 2": {"config": zero(2, offload_optimizer=CPU), "optimizer": ours},
        "client offload 3": {"config": zero(3, offload_optimizer=CPU), "optimizer": ours},
        "callable offload": {
            "config": zero(2, offload_optimizer=CPU),
            "optimizer": lambda parameters: CSAdam(parameters, **EXACT),
        },
    }
    for key, run in runs.items():
        out["differs"][key] = difference(trained(**run)[0], reference)

    if importlib.util.find_spec("numba"):
        for stage in (1, 2, 3):
            out["remembered"][stage] = remembered(stage)

    for stage in (2, 3):
        engine = engine_of(zero(stage), {"type": "cs_adam", "params": EXACT})
        train(engine, range(2))
        engine.offload_states(device=OffloadDeviceEnum.cpu, pin_memory=False)
        out[f"offloaded {stage}"] = sorted(kind.value for kind in engine.optimizer.offloaded_states)
        engine.reload_states()
        train(engine, range(2, 3))
        out["differs"][f"offload_states {stage}"] = difference(weights(engine), reference)
        engine.destroy()

    limited = accumulated_and_clipped(0.05)
    for stage in (0, 1, 2, 3):
        config = {**zero(stage), "gradient_accumulation_steps": 2, "gradient_clipping": 0.05}
        out["differs"][f"accumulated, clipped {stage}"] = difference(trained(config, 4)[0], limited)

    engine = engine_of(zero(2), {"type": "cs_adam", "params": EXACT})
    train(engine, range(2))
    engine.save_checkpoint(folder, tag="two")
    engine.destroy()

    out["said"] = {
        "unknown": said(zero(2), {"lr": 1e-3, "compresion": 0.1}),
        "impossible": said(zero(2), {"lr": -1.0}),
        "type": said(zero(2), {"lr": "fast"}),
        "betas": said(zero(2), {"betas": [0.9]}),
        "together": said(zero(2), {"width": 8, "compression": 0.1}),
        "auto": said(zero(2), {"lr": "auto"}),
        "adam's": said(zero(2), {"lr": 1e-3, "adam_w_mode": True}),
        "name": said(zero(2), name="cs_adamw"),
        "nvme": said(zero(3, offload_optimizer={"device": "nvme", "nvme_path": folder})),
        "ratio": said(zero(3, offload_optimizer={**CPU, "ratio": 0.5})),
        "elastic": said(zero(2, elastic_checkpoint=True)),
        "universal": said({**zero(2), "checkpoint": {"load_universal": True}}),
        "client elastic": said(zero(2, elastic_checkpoint=True), optimizer=ours),
        "weight_bits": said({**zero(2), "bf16": {"enabled": True}}, {"weight_bits": 24}),
        "forced": said({**zero(2, offload_optimizer=CPU), "zero_force_ds_cpu_optimizer": True}, optimizer=ours),
    }
    return out


def one_process(folder: str) -> dict[str, Any]:
    engine = engine_of(zero(2), {"type": "cs_adam", "params": EXACT})
    try:
        engine.load_checkpoint(folder, tag="two")
    except ValueError as error:
        return {"said": str(error)}
    return {"said": "nothing"}


def main(out: str, folder: str) -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Or DeepSpeed would compile a C++ extension for all-reduces of inference.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    try:
        results = (two_processes if dist.get_world_size() == 2 else one_process)(folder)
    except Exception:
        results = {"error": traceback.format_exc()}
    with open(f"{out}.{dist.get_rank()}", "w") as file:
        json.dump(results, file)
    os._exit(0)  # a rank that has failed must not wait for the other one


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A rank of a DeepSpeed run that may be killed: ``killed.py FOLDER RESULT [PAUSE]``. Run by test_killed.py.

Engines of several stages, with optimizers of the registry, are trained side by side; every second step they save.
``PAUSE`` is where rank 1 stops for good, after it has said so by a file named "paused": ``step N``, before the
optimizer's step, or ``half a file N``, when half of its file of optimizer state of checkpoint N is written.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import sketch_deepspeed  # noqa: F401
from sketch_plugins import registry

OPTIONS = {"lr": 1e-2, "min_compress_size": 64, "rank": 4, "update_freq": 3}
SETTINGS: dict[str, dict[str, Any]] = {
    "0 bf16": {"bf16": {"enabled": True}},
    "1": {"zero_optimization": {"stage": 1}},
    "2": {"zero_optimization": {"stage": 2}},
    "2 offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}},
    "3": {"zero_optimization": {"stage": 3}},
}
#: Every optimizer in the stages that cut parameters, one of them in the other settings.
RUNS = [(s, n) for s in SETTINGS for n in registry.names() if s in ("2", "3") or n == "cs_adam"]
STEPS, EVERY = 8, 2


def engine_of(setting: str, name: str) -> Any:
    torch.manual_seed(0)
    layers = torch.nn.Embedding(31, 20), torch.nn.Linear(20, 33), torch.nn.Tanh(), torch.nn.Linear(33, 31)
    model = torch.nn.Sequential(*layers)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "optimizer": {"type": name, "params": {k: v for k, v in OPTIONS.items() if k in registry.get(name).options}},
        **SETTINGS[setting],
    }
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def stop() -> None:
    (FOLDER / "paused").touch()
    time.sleep(600)


def halving(save: Any) -> Any:
    """Writes half of the optimizer's file, and no more."""

    def half(state: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        if "optim_states" not in str(path):
            return save(state, path, *args, **kwargs)
        buffer = io.BytesIO()
        torch.save(state, buffer)
        Path(path).write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        stop()

    return half


def main() -> None:
    logging.disable(logging.WARNING)
    # Or DeepSpeed would compile a C++ extension for all-reduces of inference.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    where, _, number = sys.argv[3].rpartition(" ") if len(sys.argv) > 3 else ("", "", "0")
    pause = where, int(number)
    engines = {f"{setting} {name}": engine_of(setting, name) for setting, name in RUNS}
    first = 0
    for key, engine in engines.items():
        if (FOLDER / key / "latest").is_file():
            # The one before the last may be whole for one engine and not for the next: the same for all.
            tag = min(int((FOLDER / other / "latest").read_text()[4:]) for other in engines)
            engine.load_checkpoint(str(FOLDER / key), tag=f"step{tag}")
            first = tag
    losses: dict[str, list[float]] = {key: [] for key in engines}
    for step in range(first, STEPS):
        x = torch.randint(0, 31, (4, 9), generator=torch.Generator().manual_seed(2 * step + dist.get_rank()))
        for key, engine in engines.items():
            loss = torch.nn.functional.cross_entropy(engine(x).flatten(0, 1), x.flatten())
            engine.backward(loss)
            if pause == ("step", step) and dist.get_rank() == 1:
                stop()
            engine.step()
            losses[key].append(loss.item())
        if (step + 1) % EVERY == 0:
            for key, engine in engines.items():
                if pause == ("half a file", step + 1) and dist.get_rank() == 1:
                    engine.checkpoint_engine.save = halving(engine.checkpoint_engine.save)
                engine.save_checkpoint(str(FOLDER / key), tag=f"step{step + 1}", save_latest=False)
                # DeepSpeed's own "latest" does not wait for the other ranks' files. After the barrier in
                # save_checkpoint all are there.
                if dist.get_rank() == 0:
                    (FOLDER / key / "latest.new").write_text(f"step{step + 1}")
                    os.replace(FOLDER / key / "latest.new", FOLDER / key / "latest")
                dist.barrier()
    weights = {}
    for key, engine in engines.items():
        parameters = list(engine.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters):
            raw = b"".join(p.detach().float().numpy().tobytes() for p in parameters)
        weights[key] = hashlib.sha256(raw).hexdigest()
    Path(f"{sys.argv[2]}.{dist.get_rank()}").write_text(
        json.dumps({"first": first, "losses": losses, "weights": weights})
    )
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    main()

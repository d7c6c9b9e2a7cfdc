"""A rank of a run that may be killed: ``killed_worker.py FOLDER RESULT [PAUSE]``.

Under DistributedDataParallel and under FSDP2, with each optimizer of the registry, models are trained side by side,
on the same batches. Every second step a checkpoint is written into a folder of another name, which is renamed once
all ranks have written all of theirs; the run goes on from the last whole one. It writes the losses since its start
and the final weights to ``RESULT.RANK``.

``PAUSE`` is the point at which rank 1 (rank 0 for "half a file") stops and writes a file named "paused":

* ``step N``: between forward and backward of a step; the other rank waits in the midst of its own for gradients.
* ``half a file N``: when half of the file of checkpoint N is written.
* ``half the ranks N``: in checkpoint N, when one rank has written its shards and the other one has not.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sketch_plugins import cast_model, registry

#: With 24 bits: a model in bfloat16, with the additional bits in the state.
NAMES = [*registry.names(), "cs_adam 24 bits"]
KINDS = ("ddp", "fsdp2")
EPOCH, STEPS, EVERY = 5, 12, 2  # steps
ROWS, WORLD = 40, 2


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(31, 20)
        self.inner = torch.nn.Linear(20, 33)
        self.head = torch.nn.Linear(33, 31)
        self.drop = torch.nn.Dropout(0.1)  # the random numbers have to go on, too

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.drop(torch.tanh(self.inner(self.embed(x)))))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), x.flatten())


class Run:
    """The models, their optimizers, and the state of the run."""

    def __init__(self, pause: tuple[str, int] | None) -> None:
        self.pause, self.step = pause, 0
        self.models: dict[str, Any] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for kind in KINDS:
            for name in NAMES:
                torch.manual_seed(0)
                model: Any = Net()
                options = {"lr": 0.02, "min_compress_size": 64, "rank": 4, "update_freq": 3}
                if "24 bits" in name:
                    cast_model(model, torch.bfloat16)
                    options["weight_bits"] = 24
                if kind == "fsdp2":
                    fully_shard(model.inner)
                    fully_shard(model)
                else:
                    model = DistributedDataParallel(model)
                entry = registry.get(name.split()[0])
                own = {k: v for k, v in options.items() if k in entry.options}
                self.models[f"{kind} {name}"] = model
                self.optimizers[f"{kind} {name}"] = entry.cls(model.named_parameters(), **own)
        torch.manual_seed(dist.get_rank())  # dropout

    def train(self) -> dict[str, list[float]]:
        losses: dict[str, list[float]] = {key: [] for key in self.models}
        data = torch.randint(0, 31, (ROWS, 9), generator=torch.Generator().manual_seed(0))
        while self.step < STEPS:
            epoch, number = divmod(self.step, EPOCH)
            order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch))
            size = ROWS // EPOCH // WORLD
            at = (number * WORLD + dist.get_rank()) * size
            for key, model in self.models.items():
                loss = model(data[order[at : at + size]])
                if self.pause == ("step", self.step) and dist.get_rank() == 1:
                    stop()
                loss.backward()
                self.optimizers[key].step()
                self.optimizers[key].zero_grad()
                losses[key].append(loss.item())
            self.step += 1
            if self.step % EVERY == 0:
                self.save()
        return losses

    def save(self) -> None:
        final = FOLDER / f"step{self.step}"
        parts = Path(f"{final}.parts")
        if dist.get_rank() == 0:
            shutil.rmtree(parts, ignore_errors=True)  # of a run that was killed here
            parts.mkdir(parents=True)
        dist.barrier()
        torch.save(torch.get_rng_state(), parts / f"random{dist.get_rank()}.pt")
        if dist.get_rank() == 0:
            ddp = {
                key: {"model": self.models[key].module.state_dict(), "optimizer": self.optimizers[key].state_dict()}
                for key in self.keys("ddp")
            }
            buffer = io.BytesIO()
            torch.save({"step": self.step, "runs": ddp}, buffer)
            with open(parts / "ddp.pt", "wb") as file:
                half = len(buffer.getvalue()) // 2
                file.write(buffer.getvalue()[:half])
                file.flush()
                if self.pause == ("half a file", self.step):
                    stop()
                file.write(buffer.getvalue()[half:])
        dcp.save(self.sharded(), storage_writer=Writer(parts / "fsdp2", self.pause == ("half the ranks", self.step)))
        dist.barrier()
        if dist.get_rank() == 0:
            os.replace(parts, final)

    def load(self) -> None:
        """Load the last complete checkpoint, if there is one."""
        done = [int(file.name.removeprefix("step")) for file in FOLDER.glob("step*") if file.suffix != ".parts"]
        if not done:
            return
        folder = FOLDER / f"step{max(done)}"
        saved = torch.load(folder / "ddp.pt", weights_only=True)
        self.step = saved["step"]
        for key, run in saved["runs"].items():
            self.models[key].module.load_state_dict(run["model"])
            self.optimizers[key].load_state_dict(run["optimizer"])
        sharded = self.sharded()
        dcp.load(sharded, checkpoint_id=folder / "fsdp2")
        for key, run in sharded.items():
            set_model_state_dict(self.models[key], run["model"])
            set_optimizer_state_dict(self.models[key], self.optimizers[key], run["optimizer"])
        torch.set_rng_state(torch.load(folder / f"random{dist.get_rank()}.pt", weights_only=True))

    def sharded(self) -> dict[str, dict[str, Any]]:
        return {
            key: {
                "model": get_model_state_dict(self.models[key]),
                "optimizer": get_optimizer_state_dict(self.models[key], self.optimizers[key]),
            }
            for key in self.keys("fsdp2")
        }

    def keys(self, kind: str) -> list[str]:
        return [key for key in self.models if key.startswith(kind)]

    def digests(self) -> dict[str, str]:
        """Digests of this rank's weights."""
        out = {}
        for key, model in self.models.items():
            whole = hashlib.sha256()
            for p in model.parameters():
                local = p.to_local() if hasattr(p, "to_local") else p
                whole.update(local.detach().view(torch.uint8).numpy().tobytes())
            out[key] = whole.hexdigest()
        return out


class Writer(dcp.FileSystemWriter):
    """Writes this rank's shards, or stops before it on rank 1 until the process is killed."""

    def __init__(self, path: Path, stops: bool) -> None:
        super().__init__(path)
        self.stops = stops

    def write_data(self, plan: Any, planner: Any) -> Any:
        if self.stops and dist.get_rank() == 1:
            while not list(Path(self.path).glob("__0_*")):  # until the other rank's are there
                time.sleep(0.05)
            stop()
        return super().write_data(plan, planner)


def stop() -> None:
    (FOLDER / "paused").touch()
    time.sleep(600)


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    where, _, number = sys.argv[3].rpartition(" ") if len(sys.argv) > 3 else ("", "", "")
    dist.init_process_group("gloo")
    run = Run((where, int(number)) if where else None)
    run.load()
    first = run.step
    losses = run.train()
    result = {"first": first, "losses": losses, "weights": run.digests()}
    Path(f"{sys.argv[2]}.{dist.get_rank()}").write_text(json.dumps(result))
    dist.destroy_process_group()

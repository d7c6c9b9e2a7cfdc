"""Run by test_reshard_fsdp2.py, once with each number of processes, like zero_engines.py for DeepSpeed."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from sketch_plugins.checkpoints.distributed import reshard
from sketch_plugins.optim import SM3, CSAdam, Sketchy

SKETCH = {"lr": 1e-2, "min_compress_size": 1}
#: name -> (optimizer, its options); the test reads the name.
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "exact": (CSAdam, {"preset": "exact", "lr": 1e-2}),
    "sketch": (CSAdam, {**SKETCH, "compression": 0.25, "block_size": 8}),
    "sketch lagged": (CSAdam, {**SKETCH, "preset": "lean", "lagged_rms": True}),
    "sketch sm3": (SM3, SKETCH),
    "sketch sketchy": (Sketchy, {**SKETCH, "rank": 4, "update_freq": 2, "reference_rms": 1.0}),
}
SAVED, MORE, BATCH = 3, 2, 12


class Model(torch.nn.Module):
    """Parameters whose rows no number of processes divides, an n-d weight, and one with fewer rows than processes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(23, 6)
        self.conv = torch.nn.Conv1d(3, 5, 3, padding=1)
        self.few = torch.nn.Linear(30, 2, bias=False)
        self.head = torch.nn.Linear(2, 23)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.few(self.conv(self.embed(tokens)).tanh().flatten(1)).clone())


def build(name: str, placement: Any = None) -> tuple[Any, Any]:
    kind, options = CONFIGS[name]
    torch.manual_seed(7)
    model = Model()
    fully_shard(model, shard_placement_fn=placement)
    return model, kind(model.named_parameters(), **options)


def train(model: Any, optimizer: Any, first: int, steps: int) -> list[float]:
    losses = []
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 23, (BATCH, 3), generator=generator).chunk(world)[rank]
        target = torch.randint(0, 23, (BATCH,), generator=generator).chunk(world)[rank]
        loss = torch.nn.functional.cross_entropy(model(tokens), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / world)
    return losses


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.full_tensor().detach().clone() for name, p in model.named_parameters()}


def dense(optimizer: Any) -> dict[str, torch.Tensor]:
    """Whole dense moments; shards follow each other, padded to the size of the largest."""
    out = {}
    for key, state in optimizer.state_dict()["state"].items():
        for name in ("first_moment", "second_moment"):
            if f"{name}.dense" in state:
                stacked, places = state[f"{name}.dense"].full_tensor(), state["place"].full_tensor()
                ends = [*places[1:, 0].tolist(), int(places[0, 2])]
                rows = [shard[: end - int(place[0])] for shard, place, end in zip(stacked, places, ends, strict=True)]
                out[f"{key} {name}"] = torch.cat(rows)
    return out


def state_of(model: Any, optimizer: Any) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer), "note": "mine"}


def save(name: str, folder: Path) -> dict[str, Any]:
    model, optimizer = build(name)
    train(model, optimizer, 0, SAVED)
    dcp.save(state_of(model, optimizer), checkpoint_id=folder / name)
    known: dict[str, Any] = {"weights": weights(model), "moments": dense(optimizer)}
    known["losses"] = train(model, optimizer, SAVED, MORE)
    known["end"] = weights(model)
    if dist.get_rank() == 0:
        torch.save(known, folder / f"{name}.known")
    return {"losses": known["losses"]}


def load(name: str, folder: Path, world: int) -> dict[str, Any]:
    target = folder / f"{name}-{world}"
    if dist.get_rank() == 0:
        reshard(folder / name, world, target)
    dist.barrier()
    known = torch.load(folder / f"{name}.known")
    model, optimizer = build(name)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=target)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])
    out: dict[str, Any] = {
        "note": state["note"],
        "steps": sorted({float(s["step"]) for *_, s in optimizer.held() if s}),
    }
    before = weights(model)
    out["weights"] = furthest(before, known["weights"])
    out["moments"] = furthest(dense(optimizer), known["moments"])
    out["losses"] = train(model, optimizer, SAVED, MORE)
    end = weights(model)
    apart = norm({key: known["end"][key] - end[key] for key in end})
    out["relative"] = apart / norm({key: known["end"][key] - before[key] for key in end})
    return out


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys(), (sorted(one), sorted(other))
    return max((float((one[key] - other[key]).abs().max()) for key in one), default=0.0)


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return sum(float(t.double().square().sum()) for t in tensors.values()) ** 0.5


def odd(folder: Path) -> None:
    """Write checkpoints that have to be refused."""
    model, optimizer = build("exact", lambda p: Shard(p.ndim - 1) if p.shape[-1] == 6 else None)
    train(model, optimizer, 0, 1)
    dcp.save(state_of(model, optimizer), checkpoint_id=folder / "odd columns")
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    dcp.save({"optim": flat}, checkpoint_id=folder / "odd flat")
    other = torch.optim.AdamW(model.parameters())
    train(model, other, 0, 1)
    dcp.save(state_of(model, other), checkpoint_id=folder / "odd adamw")


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    world, results = dist.get_world_size(), {}
    for name in CONFIGS:
        try:
            results[name] = save(name, folder) if world == 2 else load(name, folder, world)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
            break  # the other ranks wait, or are at another place
    if dist.get_rank() == 0 or any("error" in r for r in results.values()):
        Path(folder / f"results-{world}.{dist.get_rank()}").write_text(json.dumps(results))
    if world == 2:
        odd(folder)
    sys.stdout.flush()
    os._exit(0)  # no waiting for peers that have gone


main(Path(sys.argv[1]))

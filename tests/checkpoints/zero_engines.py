"""Run by test_reshard.py, once with each number of processes: real engines, one after the other.

Arguments: the folder that all launches share. Two processes train, save, and continue: the others have to reach the
    same
result. One process, and then three, recut the checkpoints for themselves, load them and continue. Every batch is the
same for any number of processes, and is divided among them.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import traceback
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from sketch_deepspeed.reshard import reshard
from sketch_plugins.optim import CSAdam, SAdagrad, Sketchy

BASE = {"zero_allow_untested_optimizer": True, "steps_per_print": 10**9}
BF16 = {"bf16": {"enabled": True}}
BF16_OPTIMIZER = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}
EXACT = {"preset": "exact", "lr": 1e-2}
SKETCH = {"lr": 1e-2, "min_compress_size": 1, "compression": 0.25, "block_size": 8}


def stage(number: int, **options: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": number, **options}}


#: name -> (DeepSpeed's configuration, optimizer, its options); the test reads the name.
CONFIGS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "1 exact back": (stage(1), CSAdam, EXACT),
    "1 exact BF16_Optimizer bf16 groups": ({**stage(1), **BF16_OPTIMIZER}, CSAdam, EXACT),
    "2 exact round robin groups": (stage(2, round_robin_gradients=True), CSAdam, EXACT),
    "2 exact aligned bf16": ({**stage(2, parameter_alignment=True), **BF16}, CSAdam, EXACT),
    "3 exact sub-groups groups back": (stage(3, sub_group_size=60), CSAdam, EXACT),
    "2 sketch": (stage(2), CSAdam, SKETCH),
    # The convolution as a batch of matrices, which is the form of experts.
    "1 exact experts": (stage(1), CSAdam, {**SKETCH, "first_moment": "fp32", "compression": 1.0, "batch_dims": 1}),
    "3 sketch experts": (stage(3), CSAdam, {**SKETCH, "first_moment": "fp32", "batch_dims": 1}),
    "3 sketch sketchy": (
        stage(3),
        Sketchy,
        {"lr": 2e-4, "min_compress_size": 1, "rank": 4, "update_freq": 2, "batch_dims": 1},
    ),
    "3 vector sadagrad": (stage(3), SAdagrad, {"lr": 1e-2}),
}
SAVED, MORE, BATCH = 3, 2, 12


class Model(torch.nn.Module):
    """An embedding that is tied, an n-d weight, vectors, a frozen layer, a buffer; few sizes are even."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(23, 6)
        self.frozen = torch.nn.Linear(6, 7).requires_grad_(False)
        self.conv = torch.nn.Conv1d(3, 5, 3, padding=1)
        self.inner = torch.nn.Linear(35, 6)
        self.norm = torch.nn.LayerNorm(6)
        self.head = torch.nn.Linear(6, 23, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.frozen(self.embed(tokens))  # batch x 3 x 7
        x = self.conv(x).tanh()  # batch x 5 x 7
        x = self.norm(self.inner(x.flatten(1)))
        return torch.nn.functional.cross_entropy(self.head(x).float(), target)


def build(name: str, world: int) -> tuple[Any, Any]:
    config, kind, options = CONFIGS[name]
    torch.manual_seed(7)
    model = Model()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    parameters: Any = [p for _, p in trained]
    if "groups" in name.replace("sub-groups", "", 1):
        parameters = [
            {"params": [p for n, p in trained if p.ndim > 1]},
            {"params": [p for n, p in trained if p.ndim < 2], "lr": 5e-3},
        ]
    optimizer = kind(parameters, **options)
    config = {**BASE, **config, "train_micro_batch_size_per_gpu": BATCH // world}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, optimizer


def train(engine: Any, first: int, steps: int) -> list[float]:
    losses = []
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 23, (BATCH, 3), generator=generator).chunk(world)[rank]
        target = torch.randint(0, 23, (BATCH,), generator=generator).chunk(world)[rank]
        loss = engine(tokens, target)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float()
        dist.all_reduce(mean)
        losses.append(float(mean) / world)
    return losses


def weights(engine: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """fp32 weights of the optimizer, by number; for the frozen layer those of the model, by name.

    (`safe_get_full_fp32_param` is wrong with round_robin_gradients.)
    """
    out = joined(engine, optimizer, lambda part, state: {"weight": part.data})
    for name, p in engine.module.named_parameters():
        if not p.requires_grad:
            with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
                out[name] = p.detach().clone()
    return out


def moments(engine: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """Dense moments, by number of the parameter."""
    names = ("first_moment", "second_moment")
    return joined(
        engine, optimizer, lambda part, state: {n: state[n]["dense"] for n in names if "dense" in state.get(n, {})}
    )


def joined(engine: Any, optimizer: Any, what: Any) -> dict[str, torch.Tensor]:
    """Whole parameters, joined from the pieces of all ranks, which are runs of elements."""
    third = engine.zero_optimization_stage() == 3
    if third:  # outside of a step its optimizer has no parameters
        engine.optimizer._set_fp32_optimizer_param_groups()
    own = []
    for _, _, part, state in optimizer.held():
        piece, width = part.piece, math.prod(part.piece.whole[1:])
        for name, tensor in what(part, state or {}).items():
            start = piece.row * width + piece.column
            own.append((f"{piece.index} {name}", piece.whole, start, tensor.detach().flatten().clone()))
    if third:
        engine.optimizer._clear_fp32_optimizer_param_groups()
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    out: dict[str, torch.Tensor] = {}
    for key, whole, start, run in (one for rank in every for one in rank):
        out.setdefault(key, torch.full((math.prod(whole),), math.nan))[start : start + len(run)] = run
    return out


def save(name: str, folder: Path, world: int) -> dict[str, Any]:
    """Train, save, continue; the state at both ends is kept for the others."""
    engine, optimizer = build(name, world)
    train(engine, 0, SAVED)
    path = folder / f"{name}-{world}"
    engine.save_checkpoint(path, client_state={"note": "mine"})
    known: dict[str, Any] = {"weights": weights(engine, optimizer), "moments": moments(engine, optimizer)}
    known["losses"] = train(engine, SAVED, MORE)
    known["end"], known["end moments"] = weights(engine, optimizer), moments(engine, optimizer)
    if dist.get_rank() == 0:
        torch.save(known, f"{path}.known")
    return {"losses": known["losses"]}


def load(name: str, path: Path, known: dict[str, Any], world: int) -> dict[str, Any]:
    """Load the recut checkpoint and continue; returns the distance from the known result."""
    engine, optimizer = build(name, world)
    where, client = engine.load_checkpoint(path)
    assert where is not None
    out: dict[str, Any] = {"note": client["note"], "steps": engine.global_steps}
    out["weights"] = furthest(weights(engine, optimizer), known["weights"])
    out["moments"] = furthest(moments(engine, optimizer), known["moments"])
    before = weights(engine, optimizer)
    out["losses"] = train(engine, SAVED, MORE)
    end = weights(engine, optimizer)
    out["end"] = furthest(end, known["end"])
    out["end moments"] = furthest(moments(engine, optimizer), known["end moments"])
    moved = {key: known["end"][key] - before[key] for key in end}
    apart = {key: known["end"][key] - end[key] for key in end}
    out["relative"] = norm(apart) / norm(moved)
    return out


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys(), (sorted(one), sorted(other))
    return max((float((one[key] - other[key]).abs().max()) for key in one), default=0.0)  # NaN where one is missing


def norm(tensors: dict[str, torch.Tensor]) -> float:
    return sum(float(t.double().square().sum()) for t in tensors.values()) ** 0.5


def anew(source: Path, target: Path, world: int) -> None:
    if dist.get_rank() == 0:
        reshard(source, world, target)
    dist.barrier()


def work(name: str, folder: Path, world: int) -> dict[str, Any]:
    if world == 2:
        return save(name, folder, world)
    source, target = folder / f"{name}-2", folder / f"{name}-2-{world}"
    known = torch.load(f"{source}.known")
    anew(source, target, world)
    out = load(name, target, known, world)
    if world == 1 and "back" in name:  # recut twice, compared with a run of one process
        save(name, folder, 1)
        first, known = folder / f"{name}-1", torch.load(folder / f"{name}-1.known")
        anew(first, folder / f"{name}-1-3", 3)
        anew(folder / f"{name}-1-3", folder / f"{name}-1-3-1", 1)
        out["back"] = load(name, folder / f"{name}-1-3-1", known, 1)
    return out


def main(folder: Path) -> None:
    logging.disable(logging.WARNING)
    # Otherwise DeepSpeed would compile a C++ extension for all-reduces of inference.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    world, results = dist.get_world_size(), {}
    for name in CONFIGS:
        try:
            results[name] = work(name, folder, world)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
            break  # the other ranks wait, or are at another place
    if dist.get_rank() == 0 or any("error" in r for r in results.values()):
        Path(folder / f"results-{world}.{dist.get_rank()}").write_text(json.dumps(results))


main(Path(sys.argv[1]))

"""Run by test_ddp.py in two processes: every optimizer under DistributedDataParallel, with each of its options.

``ddp_worker.py OUT FOLDER`` writes the results to ``OUT.RANK``: optimizer -> way -> "ok" or a traceback.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from sketch_plugins import registry

#: way -> arguments of DistributedDataParallel.
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static_graph": {"static_graph": True, "gradient_as_bucket_view": True},
    "find_unused_parameters": {"find_unused_parameters": True},
    "no_sync": {},
    "sparse": {},
}
STEPS, SAVED = 6, 3


class Net(torch.nn.Module):
    """An embedding, matrices, vectors, one number, and a branch that only some batches use."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(41, 24, sparse=sparse)
        self.inner = torch.nn.Linear(24, 35)
        self.branch = torch.nn.Linear(35, 35)
        self.norm = torch.nn.LayerNorm(35)
        self.head = torch.nn.Linear(35, 41)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, branch: bool) -> torch.Tensor:
        h = torch.tanh(self.inner(self.embed(x)))
        if branch:
            h = h + self.branch(h)
        logits = self.head(self.norm(h)) * self.scale
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), x.flatten())


def build(name: str, way: str, seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Net(sparse=way == "sparse")
    options = {"min_compress_size": 64} if "min_compress_size" in registry.get(name).options else {}
    return model, registry.get(name).cls(model.named_parameters(), lr=0.02, **options)


def batch(step: int, micro: int, rank: int) -> torch.Tensor:
    return torch.randint(0, 41, (3, 7), generator=torch.Generator().manual_seed(100 * step + 10 * micro + rank))


def takes_branch(way: str, step: int, rank: int) -> bool:
    """Always without find_unused_parameters; with it, on one rank only in some steps, and on none in others."""
    return way != "find_unused_parameters" or (step % 3 == 0) or (step % 3 == 1 and rank == 0)


def micros(way: str) -> int:
    return 3 if way == "no_sync" else 1


def train(model: DistributedDataParallel, optimizer: torch.optim.Optimizer, way: str, first: int, last: int) -> None:
    rank = dist.get_rank()
    for step in range(first, last):
        for micro in range(micros(way)):
            waits = micro + 1 == micros(way)
            with contextlib.nullcontext() if waits else model.no_sync():
                model(batch(step, micro, rank), takes_branch(way, step, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_alone(model: Net, optimizer: torch.optim.Optimizer, way: str) -> None:
    """One process that sees the batches of both ranks; halves of two numbers are exact, so nothing is rounded twice."""
    for step in range(STEPS):
        total: dict[str, torch.Tensor] = {}
        for rank in range(2):
            for micro in range(micros(way)):
                (model(batch(step, micro, rank), takes_branch(way, step, rank)) / 2).backward()
            for n, p in model.named_parameters():
                if p.grad is not None:
                    # Rows that occur twice are summed on each rank before the ranks are summed, as gloo does it.
                    grad = p.grad.coalesce() if p.grad.is_sparse else p.grad
                    total[n] = grad if n not in total else total[n] + grad
            optimizer.zero_grad()
        for n, p in model.named_parameters():
            p.grad = total.get(n)
        optimizer.step()
        optimizer.zero_grad()


def digest(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """A digest of the bytes of all weights and of all state, in order."""
    whole = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                whole.update(str(key).encode())
                add(value[key])
        elif isinstance(value, torch.Tensor):
            whole.update(f"{value.dtype}{tuple(value.shape)}".encode())
            whole.update(value.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            whole.update(repr(value).encode())

    for n, p in model.named_parameters():
        add({n.removeprefix("module."): p})
    add(optimizer.state_dict()["state"])
    return whole.hexdigest()


def check(name: str, way: str, folder: Path) -> str:
    model, optimizer = build(name, way)
    wrapped = DistributedDataParallel(model, **WAYS[way])
    train(wrapped, optimizer, way, 0, SAVED)
    file = folder / f"{name}-{way}.pt"
    if dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(wrapped, optimizer, way, SAVED, STEPS)
    end = digest(model, optimizer)
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, end)
    assert everywhere[0] == everywhere[1], "the ranks have come apart"
    counters = {n: int(optimizer.state[p]["step"]) for n, p in model.named_parameters() if optimizer.state.get(p)}
    # In one step of three no rank goes through the branch: its parameters have no gradient, and take no step.
    unused = STEPS // 3 if way == "find_unused_parameters" else 0
    assert counters["branch.weight"] == STEPS - unused and counters["head.weight"] == STEPS, counters

    alone, single = build(name, way)
    train_alone(alone, single, way)
    assert digest(alone, single) == end, "differs from one process that sees the mean gradient"

    other, fresh = build(name, way, seed=1)  # other weights: they have to be loaded
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    train(DistributedDataParallel(other, **WAYS[way]), fresh, way, SAVED, STEPS)
    assert digest(other, fresh) == end, "differs after a resume"
    return "ok"


def check_fsdp1(name: str) -> str:
    """FSDP1 hides the shapes: it is refused wherever the optimizer can notice it, before anything has changed."""
    for early in (True, False):
        for original in (True, False):
            if early and not original:
                continue  # torch's manual says that the optimizer's parameters are then no longer the model's
            model = torch.nn.Linear(64, 65)
            if early:
                optimizer = registry.get(name).cls(model.parameters())
            wrapped = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
            wrapped(torch.ones(2, 64)).sum().backward()
            try:
                if not early:
                    optimizer = registry.get(name).cls(wrapped.parameters())
                optimizer.step()
            except ValueError as error:
                assert "FSDP1" in str(error) and "fully_shard" in str(error), error
            else:
                raise AssertionError(f"early={early}, use_orig_params={original}: a step was taken")
            assert not early or not optimizer.state
    return "ok"


def main(out: str, folder: str) -> None:
    dist.init_process_group("gloo")
    results: dict[str, dict[str, str]] = {}
    for name in registry.names():
        for way in (*WAYS, "fsdp1"):
            try:
                said = check_fsdp1(name) if way == "fsdp1" else check(name, way, Path(folder))
            except Exception:
                said = traceback.format_exc()
            results.setdefault(name, {})[way] = said
            # A rank that has failed is at another place than the other one: neither may wait for the other.
            bad = torch.tensor(int(said != "ok"))
            dist.all_reduce(bad)
    Path(f"{out}.{dist.get_rank()}").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

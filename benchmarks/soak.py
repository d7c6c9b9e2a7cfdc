"""Ten thousand steps of every optimizer, as in a long run: saves, reloads, schedules, skipped steps, new groups.

    python benchmarks/soak.py [--steps 10000] [--optimizers cs_adam,sketchy] [--backends eager,numba] [--csv FILE]

Each optimizer on each backend trains a small model with a tensor of each kind (an embedding with row-sparse gradients,
matrices, a convolution, vectors). During the run

* a schedule changes the learning rate in every step, and options that may change do so;
* in one step of 17 some parameters have no gradient; a scaler skips one step of 29, for an infinite gradient;
* every 250 steps everything is saved with `torch.save`, and the run continues with new objects that have loaded it;
* every 400 steps a new parameter replaces one in its group, and a group is added while the oldest one is removed.

It fails unless (see `Bounds`)

* parameters and state are finite at the end, and the loss is below that at the start;
* memory does not grow. Compared are Python's allocations (`tracemalloc`), bytes in tensors, the process (RSS) and the
  entries of every cache of the package: the maximum in the last quarter of the run against that in the second one;
* backends agree on the parameters after the same steps. Training magnifies rounding errors, for some optimizers more
  than for others. If the parameters are further apart than `Bounds` allows, the eager definition runs once more from
  weights that differ in the last place. A backend may be twice as far from the definition as this run (``control``).
"""

from __future__ import annotations

import argparse
import csv
import functools
import gc
import importlib
import io
import math
import os
import pkgutil
import sys
import time
import tracemalloc
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch

import sketch_plugins
from sketch_plugins import registry
from sketch_plugins.optim import MemSGD
from sketch_plugins.optim.sadagrad import SAdagrad

# name -> (class, options); small tensors are compressed, too.
SMALL = {"min_compress_size": 64}
OPTIMIZERS = {
    **{name: (registry.get(name).cls, SMALL) for name in registry.names()},
    "cs_adam lean": (registry.get("cs_adam").cls, {**SMALL, "preset": "lean"}),
    "sketchy paper": (registry.get("sketchy").cls, {"preset": "paper", "rank": 8, "nonfinite": "skip"}),
    "s_adagrad": (SAdagrad, {"rank": 4}),
    "mem_sgd": (MemSGD, {"density": 0.1}),
}
# Optimizers without kernels, which have one backend.
EAGER_ONLY = ("s_adagrad", "mem_sgd")
RATES = {"sketchy": 4e-4, "cs_adam lean": 4e-4, "cs_momentum": 1e-2, "mem_sgd": 1e-2}
SAVE, REPLACE, WITHOUT, INFINITE = 250, 400, 17, 29


@dataclass(frozen=True)
class Bounds:
    """Allowed growth of a run, from its second quarter to its last, and allowed distance of backends.

    Python's own bookkeeping (interned strings, free lists, recorded warnings) varies by some 10 KB in any run.
    """

    python_bytes: int = 64 << 10
    tensor_bytes: int = 0
    rss_bytes: int = 24 << 20
    cache_entries: int = 0
    #: Relative to the largest parameter. Rounding differs in the last place, and training magnifies it: .0024 was
    #: measured for cs_adam after 10,000 steps, .136 for sketchy (see ``control``).
    drift: float = 0.05


class Model(torch.nn.Module):
    """A model with a tensor of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(60, 24, sparse=True)
        self.conv = torch.nn.Conv1d(24, 12, 3, padding=1)
        self.head = torch.nn.Linear(12, 20, bias=False)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.conv(self.embedding(index).mT)).mean(-1))


def caches() -> dict[str, int]:
    """Number of entries of every `lru_cache`, and of every dict that a module of the package keeps."""
    sizes: dict[str, int] = {}
    for info in pkgutil.walk_packages(sketch_plugins.__path__, "sketch_plugins."):
        module = sys.modules.get(info.name)
        if module is None:
            continue
        for name, value in vars(module).items():
            if isinstance(value, functools._lru_cache_wrapper):
                sizes[f"{value.__module__}.{value.__qualname__}"] = value.cache_info().currsize
            elif isinstance(value, (dict, list, set)) and name.startswith("_") and not name.startswith("__"):
                sizes[f"{info.name}.{name}"] = len(value)
    return sizes


def tensor_bytes() -> int:
    """Bytes of all tensors that Python knows, each storage once. (A CPU has no `torch.cuda.memory_allocated`.)"""
    storages = {}
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, torch.nn.Parameter) and one.layout == torch.strided:
            storage = one.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def rss() -> int:
    """Resident bytes of this process; 0 without /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def held(optimizer: torch.optim.Optimizer) -> int:
    """Number of entries that an optimizer keeps in its caches and its state."""
    cache = getattr(optimizer, "_step_cache", None)
    tasks = 0 if cache is None else len(cache._tasks) + len(cache.programs) + len(cache.options)
    return tasks + len(getattr(optimizer, "_solves", ())) + len(optimizer.state)


@dataclass
class Memory:
    """Memory at one moment."""

    python: int
    tensors: int
    process: int
    caches: int
    held: int


def measure(optimizer: torch.optim.Optimizer) -> Memory:
    gc.collect()
    return Memory(tracemalloc.get_traced_memory()[0], tensor_bytes(), rss(), sum(caches().values()), held(optimizer))


def largest(one: Memory | None, other: Memory) -> Memory:
    """The larger number of each pair."""
    return other if one is None else Memory(*map(max, zip(astuple(one), astuple(other), strict=True)))


def build(name: str, fused: bool, module: Model) -> torch.optim.Optimizer:
    cls, options = OPTIMIZERS[name]
    if name not in EAGER_ONLY:
        options = {**options, "fused": fused}
    groups = [{"params": list(module.parameters())}, {"params": [torch.nn.Parameter(torch.zeros(6, 5))]}]
    return cls(groups, lr=RATES.get(name, 1e-3), **options)


def run(name: str, backend: str, steps: int, warm: bool = False, nudged: bool = False) -> dict:
    """Run one optimizer on one backend; returns figures, and the final parameters under "parameters".

    ``nudged``: start from weights that differ in the last place.
    """
    torch.manual_seed(0)
    module, g = Model(), torch.Generator().manual_seed(1)
    if nudged:
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1 + 2**-23)
    optimizer = build(name, backend == "numba", module)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 100, eta_min=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**9, backoff_factor=0.999999)
    target = torch.randint(0, 20, (60,), generator=torch.Generator().manual_seed(2))
    first, last, began = None, None, time.perf_counter()
    losses = torch.zeros(steps)  # not a list, because it would grow
    for step in range(1, steps + 1):
        index = torch.randint(0, 60, (8, 5), generator=g)
        optimizer.zero_grad(set_to_none=step % 3 != 0 or step % SAVE == 0)
        loss = torch.nn.functional.cross_entropy(module(index), target[index[:, 0]])
        extra = optimizer.param_groups[-1]["params"][0]
        (scaler.scale(loss + (extra - 1).square().mean())).backward()
        losses[step - 1] = loss.detach()
        if step % WITHOUT == 0:
            module.conv.weight.grad = module.embedding.weight.grad = None
        if step % INFINITE == 0:
            module.head.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        if step % 100 == 0 and name != "mem_sgd":  # it refuses weight decay of sparse gradients
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.01 if step % 200 == 0 else 0.0
        if step % SAVE == 0 and step < steps:
            buffer = io.BytesIO()
            torch.save([module.state_dict(), optimizer.state_dict(), scheduler.state_dict(), extra.detach()], buffer)
            buffer.seek(0)
            saved = torch.load(buffer, weights_only=True)
            module = Model()
            module.load_state_dict(saved[0])
            optimizer = build(name, backend == "numba", module)
            with torch.no_grad():
                optimizer.param_groups[-1]["params"][0].copy_(saved[3])
            optimizer.load_state_dict(saved[1])
            scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 100, eta_min=1e-4)
            scheduler.load_state_dict(saved[2])
        if step % REPLACE == 0:
            # A new parameter replaces the last one, in a group of its own, as if a part of the model were reset.
            group = optimizer.param_groups.pop()
            optimizer.state.pop(group["params"][0], None)
            rate = {key: group[key] for key in ("lr", "initial_lr", "weight_decay")}
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(6, 5))], **rate})
        # Just before everything is replaced, when there is most to count, and always at the same point.
        if step % SAVE == SAVE - 1 and steps // 4 <= step < steps // 2:
            first = largest(first, measure(optimizer))
        if step % SAVE == SAVE - 1 and step >= steps - steps // 4:
            last = largest(last, measure(optimizer))
    if warm:
        return {}
    if first is None or last is None:
        raise ValueError(f"{steps} steps have no quarter with a save in it: allowed are {8 * SAVE} or more")
    state = [t for s in optimizer.state.values() for t in leaves(s)]
    finite = all(bool(t.isfinite().all()) for t in [*module.parameters(), *state] if t.is_floating_point())
    part = max(1, steps // 10)
    return {
        "optimizer": name,
        "backend": backend,
        "steps": steps,
        "seconds": round(time.perf_counter() - began, 1),
        "first_loss": round(losses[:part].mean().item(), 4),
        "last_loss": round(losses[-part:].mean().item(), 4),
        "finite": finite,
        "python_bytes": last.python - first.python,
        "tensor_bytes": last.tensors - first.tensors,
        "rss_bytes": last.process - first.process,
        "cache_entries": last.caches - first.caches + last.held - first.held,
        "parameters": torch.cat([p.detach().flatten() for p in module.parameters()]),
    }


def leaves(value: object) -> list[torch.Tensor]:
    """All tensors of a nested state."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value.values() for t in leaves(v)] if isinstance(value, dict) else []


def complaints(row: dict, bounds: Bounds) -> list[str]:
    """The reasons why a run fails."""
    where = f"{row['optimizer']} ({row['backend']}, {row['steps']} steps)"
    found = [] if row["finite"] else [f"{where}: parameters or state are not finite"]
    if not row["last_loss"] < row["first_loss"]:
        found.append(f"{where}: the loss was {row['first_loss']} and is {row['last_loss']}")
    for key, most in asdict(bounds).items():
        if row.get(key, 0) > max(most, 2 * row.get("control", 0.0) if key == "drift" else 0):
            found.append(f"{where}: {key} is {row[key]}, allowed is {most}")
    return found


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, relative to the largest number; three digits."""
    return float(f"{((one - other).abs().max() / other.abs().max()).item():.3g}")


def soak(names: list[str], backends: list[str], steps: int, bounds: Bounds) -> tuple[list[dict], list[str]]:
    """All runs, and the reasons why they fail."""
    rows: list[dict] = []
    wrong: list[str] = []
    # Compilations and first uses are no growth, and take ten times as long while they are traced.
    for name in names:
        for backend in backends:
            run(name, backend, 30, warm=True)
    tracemalloc.start()
    try:
        for name in names:
            reference = None
            for backend in backends[:1] if name in EAGER_ONLY else backends:
                row = run(name, backend, steps)
                parameters = row.pop("parameters")
                reference = parameters if reference is None else reference
                row["drift"] = apart(parameters, reference)
                row["control"] = 0.0
                if row["drift"] > bounds.drift:
                    row["control"] = apart(run(name, backends[0], steps, nudged=True)["parameters"], reference)
                rows.append(row)
                wrong += complaints(row, bounds)
    finally:
        tracemalloc.stop()
    return rows, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--backends", default="eager,numba")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    for info in pkgutil.walk_packages(sketch_plugins.__path__, "sketch_plugins."):
        if "__main__" not in info.name and ".gpu" not in info.name:
            importlib.import_module(info.name)
    rows, wrong = [], []
    for name in args.optimizers.split(","):
        some, odd = soak([name], args.backends.split(","), args.steps, Bounds())
        rows, wrong = rows + some, wrong + odd
        for row in some:
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

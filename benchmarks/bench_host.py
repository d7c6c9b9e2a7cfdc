"""Host time of one optimizer step: the time of Python and the dispatcher, in which a GPU would wait.

    python benchmarks/bench_host.py [--models bert-base,llama-1b,many] [--optimizers cs_adam,sm3]
        [--layouts plain,fsdp2,zero2] [--csv FILE]

Every kernel launch is replaced by one that does nothing. Everything else runs as on a GPU: gradients are checked,
options and state are compared, tables and numbers are uploaded. The tensors have the shapes of the model at a small
fraction of its width, because host time depends on their number and kind alone. Gradients have new addresses in each
step, as in a training loop. In the same run, alternating with each optimizer, ``torch.optim.AdamW(fused=True)`` takes
steps over as many tensors of one element. Figures are medians of the process's CPU time.

Layouts: ``plain`` parameters; ``fsdp2``, DTensors as `fully_shard` makes them, on one rank; ``zero2``, a real DeepSpeed
engine of one process, stage 2. Only its call of our optimizer's step is timed, not DeepSpeed's own work.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from sketch_plugins.kernels.gpu import launch

import torch
import triton
from bench_step import SHAPES, build, hardware, shapes
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

DEFAULT = "cs_adam,cs_adam:preset=lean,cs_adam:preset=lean;lagged_rms=true,sm3,cs_adam:capturable=true"
FIELDS = (
    "optimizer",
    "layout",
    "model",
    "tensors",
    "step_ms",
    "adamw_ms",
    "x_adamw",
    "us_per_tensor",
    "launches",
    "hardware",
    "torch",
)


class Free:
    """Replaces a kernel: a launch costs a call, and nothing is computed."""

    count = 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **constants: Any) -> None:
        Free.count += 1


@contextlib.contextmanager
def free_kernels() -> Iterator[None]:
    """Within the block, no kernel of the package computes anything."""
    saved = []
    for module in (launch.step, launch.fold, launch.norms):
        for name, value in list(vars(module).items()):
            function = getattr(value, "fn", None)
            if not name.startswith("_") and getattr(function, "__module__", "") == module.__name__:
                saved.append((module, name, value))
                setattr(module, name, Free())
    try:
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)


def model(name: str, divisor: int) -> list[tuple[int, ...]]:
    """The shapes of a model's tensors, with each dimension divided by ``divisor``; ``many``: 1,000 tensors."""
    if name == "many":
        return [(256, 64), (64,), (64, 64, 3, 3), (64,)] * 250
    return [tuple(max(2, n // divisor) for n in shape) for shape in shapes(name)]


def new_gradients(params: list[torch.nn.Parameter]) -> None:
    old = [p.grad for p in params]  # kept alive until the new ones have their addresses
    for p in params:
        p.grad = torch.empty_like(p)  # not written, because a GPU's gradients do not pass through the host's caches
    del old


def one_rank() -> None:
    """Start a process group with this process alone."""
    if not torch.distributed.is_initialized():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29555", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def fsdp2(optimizer: str, sizes: list[tuple[int, ...]], device: torch.device) -> tuple[Any, Callable[[], None]]:
    """An optimizer of DTensors, and a function that gives them gradients with their parameter's layout, as in FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    one_rank()
    mesh = init_device_mesh(device.type, (1,))
    params = [torch.nn.Parameter(distribute_tensor(torch.zeros(s, device=device), mesh, [Shard(0)])) for s in sizes]

    def give() -> None:
        old = [p.grad for p in params]
        for p in params:
            local = torch.empty_like(p.to_local())
            p.grad = DTensor(local, p._spec, requires_grad=False)
        del old

    return build(optimizer, params), give


class Many(torch.nn.Module):
    """A module of parameters, and a loss that gives each a gradient."""

    def __init__(self, sizes: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.all = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(size)) for size in sizes])

    def forward(self) -> torch.Tensor:
        return torch.stack([p.sum() for p in self.all]).sum()


def zero2(optimizer: str, sizes: list[tuple[int, ...]], device: torch.device) -> tuple[Any, Callable[[], None]]:
    """Our optimizer within a DeepSpeed engine: an object whose ``step`` is the step that the engine would call."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    one_rank()
    model = Many(sizes)
    ours = build(optimizer, list(model.parameters()))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=ours, config=config)
    step, held = ours.step, SimpleNamespace(step=lambda: None)

    def give() -> None:
        """Run forward, backward, and all of the engine's step before ours, which is timed later."""
        ours.step = lambda closure=None: None
        engine.backward(engine())
        taken: list[Any] = []

        def later(closure: Any = None) -> None:
            # The gradients exist now; DeepSpeed removes them when this returns.
            taken.extend((group["params"][0], group["params"][0].grad) for group in ours.param_groups)

        ours.step = later
        engine.step()

        for p, grad in taken:
            p.grad = grad
        held.step = step

    return held, give


def host_times(
    takes: dict[str, Callable[[], None]], before: dict[str, Callable[[], None]], steps: int
) -> dict[str, float]:
    """Median CPU milliseconds of each function, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in takes}
    for step in range(steps + 5):
        for name, take in takes.items():
            before[name]()
            start = time.process_time()
            take()
            if step >= 5:
                times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(
    optimizer: str, layout: str, name: str, divisor: int, steps: int, device: torch.device
) -> dict[str, object]:
    sizes = model(name, divisor)
    ones = [torch.nn.Parameter(torch.zeros(1, device=device)) for _ in sizes]
    if "fused=" not in optimizer:
        optimizer += (";" if ":" in optimizer else ":") + "fused=true"
    ours: Any
    if layout == "plain":
        params = [torch.nn.Parameter(torch.zeros(size, device=device)) for size in sizes]
        ours, give = build(optimizer, params), functools.partial(new_gradients, params)
    else:
        ours, give = {"fsdp2": fsdp2, "zero2": zero2}[layout](optimizer, sizes, device)
    adamw = torch.optim.AdamW(ones, lr=1e-4, fused=True)

    def before_adamw() -> None:
        give()  # a pass of the model empties the processor's caches, so that both steps begin alike
        new_gradients(ones)

    with free_kernels() if device.type == "cpu" else contextlib.nullcontext():
        found = host_times(
            {"ours": lambda: ours.step(), "adamw": adamw.step},
            {"ours": give, "adamw": before_adamw},
            steps,
        )
        give()
        Free.count = 0
        ours.step()
    return {
        "optimizer": optimizer.replace(":fused=true", "").replace(";fused=true", ""),
        "layout": layout, "model": name, "tensors": len(sizes),
        "step_ms": round(found["ours"], 3), "adamw_ms": round(found["adamw"], 3),
        "x_adamw": round(found["ours"] / found["adamw"], 2),
        "us_per_tensor": round(1e3 * found["ours"] / len(sizes), 2), "launches": Free.count,
        "hardware": hardware(device), "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default="bert-base,llama-1b,many")
    parser.add_argument("--optimizers", default=DEFAULT)
    parser.add_argument("--layouts", default="plain,fsdp2,zero2", help="the last two for the first optimizer only")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--divisor", type=int, default=4, help="dimensions are this part of the model's")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    unknown = [name for name in args.models.split(",") if name not in (*SHAPES, "many")]
    if unknown:
        parser.error(f"unknown models: {', '.join(unknown)}; there are {', '.join((*SHAPES, 'many'))}")
    torch.set_num_threads(1)
    rows = []
    layouts, optimizers = args.layouts.split(","), args.optimizers.split(",")
    odd = [layout for layout in layouts if layout not in ("plain", "fsdp2", "zero2")]
    if odd:
        parser.error(f"unknown layouts: {', '.join(odd)}; there are plain, fsdp2, zero2")
    cases = [(o, "plain", m) for m in args.models.split(",") for o in optimizers if "plain" in layouts]
    cases += [(optimizers[0], layout, m) for layout in layouts if layout != "plain" for m in args.models.split(",")]
    with Progress() as progress:
        task = progress.add_task("steps", total=len(cases))
        for optimizer, layout, name in cases:
            rows.append(measure(optimizer, layout, name, args.divisor, args.steps, torch.device("cpu")))
            progress.advance(task)
    table = Table(
        title="host time of a step, kernels free",
        caption=f"{rows[0]['hardware']}, torch {torch.__version__}, triton {triton.__version__}",
    )
    for field in FIELDS[:-2]:
        table.add_column(field, justify="left" if field in ("optimizer", "layout", "model") else "right")
    for row in rows:
        table.add_row(*(str(row[field]) for field in FIELDS[:-2]))
    Console().print(table)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()

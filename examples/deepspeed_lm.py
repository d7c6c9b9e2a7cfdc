"""Train a small GPT-2 under DeepSpeed's ZeRO with AdamW, and with the optimizer of a JSON configuration.

    deepspeed --num_gpus 2 examples/deepspeed_lm.py --deepspeed_config examples/deepspeed/stage2.json
    torchrun --nproc_per_node 2 examples/deepspeed_lm.py --deepspeed_config examples/deepspeed/stage3.json --quick

The text is the source code of Python's own standard library, the vocabulary is trained on it, and nothing is
downloaded. It needs `sketch-plugins[demo,deepspeed]`; without a GPU it runs on the CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _common as common
import deepspeed
import demo_lm
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import sketch_deepspeed  # noqa: F401  (its import makes "cs_adam" a type of optimizer)
from sketch_plugins import registry
from sketch_plugins.memory.report import format_bytes

HERE = Path(__file__).parent


def adamw_of(block: dict[str, Any]) -> dict[str, Any]:
    """AdamW with the settings that it shares with the optimizer of the configuration."""
    shared = {key: block["params"][key] for key in ("lr", "betas", "eps", "weight_decay") if key in block["params"]}
    return {"type": "AdamW", "params": {**shared, "torch_adam": True}}


def tensors(state: Any) -> Iterator[torch.Tensor]:
    """All tensors of an optimizer's state, at any depth."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from tensors(value)


def highest(value: float) -> float:
    """The largest value of all ranks."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, value)
    return max(everywhere)


def mean_loss(engine: Any, rows: torch.Tensor, size: int) -> float:
    """Mean loss of the held-out rows. Each rank takes as many batches as the others, because ZeRO-3 gathers in each."""
    size = min(size, len(rows) // dist.get_world_size())
    if size == 0:
        common.fail(f"{len(rows)} held-out blocks are too few for {dist.get_world_size()} processes")
    share = len(rows) // (dist.get_world_size() * size)
    engine.eval()
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for i in range(share):
            at = (i * dist.get_world_size() + dist.get_rank()) * size
            batch = rows[at : at + size].long().to(engine.device)
            total += engine(input_ids=batch, labels=batch).loss.double().cpu()
    engine.train()
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, total.item())
    return sum(everywhere) / (share * dist.get_world_size())


def train(args: argparse.Namespace, config: dict[str, Any], label: str, progress: Progress) -> dict[str, Any]:
    """One run with the given optimizer; model and batches are the same in all runs."""
    torch.manual_seed(args.seed)
    experiment = demo_lm.build(args, args.out)
    rows, held_out = (data.columns["input_ids"] for data in (experiment.train, experiment.eval))
    engine, *_ = deepspeed.initialize(
        model=experiment.model, model_parameters=list(experiment.model.parameters()), config=config
    )
    size = engine.train_micro_batch_size_per_gpu()
    micro_steps = args.steps * engine.gradient_accumulation_steps()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(args.seed))
    bar = progress.add_task(label, total=args.steps, loss="")
    began = time.perf_counter()
    for micro in range(micro_steps):
        at = torch.arange(size) + (micro * dist.get_world_size() + dist.get_rank()) * size
        batch = rows[order[at % len(rows)]].long().to(engine.device)
        loss = engine(input_ids=batch, labels=batch).loss
        engine.backward(loss)
        boundary = engine.is_gradient_accumulation_boundary()
        engine.step()
        if boundary:
            progress.update(bar, advance=1, loss=f"loss {loss.item():.3f}")
    seconds = time.perf_counter() - began
    state = engine.basic_optimizer.state
    result = {
        "label": label,
        "eval_loss": mean_loss(engine, held_out, size),
        "state_bytes_per_rank": highest(sum(t.numel() * t.element_size() for s in state.values() for t in tensors(s))),
        "step_ms": 1000 * seconds / args.steps,
    }
    engine.destroy()
    return result


def show(results: list[dict[str, Any]], title: str) -> None:
    """Print the table."""
    table = Table(title=title)
    table.add_column("optimizer")
    for heading in ("loss on held-out text", "state a rank", "beside AdamW", "ms a step"):
        table.add_column(heading, justify="right")
    for run in results:
        table.add_row(
            run["label"],
            f"{run['eval_loss']:.4f}",
            format_bytes(run["state_bytes_per_rank"]),
            f"{run['state_bytes_per_rank'] / results[0]['state_bytes_per_rank']:.1%}",
            f"{run['step_ms']:.0f}",
        )
    Console().print(table)


def main(argv: list[str] | None = None) -> int:
    """Entry point of every rank."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--deepspeed_config", type=Path, default=HERE / "deepspeed" / "stage2.json", metavar="FILE")
    parser.add_argument("--text", type=Path, action="append", metavar="FILE", help="a text file; may be repeated")
    for name, what in (
        ("layers", "of the model"),
        ("dim", "of the model, a multiple of 32"),
        ("vocab", "size of the vocabulary"),
        ("steps", "of training"),
        ("seq-len", "tokens a sequence"),
    ):
        parser.add_argument(f"--{name}", type=common.positive_int, metavar="N", help=f"{what} (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="weights and data order (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("deepspeed_out"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: seconds a run, says nothing about quality")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes this option
    sizes = {name: value for name, value in demo_lm.DEFAULTS.items() if name not in ("batch_size", "lr")}
    argv = sys.argv[1:] if argv is None else argv
    parser.set_defaults(**sizes)
    if "--quick" in argv:
        parser.set_defaults(**{name: demo_lm.QUICK[name] for name in sizes})
    args = parser.parse_args(argv)
    if args.dim % 32:
        parser.error(f"--dim {args.dim} is not a multiple of 32")
    try:
        config = json.loads(args.deepspeed_config.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{args.deepspeed_config}: {error}")
    block = config.get("optimizer", {})
    if block.get("type") not in registry.names():
        parser.error(f"{args.deepspeed_config}: the optimizer is none of {', '.join(registry.names())}")
    if "train_micro_batch_size_per_gpu" not in config:
        parser.error(f"{args.deepspeed_config} has no train_micro_batch_size_per_gpu")
    try:
        # An error here comes before AdamW has run.
        registry.parse_options(block["type"], block.setdefault("params", {}))
    except ValueError as error:
        parser.error(f"{args.deepspeed_config}: {error}")

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # Otherwise DeepSpeed silently compiles a C++ extension for all-reduces of inference, which takes a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    first = dist.get_rank() == 0
    args.model = args.dataset = None
    args.batch_size = config["train_micro_batch_size_per_gpu"] * dist.get_world_size()
    if first:
        args.out.mkdir(parents=True, exist_ok=True)
        about = demo_lm.prepare(args, args.out)
        print(f"text: {about['source']}; held out: {about['eval']}", flush=True)
    dist.barrier()
    columns = [*Progress.get_default_columns(), "{task.fields[loss]}"]
    results = []
    with Progress(*columns, disable=not first) as progress:
        for label, optimizer in (("AdamW", adamw_of(block)), (block["type"], block)):
            results.append(train(args, {**config, "optimizer": optimizer}, label, progress))
    if first:
        stage = config.get("zero_optimization", {}).get("stage", 0)
        show(results, f"ZeRO-{stage}, {dist.get_world_size()} processes, {args.steps} steps")
        (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Train a small GPT-2 from scratch through plain accelerate: DDP, FSDP2 or DeepSpeed, as its configuration says.

    accelerate launch --config_file examples/accelerate/ddp.yaml examples/accelerate_lm.py
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/accelerate_lm.py --optim sm3
    accelerate launch --config_file examples/accelerate/deepspeed_zero2.yaml examples/accelerate_lm.py \\
        --optim-args compression=0.05
    python examples/accelerate_lm.py --quick                                          # one process
    torchrun --nproc_per_node 2 examples/accelerate_lm.py --quick --cpu               # two, on a machine without a GPU

The text is the source code of Python's own standard library, the vocabulary is trained on it, and nothing is
downloaded. With --resume, a run that was stopped or killed continues from its last complete checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import _common as common
import demo_lm
import torch
from accelerate import Accelerator, PartialState, skip_first_batches
from accelerate.utils import set_seed

import sketch_accelerate  # noqa: F401  so that DeepSpeed does not replace the optimizer
from sketch_plugins import registry, state_report


def make_optimizer(name: str, options: str, lr: float, weight_decay: float, model: Any) -> torch.optim.Optimizer:
    """An optimizer by name, "adamw" or one of the registry; biases and norms have no weight decay."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    try:
        given = dict(part.strip().split("=", 1) for part in options.split(",") if part)
        return registry.get(name).cls(groups, lr=lr, **registry.parse_options(name, given))
    except ValueError as error:
        common.fail(f"--optim {name} --optim-args {options}: {error}")


def mean_loss(accelerator: Accelerator, model: Any, data: Any) -> float:
    """Mean loss over the evaluation blocks of all processes."""
    model.eval()
    losses = []
    with torch.no_grad():
        for batch in data:
            losses.append(accelerator.gather_for_metrics(model(**batch).loss.detach().reshape(1)).float().cpu())
    model.train()
    return float(torch.cat(losses).mean())


def save(accelerator: Accelerator, folder: Path) -> None:
    """Save under another name and rename at the end, so that every existing checkpoint is complete."""
    parts = Path(f"{folder}.parts")
    if accelerator.is_main_process:
        shutil.rmtree(parts, ignore_errors=True)  # left by a run that was killed here
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(parts))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.replace(parts, folder)


def train(args: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """Prepare, train, evaluate; returns the contents of `results.json`."""
    work, checkpoints = args.out / "work", args.out / "checkpoints"
    if accelerator.is_main_process:
        work.mkdir(parents=True, exist_ok=True)
        checkpoints.mkdir(exist_ok=True)
        demo_lm.prepare(args, work)
    accelerator.wait_for_everyone()
    set_seed(args.seed)
    experiment = demo_lm.build(args, work)
    model: Any = experiment.model
    parameters = sum(p.numel() for p in model.parameters())
    optimizer: Any = make_optimizer(args.optim, args.optim_args, args.lr, args.weight_decay, model)
    # Every process steps its schedule, and accelerate steps it once for each process.
    total = args.steps * accelerator.num_processes
    schedule: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=total + 1, pct_start=0.1)
    shuffled = torch.utils.data.DataLoader(experiment.train, batch_size=args.batch_size, shuffle=True, drop_last=True)
    held_out: Any = torch.utils.data.DataLoader(experiment.eval, batch_size=args.batch_size)
    model, optimizer, shuffled, held_out, schedule = accelerator.prepare(model, optimizer, shuffled, held_out, schedule)

    step = 0
    if args.resume:
        done = [int(file.name.removeprefix("step")) for file in checkpoints.glob("step*") if file.suffix != ".parts"]
        if done:
            step = max(done)
            accelerator.load_state(str(checkpoints / f"step{step}"))
            accelerator.print(f"goes on from step {step}")
    curve = []
    while step < args.steps:
        epoch, skipped = divmod(step, len(shuffled))
        shuffled.set_epoch(epoch)
        for batch in skip_first_batches(shuffled, skipped) if skipped else shuffled:
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            if step % max(1, args.steps // 20) == 0:
                curve.append((step, float(accelerator.gather(loss.detach().reshape(1)).mean())))
                accelerator.print(f"step {step} of {args.steps}: loss {curve[-1][1]:.4f}")
            if args.save_every and step % args.save_every == 0:
                save(accelerator, checkpoints / f"step{step}")
            if step >= args.steps:
                break

    report = state_report(common.unwrap(optimizer))
    return {
        "optimizer": args.optim,
        "run_by": f"{accelerator.distributed_type.value}, {accelerator.num_processes} process(es)",
        "parameters": parameters,
        "state_bytes": report.state_bytes,  # on rank 0
        "train_curve": curve,
        "eval_loss": mean_loss(accelerator, model, held_out),
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check. With `--quick`, options that are not given have smaller sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--text", type=Path, action="append", metavar="FILE", help="a text file; may be repeated")
    parser.add_argument("--optim", default="cs_adam", choices=("adamw", *registry.names()), help="default: %(default)s")
    parser.add_argument("--optim-args", default="", metavar="KEY=VALUE,...", help="options of the optimizer")
    parser.add_argument("--lr", type=common.positive_float, help="default: %(default)s")
    parser.add_argument("--weight-decay", type=float, default=0.01, metavar="W", help="default: %(default)s")
    for name, what in (
        ("layers", "layers"),
        ("dim", "width, a multiple of 32"),
        ("vocab", "size of the vocabulary"),
        ("steps", "steps of the optimizer"),
        ("batch-size", "sequences a process and step"),
        ("seq-len", "tokens a sequence"),
    ):
        parser.add_argument(f"--{name}", type=common.positive_int, metavar="N", help=f"{what} (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="weights and data order (default: %(default)s)"
    )
    parser.add_argument("--save-every", type=int, default=0, metavar="N", help="steps between checkpoints (0: none)")
    parser.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint in --out")
    parser.add_argument("--cpu", action="store_true", help="leave an accelerator unused")
    parser.add_argument("--out", type=Path, default=Path("accelerate_out"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: says nothing about quality")
    parser.set_defaults(**demo_lm.DEFAULTS, model=None, dataset=None)
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--quick" in argv:
        parser.set_defaults(**demo_lm.QUICK)
    args = parser.parse_args(argv)
    if args.dim % 32:
        parser.error(f"--dim {args.dim} is not a multiple of 32")
    for file in args.text or ():
        if not file.is_file():
            parser.error(f"--text {file}: no such file")

    return args


def run(args: argparse.Namespace) -> None:
    """Train, print the results, and write them to a file."""
    accelerator = Accelerator(cpu=args.cpu)
    result = train(args, accelerator)
    dense = 8 * result["parameters"]
    accelerator.print(
        f"{result['optimizer']} by {result['run_by']}: eval loss {result['eval_loss']:.4f}, state of rank 0 "
        f"{result['state_bytes'] / common.MIB:.2f} MiB (AdamW's on one process: {dense / common.MIB:.2f} MiB)"
    )
    if accelerator.is_main_process:
        (args.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    accelerator.wait_for_everyone()


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    run(parse(argv))
    PartialState().destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The ``sketch-plugins`` command, also ``python -m sketch_plugins``. One pair of functions per subcommand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

PROG = "sketch-plugins"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: ``sys.argv[1:]``) and return its exit status.

    A script that is run ends as it does under ``python``: its ``SystemExit`` and its exceptions pass through.
    """
    parser = argparse.ArgumentParser(prog=PROG, description="Memory-compressed optimizers for PyTorch.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_reshard(commands)
    _add_convert(commands)
    _add_plan(commands)
    _add_report(commands)
    _add_info(commands)
    _add_check(commands)
    argv = list(sys.argv[1:] if argv is None else argv)
    # DeepSpeed's launcher, unless told --no_local_rank, puts this before everything; it is for the script.
    local_rank = [argv.pop(0)] if argv and argv[0].startswith("--local_rank=") else []
    arguments = parser.parse_args(argv)
    if local_rank:
        if not hasattr(arguments, "arguments"):
            parser.error(f"unrecognized arguments: {local_rank[0]}")
        arguments.arguments = local_rank + arguments.arguments
    status: int = arguments.execute(arguments)
    return status


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "run",
        help="run an unmodified program, with the optimizers known to the frameworks it imports",
        description="Run PROGRAM, a script of Python or a command, with every optimizer of sketch-plugins known by "
        "name to the training frameworks that it and the processes it starts import, for example: run train.py "
        "--optim cs_adam. With --optim before PROGRAM, an optimizer of sketch-plugins takes the place of those that "
        "PROGRAM builds itself from torch.optim: run --optim cs_adam train.py",
        epilog="Under launchers, before or after them: run torchrun --nproc_per_node 2 train.py, "
        "torchrun --nproc_per_node 2 -m sketch_plugins run train.py, accelerate launch -m sketch_plugins run train.py",
    )
    parser.add_argument("-m", "--module", action="store_true", help="PROGRAM is the name of a module, as in python -m")
    parser.add_argument(
        "--optim",
        metavar="NAME",
        help="put cs_adam, sm3, sketchy, ... in the place of torch.optim's AdamW, Adam, SGD and Adagrad",
    )
    parser.add_argument(
        "--optim-args", metavar="K=V,...", help="options of that optimizer, as in Trainer's optim_args: compression=0.1"
    )
    parser.add_argument(
        "script",
        metavar="PROGRAM",
        help="script, directory or zip file with a __main__.py, module, or command (trl, torchrun, accelerate, ...)",
    )
    # REMAINDER: everything after the script belongs to the script, `--help` and `-m` included.
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="arguments of PROGRAM")
    parser.set_defaults(execute=_run, usage_error=parser.error)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.optim_args is not None and arguments.optim is None:
        arguments.usage_error(f"--optim-args {arguments.optim_args!r} are the options of --optim, which is not given")
    from sketch_plugins.running.command import main as run

    return run(arguments.script, arguments.arguments, arguments.module, arguments.optim, arguments.optim_args)


def _add_reshard(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "reshard",
        help="write a checkpoint of a sharded run anew, for another number of processes",
        description="Write CHECKPOINT, saved by DeepSpeed's ZeRO (stages 1 to 3) or by torch.distributed.checkpoint "
        "(FSDP2), anew for N processes. Weights stay as they are, bit for bit; the state of the optimizers of "
        "sketch-plugins is cut anew, exactly where that is possible (docs/resharding.md). CHECKPOINT itself is not "
        "changed.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="directory of the checkpoint")
    parser.add_argument("--world-size", metavar="N", type=int, required=True, help="processes that are to load it")
    parser.add_argument("--output", metavar="DIR", help="directory to write (default: CHECKPOINT-worldN)")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="unpickle objects that are neither tensors nor plain values: only for checkpoints of your own",
    )
    parser.set_defaults(execute=_reshard)


def _reshard(arguments: argparse.Namespace) -> int:
    # The library of tables and bars, and torch behind it, for this command alone.
    from sketch_plugins.checkpoints.command import main as reshard

    return reshard(arguments.checkpoint, arguments.world_size, arguments.output, arguments.trust, f"{PROG} reshard")


def _add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint of AdamW anew, with the state of a sketched optimizer",
        description="Write CHECKPOINT, whose optimizer is AdamW, Adam, SGD or Adagrad of torch, anew with the state of "
        "a sketched optimizer, so that the run goes on with less memory. CHECKPOINT is a checkpoint directory of "
        "transformers' Trainer or of accelerate, a file of Lightning, or a file of torch.save with the state dict of "
        "an optimizer at any depth. Everything else in it is copied, and CHECKPOINT itself is not changed. Learning "
        "rates, betas, eps and weight decays stay those of the checkpoint.",
        epilog="Example: convert out/checkpoint-500 --optim cs_adam --optim-args compression=0.1, then "
        "train(resume_from_checkpoint='out/checkpoint-500-cs_adam') with the same optim and optim_args",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="directory or file")
    parser.add_argument("--optim", metavar="NAME", required=True, help="cs_adam, sm3, sketchy, ...")
    parser.add_argument(
        "--optim-args", metavar="K=V,...", help="options of the optimizer, as in Trainer's optim_args: compression=0.1"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="what to write: a directory for a directory; for a file a file, or a directory to put it into (default: "
        "CHECKPOINT-NAME)",
    )
    parser.add_argument("--force", action="store_true", help="write over what is there")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="unpickle objects that are neither tensors nor plain values: only for checkpoints of your own",
    )
    parser.set_defaults(execute=_convert)


def _convert(arguments: argparse.Namespace) -> int:
    from sketch_plugins.checkpoints.convert import main as convert

    return convert(
        arguments.checkpoint,
        arguments.optim,
        arguments.optim_args,
        arguments.out,
        arguments.force,
        arguments.trust,
        f"{PROG} convert",
    )


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plan",
        help="memory of a training step with each optimizer, and the largest batch, without a GPU",
        description="Say what a training step of MODEL takes with each optimizer, and the largest batch that fits. No "
        "GPU is needed, no weights and no network: the model runs on tensors without memory (docs/plan.md).",
        epilog="Example: plan --model bert-large-uncased --batch-size 8 --seq-len 512 --gpu-memory 16GiB "
        "--precision bf16 --plot plan.png",
    )
    parser.add_argument(
        "--model", required=True, help="name (bert-large-uncased, gpt2, ...), directory of a model, or config.json"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="samples of a pass (default: 8)")
    parser.add_argument("--seq-len", type=int, default=512, metavar="N", help="tokens of a sample (default: 512)")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="budget, for the largest batch: 16GiB, 80GB")
    parser.add_argument(
        "--precision",
        default="bf16-mixed",
        help="fp32, bf16 (all in bfloat16), bf16-mixed (the default) or fp16-mixed (autocast, float32 weights)",
    )
    parser.add_argument(
        "--optimizer",
        action="append",
        metavar="NAME[,NAME...]",
        help="optimizers, with options after a colon: cs_adam:preset=lean; all (the default); NAME_layerwise: steps in "
        "backward; adamw, adamw_foreach, adafactor, sgd: torch's. May be given several times",
    )
    parser.add_argument(
        "--task", help="masked-lm, causal-lm, seq2seq-lm, sequence-classification (default: the model's)"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="compute activations again in backward")
    parser.add_argument("--accumulation", type=int, default=1, metavar="N", help="passes of a step (default: 1)")
    parser.add_argument("--zero-stage", type=int, default=0, metavar="N", help="DeepSpeed's ZeRO: 1, 2, 3; a formula")
    parser.add_argument("--world-size", type=int, metavar="M", help="ranks, with --zero-stage")
    parser.add_argument("--device", default="cuda", help="whose kernels: cuda (the default) or cpu")
    parser.add_argument(
        "--reserve", metavar="SIZE", help="part of --gpu-memory that torch does not get (default: 512MiB on cuda)"
    )
    parser.add_argument("--plot", metavar="FILE", help="write a bar chart: FILE.png, FILE.svg, FILE.pdf")
    parser.add_argument("--json", action="store_true", help="write JSON in place of the table")
    parser.set_defaults(execute=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from sketch_plugins.memory.plan_command import main as plan

    return plan(arguments, f"{PROG} plan")


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "report",
        help="what an optimizer's checkpoint holds",
        description="Show what the optimizer in CHECKPOINT keeps, parameter by parameter, beside AdamW. CHECKPOINT is "
        "a checkpoint directory of transformers' Trainer, a file of torch.save or of Lightning, or a directory of "
        "DeepSpeed or torch.distributed.checkpoint.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file or directory")
    parser.add_argument("--rows", type=int, default=20, metavar="N", help="parameters to show (default: 20; 0: all)")
    parser.add_argument("--json", action="store_true", help="write JSON in place of the tables")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="unpickle objects that are neither tensors nor plain values: only for checkpoints of your own",
    )
    parser.set_defaults(execute=_report)


def _report(arguments: argparse.Namespace) -> int:
    from sketch_plugins.checkpoints.report import main as report

    return report(arguments.checkpoint, arguments.rows, arguments.json, arguments.trust, f"{PROG} report")


def _add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "info",
        help="versions, kernels, and the optimizers that each framework knows",
        description="Show what is installed, which kernels take steps here and why others do not, and the names under "
        "which each framework knows the optimizers.",
    )
    parser.add_argument("--json", action="store_true", help="write JSON in place of the tables")
    parser.set_defaults(execute=_info)


def _info(arguments: argparse.Namespace) -> int:
    from sketch_plugins.info import main as info

    return info(arguments.json)


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "check",
        help="compare every kernel with its definition on this device, and time a step beside AdamW",
        description="Compare every kernel with its eager definition on small tensors, train a few steps with each "
        "optimizer both ways, and time a step on BERT-base's tensors beside torch.optim.AdamW(fused=True). A kernel "
        "that differs or does not compile is named, and the exit status is 1 (docs/check.md).",
    )
    parser.add_argument("--device", default="cuda", help="cuda (the default: Triton's kernels), cuda:N, cpu (Numba's)")
    parser.add_argument("--only", metavar="WORD", help="cases with WORD in their name, and no times")
    parser.add_argument("--no-times", action="store_true", help="leave the times out")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="processes that compile and compare; 0: this one (default: one for each core, 12 at most; on a cpu 0)",
    )
    parser.add_argument("--json", action="store_true", help="write JSON in place of the tables")
    parser.set_defaults(execute=_check)


def _check(arguments: argparse.Namespace) -> int:
    from sketch_plugins.check.command import main as check

    return check(arguments, f"{PROG} check")

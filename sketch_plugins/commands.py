"""The subcommands of ``sketch-plugins``: for each a function that adds its arguments, and one that executes it."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

PROG = "sketch-plugins"


def formatter() -> Any:
    """The formatter of help: with colours if rich-argparse is installed; explicit line breaks stay."""
    try:
        from rich_argparse import RawDescriptionRichHelpFormatter
    except ImportError:  # `check` works with torch and Triton alone
        return argparse.RawDescriptionHelpFormatter

    class Formatter(RawDescriptionRichHelpFormatter):
        group_name_formatter = str  # "options:" in lower case, as in other command lines

    return Formatter


def new_command(commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, **words: Any) -> Any:
    """Add a command. Its description is wrapped here, because the formatter keeps explicit line breaks."""
    words["description"] = textwrap.fill(words["description"], 100)
    return commands.add_parser(name, formatter_class=formatter(), **words)


def add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``run``."""
    parser = new_command(
        commands,
        "run",
        help="train with an unmodified program",
        description="Run PROGRAM, a Python script or a command. The training frameworks that PROGRAM and its child "
        "processes import know every optimizer of sketch-plugins by name. With --optim before PROGRAM, an optimizer of "
        "sketch-plugins also replaces the AdamW, Adam, SGD and Adagrad that PROGRAM builds from torch.optim.",
        epilog="examples:\n"
        "  sketch-plugins run train.py --optim cs_adam\n"
        "  sketch-plugins run --optim cs_adam --optim-args compression=0.1 train.py\n"
        "  sketch-plugins run torchrun --nproc_per_node 2 train.py --optim cs_adam\n"
        "  torchrun --nproc_per_node 2 -m sketch_plugins run train.py --optim cs_adam\n"
        "  sketch-plugins run trl sft --optim cs_adam ...\n\n"
        "The exit status is that of PROGRAM; 127 if there is no such program.",
    )
    parser.add_argument("-m", "--module", action="store_true", help="PROGRAM is the name of a module, as in python -m")
    parser.add_argument(
        "--optim",
        metavar="NAME",
        help="replace torch.optim's AdamW, Adam, SGD and Adagrad by cs_adam, sm3, sketchy, ...",
    )
    parser.add_argument(
        "--optim-args", metavar="K=V,...", help="options of that optimizer, as in Trainer's optim_args: compression=0.1"
    )
    parser.add_argument(
        "script",
        metavar="PROGRAM",
        help="script (-: on stdin), directory or zip file with a __main__.py, module, or command (trl, torchrun, ...)",
    )
    # REMAINDER: everything after the script belongs to the script, `--help` and `-m` included.
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="arguments of PROGRAM")
    parser.set_defaults(execute=run_program, usage_error=parser.error)


def run_program(arguments: argparse.Namespace) -> int:
    """Run the program, and return its exit status."""
    if arguments.optim_args is not None and arguments.optim is None:
        arguments.usage_error(
            f"--optim-args {arguments.optim_args!r} needs --optim: it sets the options of that optimizer"
        )
    from sketch_plugins.running.command import main as run

    return run(arguments.script, arguments.arguments, arguments.module, arguments.optim, arguments.optim_args)


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust",
        action="store_true",
        help="also unpickle objects other than tensors and plain values; this may run code, so use it only for "
        "checkpoints that you trust",
    )


def add_reshard(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``reshard``."""
    parser = new_command(
        commands,
        "reshard",
        help="rewrite a sharded checkpoint for another number of processes",
        description="Write a copy of CHECKPOINT for N processes. CHECKPOINT comes from DeepSpeed's ZeRO (stages 1 to "
        "3) or from torch.distributed.checkpoint (FSDP2), and is not changed. Weights stay the same, bit for bit. The "
        "state of our optimizers is divided differently, exactly where that is possible (docs/resharding.md).",
        epilog="example:\n  sketch-plugins reshard checkpoints/run --world-size 4\n\n"
        "The exit status is 1 if nothing was written.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="directory of the checkpoint")
    parser.add_argument(
        "--world-size", metavar="N", type=int, required=True, help="number of processes that will load it"
    )
    parser.add_argument("--output", metavar="DIR", help="directory to write (default: CHECKPOINT-worldN)")
    _add_trust(parser)
    parser.set_defaults(execute=_reshard)


def _reshard(arguments: argparse.Namespace) -> int:
    # Imported here, because it imports rich and torch, which other commands do not need.
    from sketch_plugins.checkpoints.command import main as reshard

    return reshard(arguments.checkpoint, arguments.world_size, arguments.output, arguments.trust, f"{PROG} reshard")


def add_convert(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``convert``."""
    parser = new_command(
        commands,
        "convert",
        help="convert a checkpoint of AdamW to the state of a sketched optimizer",
        description="Write a copy of CHECKPOINT in which the state of torch's AdamW, Adam, SGD or Adagrad is replaced "
        "by that of a sketched optimizer, so that the run can go on with less memory. CHECKPOINT is a checkpoint "
        "directory of transformers' Trainer or of accelerate, a file of Lightning, or a file of torch.save that "
        "holds an optimizer's state dict at any depth. It is not changed. Learning rates, betas, eps and weight decay "
        "stay those of CHECKPOINT.",
        epilog="example:\n"
        "  sketch-plugins convert out/checkpoint-500 --optim cs_adam --optim-args compression=0.1\n"
        "  and then, with the same optim and optim_args:\n"
        "  trainer.train(resume_from_checkpoint='out/checkpoint-500-cs_adam')\n\n"
        "The exit status is 1 if nothing was written.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="directory or file")
    parser.add_argument("--optim", metavar="NAME", required=True, help="cs_adam, sm3, sketchy, ...")
    parser.add_argument(
        "--optim-args", metavar="K=V,...", help="options of the optimizer, as in Trainer's optim_args: compression=0.1"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="output: a directory if CHECKPOINT is one, else a file or the directory for it (default: CHECKPOINT-NAME)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace an output that exists; CHECKPOINT itself is never replaced"
    )
    _add_trust(parser)
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


def add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``plan``."""
    parser = new_command(
        commands,
        "plan",
        help="predict the memory of a training step and the largest batch, without a GPU",
        description="Predict the memory of a training step of MODEL with each optimizer, and the largest batch that "
        "fits. It needs no GPU, no weights and no network: the model runs on tensors that have shapes but no memory "
        "(docs/plan.md).",
        epilog="examples:\n"
        "  sketch-plugins plan --model gpt2 --gpu-memory 16GiB\n"
        "  sketch-plugins plan --model bert-large-uncased --batch-size 8 --seq-len 512 --precision bf16 \\\n"
        "      --optimizer adamw,cs_adam:preset=lean,sm3 --plot plan.png\n"
        "  sketch-plugins plan --model llama-3.2-1b --gpu-memory 16GiB --advise least-change\n\n"
        "The exit status is 2 if the arguments are wrong.",
    )
    parser.add_argument(
        "--model", required=True, help="name (bert-large-uncased, gpt2, ...), directory of a model, or config.json"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="samples in a batch (default: 8)")
    parser.add_argument("--seq-len", type=int, default=512, metavar="N", help="tokens in a sample (default: 512)")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="memory budget for the largest batch: 16GiB, 80GB")
    parser.add_argument(
        "--precision",
        default="bf16-mixed",
        help="fp32, bf16 (all in bfloat16), bf16-mixed (the default) or fp16-mixed (autocast, float32 weights)",
    )
    parser.add_argument(
        "--optimizer",
        action="append",
        metavar="NAME[,NAME...]",
        help="optimizers to compare, with options after a colon (cs_adam:preset=lean); NAME_layerwise takes its steps "
        "in backward; adamw, adamw_foreach, adafactor and sgd are torch's; default: all. May be given several times",
    )
    parser.add_argument(
        "--task", help="masked-lm, causal-lm, seq2seq-lm, sequence-classification (default: the model's)"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations in backward")
    parser.add_argument(
        "--accumulation", type=int, default=1, metavar="N", help="gradient accumulation steps (default: 1)"
    )
    parser.add_argument(
        "--zero-stage", type=int, default=0, metavar="N", help="stage of DeepSpeed's ZeRO: 1, 2, 3 (by a formula)"
    )
    parser.add_argument("--world-size", type=int, metavar="M", help="number of processes, with --zero-stage")
    parser.add_argument("--device", default="cuda", help="device whose kernels are assumed: cuda (default) or cpu")
    parser.add_argument(
        "--reserve", metavar="SIZE", help="part of --gpu-memory that torch cannot use (default: 512MiB on cuda)"
    )
    parser.add_argument(
        "--advise",
        metavar="WISH",
        choices=("largest-batch", "largest-model", "least-change"),
        help="what to turn on for --gpu-memory, in the order of what it costs: largest-batch, largest-model, or "
        "least-change (stops at the first thing that makes --batch-size fit)",
    )
    parser.add_argument("--plot", metavar="FILE", help="write a bar chart: FILE.png, FILE.svg, FILE.pdf")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.set_defaults(execute=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from sketch_plugins.memory.plan_command import main as plan

    return plan(arguments, f"{PROG} plan")


def add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``report``."""
    parser = new_command(
        commands,
        "report",
        help="show what an optimizer's checkpoint holds",
        description="Show the bytes of optimizer state in CHECKPOINT, parameter by parameter, beside AdamW's. "
        "CHECKPOINT is a checkpoint directory of transformers' Trainer, a file of torch.save or of Lightning, or a "
        "directory of DeepSpeed or torch.distributed.checkpoint.",
        epilog="example:\n  sketch-plugins report out/checkpoint-500\n\n"
        "The exit status is 2 if CHECKPOINT holds no optimizer state that can be read.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file or directory")
    parser.add_argument(
        "--rows", type=int, default=20, metavar="N", help="number of parameters to show (default: 20; 0: all)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the tables")
    _add_trust(parser)
    parser.set_defaults(execute=_report)


def _report(arguments: argparse.Namespace) -> int:
    from sketch_plugins.checkpoints.report import main as report

    return report(arguments.checkpoint, arguments.rows, arguments.json, arguments.trust, f"{PROG} report")


def add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``info``."""
    parser = new_command(
        commands,
        "info",
        help="show versions, kernels, and the optimizers that each framework knows",
        description="Show the installed versions, which kernels can be used on this machine and why others cannot, and "
        "the names under which each framework knows the optimizers.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the tables")
    parser.set_defaults(execute=_info)


def _info(arguments: argparse.Namespace) -> int:
    from sketch_plugins.info import main as info

    return info(arguments.json)


def add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``check``."""
    parser = new_command(
        commands,
        "check",
        help="compare every kernel with eager torch on this device, and time a step beside AdamW",
        description="Compare every kernel with the same step in eager torch on small tensors, train a few steps with "
        "each optimizer both ways, and time a step on BERT-base's tensors beside torch.optim.AdamW(fused=True) "
        "(docs/check.md).",
        epilog="examples:\n  sketch-plugins check\n  sketch-plugins check --device cpu --only cs_adam\n\n"
        "The exit status is 1 if a kernel differs or does not compile, 2 if the arguments are wrong.",
    )
    parser.add_argument(
        "--device", default="cuda", help="cuda or cuda:N for Triton's kernels (default: cuda), cpu for Numba's"
    )
    parser.add_argument(
        "--only", metavar="WORD", help="run only the cases with WORD in their name, and measure no times"
    )
    parser.add_argument("--no-times", action="store_true", help="measure no times")
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="number of worker processes; 0: work in this process (default: one for each core, at most 12; on a cpu 0)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the tables")
    parser.set_defaults(execute=_check)


def _check(arguments: argparse.Namespace) -> int:
    from sketch_plugins.check.command import main as check

    return check(arguments, f"{PROG} check")

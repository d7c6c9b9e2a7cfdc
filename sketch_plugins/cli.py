"""The ``sketch-plugins`` command, also ``python -m sketch_plugins``. One pair of functions per subcommand."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import sys
import zipfile
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import NamedTuple

from sketch_plugins.import_hooks import install_integrations

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
        help="run an unmodified script, with the optimizers known to the frameworks it imports",
        description="Run SCRIPT as python would, with every optimizer of sketch-plugins known by name to the training "
        "frameworks that the script imports, for example: run train.py --optim cs_adam",
        epilog="Under launchers: torchrun --nproc_per_node 2 -m sketch_plugins run train.py, "
        "accelerate launch -m sketch_plugins run train.py",
    )
    parser.add_argument("-m", "--module", action="store_true", help="SCRIPT is the name of a module, as in python -m")
    parser.add_argument("script", metavar="SCRIPT", help="script, directory or zip file with a __main__.py, or module")
    # REMAINDER: everything after the script belongs to the script, `--help` and `-m` included.
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="arguments of the script")
    parser.set_defaults(execute=_run)


def _run(arguments: argparse.Namespace) -> int:
    install_integrations()
    try:
        program = (_find_module if arguments.module else _find_script)(arguments.script)
    except _CannotRun as error:
        print(f"{PROG} run: {error}", file=sys.stderr)
        return error.status
    sys.argv = [program.argv0, *arguments.arguments]
    _execute_as_main(program)
    return 0


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


class _Program(NamedTuple):
    code: CodeType | bytes  # compiled, or the source of a script
    file: str
    argv0: str
    spec: ModuleSpec | None  # None for a plain script, as under python


class _CannotRun(Exception):
    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _find_script(path: str) -> _Program:
    if os.path.isdir(path) or zipfile.is_zipfile(path):
        _replace_first_path(path)
        spec = PathFinder.find_spec("__main__", [path])
        if spec is None:
            raise _CannotRun(f"can't find '__main__' module in {path!r}", status=1)
        return _Program(_code_of(spec), spec.origin or path, path, spec)
    file = os.path.abspath(path)
    try:
        with io.open_code(file) as stream:
            source = stream.read()
    except OSError as error:
        raise _CannotRun(f"can't open file {file!r}: [Errno {error.errno}] {error.strerror}", status=2) from None
    _replace_first_path(os.path.dirname(os.path.realpath(path)))
    return _Program(source, file, path, None)


def _find_module(name: str) -> _Program:
    # `python -m sketch_plugins` has the current directory here already, the console command its own directory.
    _replace_first_path(os.getcwd())
    sys.argv = ["-m"]  # what a package sees while it is imported on the way to the module
    if name.startswith("."):
        raise _CannotRun(f"relative module names are not supported: {name}", status=1)
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
            if spec is None:
                raise _CannotRun(f"{name!r} is a package without __main__ and cannot be executed", status=1)
    except ModuleNotFoundError as error:
        # A package that fails on one of its own imports is the user's traceback to read.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        spec = None
    except ValueError as error:
        raise _CannotRun(f"{name!r} is not the name of a module ({error})", status=1) from None
    if spec is None:
        raise _CannotRun(f"No module named {name}", status=1)
    file = spec.origin or name
    return _Program(_code_of(spec), file, file, spec)


def _code_of(spec: ModuleSpec) -> CodeType:
    get_code = getattr(spec.loader, "get_code", None)  # extension modules have none
    code: CodeType | None = None if get_code is None else get_code(spec.name)
    if code is None:
        raise _CannotRun(f"no code object available for {spec.name}", status=1)
    return code


def _execute_as_main(program: _Program) -> None:
    """Execute ``program`` as the module ``__main__``, which stays in ``sys.modules`` afterwards.

    ``runpy`` would take it away again, and threads, ``atexit`` functions and unpickling would miss it.
    """
    spec = program.spec
    module = ModuleType("__main__")
    module.__dict__.update(
        __file__=program.file,
        __cached__=spec.cached if spec else None,
        __spec__=spec,
        __package__=spec.parent if spec else None,
        __loader__=spec.loader if spec else SourceFileLoader("__main__", program.file),
    )
    sys.modules["__main__"] = module
    try:
        code = program.code
        if isinstance(code, bytes):
            code = compile(code, program.file, "exec", dont_inherit=True)
        exec(code, module.__dict__)
    except Exception:
        _hide_own_frames()
        raise


def _hide_own_frames() -> None:
    """Show the exception that is about to leave the interpreter from the script's first frame on."""
    hook = sys.excepthook  # the script may have set its own

    def excepthook(kind: type[BaseException], value: BaseException, traceback: TracebackType | None) -> None:
        shown = entry = traceback
        while entry is not None:
            if entry.tb_frame.f_code.co_filename == __file__:
                shown = entry.tb_next
            entry = entry.tb_next
        hook(kind, value.with_traceback(shown), shown)

    sys.excepthook = excepthook


def _replace_first_path(directory: str) -> None:
    # `python -P` (3.11) asks that no directory be put on the path unasked.
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = directory

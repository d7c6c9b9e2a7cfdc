"""The ``sketch-plugins`` command, also ``python -m sketch_plugins``: its parser, its help and its completion."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sketch_plugins.commands import (
    PROG,
    add_check,
    add_convert,
    add_info,
    add_plan,
    add_report,
    add_reshard,
    add_run,
    formatter,
    new_command,
    run_program,
)
from sketch_plugins.printing import printing
from sketch_plugins.version import __version__

SHELLS = ("bash", "zsh", "tcsh")

EXAMPLES = """\
examples:
  train an unmodified program
    sketch-plugins run train.py --optim cs_adam        the program takes the name of an optimizer
    sketch-plugins run --optim cs_adam train.py        the program builds torch.optim.AdamW itself
  find out what fits into memory
    sketch-plugins plan --model gpt2 --batch-size 8 --gpu-memory 16GiB
  work with checkpoints
    sketch-plugins report out/checkpoint-500
    sketch-plugins convert out/checkpoint-500 --optim cs_adam
    sketch-plugins reshard checkpoints/run --world-size 4
  look at this machine
    sketch-plugins info
    sketch-plugins check --device cpu

exit status:
  0    the command did what it was asked to do
  1    check: a kernel is wrong; convert, reshard: nothing was written;
       or stdout could not be written
  2    the arguments are wrong; plan, report: there is nothing to show
  127  run: there is no such program
  run ends with the exit status of the program otherwise

The environment variable NO_COLOR switches colours off.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: ``sys.argv[1:]``) and return its exit status.

    A script that is run ends as under ``python``: its ``SystemExit`` and its exceptions pass through.
    """
    commands = parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    # DeepSpeed's launcher puts this option first unless --no_local_rank is given; it is meant for the script.
    local_rank = [argv.pop(0)] if argv and argv[0].startswith("--local_rank=") else []
    with printing(PROG):
        arguments = commands.parse_args(argv)
        if local_rank:
            if not hasattr(arguments, "arguments"):
                commands.error(f"unrecognized arguments: {local_rank[0]}")
            arguments.arguments = local_rank + arguments.arguments
        if arguments.execute is not run_program:
            status: int = arguments.execute(arguments)
            return status
    return run_program(arguments)  # a program has the stdout that it has under python


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    made = argparse.ArgumentParser(
        prog=PROG,
        description="Memory-compressed optimizers for PyTorch.",
        epilog=EXAMPLES,
        formatter_class=formatter(),
    )
    made.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    # `prog` is given, because argparse would otherwise format the usage to find it, which imports rich on every start.
    commands = made.add_subparsers(title="commands", metavar="COMMAND", required=True, prog=PROG)
    for add in (add_run, add_plan, add_report, add_convert, add_reshard, add_info, add_check, _add_completion):
        add(commands)
    return made


def _commands(whole: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command."""
    (found,) = [action for action in whole._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found.choices)


def _add_completion(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = new_command(
        commands,
        "completion",
        help="print a script that lets a shell complete commands and options",
        description="Print a script for SHELL. The shell completes commands, options and file names of sketch-plugins "
        "when it has read the script.",
        epilog="examples:\n"
        "  sketch-plugins completion bash > ~/.local/share/bash-completion/completions/sketch-plugins\n"
        "  sketch-plugins completion zsh > ~/.zfunc/_sketch-plugins      with ~/.zfunc in fpath",
    )
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or tcsh")
    parser.set_defaults(execute=_completion)


def _completion(arguments: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError:
        print(f"{PROG} completion: shtab is not installed: pip install shtab", file=sys.stderr)
        return 2
    whole = parser()
    for command in _commands(whole).values():
        for action in command._actions:
            if action.dest in ("script", "checkpoint", "output", "out", "plot", "model"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(whole, shell=arguments.shell))
    return 0

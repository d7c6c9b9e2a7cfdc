"""Run by `launch_ranks`: imports the modules of a script once, and then runs the script in a fork for each rank.

    python ranks.py FD,FD,... SCRIPT ARGUMENTS...

One file descriptor a rank, for its output. Frameworks take seconds to import. DeepSpeed, accelerate and Lightning
collect garbage often, and each time all objects of the frameworks would be searched, so they are frozen before the
forks. It works only without a GPU, because a fork could not use one.
"""

import ast
import atexit
import contextlib
import gc
import importlib
import os
import runpy
import sys
from pathlib import Path


def preload(script: str) -> None:
    """Execute the unconditional imports of a script; an import that fails here will fail in the script."""
    imports = [
        line for line in ast.parse(Path(script).read_text()).body if isinstance(line, ast.Import | ast.ImportFrom)
    ]
    for one in imports:
        with contextlib.suppress(ImportError):
            exec(compile(ast.Module([one], []), script, "exec"), {"__name__": "preload"})
    if "deepspeed" in sys.modules:
        # Otherwise DeepSpeed would compile a C++ extension for all-reduces of inference, which takes a minute.
        sys.modules["deepspeed"].ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "torch" in sys.modules:
        importlib.import_module("torch._dynamo")  # torch would in the first optimizer of each rank


def become(rank: int, output: int) -> None:
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    if "lightning_utilities" in sys.modules:  # it has read the rank when it was imported
        importlib.import_module("lightning_utilities.core.rank_zero").rank_zero_only.rank = rank


def leave(ended: list[bool]) -> None:
    """End a rank whose script has ended without an error.

    On a busy machine gloo's threads sometimes abort a process while it unloads its libraries ("terminate called without
    an active exception"), even after destroy_process_group.
    """
    if ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def main() -> None:
    outputs = [int(number) for number in sys.argv[1].split(",")]
    del sys.argv[:2]
    script = sys.argv[0]
    sys.path[0] = str(Path(script).parent)
    preload(script)
    gc.collect()
    gc.freeze()
    ranks = []
    for rank, output in enumerate(outputs):
        process = os.fork()
        if not process:
            become(rank, output)
            ended: list[bool] = []
            atexit.register(leave, ended)  # what is registered first is called last
            runpy.run_path(script, run_name="__main__")
            ended.append(True)
            return
        ranks.append(process)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]
    sys.exit(next((code for code in codes if code), 0))


if __name__ == "__main__":
    main()

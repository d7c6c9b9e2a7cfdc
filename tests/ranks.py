"""Run by `launch_ranks`: what a script imports is imported once, then each rank is a fork that runs the script.

    python ranks.py FD,FD,... SCRIPT ARGUMENTS...

One file descriptor a rank, for its output. Frameworks take seconds to import, and as many objects as they have are
looked through whenever DeepSpeed, accelerate or Lightning collect garbage: they are frozen before there are ranks. Only
where nothing has a GPU, which a fork could not use.
"""

import ast
import contextlib
import gc
import importlib
import os
import runpy
import sys
from pathlib import Path


def preload(script: str) -> None:
    """Execute the imports of a script that no condition precedes; what fails will fail in the script."""
    imports = [
        line for line in ast.parse(Path(script).read_text()).body if isinstance(line, ast.Import | ast.ImportFrom)
    ]
    for one in imports:
        with contextlib.suppress(ImportError):
            exec(compile(ast.Module([one], []), script, "exec"), {"__name__": "preload"})
    if "deepspeed" in sys.modules:
        # Or DeepSpeed would compile a C++ extension for all-reduces of inference, which takes a minute.
        sys.modules["deepspeed"].ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "torch" in sys.modules:
        importlib.import_module("torch._dynamo")  # torch would in the first optimizer of each rank


def become(rank: int, output: int) -> None:
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    if "lightning_utilities" in sys.modules:  # it has looked who we are when it was imported
        importlib.import_module("lightning_utilities.core.rank_zero").rank_zero_only.rank = rank


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
            runpy.run_path(script, run_name="__main__")
            return
        ranks.append(process)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks]
    sys.exit(next((code for code in codes if code), 0))


if __name__ == "__main__":
    main()

"""Runs the commands of pages in a folder, as a reader's shell would."""

import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from pages import ROOT

#: What commands import: it is imported once for all of them.
MODULES = (
    "torch", "torch._dynamo", "rich.console", "rich.table", "transformers", "transformers.trainer",
    "transformers.models.gpt2.modeling_gpt2", "accelerate", "lightning.pytorch.cli", "sketch_plugins",
)  # fmt: skip
LIMIT = 240
FORKS = Path(__file__).with_name("forks.py")


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


class Ran(NamedTuple):
    status: int
    output: str


class Shell:
    """``shell(command, folder)``: the exit status and the output of a command.

    Commands of Python that need nothing of a shell are run in forks of one process (forks.py), others by bash. With a
    GPU, or on another system than Linux, bash runs all of them.
    """

    def __init__(self) -> None:
        self.server = None
        self.output = tempfile.NamedTemporaryFile("r", errors="replace")

    def __call__(self, command: str, folder: Path) -> Ran:
        env = {
            "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "COLUMNS": "160",
            "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "PET_MASTER_PORT": free_port(),  # torchrun's; it would take the same one in other tests that run now
            "HOME": str(folder / "home"), "HF_HOME": str(folder / "home" / "hub"), "TMPDIR": str(folder),
            # As in an activated environment, and with this checkout in place of an installed package.
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]),
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(ROOT), str(ROOT / "integrations"), os.environ.get("PYTHONPATH")])
            ),
        }  # fmt: skip
        plain = re.fullmatch(r"(sketch-plugins|python (?!-)[^ ]+)( [^>|&$~]*)?", command)
        if plain and sys.platform == "linux" and not torch.cuda.is_available():
            status = self.fork(shlex.split(command), folder, env)
        else:
            status = self.bash(command, folder, {**os.environ, **env})
        self.output.seek(0)
        return Ran(status, self.output.read())

    def fork(self, words: list[str], folder: Path, env: dict[str, str]) -> int:
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, str(FORKS), ",".join(MODULES)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                text=True, env={**os.environ, "PYTHONPATH": env["PYTHONPATH"], "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        task = {"words": words, "folder": str(folder), "env": env, "output": self.output.name, "limit": LIMIT}
        self.server.stdin.write(json.dumps(task) + "\n")
        self.server.stdin.flush()
        status = self.server.stdout.readline()
        assert status, "forks.py has ended; its error is in the captured stderr"
        return int(status)

    def bash(self, command: str, folder: Path, env: dict[str, str]) -> int:
        with open(self.output.name, "w") as output:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=env, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                return process.wait(LIMIT)
            finally:
                with contextlib.suppress(ProcessLookupError):  # what the command has started and left
                    os.killpg(process.pid, signal.SIGKILL)

    def end(self) -> None:
        if self.server is not None:
            self.server.stdin.close()
            self.server.wait(30)
        self.output.close()

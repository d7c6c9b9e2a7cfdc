"""Other projects' programs, run as their authors say, and the optimizers that took their steps.

torch, not this package, says which optimizers these were: torch's hook on all optimizers records each step, in every
process (`witness/sitecustomize.py`). Nothing is downloaded: models are made from configurations, and texts and
tokenizers are generated. A client that is not installed is skipped by its name; `make clients` installs all of them.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

import pytest

WITNESS = str(Path(__file__).parent / "witness")


class Ran(NamedTuple):
    """A finished client: its exit status, its output, and the steps of optimizers in its processes."""

    status: int
    output: str
    steps: list


@pytest.fixture
def client(tmp_path):
    """``client(*command)``: `sketch-plugins run` with it in ``tmp_path``; ``--optim`` and so on are arguments, too."""
    file = tmp_path / "steps.jsonl"

    def run(*command, env=None, timeout=300):
        file.unlink(missing_ok=True)
        quiet = {
            "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "TMPDIR": str(tmp_path),
            "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"),
            # As in an activated environment, because some clients look for its commands themselves.
            "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]),
        }  # fmt: skip
        path = os.pathsep.join(filter(None, [WITNESS, str(tmp_path), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-m", "sketch_plugins", "run", *map(str, command)],
            cwd=tmp_path,
            env={**os.environ, **quiet, "PYTHONPATH": path, "CLIENT_WITNESS": str(file), **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        lines = file.read_text().splitlines() if file.exists() else []
        return Ran(done.returncode, done.stdout, [json.loads(line) for line in lines])

    return run

"""Programs as their authors wrote them, run by `sketch-plugins run` in a process of its own."""

import os
import subprocess
import sys

import pytest

#: On a busy machine gloo's threads sometimes abort a program of two processes at its exit, even after
#: destroy_process_group. Such a program is run once more.
GLOO = "terminate called without an active exception"


@pytest.fixture
def run(tmp_path):
    """``run(*arguments)``: `sketch-plugins run` with them in ``tmp_path``; ``python=True``: python itself."""

    def start(*arguments, python=False, env=None, timeout=300):
        command = [sys.executable] if python else [sys.executable, "-m", "sketch_plugins", "run"]
        quiet = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "TMPDIR": str(tmp_path)}
        for _ in range(2):
            done = subprocess.run(
                [*command, *map(str, arguments)],
                cwd=tmp_path,
                env={**os.environ, **quiet, **(env or {})},
                capture_output=True,
                text=True,
                timeout=timeout,
            )
            if not done.returncode or GLOO not in done.stderr:
                break
        return done

    return start


@pytest.fixture
def results():
    """``results(done)``: the words behind RESULT of each line, of a program that ended well; ranks write them whole."""

    def of(done):
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return sorted(line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT"))

    return of

"""Real engines: scripts of this folder, run by several processes; what they measured is judged by the tests."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="deepspeed is not installed")

os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="session")
def results_of(launch_ranks, tmp_path_factory):
    """``results_of("script.py")``: what its ranks wrote; the script is run once."""
    known = {}

    def run(script):
        if script not in known:
            known[script] = [{"error": f"{script} did not finish"}] * 2
            folder = tmp_path_factory.mktemp(script.removesuffix(".py"))
            launch_ranks(Path(__file__).with_name(script), folder / "out", folder / "work")
            known[script] = [json.loads((folder / f"out.{rank}").read_text()) for rank in (0, 1)]
        for rank in known[script]:
            if "error" in rank:
                pytest.fail(rank["error"], pytrace=False)
        return known[script]

    return run

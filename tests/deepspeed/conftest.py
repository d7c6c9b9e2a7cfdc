"""Real engines: scripts of this folder, run by several processes; what they measured is judged by the tests."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="deepspeed is not installed")

os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture(scope="session")
def results_of(launch_ranks, once):
    """``results_of("script.py")``: what its ranks wrote; the script is run once."""

    def run(script):
        path = Path(__file__).with_name(script)
        # On a busy machine ranks that wait for each other after every small message take many times what they need.
        limit = 1200
        folder = once(script, lambda at: launch_ranks(path, at / "out", at / "work", timeout=limit), timeout=limit)
        ranks = [json.loads((folder / f"out.{rank}").read_text()) for rank in (0, 1)]
        for rank in ranks:
            if "error" in rank:
                pytest.fail(rank["error"], pytrace=False)
        return ranks

    return run

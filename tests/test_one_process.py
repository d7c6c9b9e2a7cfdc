"""Frameworks whose other tests start several processes: one process takes the steps of a plain loop."""

import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("one_process.py")


@pytest.mark.parametrize("framework", ["accelerate", "deepspeed"])
def test_takes_the_steps_of_a_plain_loop(framework, launch_ranks):
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    (said,) = launch_ranks(SCRIPT, framework, world=1)
    (line,) = [line for line in said.splitlines() if line.startswith("{")]
    found = json.loads(line)
    assert found["optimizer"] == "CSAdam"
    assert found["moved"] > 1e-2
    # accelerate calls the optimizer itself. At the end of ZeRO's flat piece, instructions may round differently.
    assert found["apart"] <= (0.0 if framework == "accelerate" else 1e-6)

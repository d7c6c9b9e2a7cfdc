"""A run that is killed by SIGKILL goes on from its last whole checkpoint, and ends where it would have ended."""

import json
import signal
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed"),
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL"),
]

SCRIPT = Path(__file__).with_name("killed_worker.py")


@pytest.fixture(scope="module")
def ends(launch_ranks, kill_ranks, tmp_path_factory):
    """(result of the uninterrupted run, result of the killed one) for both ranks; starting takes most of the time."""
    folder = tmp_path_factory.mktemp("killed")
    whole, killed = folder / "whole", folder / "killed"
    for path in (whole, killed):
        path.mkdir()
    launch_ranks(SCRIPT, whole, folder / "result.whole")
    # Only one rank, in the middle of a step and of an epoch: the other one must not continue without it.
    kill_ranks([1], killed / "paused", SCRIPT, killed, folder / "result.none", "step 3")
    assert checkpoints(killed) == ["step2"]
    kill_ranks([0, 1], killed / "paused", SCRIPT, killed, folder / "result.none", "half a file 6")
    assert checkpoints(killed) == ["step2", "step4", "step6.parts"]
    kill_ranks([0, 1], killed / "paused", SCRIPT, killed, folder / "result.none", "half the ranks 8")
    assert checkpoints(killed) == ["step2", "step4", "step6", "step8.parts"]
    assert not list(folder.glob("result.none*"))
    launch_ranks(SCRIPT, killed, folder / "result.killed")
    return [
        [json.loads(Path(folder / f"result.{which}.{rank}").read_text()) for rank in (0, 1)]
        for which in ("whole", "killed")
    ]


def checkpoints(folder):
    return sorted(file.name for file in folder.glob("step*"))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_ends_as_if_it_had_not_been_killed(kind, name, ends):
    check(f"{kind} {name}", ends)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_weights_of_24_bits_end_as_if_the_run_had_not_been_killed(kind, ends):
    check(f"{kind} cs_adam 24 bits", ends)


def check(key, ends):
    for whole, killed in zip(*ends, strict=True):
        assert (whole["first"], killed["first"]) == (0, 6)
        assert whole["losses"][key][6:] == killed["losses"][key]
        assert whole["weights"][key] == killed["weights"][key]

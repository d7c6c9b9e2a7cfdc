"""Trainer on two processes: DDP and FSDP2, resumed, and killed in the middle of an epoch."""

import json
import signal
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("distributed_worker.py")


def read(folder, name):
    return [json.loads(Path(folder / f"{name}.{rank}").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def whole(launch_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    launch_ranks(SCRIPT, "whole", folder, folder / "result")
    return read(folder, "result")


def test_ranks_are_equal(whole):
    first, second = whole
    assert first["ddp"] == second["ddp"]  # losses, weights, state
    for key in ("losses", "weights"):  # state is that of a rank's shards
        assert first["fsdp2"][key] == second["fsdp2"][key]
    assert all(run["losses"]["6"] < run["losses"]["1"] for run in first.values())


def test_fsdp2_resumes_bit_for_bit(whole):
    for rank in whole:
        assert rank["fsdp2"] == rank["fsdp2 resumed"]


def test_a_warm_start_under_ddp_goes_on_where_adamw_was(whole):
    assert whole[0]["adamw resumed"] == whole[1]["adamw resumed"]  # losses, weights, state
    before, after = whole[0]["adamw"]["losses"], whole[0]["adamw resumed"]["losses"]
    for step in ("4", "5", "6"):
        # Three steps in float32 whose operations are in another order; a cold start would be off by far more.
        assert after[step] == pytest.approx(before[step], rel=1e-5)
    assert whole[0]["adamw resumed"]["state"] != whole[0]["adamw"]["state"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_ddp_killed_in_the_middle_of_an_epoch_goes_on_bit_for_bit(whole, launch_ranks, kill_ranks, tmp_path):
    kill_ranks([0, 1], tmp_path / "paused", SCRIPT, "killed", tmp_path, tmp_path / "none")
    assert [file.name for file in (tmp_path / "ddp").iterdir()] == ["checkpoint-3"]
    launch_ranks(SCRIPT, "goes on", tmp_path, tmp_path / "result")
    for end, expected in zip(read(tmp_path, "result"), whole, strict=True):
        assert end["ddp"] == expected["ddp"]

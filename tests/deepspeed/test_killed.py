"""A DeepSpeed run that is killed by SIGKILL goes on from its last whole checkpoint, and ends where it would have."""

import json
import signal
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")

SCRIPT = Path(__file__).with_name("killed.py")


@pytest.fixture(scope="module")
def ends(launch_ranks, kill_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    whole, killed = folder / "whole", folder / "killed"
    for path in (whole, killed):
        path.mkdir()
    launch_ranks(SCRIPT, whole, folder / "result.whole")
    kill_ranks([0, 1], killed / "paused", SCRIPT, killed, folder / "result.none", "step 3")
    assert (killed / "1 cs_adam" / "latest").read_text() == "step2"
    kill_ranks([0, 1], killed / "paused", SCRIPT, killed, folder / "result.none", "half a file 6")
    # The torn one is there, and nothing says that it was the last.
    assert (killed / "1 cs_adam" / "step6").is_dir() and (killed / "1 cs_adam" / "latest").read_text() == "step4"
    launch_ranks(SCRIPT, killed, folder / "result.killed")
    return [
        [json.loads(Path(folder / f"result.{which}.{rank}").read_text()) for rank in (0, 1)]
        for which in ("whole", "killed")
    ]


@pytest.mark.parametrize("setting", ["2", "3"])
def test_ends_as_if_it_had_not_been_killed(setting, name, ends):
    check(f"{setting} {name}", ends)


@pytest.mark.parametrize("setting", ["0 bf16", "1", "2 offload"])
def test_so_in_the_other_settings(setting, ends):
    check(f"{setting} cs_adam", ends)


def check(run, ends):
    for whole, killed in zip(*ends, strict=True):
        assert (whole["first"], killed["first"]) == (0, 4)
        assert whole["losses"][run][4:] == killed["losses"][run]
        assert whole["weights"][run] == killed["weights"][run]

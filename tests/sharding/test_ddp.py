"""Every optimizer under torch's DistributedDataParallel: equal on all ranks, and to one process, to the last bit."""

import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")

SCRIPT = Path(__file__).with_name("ddp_worker.py")
WAYS = ("plain", "static_graph", "find_unused_parameters", "no_sync", "sparse")


@pytest.fixture(scope="module")
def results(launch_ranks, tmp_path_factory):
    """One launch for everything here: starting takes longer than the rest."""
    folder = tmp_path_factory.mktemp("ddp")
    launch_ranks(SCRIPT, folder / "results", folder)
    return [json.loads(Path(folder / f"results.{rank}").read_text()) for rank in (0, 1)]


def test_fsdp1_is_refused(name, results):
    for rank in results:
        assert rank[name]["fsdp1"] == "ok", rank[name]["fsdp1"]


@pytest.mark.parametrize("way", WAYS)
def test_equal_on_all_ranks_to_one_process_and_after_a_resume(way, name, results):
    for rank in results:
        if rank[name][way] != "ok":
            pytest.fail(rank[name][way], pytrace=False)

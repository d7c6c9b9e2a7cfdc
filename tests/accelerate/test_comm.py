"""MemSGDKwargs in accelerate and enable_memsgd in Trainer, in two processes: the checks are in comm_worker.py."""

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

WORKER = Path(__file__).with_name("comm_worker.py")


def test_two_ranks(launch_ranks, tmp_path):
    launch_ranks(WORKER, "accelerate,trainer", tmp_path)

"""Every optimizer of the registry on parameters that FSDP2 has sharded. The checks are in fsdp2_worker.py."""

from pathlib import Path

WORKER = Path(__file__).with_name("fsdp2_worker.py")

# A launch takes seconds before the first check, so all checks for the same number of processes share one.


def test_two_ranks(launch_ranks, tmp_path):
    checks = (
        "equal,remembered,agreed,experts,trains,bytes,placements,nan,deferred,errors,sharded_checkpoint,"
        "full_checkpoint,fsdp1"
    )
    launch_ranks(WORKER, checks, tmp_path / "checkpoints", world=2)


def test_four_ranks(launch_ranks, tmp_path):
    checks = "equal,remembered,experts,sharded_checkpoint,meshes,tensor_parallel"
    launch_ranks(WORKER, checks, tmp_path / "checkpoints", world=4)

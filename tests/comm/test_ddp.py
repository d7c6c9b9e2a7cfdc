"""The communication hook in DistributedDataParallel on gloo. The checks are in ddp_worker.py."""

from pathlib import Path

WORKER = Path(__file__).with_name("ddp_worker.py")

# A launch takes seconds before the first check: all that need the same number of processes share one.


def test_two_ranks(launch_ranks):
    launch_ranks(
        WORKER,
        "reference,telescopes,dense,momentum,masking,no_sync,nonfinite,put_back,scaler,half,sparse,unused,join,pickle,"
        "wire,registry,replicas,variants,errors",
    )


def test_four_ranks(launch_ranks):
    launch_ranks(WORKER, "reference,telescopes,momentum,nonfinite,join,fits,again", world=4)


def test_checkpoints(launch_ranks, tmp_path):
    """Saved by two ranks, resumed by two, four and one."""
    launch_ranks(WORKER, "save", tmp_path)
    launch_ranks(WORKER, "resume", tmp_path, world=4)
    launch_ranks(WORKER, "resume", tmp_path, world=1)

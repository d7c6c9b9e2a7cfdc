"""The communication hook in DistributedDataParallel on gloo. The checks are in ddp_worker.py."""

from pathlib import Path

WORKER = Path(__file__).with_name("ddp_worker.py")

# A launch takes seconds before the first check, so all checks for the same number of processes share one.


def test_two_four_and_one_rank(launch_ranks, tmp_path):
    """Two, four and one ranks resume what two ranks have saved."""
    launch_ranks(
        WORKER,
        "reference,telescopes,dense,momentum,masking,no_sync,nonfinite,put_back,scaler,half,sparse,unused,join,pickle,"
        "wire,registry,replicas,variants,errors,save",
        tmp_path,
    )
    launch_ranks(WORKER, "reference,telescopes,momentum,nonfinite,join,fits,again,resume", tmp_path, world=4)
    launch_ranks(WORKER, "resume", tmp_path, world=1)

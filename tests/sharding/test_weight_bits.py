"""``weight_bits`` on parameters that FSDP2 has sharded, and other numbers of ranks. See weight_bits_worker.py."""

from pathlib import Path

from sketch_plugins.checkpoints.distributed import reshard

WORKER = Path(__file__).with_name("weight_bits_worker.py")


def test_uneven_shards_and_another_number_of_ranks(launch_ranks, tmp_path):
    launch_ranks(WORKER, "train", tmp_path, world=2)
    done = reshard(tmp_path / "SM3", 3, tmp_path / "three")
    assert done.exact["weight correction"] > 0 and not done.cut["weight correction"]
    launch_ranks(WORKER, "load", tmp_path / "three", world=3)

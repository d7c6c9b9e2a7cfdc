"""The optimizers through accelerate: DDP, FSDP2, DeepSpeed on two processes, saved and loaded by accelerate itself."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed")

SCRIPT = Path(__file__).with_name("worker.py")
TORCH = ("ddp", "ddp 24 bits", "fsdp 2 sharded", "fsdp 2 full bf16", "fsdp 2 sharded 24 bits", "fsdp 1", "exact")
DEEPSPEED = ("zero2", "zero2 offload", "zero3", "zero2 named")


def launched(launch_ranks, folder, runners):
    """One launch for all of them: starting takes longer than the rest."""
    launch_ranks(SCRIPT, folder / "results", folder, ",".join(runners))
    return [json.loads(Path(folder / f"results.{rank}").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def of_torch(launch_ranks, tmp_path_factory):
    return launched(launch_ranks, tmp_path_factory.mktemp("torch"), TORCH)


@pytest.fixture(scope="module")
def of_deepspeed(launch_ranks, tmp_path_factory):
    return launched(launch_ranks, tmp_path_factory.mktemp("deepspeed"), DEEPSPEED)


def look(results, runner, name):
    for rank in results:
        said = rank.get(runner, {}).get(name, "did not run, for another one failed before")
        if said != "ok":
            pytest.fail(said, pytrace=False)


@pytest.mark.parametrize("runner", ["ddp", "fsdp 2 sharded", "fsdp 2 full bf16"])
def test_trains_and_resumes_bit_for_bit(runner, name, of_torch):
    look(of_torch, runner, name)


@pytest.mark.parametrize("runner", ["ddp 24 bits", "fsdp 2 sharded 24 bits"])
def test_weights_of_24_bits_resume_bit_for_bit_and_are_exported(runner, of_torch):
    look(of_torch, runner, "cs_adam")


def test_fsdp1_is_refused(name, of_torch):
    look(of_torch, "fsdp 1", name)


@pytest.mark.parametrize("optimizer", ["cs_adam", "cs_rmsprop", "cs_adagrad"])
def test_fsdp2_equals_ddp_where_nothing_is_compressed(optimizer, of_torch):
    look(of_torch, "exact", optimizer)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("runner", DEEPSPEED)
def test_deepspeed_trains_and_resumes_with_our_optimizer(runner, of_deepspeed):
    # Also with offloading, where accelerate would replace the optimizer by DeepSpeedCPUAdam.
    look(of_deepspeed, runner, "cs_adam")

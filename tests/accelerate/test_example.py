"""The example with each of its configurations, shortened, on two processes; stopped and continued."""

import importlib.util
import json
from pathlib import Path

import pytest

for package in ("accelerate", "transformers", "tokenizers"):
    pytest.importorskip(package, reason="the examples need the extra `demo`")

SCRIPT = Path(__file__).with_name("example_worker.py")
KINDS = {
    "ddp": "MULTI_CPU, 2 process(es)",
    "fsdp2": "FSDP, 2 process(es)",
    "deepspeed_zero2": "DEEPSPEED, 2 process(es)",
}


@pytest.fixture(scope="module")
def results(launch_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("example")
    text = folder / "text.txt"
    text.write_text("".join(f"{n} times {m} is {n * m}.\n" for n in range(40) for m in range(60)))
    configs = [name for name in KINDS if name != "deepspeed_zero2" or importlib.util.find_spec("deepspeed")]
    launch_ranks(SCRIPT, folder, text, *configs)
    return {
        name: [json.loads((folder / name / f"{which}.json").read_text()) for which in ("whole", "results")]
        for name in configs
    }


@pytest.mark.parametrize("config", KINDS)
def test_trains_and_goes_on_from_its_last_checkpoint(config, results):
    if config not in results:
        pytest.skip("deepspeed is not installed")
    whole, resumed = results[config]
    assert whole["run_by"] == resumed["run_by"] == KINDS[config]
    assert [step for step, _ in whole["train_curve"]] == [1, 2, 3, 4, 5, 6]
    assert whole["train_curve"][3:] == resumed["train_curve"]
    assert whole["eval_loss"] == resumed["eval_loss"] < whole["train_curve"][0][1]
    shards = 1 if config == "ddp" else 2
    assert whole["state_bytes"] < 0.3 * 8 * whole["parameters"] / shards


def test_ways_of_running_agree(results):
    # Data and weights are the same. The cut of the parameters differs, and the order of summing the gradients' norm.
    losses = [whole["eval_loss"] for whole, _ in results.values()]
    assert max(losses) - min(losses) < 0.01

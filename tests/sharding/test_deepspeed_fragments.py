"""`sketch_plugins.sharding.deepspeed` on DeepSpeed's own engines: results are right, and moved attributes are named."""

import json
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="deepspeed is not installed")

# The script imports deepspeed on its own; the names of its configurations are read without that.
SCRIPT = Path(__file__).with_name("zero_fragments.py")
CONFIGS = [
    line.split('"')[1]
    for line in SCRIPT.read_text().splitlines()
    if line.startswith(('    "0', '    "1', '    "2', '    "3'))
]


@pytest.fixture
def results(launch_ranks, once):
    """One launch of two processes for everything here: starting takes longer than the rest."""
    folder = once("zero_fragments", lambda folder: launch_ranks(SCRIPT, folder / "results"))
    return [json.loads((folder / f"results.{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("config", CONFIGS)
def test_fragments_are_the_original_weights_each_element_once(config, results):
    for rank in results:
        said = rank.get(config, "did not run, for another one failed before")
        if said != "ok":
            pytest.fail(said, pytrace=False)


def test_four_ranks(launch_ranks, tmp_path):
    launch_ranks(SCRIPT, tmp_path / "results", world=4)
    for rank in range(4):
        said = json.loads((tmp_path / f"results.{rank}").read_text())
        assert len(said) == 6 and set(said.values()) == {"ok"}, said


@pytest.mark.parametrize(
    ("stage", "attribute"),
    [
        ("2", "_dp_group"),
        ("2", "_hp_mapping"),
        ("2", "_hp_mapping.hp_fragment"),
        ("2", "views of one buffer"),
        ("3", "_z3_optimizer"),
        ("3", "ds_numel"),
        ("3", "ds_process_group"),
        ("3", "grad_position"),
        ("3", "fp32_partitioned_groups_flat"),
        ("3", "get_param_id"),
    ],
)
def test_what_has_moved_is_named(stage, attribute, results):
    for rank in results:
        said = rank[f"contract {stage}"]
        assert said[""] == "nothing"  # once all is back
        assert attribute in said[attribute]

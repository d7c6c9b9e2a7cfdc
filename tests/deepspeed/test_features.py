"""What a DeepSpeed configuration may ask of an optimizer, and what is refused: see features.py for what is run."""

import json
from pathlib import Path

import pytest

from sketch_plugins import registry


@pytest.fixture
def ranks(results_of):
    return results_of("features.py")


@pytest.mark.parametrize("stage", ["1", "3"])
def test_every_name_is_an_optimizer_of_the_configuration(name, stage, ranks):
    assert ranks[0]["classes"][f"{name} {stage}"] == registry.get(name).cls.__name__


@pytest.mark.parametrize("stage", ["1", "3"])
def test_parameters_are_called_by_their_names_in_the_model(stage, ranks):
    """Those of which a rank's flat partition holds a piece; together all of them."""
    assert all(rank["names"][stage] for rank in ranks)
    assert {name for rank in ranks for name in rank["names"][stage]} == set(ranks[0]["names"]["model"])


@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_a_step_of_pieces_that_is_remembered_is_the_same(stage, ranks):
    pytest.importorskip("numba", reason="Numba is not installed")
    for rank in ranks:
        said = rank["remembered"][stage]
        assert said["differs"] == 0 and set(said["kinds"]) == {"RememberedPieces"}


def test_other_optimizers_are_left_alone(ranks):
    assert ranks[0]["classes"]["AdamW"] == "AdamW"


def test_betas_are_a_list_in_json(ranks):
    assert ranks[0]["betas"] == [0.8, 0.99]


@pytest.mark.parametrize(
    "run",
    [
        "3",
        "sub-groups",
        "offload 2",
        "offload 3",
        "client",
        "client offload 2",
        "client offload 3",
        "callable offload",
        "offload_states 2",
        "offload_states 3",
    ],
)
def test_the_same_weights_wherever_they_are_computed(run, ranks):
    # Elements by themselves: the preset is exact.
    assert all(rank["differs"][run] <= 1e-6 for rank in ranks)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_accumulates_and_clips(stage, ranks):
    # DeepSpeed adds up the norm's squares in another order than torch.
    assert all(rank["differs"][f"accumulated, clipped {stage}"] <= 1e-5 for rank in ranks)


@pytest.mark.parametrize("stage", [2, 3])
def test_state_and_masters_are_offloaded(stage, ranks):
    assert {"optim_states", "hp_params"} <= set(ranks[0][f"offloaded {stage}"])


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unknown", "cs_adam has no option 'compresion'. Did you mean 'compression'?"),
        ("impossible", "lr=-1.0 is not allowed: lr must be a finite number >= 0"),
        ("type", "lr='fast' is not allowed"),
        ("betas", "betas=[0.9] is not allowed: betas must be two numbers in [0, 1)"),
        ("together", "width=8 and compression=0.1 both set the number of buckets"),
        ("auto", '"lr": "auto" is filled in by Hugging Face\'s Trainer only'),
        ("adam's", "cs_adam has no option 'adam_w_mode'"),
        (
            "name",
            '{"type": "cs_adamw"} of the DeepSpeed configuration does not exist; the optimizers of sketch-plugins are',
        ),
        ("nvme", '"device": "nvme"'),
        ("ratio", '"ratio": 0.5'),
        ("elastic", "sketch-plugins reshard CHECKPOINT --world-size N"),
        ("universal", "sketch-plugins reshard CHECKPOINT --world-size N"),
        ("client elastic", "sketch-plugins reshard CHECKPOINT --world-size N"),
        ("weight_bits", "DeepSpeed keeps a float32 copy of bfloat16 and float16 weights"),
        ("forced", "ZeRORuntimeException: You are using ZeRO-Offload with a client provided optimizer"),
    ],
)
def test_mistakes_are_named_before_training_starts(case, message, ranks):
    for rank in ranks:
        assert message in rank["said"][case]


def test_another_number_of_processes_is_refused_with_the_command_that_helps(ranks, once, launch_ranks, tmp_path):
    saved = once("features.py", lambda folder: None) / "work"
    launch_ranks(Path(__file__).with_name("features.py"), tmp_path / "one", saved, world=1)
    said = json.loads((tmp_path / "one.0").read_text())["said"]
    assert "was written by 2 processes, and 1 processes are loading it" in said
    assert f"sketch-plugins reshard {saved}/two --world-size 1" in said

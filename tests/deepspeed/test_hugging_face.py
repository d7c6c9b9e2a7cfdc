"""Trainer and accelerate with DeepSpeed configurations, two processes: see hugging_face.py for what they do."""

import math

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

RUNS = ("no block", "stage 3", "block", "block only", "offload", "offload, class", "offload, block", "accelerate")


@pytest.fixture
def ranks(results_of):
    return results_of("hugging_face.py")


@pytest.mark.parametrize("run", RUNS)
def test_trains_with_the_optimizer_that_was_asked_for(run, ranks):
    for rank in ranks:
        losses = rank[run]["losses"]
        assert rank[run]["class"] == "CSAdam"
        assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]


@pytest.mark.parametrize("run", ["no block", "stage 3", "block", "block only", "offload", "offload, class"])
def test_the_callback_sees_the_state(run, ranks):
    dense = 2 * 4 * sum((64 * 32, 16 * 32, 4 * 32, 32 * 96 + 96, 32 * 32 + 32, 2 * 32 * 128 + 128 + 32, 64)) / 2
    for rank in ranks:
        assert 0 < rank[run]["state_bytes"] < 0.6 * dense


def test_without_a_block_trainer_makes_the_groups(ranks):
    decayed, rest = ranks[0]["no block"]["groups"]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert decayed["compression"] == 0.2


def test_auto_values_are_those_of_the_arguments(ranks):
    (group,) = ranks[0]["block"]["groups"]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ([0.9, 0.99], 1e-8, 0.1)
    assert group["compression"] == 0.2


def test_offloading_changes_nothing(ranks):
    """Bit for bit where gradients are not clipped."""
    for rank in ranks:
        plain = rank["unclipped"]["digest"]
        assert plain == rank["unclipped, offload"]["digest"] == rank["unclipped, offload, class"]["digest"]
        assert rank["unclipped, stage 3"]["digest"] == rank["unclipped, stage 3, offload"]["digest"]
        assert plain != rank["no block"]["digest"]  # in which some of the gradients are clipped


def test_where_gradients_are_clipped_offloading_changes_the_rounding_of_their_norm(ranks):
    """DeepSpeed takes the root of the same sum by Python with offload, by torch without.

    Torch asks MKL for roots of float32, which are wrong in the last bit on some processors.
    """
    ulp = 2.0**-23
    for rank in ranks:
        plain = rank["no block"]
        assert any(norm > 1 for norm in plain["norms"])
        for run in (rank["offload"], rank["offload, class"]):
            # The first step's gradients are the same bits. A group's norm is at most an ulp off; the norm of the two
            # groups' norms is rounded three more times, in each of the runs.
            assert run["norms"][0] == pytest.approx(plain["norms"][0], rel=4 * ulp)
            if run["norms"] == plain["norms"]:
                assert run["digest"] == plain["digest"]
            # An ulp of the norm is one of every gradient. The weights cannot be compared: the gradient of the keys'
            # bias is 0 but for rounding, and Adam makes steps of full size of that. The loss does not depend on it.
            assert run["losses"] == pytest.approx(plain["losses"], rel=1e-5)


def test_resumed_run_is_the_uninterrupted_one(ranks):
    for rank in ranks:
        assert rank["resumed"]["digest"] == rank["no block"]["digest"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "sm3 auto",
            'ValueError: "betas": "auto" of the DeepSpeed configuration stands for Adam\'s value, but sm3 has betas',
        ),
        ("args beside block", "ValueError: optim_args='min_compress_size=256,compression=0.2' would be ignored"),
        ("args beside block, optim left alone", "ValueError: optim_args='compresion=banana' would be ignored"),
        ("targets beside block", "ValueError: optim_target_modules=['nothing_like_this'] would be ignored"),
        (
            "another block",
            "ValueError: optim='cs_adam' would be ignored, because the DeepSpeed configuration has an optimizer",
        ),
        ("force", "ValueError: zero_force_ds_cpu_optimizer=true would replace optim='cs_adam' by DeepSpeedCPUAdam"),
    ],
)
def test_what_would_be_ignored_is_an_error(case, message, ranks):
    assert ranks[0]["said"][case].startswith(message)


def test_a_block_of_ours_needs_no_import(ranks):
    assert ranks[0]["said"]["not registered"] == "nothing"

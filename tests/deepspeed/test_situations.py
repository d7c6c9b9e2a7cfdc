"""What may befall an optimizer between two steps: see situations.py for what is run."""

import pytest


@pytest.fixture
def ranks(results_of):
    return results_of("situations.py")


def test_looking_at_state_that_is_offloaded_changes_nothing(ranks):
    assert all(rank["looked_at_while_away"] for rank in ranks)


@pytest.mark.parametrize("stage", ["2", "3"])
def test_a_copy_keeps_its_compression(stage, ranks):
    for rank in ranks:
        plain, *copies = rank["bytes_of_copies"][stage]
        assert copies == [plain] * 2


def test_not_a_number_on_one_rank_is_an_error_on_all(ranks):
    assert "'b.weight' of shape (64, 96)" in ranks[1]["not_a_number"]["said"]
    assert "on another rank" in ranks[0]["not_a_number"]["said"]
    assert all(rank["not_a_number"]["second group"] for rank in ranks)


def test_what_zero_makes_impossible_is_refused(ranks):
    assert all("nonfinite='deferred' is not possible with DeepSpeed's ZeRO" in rank["deferred"] for rank in ranks)


def test_an_optimizer_after_its_engine_waits_for_nobody(ranks):
    assert all(rank["after_its_engine"] for rank in ranks)


def test_a_preconditioner_that_is_not_finite_is_refused(ranks):
    assert all("impossible values" in rank["poisoned"] for rank in ranks)

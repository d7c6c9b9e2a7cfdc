"""Every optimizer of the registry in every stage of ZeRO, two processes: see matrix.py for what they do."""

import math

import pytest

from sketch_plugins import registry

CONFIGS = ("zero0 bf16", "zero1", "zero2", "zero3", "zero2 offload")


#: Where the state lies concerns no rule: a first moment in int8, a cover, preconditioners.
OFFLOADED = ("cs_adam", "sm3", "sketchy")
CASES = [(name, config) for name in registry.names() for config in CONFIGS[: None if name in OFFLOADED else -1]]


@pytest.fixture(params=CASES, ids=" ".join)
def case(request):
    return request.param


@pytest.fixture
def name(case):
    return case[0]


@pytest.fixture
def config(case):
    return case[1]


@pytest.fixture
def case_of(results_of):
    """What both ranks found in one case. A case that failed fails its own tests, and no others."""

    def find(key):
        ranks = [rank[key] for rank in results_of("matrix.py")]
        for rank in ranks:
            if "error" in rank:
                pytest.fail(rank["error"], pytrace=False)
            if "skip" in rank:
                pytest.skip(rank["skip"])
        return ranks

    return find


@pytest.fixture
def ranks(name, config, case_of):
    return case_of(f"{name} {config}")


def test_trains_with_the_optimizer_that_was_asked_for(name, ranks):
    for rank in ranks:
        assert rank["class"] == registry.get(name).cls.__name__
        assert all(map(math.isfinite, rank["losses"]))


def test_resumes_bit_for_bit(ranks):
    assert all(rank["resumed"] for rank in ranks)


def test_where_each_element_is_by_itself_it_is_the_run_of_one_process(name, ranks):
    # A preconditioner of a piece is not a piece of the preconditioner; the sign of an average next to 0 is rounding's.
    if name in ("sketchy", "cs_lion"):
        assert all("differs" not in rank for rank in ranks)
        return
    for rank in ranks:
        assert rank["moved"] > 1e-3
        # Not 0: at the end of a piece instructions may round otherwise than in the middle of a tensor.
        assert rank["differs"] <= 1e-6, rank["where"]


def test_state_is_spread_over_the_processes(name, config, ranks, results_of):
    whole = results_of("matrix.py")[0][name]
    for rank in ranks:
        if config == "zero0 bf16":
            assert rank["bytes"] == whole["bytes"]
        else:
            # A process that holds rows of a matrix has a sketch of its columns for itself (Sketchy).
            assert rank["bytes"] <= 1.1 * whole["bytes"] / 2 + whole["columns"] / 2
            assert rank["bytes"] >= 0.4 * whole["bytes"]


OVERFLOWS = [(config, how) for config in CONFIGS[:-1] for how in ("fp16", "bf16", "fp32")]
OVERFLOWS.remove(("zero0 bf16", "fp32"))  # without ZeRO nothing of DeepSpeed looks at gradients in fp32


# DeepSpeed decides about a step, whatever the optimizer: the one with the most state beside the usual one.
OVERFLOWING = ("cs_adam", "sketchy")


@pytest.mark.parametrize("optimizer", OVERFLOWING)
@pytest.mark.parametrize(("config", "how"), OVERFLOWS)
def test_a_step_that_overflows_leaves_everything_as_it_was(optimizer, config, how, case_of):
    """fp16 by DeepSpeed's own scale of the loss, bf16 by an infinite element, fp32 by a scale that is too large."""
    for rank in case_of(f"{optimizer} {config} overflow {how}"):  # the gradients of one rank were not finite; all skip
        assert rank == {"skipped": 1, "untouched": True, "finite": True, "moves": True}


def test_every_case_is_tested(results_of):
    tested = set(map(" ".join, CASES))
    tested |= {f"{name} {config} overflow {how}" for name in OVERFLOWING for config, how in OVERFLOWS}
    for rank in results_of("matrix.py"):
        assert rank.keys() == tested | set(registry.names())

"""MemSGDState without processes: options, checkpoints, the rule for another number of ranks."""

import pytest
import torch

from sketch_plugins.comm import BlockTopK, MemSGDState, redistribute
from sketch_plugins.comm.state import make_compressor


def params():
    return [("a", torch.nn.Parameter(torch.zeros(40, 5))), ("b", torch.nn.Parameter(torch.zeros(7)))]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": 1}, "start=1"),
        ({"min_size": -1}, "min_size=-1"),
        ({"momentum": 1.0}, r"momentum=1\.0"),
        ({"clip": -0.5}, r"clip=-0\.5"),
        ({"memory_dtype": "fp16"}, "memory_dtype='fp16' is not one of 'fp32', 'bf16'"),
        ({"seed": 0.5}, r"seed=0\.5"),
        ({"factor_masking": 1}, "factor_masking=1"),
        ({"density": 2}, "density=2"),
        ({"warmup": -3}, "warmup=-3"),
        ({"compressor": "best"}, "'topk', 'block_topk', 'randk', 'count_sketch'"),
    ],
)
def test_options(options, said):
    with pytest.raises(ValueError, match=said):
        MemSGDState(params(), **options)


def test_names():
    (name, p), other = params()
    for given, said in (
        ([], "empty"),
        ([p], "pairs"),
        ([(name, p), ("c", p)], "'c' is there twice"),
        ([(name, p), (name, other[1])], "'a' is there twice"),
    ):
        with pytest.raises(ValueError, match=said):
            MemSGDState(given)
    with pytest.raises(ValueError, match="none of the 2"):
        MemSGDState(params()).slot(torch.zeros(3))


def test_density_by_iteration():
    state = MemSGDState(params(), density=0.01, start=3, warmup=10)
    seen = []
    for _ in range(20):
        seen.append(state.density)
        state.end()
    assert seen[:4] == [1.0, 1.0, 1.0, 0.25] and seen[13:] == [0.01] * 7
    assert seen[3:14] == sorted(seen[3:14], reverse=True)


def state_of(rank, world, values, **options):
    state = MemSGDState(params(), **options)
    for _, p in zip("ab", state._bound, strict=True):
        state.slot(p)["error"].copy_(values[: p.numel()])
    state.iteration = 4
    return {**state.state_dict(), "rank": rank, "world_size": world}


def test_mean_of_the_memories():
    values = [torch.randn(200, generator=torch.Generator().manual_seed(rank)) for rank in range(3)]
    states = [state_of(rank, 3, v) for rank, v in enumerate(values)]
    merged = redistribute(states[::-1])
    assert torch.allclose(merged["memory"]["a"]["error"], sum(values) / 3, atol=1e-7)
    state = MemSGDState(params(), memory_dtype="bf16")
    state.load_gathered(states)
    assert state.iteration == 4 and state.memory["b"]["error"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="all 3 ranks"):
        redistribute(states[:2])
    with pytest.raises(ValueError, match="no states"):
        redistribute([])


def test_what_is_not_loaded():
    good = {**state_of(0, 1, torch.ones(200)), "rank": 0, "world_size": 1}
    state = MemSGDState(params())
    state.load_state_dict(good)
    for bad, said in (
        ({}, "version"),
        ({**good, "memory": {"a": {"error": torch.zeros(3)}}}, "has 3 entries, expected 200"),
        ({**good, "memory": {"a": {"error": torch.full((200,), float("nan"))}}}, "not finite"),
        ({**good, "world_size": 2}, "of 2 and this is rank 0 of 1"),
    ):
        with pytest.raises(ValueError, match=said):
            state.load_state_dict(bad)
    assert state.memory_norm() == pytest.approx(207**0.5) and state.memory_bytes() == 4 * 207


def test_compressors_by_name():
    assert isinstance(make_compressor("block_topk"), BlockTopK)
    assert make_compressor("randk", seed=5).seed == 5
    assert make_compressor(own := BlockTopK(64)) is own

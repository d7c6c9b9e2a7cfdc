"""MemSGDState without processes: options, checkpoints, the rule for another number of ranks."""

import gc
import math
import weakref

import pytest
import torch

from sketch_plugins.comm import BlockTopK, MemSGDState, redistribute
from sketch_plugins.comm.compressors import make_compressor


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
        ({"compressor": ["topk"]}, r"compressor=\['topk'\] is not one of"),
        ({"density": math.nan}, "density=nan"),
        ({"initial_density": 0, "warmup": 3}, "initial_density=0"),
        ({"initial_density": 0.5}, r"initial_density=0\.5 has no effect without warmup"),
        ({"factor_masking": False}, "factor_masking=False has no effect without momentum"),
        ({"memory_dtype": ["bf16"]}, r"memory_dtype=\['bf16'\]"),
        ({"scaler": 65536.0}, "scaler is a float"),
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
        ([(name, p), ("c", p)], "'c' is given twice"),
        ([(name, p), (name, other[1])], "'a' is given twice"),
    ):
        with pytest.raises(ValueError, match=said):
            MemSGDState(given)
    with pytest.raises(ValueError, match="not among the 2"):
        MemSGDState(params()).slot(torch.zeros(3))


def test_bound_anew():
    """A memory stays with the parameter of its name; if the size differs or the name is missing, all is refused."""
    state = MemSGDState(params())
    state.slot(state._bound[0])["error"].fill_(1.0)
    (name, p), (_, q) = other = params()
    for given, said in (
        ([(name, torch.zeros(3)), ("b", q)], "200 entries for parameter 'a', which now has 3"),
        ([("b", q)], "'a', which is no longer bound"),
        ([(name, p), (name, q)], "'a' is given twice"),
    ):
        with pytest.raises(ValueError, match=said):
            state.bind(given)
        assert state.number(state._bound[1]) == 1
    state.bind(other)
    assert torch.equal(state.slot(p)["error"], torch.ones(200))
    state.reset()
    state.bind([(name, torch.zeros(3))])


def test_density_by_iteration():
    state = MemSGDState(params(), density=0.01, start=3, warmup=10)
    seen = []
    for _ in range(20):
        seen.append(state.density)
        state.end()
    assert seen[:4] == [1.0, 1.0, 1.0, 0.25] and seen[13:] == [0.01] * 7
    assert seen[3:14] == sorted(seen[3:14], reverse=True)


def test_figures_are_of_the_step_just_taken():
    state = MemSGDState(params(), density=0.01, start=2, warmup=2)
    for density in (1.0, 1.0, 0.25, 0.05, 0.01, 0.01):
        state.begin()
        state.end()
        assert state.figures()["density"] == state.last_density == pytest.approx(density)


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
        ({**good, "world_size": 2}, "of 2, but this is rank 0 of 1"),
        *(({k: v for k, v in good.items() if k != key}, f"lacks '{key}'") for key in ("world_size", "rank", "iteration",
                                                                                     "memory")),
        (None, "version"),
        ({**good, "memory": None}, "memory is a NoneType"),
        ({**good, "memory": {"a": {}}}, "of 'a' lacks 'error'"),
        ({**good, "memory": {"a": torch.zeros(200)}}, "of 'a' lacks 'error'"),
        ({**good, "memory": {"a": {"error": [0.0]}}}, "contains 'error', a list"),
        ({**good, "memory": {"a": {"error": torch.zeros(200), "velocity": torch.zeros(200)}}}, "contains 'velocity'"),
        ({**good, "iteration": "4"}, "iteration='4'"),
        ({**good, "rank": None}, "rank=None"),
        ({**good, "world_size": 0}, "world_size=0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            state.load_state_dict(bad)
    assert state.memory_norm() == pytest.approx(207**0.5) and state.memory_bytes() == 4 * 207
    for bad, said in (
        ([{**good, "world_size": 2}, {k: v for k, v in good.items() if k != "memory"}], "lacks 'memory'"),
        ([{**good, "world_size": 2}, {**good, "world_size": 2}], "one state of each of the"),
        ([{**good, "world_size": 2}, {**good, "world_size": 3, "rank": 1}], "one of them comes from rank 1 of 3"),
        (
            [{**good, "world_size": 2}, {**good, "world_size": 2, "rank": 1, "iteration": 9}],
            r"after iterations \[4, 9\]",
        ),
        ([{**good, "world_size": 2},
          {**good, "world_size": 2, "rank": 1, "memory": {"a": {"error": torch.zeros(3)}}}], "3 entries on rank 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            redistribute(bad)
    for bad in ({}, None):
        with pytest.raises(ValueError, match=r"list that gather\(\) returns"):
            state.load_gathered(bad)


def test_a_folder_holds_one_save(tmp_path):
    """Files of another number of ranks are removed when a rank saves there, and an error when it reads."""
    for rank in range(3):
        torch.save(state_of(rank, 3, torch.full((200,), float(rank))), tmp_path / f"memsgd-{rank:05d}-of-00003.pt")
    (tmp_path / "memsgd-notes.pt").touch()
    state = MemSGDState(params())
    state.load(tmp_path)  # of three ranks on one: the mean
    assert torch.equal(state.memory["a"]["error"], torch.ones(200)) and state.iteration == 4
    torch.save(state_of(0, 1, torch.ones(200)), tmp_path / "memsgd-00000-of-00001.pt")
    with pytest.raises(ValueError, match="files of runs of 1 and of 3 ranks"):
        state.load(tmp_path)
    state.iteration = 7
    state.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memsgd-00000-of-00001.pt", "memsgd-notes.pt"]
    other = MemSGDState(params())
    other.load(tmp_path)
    assert other.iteration == 7 and torch.equal(other.memory["a"]["error"], torch.ones(200))
    (tmp_path / "memsgd-00000-of-00001.pt").write_bytes(b"half of a file")
    with pytest.raises(ValueError, match=r"memsgd-00000-of-00001\.pt cannot be read"):
        other.load(tmp_path)
    assert other.iteration == 7
    (tmp_path / "memsgd-00000-of-00001.pt").unlink()
    with pytest.raises(ValueError, match="no files memsgd"):
        state.load(tmp_path)


def test_memories_of_many_ranks_are_read_one_at_a_time(tmp_path, monkeypatch):
    """With 6 files, all tensors of one are freed before the next is opened."""
    states = [state_of(rank, 6, torch.randn(200), momentum=0.9) for rank in range(6)]
    for rank, one in enumerate(states):
        torch.save(one, tmp_path / f"memsgd-{rank:05d}-of-00006.pt")
    seen, alive, load = [], [], torch.load

    def watched(*args, **kwargs):
        gc.collect()
        alive.append(sum(ref() is not None for ref in seen))
        read = load(*args, **kwargs)
        seen.extend(weakref.ref(t) for slot in read["memory"].values() for t in slot.values())
        return read

    monkeypatch.setattr(torch, "load", watched)
    state = MemSGDState(params(), momentum=0.9)
    state.load(tmp_path)
    assert alive == [0] * 6 and len(seen) == 6 * 4
    mean = sum(one["memory"]["a"]["error"].double() for one in states) / 6
    assert torch.equal(state.memory["a"]["error"], mean.float())


def test_forgetting():
    state = MemSGDState(params(), momentum=0.5)
    state.slot(state._bound[0])["error"].fill_(1.0)
    state.iteration = 9
    state.reset()
    assert not state.memory and state.iteration == 0 and state.density == 1.0


def test_compressors_by_name():
    assert isinstance(make_compressor("block_topk"), BlockTopK)
    assert make_compressor("randk", seed=5).seed == 5
    assert make_compressor(own := BlockTopK(64)) is own

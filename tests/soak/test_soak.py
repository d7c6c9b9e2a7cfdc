"""A short soak: benchmarks/soak.py has the long one (`make soak`)."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.fixture(scope="module")
def soak():
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # where its dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules["soak"]


def backends():
    return ["eager", "numba"] if importlib.util.find_spec("numba") else ["eager"]


@pytest.mark.filterwarnings("ignore:fused=True")
@pytest.mark.parametrize("name", ["cs_adam", "sketchy"])
def test_nothing_grows_or_drifts(name, soak, monkeypatch):
    """All events of a long run, twice: saved and loaded, skipped, a parameter replaced."""
    monkeypatch.setattr(soak, "SAVE", 6)
    monkeypatch.setattr(soak, "REPLACE", 8)
    # After so few steps, Python's own bookkeeping still grows, and losses may go either way. Tensors, caches and the
    # backends' agreement must not change.
    rows, wrong = soak.soak([name], backends(), 96, soak.Bounds(python_bytes=256 << 10))
    assert [row["finite"] for row in rows] == [True] * len(rows)
    assert [line for line in wrong if "the loss was" not in line] == []


def test_the_soak_sees_growth_and_what_is_not_finite(soak):
    row = dict.fromkeys(("python_bytes", "tensor_bytes", "rss_bytes", "cache_entries", "drift"), 0)
    row |= {"optimizer": "x", "backend": "eager", "steps": 1, "finite": True, "first_loss": 2.0, "last_loss": 1.0}
    assert soak.complaints(row, soak.Bounds()) == []
    for key, value in {"finite": False, "last_loss": 3.0, "tensor_bytes": 4, "cache_entries": 1, "drift": 0.1}.items():
        assert len(soak.complaints({**row, key: value}, soak.Bounds())) == 1

"""A Numba or Triton that is installed but broken: steps are eager, and messages say why."""

import importlib.util
import sys

import pytest
import torch

from sketch_plugins import CSAdam, info
from sketch_plugins.comm.block_topk import BlockTopK
from sketch_plugins.memory import plan_optimizers
from sketch_plugins.optim import fused


@pytest.fixture
def broken(monkeypatch, tmp_path):
    """Replaces a package by one that raises an error when it is imported."""

    def replace(package, error):
        if importlib.util.find_spec(package) is None:  # a test run that hides a package hides its stand-in, too
            pytest.skip(f"{package} is not installed")
        (tmp_path / f"{package}.py").write_text(f"raise {error}('the build does not fit')")
        monkeypatch.delitem(sys.modules, package, raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        fused._numba.cache_clear()
        fused._triton.cache_clear()

    yield replace
    fused._numba.cache_clear()
    fused._triton.cache_clear()


def steps_eagerly(said):
    p, q = (torch.nn.Parameter(torch.ones(300, 300)) for _ in range(2))
    with pytest.raises(ValueError, match=said):
        CSAdam([p], fused=True)
    for one, options in ((p, {}), (q, {"fused": False})):
        one.grad = torch.full_like(one, 0.1)
        CSAdam([one], **options).step()
    assert torch.equal(p, q) and (p < 1).all()
    assert plan_optimizers.takes_eager_steps(CSAdam([p]), cuda=False)


@pytest.mark.parametrize("error", ["SystemError", "OSError", "AttributeError", "RuntimeError", "ImportError"])
def test_a_broken_numba_leaves_eager_steps(broken, error):
    broken("numba", error)
    steps_eagerly("Numba cannot be imported.*the build does not fit")
    assert "the build does not fit" in info._kernels()["numba"]["note"]


def test_numba_that_does_not_compile_leaves_eager_steps(broken, monkeypatch):
    numba = pytest.importorskip("numba", reason="Numba is not installed")
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    fused._numba.cache_clear()
    steps_eagerly("NUMBA_DISABLE_JIT is set")
    assert not info._kernels()["numba"]["available"]


@pytest.mark.parametrize("error", ["OSError", "RuntimeError"])
def test_a_broken_triton_is_reported(broken, error, monkeypatch):
    broken("triton", error)
    assert fused.backend(torch.device("cuda"), None) is None
    note = info._kernels()["triton"]
    assert not note["available"] and f"Triton cannot be imported ({error}: the build does not fit)" in note["note"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"Triton cannot be imported .*the build does not fit"):
        BlockTopK(64, fused=True)._has_kernel(torch.zeros(640))

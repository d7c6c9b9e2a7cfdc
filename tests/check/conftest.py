import importlib
import types

import pytest
import torch

from sketch_plugins.optim import self_check, verdicts


@pytest.fixture
def interpreted(monkeypatch, tmp_path):
    """``fused=True`` means Triton's interpreter, and the folder that Triton's cache is in is returned."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("with a CUDA device kernels are compiled in this process, not interpreted")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    self_check.forget()
    verdicts.combination.cache_clear()
    yield tmp_path / "cache"
    self_check.forget()
    verdicts.combination.cache_clear()


@pytest.fixture
def broken(interpreted, monkeypatch):
    """``broken("arithmetic")``: steps are a hundredth too small; ``broken("compiler")``: a kernel does not compile."""
    import triton

    launch = importlib.import_module("sketch_plugins.kernels.gpu.launch")
    right = launch.step.factor

    def wrong(v, s, f):
        return right(v, s, f) * 0.99

    class NotCompiled:
        fn = types.SimpleNamespace(__name__="buckets")

        def __getitem__(self, grid):
            def launched(*args, **kwargs):
                raise triton.compiler.errors.CompilationError("kernel", None, "no compiler takes this kernel")

            return launched

    def by(what):
        if what == "arithmetic":
            monkeypatch.setattr(launch.step, "factor", wrong)
        else:
            monkeypatch.setattr(launch.step, "buckets", NotCompiled())

    return by

import importlib.util

import pytest
import torch

HAS_NUMBA = importlib.util.find_spec("numba") is not None
HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture(
    params=[
        pytest.param("numba", id="numba"),
        pytest.param("interpreter", id="triton_interpreter"),
        pytest.param("cuda", id="triton", marks=pytest.mark.gpu),
    ]
)
def kernels(request, monkeypatch):
    """The device on which ``fused=True`` means these kernels."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return torch.device("cuda")
    if request.param == "interpreter":
        if not HAS_TRITON:
            pytest.skip("Triton is not installed")
        if torch.cuda.is_available():
            pytest.skip("with a CUDA device kernels are compiled in this process, not interpreted")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    elif not HAS_NUMBA:
        pytest.skip("Numba is not installed")
    return torch.device("cpu")

import importlib.util

import pytest
import torch

from sketch_plugins import registry

SHAPES = [(7, 5), (64, 33), (5,), (), (4, 3, 2, 2), (1, 40), (40, 1), (0, 3)]


@pytest.fixture(params=["eager", "numba", "triton"])
def fused(request, monkeypatch):
    """``fused``: False, or True for these kernels on a CPU."""
    if request.param == "eager":
        return False
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"needs {request.param}")
    if request.param == "triton":
        if torch.cuda.is_available():
            pytest.skip("with a CUDA device kernels are compiled in this process, not interpreted")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return True


def known(name, options):
    """The given options that the optimizer has; SM3, for example, has no sketch, and no options of tables or hashes."""
    return {key: value for key, value in options.items() if key in registry.get(name).options}


def parameters(shapes=SHAPES, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, dtype=torch.float64, generator=g).to(dtype)) for s in shapes]


def gradients(shapes=SHAPES, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(1000 + seed)
    return [torch.randn(s, dtype=torch.float64, generator=g).to(dtype) for s in shapes]


def train(optimizer, params, steps, first=0, shapes=None, dtype=None):
    for step in range(first, first + steps):
        for p, g in zip(params, gradients([tuple(p.shape) for p in params], params[0].dtype, step), strict=True):
            p.grad = g
        optimizer.step()

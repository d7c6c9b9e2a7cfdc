import importlib
import os
import warnings

import pytest
import torch

# Triton decides when it is imported whether kernels are interpreted, and other libraries import it. Without a GPU they
# are here; tests that compile them do so in a process of their own.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("sketch_plugins.kernels.gpu.launch")
        except ImportError:  # no Triton on this platform
            pass
    del os.environ["TRITON_INTERPRET"]  # or fused=True on a CPU would mean the interpreter everywhere

from sketch_plugins import registry


@pytest.fixture(params=registry.names())
def name(request):
    """Every optimizer of the registry: a new one inherits these tests."""
    return request.param

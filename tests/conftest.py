import importlib
import os
import socket
import subprocess
import sys
import tempfile
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


@pytest.fixture(scope="session")
def launch():
    """`launch(script, *arguments)` runs a script in two processes, the ranks of a gloo group on this machine."""

    def run(script, *arguments, world=2, timeout=400, env=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        quiet = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, str(script), *map(str, arguments)]
        # Files, not pipes: a rank that fills its pipe would wait while the other one is read.
        files = [tempfile.TemporaryFile("w+") for _ in range(world)]
        ranks = [
            subprocess.Popen(
                command,
                env={**os.environ, **quiet, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **(env or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for rank, file in enumerate(files)
        ]
        try:
            for rank in ranks:
                rank.wait(timeout)
        finally:
            for rank in ranks:
                rank.kill()
        outputs = []
        for file in files:
            with file:
                file.seek(0)
                outputs.append(file.read())
        for rank, output in zip(ranks, outputs, strict=True):
            assert rank.returncode == 0, output[-5000:]
        return outputs

    return run

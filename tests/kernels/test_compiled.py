"""Kernels compiled for GPUs that need not exist: registers, spills and the width of loads."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
# Nothing may spill. Registers: 512 threads of 128 fill an SM's 65536; measured 88 at most in the dense steps.
REGISTERS = {"sm_80": 128, "sm_90": 128, "gfx942": 128}
# Rows of a multiple of 16 numbers: the main path.
WIDE = {
    "adam", "adam_bf16", "lean", "adam_dense_moment", "exact", "adam_cover", "adam_log8", "momentum", "lion", "sm3",
    "sm3_lean", "sm3_one", "bf16_tables", "lean_lagged", "lean_lagged_bf16", "adam_lagged", "sm3_lagged",
    "lean_lagged_experts", "sm3_experts",
}  # fmt: skip


@pytest.mark.parametrize("target", REGISTERS)
def test_every_kernel_compiles_without_spills(target):
    run = subprocess.run(
        [sys.executable, str(SCRIPT), target],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    kernels = {
        "buckets",
        "tiles",
        "dense",
        "row_means",
        "row_means_of",
        "touched",
        "step_sizes",
        "recall",
        "record",
        "select",
        "covers",
    }
    assert {kernel["kernel"] for kernel in found} == kernels
    assert {kernel["case"] for kernel in found} >= WIDE
    assert [k for k in found if k["spilt"] > 0] == []
    assert [k for k in found if k["registers"] > REGISTERS[target]] == []
    for kernel in found:
        if kernel["case"] in WIDE and kernel["kernel"] in ("buckets", "tiles"):
            # g, p and (where it is one) the moment; the first of SM3-I's sweeps reads g alone
            assert kernel["wide"] >= (1 if kernel["case"] == "sm3_one" else 2), kernel

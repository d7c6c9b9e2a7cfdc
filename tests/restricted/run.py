"""The test suite as on other machines: with fewer instruction sets or hidden packages. ``make restricted`` runs it.

    python tests/restricted/run.py [--rows NAME,NAME] [--list] [-- PYTEST ARGUMENTS]

Each row is one run of pytest. Before it, a process checks that the restriction works here; otherwise the row would test
nothing, and counts as failed. The table at the end has a line for each row.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rows

HERE = Path(__file__).resolve().parent


class Row(NamedTuple):
    what: str
    environment: dict[str, str]
    #: An expression that is true if the restriction works.
    check: str
    x86: bool = True


CAPABILITY = "torch.backends.cpu.get_cpu_capability()"
NO_FLOAT16 = "not torch.ops.mkldnn._is_mkldnn_fp16_supported()"
#: A float32 root that is not correctly rounded: MKL has such roots for processors that are not Intel's.
ROUGH_ROOTS = (
    "(x := torch.arange(1.0, 4097.0)).sqrt().ne(x.double().sqrt().float()).sum() > 200 "
    "if torch.backends.mkl.is_available() else False"
)
HASWELL = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+bmi,+bmi2,+f16c,+lzcnt,+popcnt"}
NUMBA_IS_HASWELL = (
    "(c := importlib.import_module('numba').core.config).CPU_NAME == 'haswell' and 'avx512' not in c.CPU_FEATURES"
)
ROWS = {
    "no-float16": Row(
        "oneDNN without AVX-512, float16 and AMX", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, NO_FLOAT16
    ),
    "aten-avx2": Row("torch's own kernels with AVX2", {"ATEN_CPU_CAPABILITY": "avx2"}, f"{CAPABILITY} == 'AVX2'"),
    "aten-default": Row(
        "torch's own kernels without AVX", {"ATEN_CPU_CAPABILITY": "default"}, f"{CAPABILITY} == 'DEFAULT'"
    ),
    "mkl": Row("MKL without AVX", {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, ROUGH_ROOTS),
    "numba-haswell": Row("Numba's kernels with AVX2", HASWELL, NUMBA_IS_HASWELL),
    "oldest": Row(
        "all of these together",
        {
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "ATEN_CPU_CAPABILITY": "default",
            "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
            **HASWELL,
        },
        f"{NO_FLOAT16} and {CAPABILITY} == 'DEFAULT' and {NUMBA_IS_HASWELL}",
    ),
    "no-numba": Row(
        "Numba is not installed",
        {"SKETCH_TESTS_WITHOUT": "numba,llvmlite"},
        "importlib.util.find_spec('numba') is None",
        x86=False,
    ),
    "no-triton": Row(
        "Triton is not installed",
        {"SKETCH_TESTS_WITHOUT": "triton"},
        "importlib.util.find_spec('triton') is None",
        x86=False,
    ),
}  # fmt: skip


def main() -> int:
    settings = {name: " ".join(f"{k}={v}" for k, v in row.environment.items()) for name, row in ROWS.items()}
    what = {name: f"{row.what}: {settings[name]}" for name, row in ROWS.items()}
    return rows.main((__doc__ or "").splitlines()[0], what, run)


def run(name: str, pytest: list[str]) -> rows.Outcome:
    row = ROWS[name]
    if row.x86 and platform.machine() not in ("x86_64", "AMD64"):
        return rows.Outcome(rows.NOT_RUN, "this processor has other instruction sets")
    # First on the path, before a sitecustomize of the system.
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    environment = {**row.environment, "PYTHONPATH": path}
    check = f"import importlib, importlib.util, sys, torch\nsys.exit(0 if ({row.check}) else 3)"
    checked = subprocess.run([sys.executable, "-c", check], env={**os.environ, **environment}).returncode
    if checked:
        why = "the restriction has no effect on this machine" if checked == 3 else f"its check ended with {checked}"
        return rows.Outcome(rows.FAILED, f"not run: {why}")
    with tempfile.TemporaryDirectory() as cache:
        # Otherwise torch.compile would use code from its cache that was generated for this processor's real
        # instructions.
        return rows.run_pytest(sys.executable, pytest, {**environment, "TORCHINDUCTOR_CACHE_DIR": cache})


if __name__ == "__main__":
    sys.exit(main())

"""`make gpu` without a GPU: every part writes its rows, and missing packages are named."""

import csv
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(folder, output) of a run without rich and pytest, which has to find the package itself."""
    out = tmp_path_factory.mktemp("gpu")
    hidden = out / "hidden"
    hidden.mkdir()
    for name in ("rich", "pytest", "matplotlib"):
        (hidden / f"{name}.py").write_text("raise ImportError('not installed')")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--device", "cpu", "--quick", "--out", out / "results"],
        capture_output=True,
        text=True,
        cwd=out,
        env={**environment, "PYTHONPATH": str(hidden), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "results", done.stdout


def rows(path):
    with path.open(newline="") as file:
        return [*csv.DictReader(file)]


def test_every_part_writes_its_rows(ran):
    folder, _ = ran
    assert {row["result"] for row in rows(folder / "kernels.csv")} <= {"agrees", "left out"}
    (step,) = rows(folder / "steps.csv")
    assert step["optimizer"] == "cs_adam" and float(step["step_ms"]) > 0 and float(step["adamw_ms"]) > 0
    (training,) = rows(folder / "training.csv")
    assert training["optimizer"] == "cs_adam:preset=lean" and float(training["training_ms"]) > 0


def test_the_summary_has_all_parts_and_names_what_is_missing(ran):
    text = (ran[0] / "gpu.md").read_text()
    for part in ("device", "kernels", "tests", "steps", "training"):
        assert f"## {part}\n" in text
    assert f"* torch: {torch.__version__}" in text
    assert "left out: --quick" in text and "| cs_adam | tiny | float32 |" in text


def test_no_time_at_all(tmp_path, capsys):
    """Parts that did not begin are named, and nothing is reported as wrong."""
    script = runpy.run_path(str(SCRIPT))
    assert script["main"](["--device", "cpu", "--minutes", "0", "--parts", "steps", "--out", str(tmp_path)]) == 0
    assert "* cs_adam bert-base float32: no time was left" in (tmp_path / "gpu.md").read_text()

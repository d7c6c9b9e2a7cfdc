"""benchmarks/quality_run.py: a line for each run, none twice, and missing arguments are reported."""

import csv
import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quality_run.py"
pytest.importorskip("rich")
pytest.importorskip("tqdm")


def run(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def text(tmp_path):
    rng = random.Random(0)
    for name in ("valid.txt", "test.txt"):
        (tmp_path / name).write_text(" ".join(f"w{min(int(rng.expovariate(0.1)), 99)}" for _ in range(2000)))
    return tmp_path


def test_runs_are_written_once_and_are_the_same_again(text, tmp_path):
    out = tmp_path / "out.csv"
    common = ("lm", "--text", text, "--steps", "3", "--out")
    first = run(*common, out, "--optimizers", "adamw,cs_adam:preset=lean")
    assert first.returncode == 0, first.stderr
    assert "evaluation loss" in first.stdout and "cs_adam:preset=lean" in first.stdout
    before = out.read_text()
    assert run(*common, out, "--optimizers", "adamw,cs_adam:preset=lean").returncode == 0
    assert out.read_text() == before  # nothing was run again
    assert run(*common, tmp_path / "again.csv", "--optimizers", "cs_adam:preset=lean").returncode == 0
    rows = [list(csv.DictReader(path.open())) for path in (out, tmp_path / "again.csv")]
    assert [row["optimizer"] for row in rows[0]] == ["adamw", "cs_adam:preset=lean"]
    assert rows[0][1]["value"] == rows[1][0]["value"]
    assert float(rows[0][0]["bytes_per_param"]) == 8.0 and float(rows[0][1]["bytes_per_param"]) < 0.3


def test_what_a_task_needs_is_said(tmp_path):
    for arguments, missing in ((("lm",), "--text"), (("fine_tune", "--model", tmp_path), "--reviews")):
        done = run(*arguments)
        assert done.returncode == 2 and missing in done.stderr
    done = run("lm", "--text", tmp_path / "nowhere")
    assert done.returncode == 2 and "nowhere" in done.stderr

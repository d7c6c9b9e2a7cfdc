"""benchmarks/bench_training.py with a small model: earlier code beside ours."""

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = "--layers 1 --batch 1 --length 8 --warmup 1 --steps 2 --threads 1 --optimizers cs_adam:preset=lean".split()


def run(*arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_training.py"), *SMALL, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_old_and_new_code_in_one_run(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    for folder in ("sketch_plugins", "integrations"):
        (old / folder).symlink_to(ROOT / folder)
    done = run("--old", old, "--out", tmp_path / "out.csv")
    assert done.returncode == 0, done.stderr[-2000:]
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["optimizer"], row["code"]) for row in rows] == [("cs_adam:preset=lean", c) for c in ("old", "new")]
    assert all(float(row["x_adamw_training"]) > 0 for row in rows)
    assert "cs_adam:preset=lean (old code)" in " ".join(done.stdout.split())


def test_a_folder_without_the_package(tmp_path):
    done = run("--old", tmp_path)
    assert done.returncode == 1 and "has no folder sketch_plugins" in done.stderr

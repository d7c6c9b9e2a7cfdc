"""benchmarks/quality_run.py: a line for each run, none twice, and missing arguments are reported."""

import csv
import importlib.util
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("tqdm")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# It stays there: the processes of --jobs import from it, too.
sys.path.insert(0, str(BENCHMARKS))
import quality_check  # noqa: E402
import quality_run  # noqa: E402


@pytest.fixture
def run(monkeypatch, capsys):
    """The command in this process: (exit status, what was printed, errors)."""
    threads = torch.get_num_threads()

    def call(*arguments, of=quality_run):
        monkeypatch.setattr(sys, "argv", [of.__name__, *map(str, arguments)])
        try:
            code = of.main() or 0
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        return Printed(code, printed.out, printed.err)

    yield call
    torch.set_num_threads(threads)


@dataclass
class Printed:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def text(tmp_path):
    rng = random.Random(0)
    for name in ("valid.txt", "test.txt"):
        (tmp_path / name).write_text(" ".join(f"w{min(int(rng.expovariate(0.1)), 99)}" for _ in range(2000)))
    return tmp_path


def test_runs_are_written_once_and_are_the_same_again(run, text, tmp_path):
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


def rows(path):
    """What does not depend on the time of day, in an order of its own."""
    left_out = ("seconds", "train_seconds", "core_seconds", "load")
    found = [{key: value for key, value in row.items() if key not in left_out} for row in csv.DictReader(path.open())]
    return sorted(found, key=lambda row: sorted(row.items()))


def test_runs_side_by_side_and_curves_have_the_same_values(run, text, tmp_path):
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    common = ("lm", "--text", text, "--steps", "4", "--optimizers", "adamw,cs_adam", "--out")
    done = run(*common, one, "--curve", "2")
    assert done.returncode == 0, done.stderr
    assert "until AdamW's last value is reached" in done.stdout
    curve = list(csv.DictReader((tmp_path / "one_curve.csv").open()))
    assert [(row["optimizer"], row["step"]) for row in curve] == [
        ("adamw", "2"), ("adamw", "4"), ("cs_adam", "2"), ("cs_adam", "4"),
    ]  # fmt: skip
    ends = {row["optimizer"]: row["value"] for row in curve if row["step"] == "4"}
    assert ends == {row["optimizer"]: row["value"] for row in rows(one)}
    for a, b in (curve[:2], curve[2:]):
        assert 0 < float(a["train_seconds"]) < float(b["train_seconds"])
        assert 0 < float(a["core_seconds"]) < float(b["core_seconds"])
    before = (tmp_path / "one_curve.csv").read_text()
    assert run(*common, one, "--curve", "2").returncode == 0
    assert (tmp_path / "one_curve.csv").read_text() == before  # nothing was run again
    done = run(*common, two, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert rows(two) == rows(one)


def test_a_sweep_goes_on_from_the_runs_on_file(run, text, tmp_path):
    out = tmp_path / "out.csv"
    common = ("lm", "--text", text, "--steps", "1", "--optimizers", "adamw", "--out", out, "--sweep", "--lr", "0.01")
    done = run(*common, "--seeds", "1")
    assert done.returncode == 0, done.stderr
    values = {float(row["lr"]): float(row["value"]) for row in rows(out)}
    best = min(values, key=values.get)
    assert min(values) < best < max(values) and {0.005, 0.01, 0.02} <= set(values)
    before = out.read_text()
    done = run(*common, "--seeds", "1,2")
    assert done.returncode == 0, done.stderr
    added = out.read_text().removeprefix(before).splitlines()
    assert [line.split(",")[2:5] for line in added] == [["adamw", f"{best:g}", "2"]]


def test_a_peer_that_is_not_installed_is_skipped_with_the_reason(run, text, tmp_path):
    out = tmp_path / "out.csv"
    done = run("lm", "--text", text, "--steps", "1", "--optimizers", "adamw,apollo", "--out", out)
    assert done.returncode == 0, done.stderr
    if importlib.util.find_spec("apollo_torch") is None:
        assert "apollo is skipped: apollo-torch is not installed" in done.stdout
        (skipped,) = csv.DictReader((tmp_path / "out_skipped.csv").open())
        assert skipped["optimizer"] == "apollo" and skipped["reason"] == "apollo-torch is not installed"
        assert [row["optimizer"] for row in rows(out)] == ["adamw"]
    else:
        assert sorted(row["optimizer"] for row in rows(out)) == ["adamw", "apollo"]


def test_options_that_contradict_each_other_are_refused(run, text):
    for more, word in (
        (("--curve", "2", "--jobs", "2"), "leave --jobs at 1"),
        (("--jobs", "0"), "--jobs 0"),
        (("--curve", "-1"), "--curve -1"),
        (("--sweep", "--lr", "1,2"), "--lr 1,2"),
    ):
        done = run("lm", "--text", text, *more)
        assert done.returncode == 2 and word in done.stderr


def test_a_repeated_part_says_which_figures_do_not_hold(run, text, tmp_path):
    out = tmp_path / "out.csv"
    assert run("lm", "--text", text, "--steps", "2", "--optimizers", "adamw,sketchy", "--out", out).returncode == 0
    command = ("--text", text, "--jobs", "1", "--steps", "2", "--figures", out, "--optimizers", "adamw,sketchy")
    done = run(*command, of=quality_check)
    assert done.returncode == 0 and "every figure holds" in done.stdout, done
    lines = out.read_text().splitlines()
    fields = lines[2].split(",")
    assert fields[2] == "sketchy"
    fields[5] = f"{float(fields[5]) - 0.02:.5f}"
    out.write_text("\n".join([*lines[:2], ",".join(fields), ""]))
    done = run(*command, of=quality_check)
    assert done.returncode == 1 and "do not hold: sketchy\n" in done.stdout, done
    done = run(*command[:-1], "muon", of=quality_check)
    assert done.returncode == 2 and "has no run of muon with 2 steps" in done.stderr


def test_what_a_task_needs_is_said(run, tmp_path):
    for arguments, missing in ((("lm",), "--text"), (("fine_tune", "--model", tmp_path), "--reviews")):
        done = run(*arguments)
        assert done.returncode == 2 and missing in done.stderr
    done = run("lm", "--text", tmp_path / "nowhere")
    assert done.returncode == 2 and "nowhere" in done.stderr

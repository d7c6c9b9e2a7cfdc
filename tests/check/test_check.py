"""``sketch-plugins check`` finds wrong kernels, names them, and prints its table in any case."""

import json
import sys

import pytest
import torch

from sketch_plugins import cli, registry
from sketch_plugins.check import times, workers
from sketch_plugins.check.cases import cases
from sketch_plugins.optim import fused


def check(capsys, *arguments):
    """Exit status and JSON of the command, in this process."""
    status = cli.main(["check", "--device", "cpu", "--json", *arguments])
    return status, json.loads(capsys.readouterr().out)


def test_every_optimizer_store_and_kernel_has_a_case():
    names = [case.name for case in cases()]
    assert len(names) == len(set(names))
    assert {case.optimizer for case in cases() if case.part == "training"} == set(registry.names())
    assert {torch.float32, torch.bfloat16, torch.float16} == {case.dtype for case in cases()}
    assert {"dense", "packed", "rows", "gaps"} == {case.gradients for case in cases()}
    words = " ".join(names)
    for store in ("count_sketch", "row_count_min", "cover", "dense", "bf16", "none", "capturable", "block_topk"):
        assert store in words


@pytest.mark.parametrize(
    ("word", "kernels"),
    [
        ("cs_adam scale_parameter", {"step.buckets", "step.tiles", "norms.step_sizes", "fold.row_means_of"}),
        ("sm3 variant=I preset=paper 2 to 6 axes", {"step.tiles", "fold.covers"}),
        ("initial_accumulator", {"step.buckets", "step.tiles"}),
        ("cs_momentum bfloat16", {"step.tiles"}),
        ("bucket=sum row_sparse=True", {"fold.touched", "step.tiles"}),
        ("gradients=gaps", {"step.buckets", "step.tiles", "fold.row_means_of"}),
        ("block=256", {"block_topk.select"}),
    ],
)
def test_interpreted_kernels_agree(interpreted, capsys, word, kernels):
    status, found = check(capsys, "--only", word)
    assert status == 0 and found["wrong"] == [] and found["kernels"] == "Triton's, interpreted"
    assert {row["result"] for row in found["cases"]} == {"agrees"}
    assert {name for row in found["cases"] for name in row["kernels"]} == kernels


@pytest.mark.parametrize(("what", "result"), [("arithmetic", "DIFFERS"), ("compiler", "FAILS")])
def test_a_wrong_kernel_is_named(broken, capsys, what, result):
    """Exit status 1; cases without that kernel go on and agree."""
    broken(what)
    arguments = ["check", "--device", "cpu", "--only", "lr_decay"]
    assert cli.main([*arguments, "--json"]) == (1 if what == "arithmetic" else 0)  # a cover has no buckets
    arguments[-1] = "initial_accumulator"
    capsys.readouterr()
    assert cli.main(arguments) == 1
    said = capsys.readouterr().out
    case = "cs_adagrad weight_decay=0.1 initial_accumulator_value=0.1"
    (line,) = [line for line in said.splitlines() if line.startswith(f"{result}: {case}")]
    assert "step.buckets" in line
    assert ("no compiler takes this kernel" if what == "compiler" else "not close") in line
    assert "0 of 1 cases agree with eager torch, 1 do not" in said


def test_numba(capsys):
    """Cases that Numba's kernels do not support are left out, with the reason."""
    pytest.importorskip("numba", reason="Numba is not installed")
    status, found = check(capsys, "--only", "sm3 variant=I ", "--no-times")
    assert status == 0
    rows = {row["case"]: row for row in found["cases"]}
    assert {row["result"] for row in rows.values()} == {"agrees", "left out"}
    # Of two axes and more there are vectors, which are kept exactly, and none in the other case.
    assert rows["sm3 variant=I preset=ema update_clip=0.3"]["kernels"] == ["sweeps.exact"]
    left_out = rows["sm3 variant=I preset=paper 2 to 6 axes"]
    assert left_out["result"] == "left out" and "do not keep the second moment" in left_out["note"]


def test_no_kernels_at_all(capsys, monkeypatch):
    """Without Numba nothing is compared, and that is not a success."""
    fused._numba.cache_clear()
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "numba", None)
        assert cli.main(["check", "--device", "cpu"]) == 2
        assert "Numba cannot be imported" in capsys.readouterr().err
    fused._numba.cache_clear()


def test_what_is_refused(capsys):
    pytest.importorskip("numba", reason="Numba is not installed")
    for arguments, words in (
        (["--device", "tpu"], "--device 'tpu' is not known"),
        (["--device", "cpu", "--only", "nothing like it"], "no case has this word in its name"),
        (["--device", "cpu", "--jobs", "-1"], "--jobs -1 is not allowed"),
    ):
        assert cli.main(["check", *arguments]) == 2
        assert words in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(["check"]) == 2
        assert "finds no CUDA or ROCm device" in capsys.readouterr().err


def test_a_process_that_ends_costs_a_row():
    """Here both cases take longer than allowed."""
    chosen = cases()[:2]
    done = []
    rows = workers.compare_all(chosen, torch.device("cpu"), 1, done.append, patience=0.05)
    assert [row.case for row in rows] == [case.name for case in chosen] and done == rows
    for row in rows:
        assert row.result == "FAILS" and "took too long" in row.note


def test_nothing_but_torch_and_triton(interpreted, monkeypatch, capsys):
    """No library of tables, here and in the process that compares, and none for tests or for a CPU."""
    hidden = interpreted.parent / "hidden"
    hidden.mkdir()
    for name in ("rich", "numba", "pytest", "transformers", "matplotlib"):
        (hidden / f"{name}.py").write_text("raise ImportError('not installed')")
    monkeypatch.setenv("PYTHONPATH", str(hidden))
    for name in ("rich.console", "rich.table", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    assert cli.main(["check", "--device", "cpu", "--only", "block=256", "--jobs", "1"]) == 0
    assert "block_topk block=256 bfloat16 momentum  agrees" in capsys.readouterr().out


def test_times():
    shapes = [*times.bert_base(1, 32, 100)]
    found = times.measure("cs_adam", {"fused": False}, torch.float32, torch.device("cpu"), shapes, steps=2)
    assert found.error == "" and found.step_ms > 0 and found.adamw_ms > 0
    count = sum(torch.Size(shape).numel() for shape in times.bert_base())
    assert count == 109_482_240  # of bert-base-uncased with its pooler
    wrong = times.measure("cs_adam", {"depth": 0}, torch.float32, torch.device("cpu"), shapes)
    assert "depth" in wrong.error

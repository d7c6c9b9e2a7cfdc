"""The examples as a user starts them, at tiny sizes: the files they write and the figures in them."""

import argparse
import csv
import json
import logging
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
PNG = b"\x89PNG\r\n\x1a\n"

for package in ("transformers", "tokenizers", "matplotlib"):
    pytest.importorskip(package, reason="the examples need the extra `demo`")

import transformers  # noqa: E402


@pytest.fixture
def start(monkeypatch, capfd, caplog):
    """``start(script, *options)``: as `python script *options`, here, where what it imports is there already.

    The processes that a script starts (`larger_batch.py`, one for each optimizer) are its own.
    """
    before = dict(os.environ)
    # A library that an earlier test imported logs to what was standard error then; a user's process has only one.
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    handlers = [handler for logger in loggers for handler in logger.handlers if type(handler) is logging.StreamHandler]
    streams = [handler.stream for handler in handlers]  # closed ones too, which `setStream` would flush
    for handler in handlers:
        handler.stream = sys.stderr

    def run(script, *options):
        command = [str(EXAMPLES / script), *map(str, options)]
        monkeypatch.setattr(sys, "argv", command)
        os.environ.update({"TQDM_DISABLE": "1", "COLUMNS": "160", "OMP_NUM_THREADS": "1"})
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as ended:
            # A message is what the interpreter prints before it ends with 1.
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            assert not code, f"{ended.code}\n{capfd.readouterr().err}"
        out, err = capfd.readouterr()
        # What was imported when pytest had a handler of its own has none, and leaves its messages to that.
        return subprocess.CompletedProcess(command, 0, out, err + caplog.text)

    yield run
    for handler, stream in zip(handlers, streams, strict=True):
        handler.stream = stream
    os.environ.clear()
    os.environ.update(before)


def rows_of(finished, label):
    """The rows of the tables about one run."""
    cells = (re.split("  +", line.strip()) for line in finished.stdout.splitlines())
    return [row for row in cells if row[0] == label and len(row) > 1]


def check(finished, out, labels):
    """The table, the picture and the figures agree on what was run; returns the figures of each run."""
    for theme in ("light", "dark"):
        assert (out / f"comparison-{theme}.png").read_bytes().startswith(PNG)
    results = json.loads((out / "results.json").read_text())
    runs = {run["label"]: run for run in results["runs"]}
    assert list(runs) == labels
    for label, run in runs.items():
        row, *others = rows_of(finished, label)
        assert len(others) == (run["largest"] is not None)
        assert f"{run['eval_loss']:.4f}" in row
        assert f"{run['bytes_per_param']:.3f}" in row
        for curve in ("train_curve", "eval_curve"):
            assert run[curve] and all(math.isfinite(loss) for _, loss in run[curve])
        assert run["eval_curve"][-1] == [results["options"]["steps"], run["eval_loss"]]
        assert 0 < run["optimizer_ms"] < run["step_ms"]
        # Nothing but tensors: weights and state are there all the time, and some gradients or activations at the peak.
        assert run["weight_bytes"] + run["state_bytes"] < run["peak_bytes"] < 20 * 2**20
    assert len({run["parameters"] for run in runs.values()}) == 1
    return runs


def check_bytes(runs):
    if "AdamW" in runs:
        # Two float32 moments a parameter, and a step counter of 4 bytes for each tensor.
        assert runs["AdamW"]["bytes_per_param"] == pytest.approx(8, abs=0.02)
    # int8 blocks, 5 % of the rows, and the exact state of biases and norms, which weigh more in a tiny model.
    assert runs["cs_adam"]["bytes_per_param"] < 1.5


def test_language_model(tmp_path, start):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} times {m} is {n * m}.\n" for n in range(60) for m in range(60)))
    size = ("--dim", 96, "--layers", 1, "--vocab", 300, "--steps", 6, "--seq-len", 32, "--batch-size", 2)
    out = tmp_path / "out"
    # What else the demo runs by default, .ci/run runs.
    optimizers = ("--optimizers", "adamw_torch_fused,cs_adam@2e-3")
    finished = start("demo_lm.py", "--quick", "--text", text, "--out", out, *optimizers, *size)
    runs = check(finished, out, ["AdamW", "cs_adam"])
    check_bytes(runs)
    adamw, ours = runs.values()
    # Same weights, same data: the first loss, before the first update, is the same.
    assert adamw["train_curve"][0] == ours["train_curve"][0]
    # Memory counts the state and nothing else of an optimizer, such as its compiler.
    difference = adamw["state_bytes"] - ours["state_bytes"]
    assert adamw["peak_bytes"] - ours["peak_bytes"] == pytest.approx(difference, abs=16 * 1024)

    budget = json.loads((out / "results.json").read_text())["budget_bytes"]
    assert 0 <= budget - adamw["peak_bytes"] < 2**20 / 10
    assert adamw["largest"]["batch"] == 2 < ours["largest"]["batch"]
    assert ours["peak_bytes"] < ours["largest"]["peak_bytes"] <= budget < ours["largest"]["baseline_peak_bytes"]
    batch, steps = ours["largest"]["batch"], ours["largest"]["steps"]
    assert abs(batch * steps - 2 * 6) <= batch / 2  # as many tokens, but for half a step
    assert ours["largest"]["learning_rate"] == pytest.approx(2e-3 * (batch / 2) ** 0.5)
    _, row = rows_of(finished, "cs_adam")
    assert row[1:3] == [str(batch), f"{batch / 2:.2f}"] and f"{ours['largest']['eval_loss']:.4f}" in row

    # Nothing stands between our lines: no bars, no lines of libraries.
    assert finished.stderr == "" and "\r" not in finished.stdout
    known = ("text: ", "memory: ", "[", "  kernels are ready", "  batch ", "  largest batch in ")
    lines = finished.stdout[: finished.stdout.index("GPT-2 architecture")].splitlines()[:-1]
    assert [line for line in lines if line and not line.startswith(known)] == []


def test_no_batch_fits_into_a_small_budget(tmp_path):
    import _common as common
    import _compare as compare

    args = argparse.Namespace(batch_size=2, steps=2, out=tmp_path, weight_decay=0.0, seed=0, cpu=True)
    config = transformers.GPT2Config(vocab_size=8, n_positions=4, n_embd=32, n_layer=1, n_head=1)
    run, peaks = common.Run("adamw_torch_fused", None, 1e-3), []
    for size in (8, 100_000):
        ids = torch.zeros(size, 4, dtype=torch.int32)
        rows = common.Rows(input_ids=ids, labels=ids)
        experiment = common.Experiment(transformers.GPT2LMHeadModel(config), rows, rows)
        found = compare.count_memory(args, run, experiment, 2, budget=1000)
        assert found.batch is None and [batch for batch, _ in found.peaks] == [2, 1]
        peaks.append(found.peaks[0][1])
        del ids, rows, experiment
    # A row's 16 bytes are not counted, and not subtracted twice. Its place in the order of the epoch takes 8 bytes.
    assert 1000 < peaks[0] <= peaks[1] < peaks[0] + 100_000 * 12


@pytest.mark.parametrize("task", ["classify", "mlm"])
def test_bert(tmp_path, start, task):
    out = tmp_path / "out"
    size = ("--dim", 96, "--layers", 1, "--vocab", 300, "--steps", 4, "--seq-len", 32, "--batch-size", 4)
    texts = []
    for label in ("north", "south"):
        texts += ["--text", tmp_path / f"{label}.txt"]
        texts[-1].write_text("".join(f"{n * n} steps to the {label}, then {n}.\n" for n in range(400)))
    # What differs between the tasks is the same for all optimizers.
    optimizers = {"classify": {"adamw_torch_fused": "AdamW", "cs_adam": "cs_adam"}, "mlm": {"cs_adam": "cs_adam"}}[task]
    named = ("--optimizers", ",".join(optimizers))
    finished = start("finetune_bert.py", "--task", task, "--quick", "--out", out, *named, *size, *texts)
    runs = check(finished, out, [*optimizers.values()])
    check_bytes(runs)
    for run in runs.values():
        assert (run["eval_accuracy"] is not None) == (task == "classify")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "0 is not a positive whole number"),
        (["--lr", "nan"], "nan is not a positive number"),
        (["--dim", "100"], "--dim 100 is not a multiple of 32"),
        (["--text", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--optimizers", "cs_adam@fast"], "'cs_adam@fast'"),
        (["--optimizers", "no_such", "--quick"], "optimizer 'no_such' is unknown to Trainer"),
    ],
)
def test_bad_options_are_named(tmp_path, monkeypatch, capsys, options, message):
    import demo_lm

    # What `main` sets for its own processes shall not reach the other tests.
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(SystemExit) as ended:
        demo_lm.main(["--out", str(tmp_path), *options])
    # argparse prints and ends with 2; our own message is the exit value, which the interpreter prints.
    assert message in f"{ended.value} {capsys.readouterr().err}"


def read_csv(file):
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


#: Small enough for the optimizer to stay eager; compressed all the same.
OURS = "cs_adam:min_compress_size=256"


def test_larger_batch(tmp_path, start):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("".join(f"{n} times {m} is {n * m}.\n" for n in range(60) for m in range(60)))
    options = ("--dim", 64, "--vocab", 300, "--max-batch", 64, "--optimizers", f"adamw_torch_fused,{OURS}@2e-3")
    finished = start("larger_batch.py", "--quick", "--task", "lm", "--text", text, "--out", out, *options)
    assert (out / "larger_batch.png").read_bytes().startswith(PNG)
    adamw, ours = read_csv(out / "larger_batch.csv")
    assert (adamw["optimizer"], ours["optimizer"]) == ("AdamW", "cs_adam min_compress_size=256")
    parameters = int(adamw["parameters"])
    for run in (adamw, ours):
        assert run["source"] == "measured" and int(run["budget_bytes"]) == 20 * parameters
        assert 0 < int(run["peak_bytes"]) <= 20 * parameters
        # As many tokens for each, but for half a step.
        batch, steps = int(run["batch"]), int(run["steps"])
        assert int(run["tokens"]) == batch * steps * 16 and abs(int(run["tokens"]) - 512) <= batch * 8
        assert float(run["tokens_per_second"]) > 0 and 0 < float(run["eval_loss"]) < 10
    assert int(adamw["state_bytes"]) == 8 * parameters and int(ours["state_bytes"]) < 2 * parameters
    ratio = int(ours["batch"]) / int(adamw["batch"])
    assert ratio >= 1.4 and float(ours["x_adamw"]) == pytest.approx(ratio, rel=1e-3)
    assert float(ours["learning_rate"]) == pytest.approx(2e-3 * ratio**0.5, rel=1e-3)
    (row,) = [line for line in finished.stdout.splitlines() if line.startswith("│ cs_adam min")]
    assert [cell.strip() for cell in row.split("│")[2:4]] == [ours["batch"], f"{ratio:.2f}"]


def test_larger_batch_predicted(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sketch_plugins.memory.plan", reason="predictions come from there")
    import larger_batch

    monkeypatch.setattr(os, "environ", os.environ.copy())
    options = ["--quick", "--task", "bert", "--device", "cpu", "--predict"]
    options += ["--optimizers", f"adamw_torch_fused,{OURS}"]
    assert larger_batch.main([*options, "--budget", "10MB", "--out", str(tmp_path)]) == 0
    assert "batch (predicted)" in capsys.readouterr().out
    assert (tmp_path / "larger_batch.png").read_bytes().startswith(PNG)
    adamw, ours = read_csv(tmp_path / "larger_batch.csv")
    assert adamw["source"] == ours["source"] == "predicted" and adamw["budget_bytes"] == "10000000"
    assert 0 < int(adamw["batch"]) < int(ours["batch"]) and adamw["tokens_per_second"] == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda"], "there is no GPU; --predict says what would fit"),
        (["--device", "cuda", "--predict", "--budget", "0.5"], "--budget 0.5 is a fraction of a GPU that is not there"),
        (["--budget", "much"], "--budget='much' is not allowed"),
        (["--dim", "100"], "--dim 100 is not a multiple of 64"),
        (["--model", "gpt2"], "--model goes with one --task"),
        (["--optimizers", "no_such"], "optimizer 'no_such' is unknown to Trainer"),
        (["--optimizers", "cs_adam/fp8"], "optimizer 'cs_adam/fp8' is unknown to Trainer"),
        (["--optimizers", "cs_adam_layerwise/bf16:compresion=0.1"], "Did you mean 'compression'?"),
        (["--seed", "-1"], "--seed -1 is not in [0, 4294967295]"),
    ],
)
def test_bad_options_of_larger_batch(options, message, tmp_path, monkeypatch, capsys):
    import larger_batch

    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        larger_batch.main(["--out", str(tmp_path), *options])
    assert message in capsys.readouterr().err


def test_lightning_language_model(tmp_path, start):
    pytest.importorskip("lightning", reason="needs the extra `lightning`")
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("".join(f"{n} times {m} is {n * m}.\n" for n in range(60) for m in range(60)))
    size = ("--dim", 96, "--layers", 1, "--vocab", 300, "--steps", 10, "--seq-len", 32, "--batch-size", 2, "--cpu")
    finished = start("lightning_lm.py", "--quick", "--text", text, "--out", out, "--strategy", "sm3", *size)
    # SM3's betas are no Adam's; those of the module are torch's defaults, so there is nothing to complain of.
    assert (out / "comparison.png").read_bytes().startswith(PNG)
    adamw, sm3 = json.loads((out / "results.json").read_text())["runs"]
    assert (adamw["label"], sm3["label"], sm3["optimizer"]) == ("AdamW", "sm3", "SM3")
    assert adamw["bytes_per_param"] == 8 and sm3["bytes_per_param"] < 1.5
    assert adamw["train_curve"][0] == sm3["train_curve"][0] and len(sm3["train_curve"]) == 10
    assert [step for step, _ in sm3["eval_curve"]] == [2, 4, 6, 8, 10]
    assert "sketch_lightning: replaced AdamW by SM3" in finished.stderr + finished.stdout


def test_lightning_cli(tmp_path, start):
    pytest.importorskip("lightning", reason="needs the extra `lightning`")
    pytest.importorskip("jsonargparse", reason="LightningCLI needs the package `jsonargparse`")
    options = ("--trainer.max_epochs", 1, "--trainer.limit_train_batches", 4, "--trainer.default_root_dir", tmp_path)
    finished = start("lightning_cli.py", "fit", "--config", EXAMPLES / "lightning_cli.yaml", *options)
    said = finished.stderr + finished.stdout
    assert "replaced AdamW by CSAdam(lr=0.003, compression=0.05)" in said and "beside AdamW" in said

"""The processes that a program starts get the same changes as the program under `run`, and no others do."""

import ast
import json
import os
import sys
import venv
from pathlib import Path

import pytest

from sketch_plugins.running import children

# Everything by which a process can notice how it was started; without a framework.
LOOK = """
import json, os, sys
print(json.dumps({
    "path": sys.path, "modules": sorted(sys.modules), "arguments": sys.argv[1:], "name": __name__,
    "finders": [getattr(f, "__name__", type(f).__name__) for f in sys.meta_path],
}))
"""
PARENT = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, *sys.argv[1:]]).returncode)
"""
BUILD = """
import torch
print("RESULT", type(torch.optim.AdamW([torch.ones(2, requires_grad=True)])).__name__, flush=True)
"""
OPTIM = ("--optim", "cs_adam")


@pytest.mark.parametrize("flags", [(), ("-S",), ("-I",), ("-E",), ("-P",)], ids=str)
def test_a_child_without_a_framework_sees_what_it_sees_under_python(flags, run, write):
    if flags == ("-P",) and sys.version_info < (3, 11):
        pytest.skip("python -P is of 3.11")
    write("parent.py", PARENT), write("look.py", LOOK)
    theirs, ours = (json.loads(run("parent.py", *flags, "look.py", "x", python=p).stdout) for p in (True, False))
    if flags == ("-S",):  # no code of ours has run that could have removed it
        ours["path"].remove(children.FOLDER)
    if flags in ((), ("-P",)):  # the others do not import a sitecustomize, or not from PYTHONPATH
        assert ours["finders"].pop(0) == "_Waiting"
    assert ours == theirs


def test_a_program_without_a_framework_writes_nothing_and_says_nothing(run, write, tmp_path):
    write("parent.py", PARENT), write("look.py", LOOK)
    before = sorted(os.listdir(tmp_path))
    done = run("parent.py", "look.py")
    assert (done.returncode, done.stderr) == (0, "") and "torch" not in json.loads(done.stdout)["modules"]
    assert sorted(os.listdir(tmp_path)) == before


def test_the_users_sitecustomize_runs_and_is_the_one_that_is_seen(run, write, tmp_path):
    (tmp_path / "theirs").mkdir()
    write("theirs/sitecustomize.py", "import sys; sys.theirs = __file__")
    write("parent.py", PARENT)
    write("child.py", "import sys, sitecustomize; print(sys.theirs, sitecustomize.__file__, sys.path)\n" + BUILD)
    path = os.pathsep.join(filter(None, [str(tmp_path / "theirs"), os.environ.get("PYTHONPATH", "")]))
    done = run(*OPTIM, "parent.py", "child.py", env={"PYTHONPATH": path})
    theirs = str(tmp_path / "theirs" / "sitecustomize.py")
    assert done.stdout.startswith(f"{theirs} {theirs} ") and children.FOLDER not in done.stdout, done.stderr
    assert "RESULT CSAdam" in done.stdout


def test_an_error_in_the_users_sitecustomize_is_shown_as_python_shows_it(run, write, tmp_path):
    (tmp_path / "theirs").mkdir()
    write("theirs/sitecustomize.py", "raise LookupError('theirs')")
    write("parent.py", PARENT), write("child.py", "print('went on')")
    path = os.pathsep.join(filter(None, [str(tmp_path / "theirs"), os.environ.get("PYTHONPATH", "")]))
    env = {"PYTHONPATH": path}
    theirs = run("parent.py", "child.py", env=env, python=True)
    ours = run("parent.py", "child.py", env=env)
    assert "theirs" in theirs.stderr and ours.stdout == theirs.stdout == "went on\n"
    # The run's own process had it before the run.
    assert ours.stderr == theirs.stderr


@pytest.mark.parametrize("path", [None, "", "a", "a:", ":a"], ids=repr)
def test_what_is_on_the_path_stays_there(path, monkeypatch):
    monkeypatch.setattr(children, "join", lambda settings: None)
    monkeypatch.setattr(children.watch, "_own_file", None)
    for variable in ("PYTHONPATH", children.VARIABLE):  # restored after the test
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    if path is not None:
        monkeypatch.setenv("PYTHONPATH", path)
    for _ in range(2):  # a run within a run adds nothing
        children.begin()
        assert os.environ["PYTHONPATH"] == (f"{children.FOLDER}:{path}" if path else children.FOLDER)


def test_a_python_without_this_package_goes_on(run, write, tmp_path):
    """It imports a module that would load our package if it were installed."""
    venv.create(tmp_path / "other", symlinks=True)
    (tmp_path / "lib").mkdir()
    write("lib/torch.py", "NAME = 'their own torch'")
    python = tmp_path / "other" / "bin" / "python"
    write(
        "parent.py",
        f"""
        import os, subprocess
        first = os.environ["PYTHONPATH"].split(os.pathsep)[0]
        env = {{**os.environ, "PYTHONPATH": first + os.pathsep + "lib"}}
        command = [{str(python)!r}, "-c", "import torch, sys; print(torch.NAME, 'sketch_plugins' in sys.modules)"]
        subprocess.run(command, env=env, check=True)
        """,
    )
    done = run("parent.py")
    assert (done.stdout, done.stderr) == ("their own torch False\n", "")


@pytest.mark.parametrize("value", ["", "nonsense", 'torch {"optim": 1}', "torch [1]", "torch 1"], ids=repr)
def test_a_variable_of_another_version_is_none(value, monkeypatch):
    monkeypatch.setenv(children.VARIABLE, value)
    assert children.inherited() is None


def test_the_sitecustomize_is_for_every_python_and_alone_in_its_folder():
    """Any Python that the program starts reads it, and other files beside it would shadow modules."""
    source = (Path(children.FOLDER) / "sitecustomize.py").read_text()
    ast.parse(source, feature_version=(3, 7))  # the oldest that `ast` knows in all Pythons of this package
    assert set(os.listdir(children.FOLDER)) - {"__pycache__"} == {"sitecustomize.py"}


def test_a_child_of_a_child(run, write, results):
    write("parent.py", PARENT), write("child.py", BUILD)
    assert results(run(*OPTIM, "parent.py", "parent.py", "child.py")) == [["CSAdam"]]


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_multiprocessing(method, run, write, results):
    write(
        "train.py",
        f"""
        import multiprocessing, sys

        def child():
            import torch
            print("RESULT", type(torch.optim.SGD([torch.ones(2, requires_grad=True)], 0.1)).__name__, flush=True)
            sys.exit(3)

        if __name__ == "__main__":
            process = multiprocessing.get_context({method!r}).Process(target=child)
            process.start()
            process.join()
            assert process.exitcode == 3
        """,
    )
    done = run(*OPTIM, "train.py")
    assert results(done) == [["CSAdam"]] and "WARNING" not in done.stderr


TRAINER = """
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments


def main():
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    torch.manual_seed(args.local_process_index)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    rows = torch.arange(16 * 32).reshape(32, 16) % 64
    trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    digest = sum(p.double().abs().sum() for p in model.parameters()).item()
    state = sum(t.nbytes for s in optimizer.state.values() for t in torch.utils._pytree.tree_leaves(s)
                if isinstance(t, torch.Tensor))
    kind = type(optimizer)
    line = f"RESULT {args.world_size} {kind.__module__}.{kind.__name__} {state} {digest!r}\\n"
    sys.stdout.write(line)
    sys.stdout.flush()
    if torch.distributed.is_initialized():  # gloo's threads may end a process that leaves this to its exit
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
"""
TRAINING = ("--output_dir", "out", "--max_steps", "2", "--use_cpu", "--report_to", "none", "--save_strategy", "no")
OURS = ("--optim", "cs_adam", "--optim_args", "compression=0.25,min_compress_size=256")
#: torch.optim.AdamW's: two moments and a counter for each of the 18 parameters; the head is tied to the embedding.
ADAMW = 8 * (64 * 32 + 16 * 32 + 32 * 96 + 96 + 32 * 32 + 32 + 2 * 32 * 128 + 128 + 32 + 6 * 32)


@pytest.mark.parametrize(
    "launcher",
    [
        ("torchrun", "--standalone", "--nproc_per_node", "2"),
        ("accelerate", "launch", "--cpu", "--num_processes", "1"),
    ],
    ids=lambda launcher: launcher[0].strip("-"),
)
def test_launchers_that_are_run(launcher, run, write, results):
    pytest.importorskip("transformers")
    write("train.py", TRAINER)
    done = run(*launcher, "train.py", *TRAINING, *OURS)
    ranks = results(done)
    assert len(ranks) == (1 if launcher[0] == "accelerate" else 2)
    for world, kind, state, digest in ranks:
        assert (world, kind, digest) == (str(len(ranks)), "sketch_plugins.optim.adam.CSAdam", ranks[0][-1])
        assert 0 < int(state) < 0.7 * ADAMW  # two thirds of the bytes are the first moment and vectors
    assert "sketch-plugins run: no optimizer" not in done.stderr


LIGHTNING = """
import sys

import lightning
import torch


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 1))

    def training_step(self, batch, index):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


if __name__ == "__main__":
    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy=sys.argv[1], max_steps=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(8, 32), batch_size=2))
    digest = sum(p.double().abs().sum() for p in module.parameters()).item()
    (optimizer,) = trainer.optimizers
    sys.stdout.write(f"RESULT {trainer.world_size} {type(optimizer).__name__} {digest!r}\\n")
    sys.stdout.flush()
"""


@pytest.mark.parametrize(
    ("options", "strategy"), [((), "ddp_cs_adam"), (("--optim", "cs_adam"), "ddp")], ids=["strategy", "--optim"]
)
def test_lightning_starts_its_second_process_itself(options, strategy, run, write, results):
    pytest.importorskip("lightning")
    write("train.py", LIGHTNING)
    done = run(*options, "train.py", strategy)
    first, second = results(done)
    assert first[:2] == ["2", "CSAdam"] and first == second
    assert done.stderr.count("sketch-plugins run: replaced AdamW by CSAdam(lr=0.01)") == len(options) // 2
    assert "no optimizer" not in done.stderr

"""`python -m sketch_plugins run`: like python itself, with the optimizers registered in an unmodified script."""

import importlib.metadata
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch

from sketch_plugins import cli, import_hooks
from sketch_plugins.running import children, watch

# A script as its author wrote it, without any code of this project.
TRAIN = """
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments


def main():
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    torch.manual_seed(args.local_process_index)  # DDP has to make the ranks equal
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    rows = torch.arange(16 * 32).reshape(32, 16) % 64
    trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.train()
    digest = sum(p.double().abs().sum() for p in model.parameters()).item()
    optimizer = trainer.optimizer.optimizer
    sys.stdout.write(
        f"RESULT {args.world_size} {type(optimizer).__name__} {optimizer.defaults['compression']} {digest!r}\\n"
    )
    sys.stdout.flush()
    if torch.distributed.is_initialized():  # gloo's threads may end a process that leaves this to its exit
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
"""

# Everything about its surroundings that a program can see, then an uncaught exception.
INSPECT = """
import sys

def fail():
    raise LookupError("the script's own")

print(__name__, __file__, __package__, __spec__ and __spec__.name, type(__loader__).__name__)
print(sys.argv, sys.path[0], sys.modules["__main__"].fail is fail)
print(sorted(name for name in globals() if name not in ("__annotations__", "__warningregistry__")))
fail()
"""


def run(*command, cwd, **kwargs):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, **kwargs)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory, and an interpreter that is restored after `cli.main` has run in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())
    monkeypatch.setattr(torch.optim.Optimizer, "__init__", torch.optim.Optimizer.__init__)
    # `run` changes the whole process: children of later tests must not inherit it, and no warning may come at the end.
    for variable in ("PYTHONPATH", children.VARIABLE):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    monkeypatch.setattr(children, "_joined", False)
    monkeypatch.setattr(watch, "_files", ())
    monkeypatch.setattr(watch, "_own_file", None)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    return tmp_path


def test_the_installed_distribution_names_the_triggers():
    entries = {entry.name: entry.value for entry in importlib.metadata.entry_points(group=import_hooks.GROUP)}
    for trigger in ("transformers.training_args", "transformers.trainer"):
        assert entries[trigger] == "sketch_transformers:register"


TRAINING = ("--output_dir", "out", "--max_steps", "3", "--use_cpu", "--report_to", "none", "--save_strategy", "no")
OPTIM = ("--optim", "cs_adam", "--optim_args", "compression=0.25,min_compress_size=256")


def results(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT")]


def test_unmodified_script_under_torchrun(here):
    (here / "train.py").write_text(TRAIN)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = run(*launcher, "-m", "sketch_plugins", "run", "train.py", *TRAINING, *OPTIM, cwd=here)
    first, second = results(done)
    assert first[:3] == ["2", "CSAdam", "0.25"]
    assert first == second  # the same parameters on both ranks, to the last bit


def test_unmodified_script_under_accelerate_launch(here):
    (here / "train.py").write_text(TRAIN)
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1")
    done = run(*launcher, "-m", "sketch_plugins", "run", "train.py", *TRAINING, *OPTIM, cwd=here)
    assert [result[:3] for result in results(done)] == [["1", "CSAdam", "0.25"]]


@pytest.mark.parametrize("imports", ["transformers.trainer_callback", "transformers.training_args"])
def test_wherever_a_script_begins_to_import(imports, here):
    # The hook runs while transformers is half imported, in more ways than one.
    script = f"""
        import {imports}
        import sys
        print("sketch_transformers" in sys.modules)
        from transformers import Trainer, TrainingArguments
        print(Trainer.get_optimizer_cls_and_kwargs(TrainingArguments("out", optim="cs_adam", use_cpu=True))[0].__name__)
    """
    (here / "script.py").write_text(textwrap.dedent(script))
    done = run("-m", "sketch_plugins", "run", "script.py", cwd=here)
    assert done.stdout.split() == ["True", "CSAdam"], done.stderr[-3000:]


def test_a_script_without_a_framework_imports_none(here):
    (here / "script.py").write_text(
        "import sys\nprint([name in sys.modules for name in ('torch', 'transformers', 'sketch_transformers')])"
    )
    assert run("-m", "sketch_plugins", "run", "script.py", cwd=here).stdout == "[False, False, False]\n"


def test_a_script_sees_what_python_shows_it(here):
    (here / "sub").mkdir()
    (here / "sub" / "script.py").write_text(INSPECT)
    command = ("sub/script.py", "--help", "-m", "x", "--", "--flag=1")
    theirs, ours = run(*command, cwd=here), run("-m", "sketch_plugins", "run", *command, cwd=here)
    assert theirs.returncode == 1 and "the script's own" in theirs.stderr
    assert (ours.stdout, ours.stderr, ours.returncode) == (theirs.stdout, theirs.stderr, theirs.returncode)


def test_a_module_sees_what_python_shows_it(here):
    (here / "pack").mkdir()
    (here / "pack" / "__init__.py").write_text("import sys; print(sys.argv[0])")
    (here / "pack" / "tool.py").write_text(INSPECT)
    command = ("-m", "pack.tool", "--help", "-m")
    theirs, ours = run(*command, cwd=here), run("-m", "sketch_plugins", "run", *command, cwd=here)
    assert (ours.stdout, ours.returncode) == (theirs.stdout, theirs.returncode)
    # python shows two frames of its own runpy before the module's.
    frames = [line for line in theirs.stderr.splitlines() if "runpy" not in line]
    assert ours.stderr.splitlines() == frames


@pytest.mark.parametrize("source", ["import sys; sys.exit(3)", "raise SystemExit", "raise SystemExit('why')"])
def test_exit_status(source, here):
    (here / "script.py").write_text(source)
    theirs = run("script.py", cwd=here)
    with pytest.raises(SystemExit) as ours:
        cli.main(["run", "script.py"])
    # The interpreter converts the code to the status for any exception, so the same code runs there.
    again = run("-c", f"raise SystemExit({ours.value.code!r})", cwd=here)
    assert (again.returncode, again.stderr) == (theirs.returncode, theirs.stderr)


def test_a_syntax_error_is_shown_as_python_shows_it(here):
    (here / "script.py").write_text("x = 1\n1 +")
    theirs, ours = run("script.py", cwd=here), run("-m", "sketch_plugins", "run", "script.py", cwd=here)
    assert theirs.returncode == 1 and "SyntaxError" in theirs.stderr
    assert (ours.returncode, ours.stderr) == (theirs.returncode, theirs.stderr)


def test_main_stays_main_after_the_script(here):
    (here / "script.py").write_text("class Kept: pass")
    assert cli.main(["run", "script.py"]) == 0
    assert sys.modules["__main__"].Kept.__module__ == "__main__"


@pytest.mark.parametrize("archive", [False, True], ids=["directory", "zip"])
def test_directories_and_archives(archive, here, capsys):
    (here / "app").mkdir()
    (here / "app" / "__main__.py").write_text("import helper, sys; print(helper.NAME, sys.argv)")
    (here / "app" / "helper.py").write_text("NAME = 'found'")
    target = "app"
    if archive:
        target = "app.zip"
        with zipfile.ZipFile(target, "w") as file:
            for name in ("__main__.py", "helper.py"):
                file.write(Path("app", name), name)
    assert cli.main(["run", target, "one"]) == 0
    assert capsys.readouterr().out == f"found {[target, 'one']}\n"
    sys.modules.pop("helper")


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        (["nowhere.py"], 2, "can't open file '{here}/nowhere.py': [Errno 2] No such file or directory"),
        (["empty"], 1, "can't find '__main__' module in '{here}/empty'"),
        (["-m", "nowhere"], 1, "No module named nowhere"),
        (["-m", "os.nowhere"], 1, "No module named os.nowhere"),
        (
            ["-m", "empty"],
            1,
            "'empty' is a package without __main__, so it cannot be executed. Run a module in it instead: ",
        ),
        (["nowhere"], 127, "there is no file '{here}/nowhere', and no command 'nowhere' beside "),
        (["-m", ".relative"], 1, "relative module names are not supported: .relative"),
    ],
    ids=str,
)
def test_what_cannot_be_run(command, status, message, here, capsys):
    (here / "empty").mkdir()
    (here / "empty" / "__init__.py").touch()
    assert cli.main(["run", *command]) == status
    error = capsys.readouterr().err
    assert error.startswith("sketch-plugins run: ") and message.format(here=here) in error
    sys.modules.pop("empty", None)


def test_what_the_deepspeed_launcher_puts_first_is_for_the_script(here):
    (here / "script.py").write_text("import sys\nprint(sys.argv)")
    said = run("-m", "sketch_plugins", "--local_rank=1", "run", "script.py", "--steps", "2", cwd=here)
    assert said.stdout.strip() == "['script.py', '--local_rank=1', '--steps', '2']"


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["fly"],
        ["run"],
        ["run", "-x", "script.py"],
        ["run", "--optim-args", "lr=1", "x.py"],
        ["--local_rank=0", "reshard", "x", "--world-size", "2"],
    ],
    ids=str,
)
def test_usage_errors(command, here, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(command)
    assert exit.value.code == 2 and "usage: sketch-plugins" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["--help"], ["run", "--help"]], ids=str)
def test_help(command, here, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(command)
    assert exit.value.code == 0 and "run" in capsys.readouterr().out


def test_hooks_leave_no_trace_in_the_module(here, monkeypatch):
    (here / "trigger_module.py").write_text("X = 1")
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())
    seen = []
    import_hooks.when_imported("trigger_module", lambda: seen.append(sys.modules["trigger_module"].X))
    assert seen == []
    import trigger_module

    assert seen == [1]
    assert type(trigger_module.__loader__).__name__ == "SourceFileLoader"
    assert trigger_module.__spec__.loader is trigger_module.__loader__
    import_hooks.when_imported("trigger_module", lambda: seen.append("at once"))
    assert seen == [1, "at once"]
    sys.modules.pop("trigger_module")


def test_a_hook_that_fails_fails_the_import(here, monkeypatch):
    (here / "trigger_module.py").touch()
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())
    import_hooks.when_imported("trigger_module", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        import trigger_module  # noqa: F401

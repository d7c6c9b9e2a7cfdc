"""A run that built no optimizer of ours says so at its end, once, and leaves no files behind."""

import os

import pytest

from sketch_plugins.running import watch

BUILD = """
import sys
import torch
import sketch_plugins

for name in sys.argv[1:]:
    cls = getattr(sketch_plugins, name, None) or getattr(torch.optim, name)
    cls([torch.ones(2, requires_grad=True)], lr=0.1)
"""
PARENT = """
import subprocess, sys
processes = [subprocess.Popen([sys.executable, "build.py", *names.split(",")]) for names in sys.argv[1:]]
sys.exit(max(process.wait() for process in processes))
"""


@pytest.fixture
def warnings(run, write, tmp_path):
    """``warnings(*arguments)``: the lines of a run. Its exit status does not change, and it leaves no file."""

    def of(*arguments, status=0, **kwargs):
        write("build.py", BUILD), write("parent.py", PARENT)
        done = run(*arguments, **kwargs)
        assert done.returncode == status, done.stderr
        assert list(tmp_path.glob("sketch-plugins-run-*")) == []
        return [line for line in done.stderr.splitlines() if line.startswith("WARNING sketch-plugins run:")]

    return of


def test_the_program_trained_with_another(warnings):
    (line,) = warnings("build.py", "SGD", "LBFGS")
    assert "no optimizer of sketch-plugins was built, only LBFGS, SGD." in line and "--optim cs_adam" in line


def test_the_programs_children_trained_with_others(warnings):
    (line,) = warnings("parent.py", "SGD,AdamW", "Adam")
    assert "was built, only Adam, AdamW, SGD." in line


def test_one_of_ours_in_one_of_the_processes_is_enough(warnings):
    assert warnings("parent.py", "SGD", "CSAdam,Adagrad") == []


def test_a_program_whose_child_was_refused_has_been_told(warnings):
    assert warnings("--optim", "sm3", "parent.py", "LBFGS", status=1) == []


def test_only_one_rank_speaks(warnings):
    assert warnings("build.py", "SGD", env={"RANK": "1", "WORLD_SIZE": "2"}) == []


def test_options_that_are_checked_are_no_optimizer_that_was_built(warnings):
    (line,) = warnings("--optim", "sm3", "build.py")  # it imports torch, and then `run` checks whether sm3 can be built
    assert "no optimizer was built that sm3 could replace" in line


@pytest.mark.parametrize("arguments", [("script.py",), ("python", "script.py"), ("-m", "script")], ids=str)
def test_optim_and_nothing_to_replace(arguments, warnings, write):
    write("script.py", "import sys; sys.exit(4)")
    (line,) = warnings("--optim", "sm3", *arguments, status=4)
    assert "no optimizer was built that sm3 could replace" in line


def test_a_command_that_a_signal_ended(warnings, write):
    write("script.py", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert len(warnings("--optim", "sm3", "python", "script.py", status=-9)) == 1


def test_gradients_that_are_sent_sparsified_are_something_of_ours(warnings, write):
    write(
        "train.py",
        """
        import torch
        from sketch_plugins.comm import MemSGDState
        model = torch.nn.Linear(4, 4)
        torch.optim.SGD(model.parameters(), 0.1)
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        MemSGDState(model.named_parameters())
        torch.distributed.destroy_process_group()
        """,
    )
    assert warnings("train.py") == []


def test_a_run_within_a_run_tells_both(warnings):
    inner = ("python", "-m", "sketch_plugins", "run")
    assert warnings(*inner, "build.py", "CSAdam") == []
    assert len(warnings(*inner, "--optim", "sm3", "build.py")) == 1  # the outer run was not asked for an optimizer


def test_a_fork_of_the_program_does_not_speak_for_it(warnings, write):
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this platform")
    write("script.py", "import os, sys\npid = os.fork()\nif pid:\n    os.waitpid(pid, 0)\nsys.exit(0)")
    assert len(warnings("--optim", "sm3", "script.py")) == 1


def test_what_is_ours():
    import torch

    from sketch_plugins import CSAdam, MemSGD

    class Derived(CSAdam):
        pass

    assert watch.is_ours(CSAdam) and watch.is_ours(Derived) and watch.is_ours(MemSGD)
    assert not watch.is_ours(torch.optim.AdamW)

"""`run` of commands and binaries: which one is found, and that it ends as it ends without `run`."""

import os
import signal
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from sketch_plugins.running.command import _is_foreign

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and shells of POSIX")


def executable(path, text):
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def on_path(folder):
    return {"PATH": os.pathsep.join([str(folder), os.environ["PATH"]])}


def test_a_console_script_of_this_environment_is_executed_in_this_process(run, tmp_path):
    """Like a shell: its own name in sys.argv, its own folder on sys.path."""
    command = Path(sysconfig.get_path("scripts")) / "torchrun"
    done = run("torchrun", "--version-that-is-none")
    assert done.returncode == 2 and done.stderr.startswith("usage: torchrun ")
    assert subprocess.run([command, "--version-that-is-none"], capture_output=True, text=True).stderr == done.stderr


def test_a_command_on_the_path_that_is_python_without_an_environment_of_its_own(run, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    executable(
        folder / "train-it", "#!/usr/bin/env python3\nimport sys, os\nprint(sys.argv, sys.path[0], os.getppid())"
    )
    done = run("train-it", "--help", "-m", env=on_path(folder))
    assert done.stdout == f"{[str(folder / 'train-it'), '--help', '-m']} {folder} {os.getpid()}\n", done.stderr


@POSIX
def test_a_command_of_another_kind_gets_a_process_that_reaches_python(run, write, tmp_path, results):
    folder = tmp_path / "bin"
    folder.mkdir()
    executable(folder / "launch", f'#!/bin/sh\nshift\nexec {sys.executable} "$@"\n')
    write("build.py", "import torch\nprint('RESULT', type(torch.optim.Adam([torch.ones(2)])).__name__)")
    done = run("--optim", "sm3", "launch", "first", "build.py", env=on_path(folder))
    assert results(done) == [["SM3"]] and "WARNING" not in done.stderr


@POSIX
def test_python_itself_is_a_command(run, write):
    write("status.py", "import sys; print(sys.argv); sys.exit(7)")
    done = run("python", "status.py", "--optim")
    assert (done.returncode, done.stdout, done.stderr) == (7, "['status.py', '--optim']\n", "")


@POSIX
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV, signal.SIGINT], ids=str)
def test_who_waits_sees_the_signal_that_the_command_ended_by(number, run):
    assert run("sh", "-c", f"kill -{int(number)} $$").returncode == -number


@POSIX
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP], ids=str)
def test_a_signal_is_passed_on_and_the_answer_is_the_commands(number, tmp_path):
    script = f"trap 'echo got; exit 5' {int(number)}; echo ready; while :; do sleep 0.05; done"
    command = [sys.executable, "-m", "sketch_plugins", "run", "sh", "-c", script]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True) as running:
        assert running.stdout.readline() == "ready\n"
        running.send_signal(number)
        assert running.stdout.read() == "got\n"
        assert running.wait(60) == 5


@POSIX
def test_a_signal_at_once_ends_the_command_too(tmp_path):
    """The signal comes when the command has just started: no process is left behind."""
    (tmp_path / "early.py").write_text(
        "import os, signal, subprocess, sys\n"
        "from sketch_plugins.running import command\n"
        "class Early(subprocess.Popen):\n"
        "    def __init__(self, *args, **kwargs):\n"
        "        super().__init__(*args, **kwargs)\n"
        "        print(self.pid, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "command.subprocess.Popen = Early\n"
        "sys.exit(command._run_command(['sleep', '60'], None))\n"
    )
    done = subprocess.run([sys.executable, "early.py"], cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert done.returncode == -signal.SIGTERM, done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


@POSIX
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_a_script_gets_its_signals_itself(number, tmp_path):
    (tmp_path / "script.py").write_text(
        "import signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(6))\n"
        "print('ready', flush=True)\n"
        "while True:\n    time.sleep(0.05)\n"
    )
    command = [sys.executable, "-m", "sketch_plugins", "run", "script.py"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "ready\n"
        running.send_signal(number)
        assert running.wait(60) == 6


@POSIX
def test_a_script_comes_before_a_command_and_a_command_before_a_folder(run, write, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    executable(folder / "thing", "#!/bin/sh\necho command\n")
    (tmp_path / "thing").mkdir()  # the sources of the thing, say
    assert run("thing", env=on_path(folder)).stdout == "command\n"
    write("thing/__main__.py", "print('folder')")
    assert run("thing", env=on_path(folder)).stdout == "folder\n"
    (tmp_path / "thing" / "__main__.py").unlink()
    (tmp_path / "thing").rmdir()
    write("thing", "print('script')")
    assert run("thing", env=on_path(folder)).stdout == "script\n"


@POSIX
def test_which_files_this_python_executes(tmp_path):
    own, other = Path(sys.executable).parent, tmp_path / "other" / "bin"
    first_lines = {
        f"#!{own}/python3.11": (False, False),
        f"#!{other}/python3": (True, False),  # as a command of another environment; by its path it is a script
        "#!/usr/bin/env python3": (False, False),
        f"#!{own}/python -I": (False, False),
        "#!/usr/bin/env -S python -I": (True, True),
        "#!/bin/bash": (True, True),
        f"#!/bin/sh\n'''exec' {own}/python \"$0\" \"$@\"\n' '''": (False, False),
        f"#!/bin/sh\n'''exec' \"{other}/a b/python\" \"$0\" \"$@\"\n' '''": (True, False),
        "#!": (True, True),
        "import sys": (False, False),
        "": (False, False),
    }
    for line, expected in first_lines.items():
        path = str(executable(tmp_path / "command", f"{line}\nprint()\n"))
        assert (_is_foreign(path, True), _is_foreign(path, False)) == expected, line
    (tmp_path / "command").chmod(0o644)
    assert not _is_foreign(path, True)  # only a Python can execute it
    assert _is_foreign(os.path.realpath(sys.executable), False)


def test_a_package_without_main_is_named_with_its_commands(run):
    done = run("-m", "torch")
    assert done.returncode == 1
    assert "'torch' is a package without __main__, so it cannot be executed" in done.stderr
    assert "Run its command instead: sketch-plugins run torchfrtrace or torchrun" in done.stderr


def test_nothing_is_found(run):
    done = run("no-such-command", "x")
    assert done.returncode == 127 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "no command 'no-such-command'" in line and "sketch-plugins run -m no-such-command" in line

"""The command line as a whole: version, help with examples, exit statuses, colours, completion."""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sketch_plugins import CSAdam, __version__, cli

ROOT = Path(__file__).parents[1]
COMMANDS = ["run", "plan", "report", "convert", "reshard", "info", "check", "completion"]


def said(*words, **env):
    """stdout of the command in a process of its own."""
    ran = subprocess.run(
        [sys.executable, "-m", "sketch_plugins", *words],
        capture_output=True,
        text=True,
        check=True,
        env={**{k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}, **env},
    )
    return ran.stdout


def test_the_version():
    assert said("--version").strip() == f"sketch-plugins {__version__}"


def test_every_command_is_listed_and_documented():
    assert list(cli._commands(cli.parser())) == COMMANDS
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| [^|]*\| [^|]*\|$", page.partition("## Exit status")[0], re.MULTILINE) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_describes_every_option(command):
    parser = cli._commands(cli.parser())[command]
    assert parser.description and len(parser.description) > 40
    for action in parser._actions:
        assert action.help, f"{command} {action.dest} has no help"
    if command != "info":
        assert parser.epilog and parser.epilog.startswith("example")


def test_the_examples_of_the_help_are_commands_that_parse():
    whole = cli.parser()
    texts = [cli.EXAMPLES, *(one.epilog or "" for one in cli._commands(whole).values())]
    lines = re.findall(
        r"^ +sketch-plugins (.*?)(?: {2,}.*| >.*)?$", re.sub(r" \\\n *", " ", "\n".join(texts)), re.MULTILINE
    )
    assert len(lines) > 15
    for line in lines:
        assert isinstance(whole.parse_args(line.split()), argparse.Namespace), line


def test_no_color_is_respected():
    pytest.importorskip("rich_argparse", reason="rich-argparse is not installed: without it help has no colours")
    assert "\x1b[" in said("--help", FORCE_COLOR="1")
    assert "\x1b[" not in said("--help", FORCE_COLOR="1", NO_COLOR="1")
    assert "\x1b[" not in said("--help")  # a pipe


def test_help_without_rich_argparse(monkeypatch, capsys):
    """With torch and no other package, `check` works, and so does help."""
    monkeypatch.setitem(sys.modules, "rich_argparse", None)
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "exit status:" in shown and "examples:" in shown


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completion(shell):
    pytest.importorskip("shtab", reason="shtab is not installed")
    script = said("completion", shell)
    for word in (*COMMANDS, *(() if shell == "tcsh" else ("--gpu-memory", "--optim-args"))):
        assert word in script
    if shell == "bash" and shutil.which("bash"):
        # bash reads it, and completes.
        asked = (
            f"{script}\nCOMP_WORDS=(sketch-plugins pl); COMP_CWORD=1\n"
            'f=$(complete -p sketch-plugins | sed "s/.*-F \\([^ ]*\\).*/\\1/"); $f; echo "${COMPREPLY[@]}"'
        )
        ran = subprocess.run(["bash", "-c", asked], capture_output=True, text=True)
        assert ran.stdout.split() == ["plan"], ran.stderr


def test_completion_without_shtab(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "pip install shtab" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["report", "nothing-here"], 2),
        (["convert", "nothing-here", "--optim", "cs_adam"], 1),
        (["reshard", "nothing-here", "--world-size", "2"], 1),
        (["plan", "--model", "gpt2", "--batch-size", "0"], 2),
        (["check", "--device", "abacus"], 2),
    ],
    ids=lambda one: one if isinstance(one, int) else one[0],
)
def test_exit_statuses(words, status, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == status
    assert f"sketch-plugins {words[0]}" in capsys.readouterr().err


def test_exit_status_of_a_program_that_does_not_exist(tmp_path):
    """In a process of its own: `run` sets environment variables, which children of later tests would inherit."""
    command = [sys.executable, "-m", "sketch_plugins", "run", "no-such-program-here"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 127 and "sketch-plugins run" in done.stderr


def through(words, shell, folder):
    """The command with a redirection of the shell; the shell's PIPESTATUS is printed."""
    line = f"{sys.executable} -m sketch_plugins {words} {shell}; echo status ${{PIPESTATUS[0]}} >&2"
    done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, timeout=120)
    *said, status = done.stderr.splitlines()
    return int(status.removeprefix("status ")), said


@pytest.mark.skipif(shutil.which("bash") is None or not Path("/dev/full").exists(), reason="needs bash and /dev/full")
@pytest.mark.parametrize(
    "words", ["--help", "report --help", "completion bash", "report run.pt", "report --json run.pt"]
)
def test_output_that_cannot_be_written(words, tmp_path):
    """Nothing is said of a reader that has ended, and a line of a full disk. A closed stdout is the user's wish."""
    if words.startswith("completion"):
        pytest.importorskip("shtab", reason="shtab is not installed")
    if words.endswith("run.pt"):
        p = torch.nn.Parameter(torch.ones(4, 4))
        p.grad = torch.ones(4, 4)
        optimizer = CSAdam([p])
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "run.pt")
    assert through(words, "| true", tmp_path) == (1, [])
    status, said = through(words, "> /dev/full", tmp_path)
    assert status == 1 and len(said) == 1
    assert said[0].startswith("sketch-plugins: the output cannot be written: [Errno 28]")
    assert through(words, ">&-", tmp_path) == (0, [])


@pytest.mark.skipif(os.name != "posix", reason="file descriptors of POSIX")
def test_a_program_under_run_has_the_stdout_that_it_has_under_python(tmp_path):
    (tmp_path / "look.py").write_text(
        "import os, sys\nprint(type(sys.stdout).__name__, os.open('x', 64), file=sys.stderr)"
    )
    for closed in ("", ">&-"):
        said = [
            subprocess.run(["sh", "-c", f"{sys.executable} {way} look.py {closed}"], cwd=tmp_path, capture_output=True)
            for way in ("", "-m sketch_plugins run")
        ]
        assert said[0].stderr == said[1].stderr and said[0].returncode == said[1].returncode == 0

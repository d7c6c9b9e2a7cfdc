"""Every shell command of the pages is run as it is written (runs.py), or is listed with a reason (listed.py).

test_long_commands.py runs those that take many seconds.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 reads no TOML by itself")

sys.path.insert(0, str(Path(__file__).parent))

from commands import READ, Command, commands, inline, lines, unmarked
from listed import LISTED, REASONS
from pages import ROOT, named
from runs import RUNS

from sketch_plugins import cli

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the pages' commands are for a Unix shell")


FOUND = commands()


def by_rule(text):
    """Whether a command is checked by a rule: make's targets, and the extras that pip installs."""
    return text.startswith(("make ", "pip "))


def test_every_command_is_run_or_listed():
    entries = {*RUNS, *LISTED}
    new = [
        f"{', '.join(command.pages)}: {command.text}"
        for command in FOUND
        if command.text not in entries and not by_rule(command.text)
    ]
    assert not new, (
        "pages have commands that are neither run nor listed. Add them to RUNS in tests/docs/runs.py, with what is in "
        "their folder (tests/docs/scenes.py) and what they print. If one cannot be run here, add it to LISTED in "
        f"tests/docs/listed.py with one of the reasons {', '.join(REASONS)}: {new}"
    )
    gone = sorted(entries - {command.text for command in FOUND})
    assert not gone, f"no page has these commands any more; remove them from tests/docs: {gone}"
    assert not {*RUNS} & {*LISTED}, "a command that is run needs no reason"


@pytest.mark.parametrize("text", [text for text, run in RUNS.items() if not run.long])
def test_a_command_runs(text, run):
    run(text, RUNS[text])


@pytest.mark.parametrize("text", [command.text for command in FOUND if command.text.startswith("make ")])
def test_what_make_would_do(text):
    """make reads the target, and prints its commands in place of running them. It would ignore an unknown variable."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    said = subprocess.run(["make", "-n", *shlex.split(text)[1:]], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.strip(), said.stderr
    variables = set(re.findall(r"\b([A-Z_]+)=", text))
    known = set(re.findall(r"\$\((\w+)\)|^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert variables <= {one or other for one, other in known}, f"{text}: the Makefile does not read all of {variables}"


def test_every_target_of_make_that_is_named_exists():
    for page in READ:
        asked = set(re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8")))
        assert asked <= targets(), f"{named(page)}: make {sorted(asked - targets())}"


def targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("text", [command.text for command in FOUND if command.text.startswith("pip ")])
def test_what_pip_installs_exists(text):
    """This package is in no index: it is installed from the clone."""
    package = re.fullmatch(r"pip install (?:-e )?\"?\.(?:\[([\w,]+)\])?\"?", text)
    assert package, f'{text}: a page installs this package by its folder, as in: pip install ".[cpu]"'
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*filter(None, (package[1] or "").split(","))} <= {*extras}


@pytest.mark.parametrize("text", LISTED)
def test_what_is_listed_is_run_elsewhere(text):
    reason, by = LISTED[text]
    assert reason in REASONS, f"{text}: the reasons are {', '.join(REASONS)}"
    assert by, f"{text}: what runs the like of it?"
    if by.startswith("make "):
        assert by.removeprefix("make ") in targets(), f"{text}: the Makefile has no target {by!r}"
        return
    path, _, function = by.partition("::")
    assert re.search(rf"^def {function}\(", (ROOT / path).read_text(), re.MULTILINE), f"{text}: there is no {by}"
    assert (reason == "make clients") == path.startswith("tests/clients/")


@pytest.mark.parametrize("text", [text for text in LISTED if re.search(r"\bsketch[-_]plugins ", text)])
def test_what_is_listed_has_options_that_exist(text, capsys):
    words = shlex.split(re.split(r"\bsketch[-_]plugins ", text, maxsplit=1)[1])
    try:
        cli.parser().parse_args(words)
    except SystemExit:
        pytest.fail(f"{text}\n{capsys.readouterr().err}", pytrace=False)


@pytest.mark.parametrize("script", sorted({*re.findall(r"\b(?:examples|benchmarks)/\w+\.py", "\n".join(LISTED))}))
def test_a_script_that_is_listed_has_its_options(script, shell, tmp_path):
    """Those that follow it; its help is printed by the script itself, so its imports work, too."""
    (tmp_path / "clone").symlink_to(ROOT)
    ran = shell(f"python clone/{script} --help", tmp_path)
    assert ran.status == 0, ran.output[-4000:]
    for text in LISTED:
        _, here, rest = text.partition(script)
        options = [word.partition("=")[0] for word in shlex.split(rest) if word.startswith("--")]
        absent = [option for option in options if not re.search(rf"{option}\b(?!-)", ran.output)]
        assert not here or not absent, f"{text}: {script} has no {', '.join(absent)}"


@pytest.mark.parametrize("text", [text for text in LISTED if "examples/" in text or "benchmarks/" in text])
def test_files_of_what_is_listed_exist(text):
    for word in re.findall(r"\b(?:examples|benchmarks)/[\w./]+", text):
        assert (ROOT / word).is_file(), f"{text}: there is no {word}"


@pytest.mark.parametrize("page", READ, ids=named)
def test_commands_are_in_blocks_of_a_shell(page):
    """A command in another block would not be found."""
    found = unmarked(page.read_text(encoding="utf-8"))
    assert not found, f"{named(page)}: put these into a block that begins with ```sh: {found}"


def test_commands_are_found():
    text = (
        "`sketch-plugins report FILE`,\n`sketch-plugins  info`; `sketch-plugins run` is a name, `python` is, too.\n"
        "\n```sh\n$ one --a \\\n    --b   # why\n\n# a comment\nA=1 two ...\n```\n"
        "\n```\nmake test\nanything\n```\n\n    pip install x\n    output of it\n"
    )
    assert [*inline(text)] == ["sketch-plugins report FILE", "sketch-plugins info"]
    assert [*lines("one --a \\\n    --b   # why\n\n# a comment\n$ A=1 two ...\n")] == ["one --a --b", "A=1 two"]
    assert unmarked(text) == ["make test", "pip install x"]
    assert len(FOUND) > 80 and all(isinstance(one, Command) and one.pages for one in FOUND)

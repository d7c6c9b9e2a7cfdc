"""Runs a page's command in a folder of its own, and checks what it prints and writes."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from pages import ROOT, blocks

#: docs/versions.md: figures of the pages are from this version of torch.
FIGURES = "2.13."


@pytest.fixture(scope="module")
def shell():
    from shell import Shell

    made = Shell()
    yield made
    made.end()


@pytest.fixture
def run(shell, tmp_path):
    """``run(text, Run(...))``: the command of a page, as it is written there."""
    from runs import filled

    def command_runs(text, expected):
        for package in expected.scene.needs:
            if importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed")
        (tmp_path / "home").mkdir()
        (tmp_path / "examples").symlink_to(ROOT / "examples")  # the folder is a reader's clone of this repository
        for name, source in expected.scene.files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(source)
        for command in expected.scene.before:
            printed(shell(command, tmp_path), command)
        for command in filled(text):
            output = printed(shell(command, tmp_path), command)
            for said in expected.said:
                assert re.search(said, output, re.MULTILINE), f"{command} does not print {said}:\n{output[-4000:]}"
            if expected.shown:
                is_as_shown(output, ROOT / expected.shown)
        for name in expected.writes:
            assert (tmp_path / name).stat().st_size > 0

    return command_runs


def printed(ran, command):
    """The output of a command that has ended without error."""
    assert ran.status == 0, f"{command} ends with status {ran.status}:\n{ran.output[-4000:]}"
    return ran.output


def is_as_shown(output, page):
    """A page's copy of an output may leave out lines; widths of columns may differ."""
    import torch

    first = output.splitlines()[0]
    (copy,) = [code for _, _, code in blocks(page, "") if code.splitlines()[0] == first]
    if not torch.__version__.startswith(FIGURES):
        return
    lines = {squeezed(line) for line in output.splitlines()}
    changed = [line for line in copy.splitlines() if not re.search("[━─]", line) and squeezed(line) not in lines]
    assert not changed, f"{page.name} shows lines that the command does not print:\n{changed}\n{output}"


def squeezed(line):
    return " ".join(line.split())

"""docs/extending.md: its code, put into a copy of the package as the page says, does what the page says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n# (?P<head>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
HEADINGS = ["A store", "An optimizer", "A framework"]


def sections():
    """Heading -> its blocks: (first line, code)."""
    text = (ROOT / "docs" / "extending.md").read_text()
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    return {
        heading: [(block["head"], block["code"]) for block in BLOCK.finditer(body)]
        for heading, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def test_every_block_says_where_it_goes():
    found = sections()
    assert list(found) == HEADINGS
    text = (ROOT / "docs" / "extending.md").read_text()
    assert sum(map(len, found.values())) == text.count("```python")
    for blocks in found.values():
        assert sum(head == "to be tried" for head, _ in blocks) == 1


@pytest.mark.parametrize("heading", HEADINGS)
def test_the_page_s_code_works_as_it_stands_there(heading, tmp_path):
    shutil.copytree(ROOT / "sketch_plugins", tmp_path / "sketch_plugins", ignore=shutil.ignore_patterns("__pycache__"))
    tried = ""
    for head, code in sections()[heading]:
        if head == "to be tried":
            tried = code
        elif head.startswith("new file: "):
            file = tmp_path / head.removeprefix("new file: ")
            assert not file.exists()
            file.parent.mkdir(exist_ok=True)
            file.write_text(code)
        else:
            name, line = re.fullmatch(r"in (\S+), after: (.*)", head).groups()
            file = tmp_path / name
            before, there, after = file.read_text().partition(f"\n{line}\n")
            assert there, f"{name} has no line {line!r}"
            file.write_text(before + there + code + after)
    (tmp_path / "tried.py").write_text(tried)
    path = os.pathsep.join([str(tmp_path), str(ROOT / "integrations")])
    # `run` registers the integrations of installed frameworks, like a user's command.
    command = [sys.executable, "-m", "sketch_plugins", "run", "tried.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]

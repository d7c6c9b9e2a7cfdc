"""The commands of docs/quickstart.md, as they are written there, in their order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)(?: title=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(script: str, folder: Path) -> str:
    """A block of commands in a shell, which ends at the first that fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": "140"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, f"{script}\n{ended.stdout}"
    return ended.stdout


@pytest.mark.skipif(os.name == "nt", reason="the page's commands are for a Unix shell")
def test_every_command_of_the_page(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    said = []
    for language, title, text in BLOCK.findall((ROOT / "docs" / "quickstart.md").read_text()):
        if language == "python":
            assert title, f"code without a file to write it to:\n{text}"
            (tmp_path / title).write_text(text)
        elif "SKETCH_PLUGINS_QUICKSTART_INSTALL" not in os.environ:
            # Installing is a step of its own in .ci/run, in an environment of its own; here the one at hand is used.
            lines = [line for line in text.splitlines() if not line.startswith(("python3 -m venv", "pip install"))]
            said.append(run("\n".join(lines), tmp_path))
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert len(said) == 4 and "cs_adam" in said[0]
    sizes = dict(re.findall(r"^(\w+): a batch of (\d+)$", said[2], re.MULTILINE))
    adamw, ours, layerwise = (int(sizes[name]) for name in ("adamw_torch_fused", "cs_adam", "cs_adam_layerwise"))
    assert 1.4 * adamw < ours and 2 * adamw < layerwise, sizes
    assert "exp_avg_sq" in said[3] and "second_moment" in said[3].replace(" ", "_")

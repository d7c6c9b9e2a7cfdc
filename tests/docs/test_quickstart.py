"""The commands of docs/quickstart.md, as they are written there, in their order.

With QUICKSTART_INSTALL=1, as in .ci/run, in a copy of this repository and into an environment of its own; with
QUICKSTART_INSTALL=0 in the environment at hand, without the commands that install. Without either it is skipped: what
the commands do has tests of its own (tests/memory/test_plan.py, tests/transformers/test_reclaim.py,
tests/checkpoints/test_report.py).
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)(?: title=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INSTALLS = ("python3 -m venv", "pip install")
ASKED = os.environ.get("QUICKSTART_INSTALL", "")
WHOLE = ASKED not in ("", "0")


def page_as_a_script(install: bool) -> str:
    """The page's blocks in one shell, so that an activated environment stays; a marker before each."""
    lines = []
    for number, (language, title, text) in enumerate(
        BLOCK.findall((ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8"))
    ):
        if language == "python":
            assert title, f"code without a file to write it to:\n{text}"
            lines.append(f"cat > {title} <<'END OF THE FILE'\n{text}END OF THE FILE")
            continue
        lines.append(f"echo '@@@ {number}'")
        lines += [line for line in text.splitlines() if install or not line.startswith(INSTALLS)]
    return "\n".join(lines)


@pytest.mark.skipif(not ASKED, reason="QUICKSTART_INSTALL is not set: 1 installs into an environment of its own, 0 not")
@pytest.mark.skipif(os.name == "nt", reason="the page's commands are for a Unix shell")
def test_every_command_of_the_page(tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folder, environment = tmp_path, {**os.environ, "COLUMNS": "140"}
    if WHOLE:
        folder = tmp_path / "clone"
        unwanted = shutil.ignore_patterns(".*", "build", "dist", "*_out", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=unwanted)
        (tmp_path / "constraints.txt").write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
        environment["PIP_CONSTRAINT"] = str(tmp_path / "constraints.txt")  # the build that is here, whatever is newest
        environment.pop("PYTHONPATH", None)
    else:
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", page_as_a_script(WHOLE)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
    )
    assert ended.returncode == 0, ended.stdout
    installed, plan, runs, reports = re.split(r"^@@@ \d+$", ended.stdout, flags=re.MULTILINE)[1:]
    assert "cs_adam" in installed
    rows = {row[1].strip(): int(row[-2]) for line in plan.splitlines() if len(row := re.split("[│|]", line)) > 8}
    assert rows["adamw"] < rows["cs_adam"], plan
    assert (folder / "plan.png").stat().st_size > 10_000
    sizes = {name: int(size) for name, size in re.findall(r"^(\w+): a batch of (\d+)$", runs, re.MULTILINE)}
    assert 1.4 * sizes["adamw_torch_fused"] < sizes["cs_adam"], runs
    assert 2 * sizes["adamw_torch_fused"] < sizes["cs_adam_layerwise"], runs
    assert "exp_avg_sq" in reports and "second_moment" in reports
